"""An agent that was broken into, and signed documents that are odd: the box goes on reading, and learns what can be learnt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.domain import Note
from appliance.core.errors import ActivationError
from appliance.core.settings import Settings
from appliance.lifecycle import exchange
from appliance.lifecycle.exchange import Directives, Exchange
from appliance.lifecycle.journal import REFUSALS_PER_HOUR
from appliance.lifecycle.journal_queries import is_older, reason_of
from appliance.lifecycle.model_control import activate
from tests.support.activation_box import LINE, digest_of, finish_with, wanted
from tests.support.clinic import Clinic, open_clinic

OTHER = "bone-age"


@pytest.fixture
def clinic(tmp_path: Path, settings: Settings) -> Iterator[Clinic]:
    """A box that runs version 1.0.0 of one line; the library has another line as well."""
    with open_clinic(tmp_path, settings, (LINE, OTHER)) as made:
        yield made


def test_a_directive_whose_version_is_none_does_not_end_the_worker(clinic: Clinic) -> None:
    kept = clinic.box.active()
    for version in ("1.0.0-01", "1.0.0-a..b", "1.0.0+", "1.0.0-+", "1.٣.0", "1.0.0-" + "a" * 64):
        clinic.direct(version=version, digest="ab" * 32)
        clinic.settle()
    assert (clinic.box.active(), clinic.box.last()) == (kept, ("good", ""))
    assert finish_with(clinic.box.store.settings) == 0


def test_a_version_that_is_none_comes_before_all_others() -> None:
    assert is_older("1.0.0-01", "1.0.0-1")
    assert not is_older("1.0.0", "1.0.0-01")
    assert not is_older("x", "y")


def test_links_that_cannot_be_followed_do_not_end_the_worker(clinic: Clinic) -> None:
    kept = clinic.box.active()
    for name in ("bundles", "trust", "metadata"):
        (clinic.exchange / name).rename(clinic.exchange / f"aside-{name}")
        (clinic.exchange / name).symlink_to("x" * 300)  # ENAMETOOLONG, which pathlib does not take for absence
        clinic.direct(digest="ab" * 32)
        clinic.settle()
    assert clinic.box.active() == kept
    assert finish_with(clinic.box.store.settings) == 0


def test_what_nobody_foresaw_about_the_library_does_not_stop_the_reading(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(_exchange: Exchange) -> Directives:
        raise ZeroDivisionError("a fault of ours")

    kept = clinic.box.active()
    monkeypatch.setattr(Exchange, "directives", fault)
    activator = clinic.box.activator()
    clinic.box.step_until(activator, lambda: "the library cannot be followed" in caplog.text)
    number = clinic.box.journal.start(wanted(clinic.box.bundle("1.1.0"), source="embedded"))
    clinic.box.step_until(activator, lambda: clinic.box.state(number) == "trial")
    activator.stop()
    assert clinic.box.active() != kept


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another account")
def test_an_exchange_directory_that_the_box_may_not_read_does_not_end_the_worker(clinic: Clinic) -> None:
    settings = clinic.box.store.settings
    clinic.exchange.chmod(0o700)
    for path in (settings.data_dir, *settings.data_dir.rglob("*")):
        os.chown(path, 65534, 65534)
    for parent in settings.data_dir.parents[:-2]:  # down to what everybody may enter
        parent.chmod(0o755)
    account = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    line = [*account, sys.executable, "-m", "appliance", "worker", "--until-idle", "--data-dir", str(settings.data_dir)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 127:
        pytest.skip("this Python's shared library is not for other accounts")
    assert done.returncode == 0, done.stderr
    for path in (settings.data_dir, *settings.data_dir.rglob("*")):
        os.chown(path, 0, 0)


def test_a_withdrawal_in_chinese_is_learnt_whatever_the_locale(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.site.withdraw(LINE, "1.0.0", "漏诊气胸")
    clinic.agent.pull()
    # What a service gets from /etc/locale.conf on a Chinese system; the C locale where that one is not installed.
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0"), ("PYTHONIOENCODING", "gb18030")):
        monkeypatch.setenv(name, value)
    clinic.settle()
    assert clinic.box.active() is None
    assert reason_of(clinic.box.journal.history(1)[0]) == Note("model.withdrawn", "漏诊气胸")
    monkeypatch.delenv("PYTHONIOENCODING")
    clinic.release("1.1.0")
    clinic.follow()
    assert clinic.box.last() == ("good", "")  # the proof speaks as well


def test_an_answer_that_is_too_long_is_said_and_raises_the_alarm(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = clinic.box.active()
    monkeypatch.setattr(exchange, "_MAX_FACTS_BYTES", 100)
    clinic.release("1.1.0")
    clinic.follow()
    assert (clinic.box.active(), clinic.box.last()) == (kept, ("failed", "trust.unchecked"))
    assert [(entry["detail"]["code"], entry["outcome"]) for entry in clinic.audited("worker")] == [("trust.unchecked", 8)]


def test_nothing_that_the_agent_lays_keeps_the_report_waiting_or_leads_it_elsewhere(
    clinic: Clinic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report, prey = clinic.exchange / "box-report.json", tmp_path / "prey"
    prey.write_text("mine")
    os.mkfifo(clinic.exchange / f".box-report.json.{os.getpid()}")
    box = Exchange(clinic.box.store, clinic.exchange)
    for lay in (lambda: os.mkfifo(report), lambda: report.symlink_to(prey), lambda: report.symlink_to("/dev/full")):
        report.unlink()
        lay()
        box.write_report()
        assert clinic.report()["models"]
        assert not report.is_symlink()
    report.unlink()
    report.mkdir()
    for _ in range(3):
        box.write_report()  # it cannot take the place of a directory
    report.rmdir()
    box.write_report()
    assert clinic.report()["models"]
    assert prey.read_text() == "mine"
    assert caplog.text.count("the report to the sync agent cannot be written") == 1
    assert not [path for path in clinic.exchange.iterdir() if path.name.startswith(".box-report")]
    with_pipe = clinic.exchange.with_name("pipe")
    os.mkfifo(with_pipe)
    Exchange(clinic.box.store, with_pipe).write_report()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another account")
def test_an_agent_of_another_account_can_read_the_report_and_nobody_else(clinic: Clinic) -> None:
    agent, stranger = 65534, 65533
    os.chown(clinic.exchange, agent, agent)
    for parent in (clinic.exchange, *clinic.exchange.parents[:-2]):  # down to what everybody may enter
        parent.chmod(0o755)
    Exchange(clinic.box.store, clinic.exchange).write_report()
    for account, code in ((agent, 0), (stranger, 1)):
        line = ["setpriv", f"--reuid={account}", f"--regid={account}", "--clear-groups", "cat", str(clinic.exchange / "box-report.json")]
        assert subprocess.run(line, capture_output=True, check=False).returncode == code
    os.chown(clinic.exchange, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another account")
def test_a_group_without_a_number_here_keeps_no_report_from_being_written(clinic: Clinic) -> None:
    """In a user namespace, as of a container without root: the directory's group is not mapped, and cannot be given (EINVAL)."""
    apart = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    os.chown(clinic.exchange, 0, 65533)
    code = (
        "import sys, pathlib; from appliance.lifecycle.exchange import _write_file;"
        " _write_file(pathlib.Path(sys.argv[1]), 'box-report.json', b'{}')"
    )
    done = subprocess.run([*apart, sys.executable, "-c", code, str(clinic.exchange)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (clinic.exchange / "box-report.json").read_text() == "{}"
    os.chown(clinic.exchange, 0, 0)


def test_however_many_names_lie_there_a_look_costs_the_same(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(str(path)) or real(path))
    flooded = clinic.exchange / "documents" / "models"
    for number in range(3000):
        (flooded / str(number)).touch()
        (clinic.exchange / f".box-report.json.{number}").touch()
    box = Exchange(clinic.box.store, clinic.exchange)
    assert len(list(clinic.exchange.glob(".box-report.json.*"))) >= 1900
    looked.clear()
    before = box.version()
    assert looked == []
    assert len(before) == 7
    clinic.release("1.1.0")
    clinic.agent.pull()
    assert box.version() != before


def test_invented_wishes_neither_fill_the_journal_nor_keep_the_scans_waiting(clinic: Clinic) -> None:
    before = len(clinic.box.journal.history(1000))
    path = clinic.exchange / "directives.json"
    invented = {f"l{number:06d}": {"version": "1.0.0", "digest": f"{number:064x}", "source": "usb"} for number in range(8000)}
    path.unlink()
    path.write_text(json.dumps({"schema": 1, "lines": invented}))
    clinic.settle()
    assert len(clinic.box.journal.history(1000)) == before
    for number in range(REFUSALS_PER_HOUR + 2):
        path.unlink()
        one = {"version": f"7.{number}.0", "digest": f"{number:064x}", "source": "usb"}
        path.write_text(json.dumps({"schema": 1, "lines": {LINE: one, OTHER: one}}))
        clinic.settle()
    written = clinic.box.journal.history(1000)[: -before or None]
    assert len(written) == 2 * REFUSALS_PER_HOUR
    digest = clinic.release("1.1.0")
    clinic.follow()
    assert clinic.box.active() == digest  # a real one comes all the same


def test_a_check_that_died_is_asked_again_without_the_agent(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic.site.withdraw(LINE, "1.0.0", "x")
    clinic.agent.pull()
    ahead = 0.0
    activator = clinic.box.activator(clock=lambda: time.monotonic() + ahead)
    with monkeypatch.context() as killed:
        killed.setattr(exchange, "_MAX_FACTS_BYTES", 0)  # as by the OOM killer: nothing of it is heard
        clinic.box.settle(activator)
    assert clinic.box.active_digest_is(clinic.box.journal.history(1)[0]["digest"])
    ahead += 9.0
    assert not activator.is_busy
    ahead += 2.0
    assert activator.is_busy
    clinic.box.settle(activator)
    assert clinic.box.active() is None
    assert [entry["detail"]["code"] for entry in clinic.audited("worker")] == ["trust.unchecked", ""]
    assert not activator.is_busy
    ahead += 3601.0
    assert activator.is_busy  # now and then in any case
    activator.stop()


def test_an_older_set_laid_by_a_broken_agent_brings_nothing_new_and_takes_nothing_back(clinic: Clinic, tmp_path: Path) -> None:
    clinic.site.publish(clinic.box.bundle("1.1.0"))
    clinic.agent.pull()
    shutil.copytree((clinic.exchange / "trust").resolve(), clinic.exchange / "old")
    digest = clinic.release("1.2.0", minimum_version="1.0.0")
    clinic.site.withdraw(LINE, "1.0.0", "x")
    clinic.follow()
    assert clinic.box.active() == digest
    for name in ("trust", "metadata", "documents"):
        (clinic.exchange / name).unlink()
    for name, target in (("trust", "old"), ("metadata", "old/metadata"), ("documents", "old/documents")):
        (clinic.exchange / name).symlink_to(target)
    (clinic.exchange / "floor.json").unlink()
    clinic.direct(version="1.1.0", digest=digest_of(clinic.box.bundles / f"{LINE}-1.1.0"))
    shutil.copytree(clinic.box.bundles / f"{LINE}-1.1.0", clinic.exchange / "bundles" / digest_of(clinic.box.bundles / f"{LINE}-1.1.0"))
    clinic.settle()
    assert (clinic.box.active(), clinic.box.last()) == (digest, ("failed", "trust.rollback"))
    assert clinic.box.journal.find_restriction(LINE, "1.0.0")
    assert [(entry["detail"], entry["outcome"]) for entry in clinic.audited("worker")] == [({"code": "trust.rollback", "line": LINE}, 8)]


def test_what_was_learnt_holds_when_the_facts_of_a_line_vanish(clinic: Clinic) -> None:
    clinic.site.withdraw(LINE, "1.0.0", "x")
    clinic.follow()
    assert clinic.box.active() is None
    revoked = clinic.exchange / "documents" / "models" / LINE / "line.json"
    revoked.unlink()
    clinic.settle()
    assert clinic.box.active() is None
    assert clinic.box.journal.find_restriction(LINE, "1.0.0")
    with pytest.raises(ActivationError, match=r"model\.withdrawn"):
        activate(clinic.box.store, clinic.box.bundles / f"{LINE}-1.0.0", "test")


def test_an_agent_that_flaps_does_not_fill_the_audit(clinic: Clinic) -> None:
    ahead = 0.0
    activator = clinic.box.activator(clock=lambda: time.monotonic() + ahead)
    clinic.box.settle(activator)
    before = len(clinic.audited("model-sync"))
    path = clinic.exchange / "sync-status.json"
    for number in range(20):
        path.unlink()
        path.write_text(json.dumps({"schema": 1, "state": "untrusted", "code": f"trust.x{number}"}))
        ahead += 2.0
        activator.tick()
    assert len(clinic.audited("model-sync")) == before + 1
    ahead += 61.0
    activator.tick()
    assert clinic.audited("model-sync")[-1]["detail"]["code"] == "trust.x19"
    activator.stop()
