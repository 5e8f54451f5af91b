"""The box follows the signed library: real signatures, a real agent, the real check; whatever is wrong, the model at work stays."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.core.settings import Settings
from appliance.lifecycle import exchange
from appliance.lifecycle.exchange import Exchange
from appliance.lifecycle.journal_queries import reason_of
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.store.store import Store
from model_sync.library.usb_export import export
from tests.support.activation_box import LINE, Box, finish_with, looping
from tests.support.binding_gate import write_gate
from tests.support.clinic import Clinic, open_clinic
from tests.support.library_site import make_site, older_publish, tiny_bundle
from tests.support.scans import scan_bytes

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@pytest.fixture
def clinic(tmp_path: Path, settings: Settings) -> Iterator[Clinic]:
    """A box that runs version 1.0.0 of the library's line."""
    with open_clinic(tmp_path, settings) as made:
        yield made


def test_a_signed_version_comes_is_proven_and_reported(clinic: Clinic) -> None:
    digest = clinic.release("1.1.0")
    clinic.follow()
    assert (clinic.box.last(), clinic.box.active()) == (("trial", ""), digest)
    row = clinic.box.journal.history(1)[0]
    assert (row["source"], row["actor"]) == ("library", "model-sync")
    report = clinic.report()
    assert [(item["version"], item["state"]) for item in report["models"]] == [("1.1.0", "active"), ("1.0.0", "previous")]
    assert [(item["version"], item["state"], item["code"]) for item in report["activations"]] == [
        ("1.1.0", "trial", None),
        ("1.0.0", "good", None),
    ]
    assert (clinic.exchange / "box-report.json").stat().st_mode & 0o777 == 0o640
    clinic.settle()
    assert len(clinic.box.journal.history()) == 2  # a directive that is met is not met again


def test_r18_the_report_says_nothing_of_a_patient(clinic: Clinic) -> None:
    from appliance.core.domain import Source
    from appliance.ingest.ingest import Ingest

    canary = "CANARY-7391"
    data = scan_bytes(PatientID=canary, PatientName=canary, AccessionNumber=canary, StudyInstanceUID="1.2.7391.1")
    accepted = Ingest(clinic.box.store).accept(data, Source("upload", canary, canary))
    clinic.box.store.planner.close_series([accepted.stored.series_id])
    clinic.box.work()
    clinic.settle()
    raw = (clinic.exchange / "box-report.json").read_text()
    assert "7391" not in raw
    assert clinic.report()["health"]["analysed_24h"] == 1
    with_canary = [row["entry"] for row in clinic.box.store.database.query("SELECT entry FROM audit")]
    assert any(canary in entry for entry in with_canary)  # the canary was really there


def test_a_version_withdrawn_by_the_library_is_switched_off(clinic: Clinic) -> None:
    old, digest = clinic.box.active(), clinic.release("1.1.0")
    clinic.follow()
    assert clinic.box.active() == digest
    clinic.site.withdraw(LINE, "1.1.0", "误报过多")
    clinic.site.rollout("stable", LINE, "1.0.0")
    clinic.follow()
    assert clinic.box.active() == old
    states = [(row["version"], row["state"]) for row in clinic.box.journal.history()]
    assert states == [("1.1.0", "withdrawn"), ("1.0.0", "good")]
    assert reason_of(clinic.box.journal.history(1)[0]) == Note("model.withdrawn", "误报过多")
    assert clinic.report()["activations"][0]["code"] == "model.withdrawn"


def test_anti_rollback_by_directive_and_by_hand(clinic: Clinic) -> None:
    older = clinic.box.active()
    digest = clinic.release("1.1.0", minimum_version="1.1.0")
    clinic.follow()
    assert clinic.box.active() == digest
    clinic.direct(version="1.0.0", digest=str(older))
    clinic.settle()
    assert (clinic.box.last(), clinic.box.active()) == (("failed", "model.below_minimum"), digest)
    with pytest.raises(ActivationError, match=r"model\.below_minimum"):
        activate(clinic.box.store, clinic.box.bundles / "cxr-pneumonia-1.0.0", "test")
    with pytest.raises(ActivationError, match=r"model\.below_minimum"):
        activate(clinic.box.store, reference_bundle(), "test")  # the one that came with the box is no exception


def test_an_unsigned_bundle_is_refused_by_hand_and_a_signed_one_is_not(clinic: Clinic) -> None:
    kept = clinic.box.active()
    with pytest.raises(ActivationError, match=r"model\.not_signed") as caught:
        activate(clinic.box.store, clinic.box.bundle("6.6.6"), "test")
    assert caught.value.hint
    with pytest.raises(ActivationError, match=r"model\.mismatch"):
        activate(clinic.box.store, tiny_bundle(clinic.box.bundles / "other", "1.0.0", seed=9), "test")
    assert clinic.box.active() == kept
    clinic.site.publish(clinic.box.bundle("1.2.0"))
    clinic.agent.pull()
    digest = activate(clinic.box.store, clinic.box.bundles / "cxr-pneumonia-1.2.0", "test")
    assert (clinic.box.active(), clinic.box.last()) == (digest, ("trial", ""))
    clinic.settle()
    assert clinic.box.active() == digest  # a person's word holds until the library wants something new
    new = clinic.release("1.3.0")
    clinic.follow()
    assert clinic.box.active() == new


def test_without_an_exchange_directory_only_the_embedded_model_is_put_to_work(tmp_path: Path, settings: Settings) -> None:
    site = make_site(tmp_path / "library")
    box = Box(tmp_path, Store(settings.model_copy(update={"library_root": site.root})))
    with pytest.raises(ActivationError, match=r"model\.not_signed"):
        activate(box.store, box.bundle("1.0.0"), "test")
    activate(box.store, reference_bundle(), "test")
    assert box.last() == ("good", "")


@pytest.mark.skipif(FAKETIME is None, reason="needs Debian's faketime")
def test_metadata_that_expires_between_download_and_activation(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = clinic.box.active()
    slow = looping(clinic.box.bundle("1.1.0"), picture=50_000)
    write_gate(slow)  # it was measured with these weights
    clinic.release("1.1.0", slow)
    clinic.agent.pull()
    activator = clinic.box.activator()
    clinic.box.step_until(activator, lambda: clinic.box.journal.pending())
    number = clinic.box.journal.pending()
    assert number
    clinic.box.step_until(activator, lambda: clinic.box.state(number["id"]) == "self-test")
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))  # the check right before the switch sees the day after next year
    monkeypatch.setenv("FAKETIME", "+800d")
    clinic.box.step_until(activator, lambda: not clinic.box.under_way(number["id"]))
    activator.stop()
    assert (clinic.box.last(), clinic.box.active()) == (("failed", "trust.expired"), kept)
    clinic.settle()
    assert (clinic.box.last(), len(clinic.box.journal.history())) == (("failed", "trust.expired"), 2)
    monkeypatch.delenv("LD_PRELOAD")
    clinic.settle()
    assert clinic.box.last() == ("trial", "")  # nothing about the model itself was wrong


@pytest.mark.skipif(FAKETIME is None, reason="needs Debian's faketime")
def test_withdrawals_hold_when_the_metadata_has_expired(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.site.withdraw(LINE, "1.0.0", "x")
    clinic.agent.pull()
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME", "+800d")
    clinic.settle()
    assert clinic.box.active() is None
    assert clinic.box.last() == ("withdrawn", "model.withdrawn")


def damage_bundle(clinic: Clinic, digest: str) -> None:
    weights = next((clinic.exchange / "bundles" / digest).glob("*.onnx"))
    weights.chmod(0o644)
    weights.write_bytes(b"junk")


WRONG: dict[str, tuple[Callable[[Clinic, str], None], str]] = {
    "the bundle is not there": (lambda clinic, digest: shutil.rmtree(clinic.exchange / "bundles" / digest), "model.absent"),
    "the bundle is damaged": (damage_bundle, "model.invalid"),
    "another digest than was signed": (lambda clinic, _: clinic.direct(digest="a" * 64), "model.mismatch"),
    "a version nobody signed": (lambda clinic, _: clinic.direct(version="6.6.6"), "model.not_signed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wanted_but_wrong_changes_nothing_and_says_why(clinic: Clinic, name: str) -> None:
    kept, digest = clinic.box.active(), clinic.release("1.1.0")
    clinic.agent.pull()
    spoil, code = WRONG[name]
    spoil(clinic, digest)
    clinic.settle()
    clinic.settle()
    assert (clinic.box.last(), clinic.box.active()) == (("failed", code), kept)
    assert len(clinic.box.journal.history()) == 2  # said once, not with every look
    assert clinic.report()["activations"][0]["code"] == code


def garble(path: Path) -> None:
    path.unlink()
    path.write_text('{"signed": {}, "signatures": []}')


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("spoil", "code"), [(garble, "trust."), (pipe, "trust.unreadable"), (Path.unlink, "trust.missing")])
def test_metadata_that_cannot_be_trusted_keeps_the_model_and_raises_the_alarm(
    clinic: Clinic, spoil: Callable[[Path], None], code: str
) -> None:
    kept = clinic.box.active()
    clinic.release("1.1.0")
    clinic.agent.pull()
    spoil(clinic.exchange / "metadata" / "timestamp.json")
    clinic.settle()
    assert clinic.box.active() == kept
    assert clinic.box.last()[0] == "failed"
    assert clinic.box.last()[1].startswith(code)
    (alarm,) = clinic.audited("worker")
    assert (alarm["event"], alarm["outcome"]) == ("110113", 8)
    with pytest.raises(ActivationError, match=re.escape(code)):
        activate(clinic.box.store, clinic.box.bundles / "cxr-pneumonia-1.1.0", "test")


def test_a_check_that_takes_too_long_has_verified_nothing(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = clinic.box.active()
    clinic.release("1.1.0")
    clinic.agent.pull()
    monkeypatch.setattr(exchange, "CHECK_DEADLINE_S", 0.0)
    clinic.settle()
    assert (clinic.box.active(), clinic.box.last()) == (kept, ("failed", "trust.unchecked"))


JUNK = (b"", b"[]", b"{", b'{"schema": 2}', b"\xff" * 100, b'{"schema":1,"lines":{"../x":{}}}', b"[" * 100_000, b" " * (2 << 20))


def test_directives_that_cannot_be_understood_change_nothing(clinic: Clinic) -> None:
    kept = clinic.box.active()
    path = clinic.exchange / "directives.json"
    for junk in JUNK:
        path.unlink()
        path.write_bytes(junk)
        assert Exchange(clinic.box.store, clinic.exchange).directives() is None
    clinic.settle()
    assert (clinic.box.active(), clinic.box.last()) == (kept, ("good", ""))


def test_links_and_pipes_in_the_exchange_directory_are_not_followed(clinic: Clinic, tmp_path: Path) -> None:
    for name in ("directives.json", "sync-status.json"):
        (clinic.exchange / name).unlink()
        (clinic.exchange / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("{}")
    clinic.settle()
    for name in ("directives.json", "sync-status.json"):
        pipe(clinic.exchange / name)
    clinic.settle()
    assert clinic.box.last() == ("good", "")


def test_the_state_of_the_line_is_audited_once_per_change_and_unreachable_is_no_alarm(clinic: Clinic) -> None:
    def tell(state: str, code: str) -> None:
        path = clinic.exchange / "sync-status.json"
        path.unlink()
        path.write_text(json.dumps({"schema": 1, "state": state, "code": code}))
        clinic.settle()

    before = len(clinic.audited("model-sync"))
    for state, code in (
        ("unreachable", "sync.unreachable"), ("unreachable", "sync.unreachable"), ("downloading", ""), ("untrusted", "trust.signature"),
        ("untrusted", "trust.signature"), ("ok", "sync.ok"), ("waiting", "sync.window"),
    ):  # fmt: skip
        tell(state, code)
    entries = clinic.audited("model-sync")[before:]
    assert [(entry["detail"]["state"], entry["event"], entry["outcome"]) for entry in entries] == [
        ("unreachable", "110100", 4),
        ("ok", "110100", 0),
        ("untrusted", "110113", 8),
        ("ok", "110100", 0),
    ]


def test_a_version_from_a_usb_stick_is_one_like_any_other(clinic: Clinic, tmp_path: Path) -> None:
    digest = clinic.release("1.1.0")
    (tmp_path / "stick").mkdir()
    export(clinic.site.public, tmp_path / "stick")
    clinic.agent.client().import_usb(tmp_path / "stick")
    clinic.settle()
    assert (clinic.box.active(), clinic.box.last()) == (digest, ("trial", ""))
    assert clinic.box.journal.history(1)[0]["source"] == "usb"


def test_a_worker_follows_the_library_by_itself(clinic: Clinic) -> None:
    digest = clinic.release("1.1.0")
    clinic.agent.pull()
    assert finish_with(clinic.box.store.settings) == 0
    assert (clinic.box.active(), clinic.box.last()) == (digest, ("trial", ""))


def test_a_model_that_failed_here_is_not_tried_again_and_again(clinic: Clinic) -> None:
    kept = clinic.box.active()
    with older_publish():
        clinic.release("1.1.0", tiny_bundle(clinic.box.bundles, "1.1.0", good=False))
    for _ in range(3):
        clinic.follow()
    assert (clinic.box.last(), clinic.box.active()) == (("failed", "model.self_test"), kept)
    assert len(clinic.box.journal.history()) == 2
    assert clinic.report()["activations"][0] | {"at": ""} == {
        "line": LINE, "version": "1.1.0", "digest": clinic.box.journal.history(1)[0]["digest"], "state": "failed",
        "code": "model.self_test", "at": "",
    }  # fmt: skip
