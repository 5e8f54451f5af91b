"""``verify`` finds whatever is wrong with a public tree, and ``status`` says what a tired person has to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, TargetFile

from model_sync.library import check as library_check
from model_sync.library import publish, rollouts
from model_sync.library.library import Library
from model_sync.library.text import describe, status_lines
from model_sync.trust.documents import Rollout, RolloutStep
from tests.support.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = make_site(tmp_path / "lib")
    made.publish(tiny_bundle(tmp_path, "0.1.0", seed=1, hidden=200))
    made.publish(tiny_bundle(tmp_path, "0.2.0", seed=1, hidden=200, drift=1e-4))
    made.rollout("stable", LINE, "0.2.0")
    return made


def newest(site: Site, role: str) -> Path:
    return max((site.public / "metadata").glob(f"*.{role}.json"), key=lambda path: int(path.name.split(".")[0]))


def rewrite(site: Site, role: str, change: Callable[[Metadata], None], sign: bool = True) -> None:
    """Change a public role behind the library's back, with good signatures up to the timestamp."""
    path = newest(site, role)
    md = Metadata.from_bytes(path.read_bytes())
    change(md)
    resign(site, role, md, path, sign)
    snapshot = newest(site, "snapshot")
    snap = Metadata.from_bytes(snapshot.read_bytes())
    if f"{role}.json" in snap.signed.meta:
        snap.signed.meta[f"{role}.json"] = MetaFile.from_data(md.signed.version, path.read_bytes(), ["sha256"])
        resign(site, "snapshot", snap, snapshot)
        stamp = site.public / "metadata" / "timestamp.json"
        top = Metadata.from_bytes(stamp.read_bytes())
        top.signed.snapshot_meta = MetaFile.from_data(snap.signed.version, snapshot.read_bytes(), ["sha256"])
        resign(site, "timestamp", top, stamp)


def resign(site: Site, role: str, md: Metadata, path: Path, sign: bool = True) -> None:
    md.signatures.clear()
    for signer in site.holders[role] if sign else [CryptoSigner.generate_ed25519()]:
        md.sign(signer, append=True)
    path.write_bytes(md.to_bytes())


def weights(site: Site) -> Path:
    return next((site.public / "targets").rglob("*.onnx"))


def delegate_twice(md: Metadata) -> None:
    md.signed.delegations.roles["second"] = DelegatedRole("second", [], 1, True, [f"models/{LINE}/*/*"])


def delegate_further(md: Metadata) -> None:
    md.signed.delegations = Delegations({}, {"x": DelegatedRole("x", [], 1, True, ["models/*"])})


def point_at_nothing(site: Site) -> None:
    """A rollout, well signed, of a version that the line never signed."""
    step = RolloutStep(version="7.0.0", percent=100, start=datetime.now(timezone.utc))
    raw = Rollout(ring="stable", issued_at=datetime.now(timezone.utc), lines={LINE: step}).to_json()
    target = TargetFile.from_data("rollout/stable.json", raw)
    site.library.files.public_target(target).write_bytes(raw)
    rewrite(site, "rollout", lambda md: md.signed.targets.update({target.path: target}))


def junk_index(site: Site) -> None:
    target = TargetFile.from_data(f"models/{LINE}/line.json", b"{}")
    site.library.files.public_target(target).write_bytes(b"{}")
    rewrite(site, LINE, lambda md: md.signed.targets.update({target.path: target}))


def junk_manifest(site: Site) -> None:
    target = TargetFile.from_data(f"models/{LINE}/0.1.0/manifest.json", b"{}")
    site.library.files.public_target(target).write_bytes(b"{}")
    rewrite(site, LINE, lambda md: md.signed.targets.update({target.path: target}))


def drop_target(name: str) -> Callable[[Site], None]:
    return lambda site: rewrite(site, LINE, lambda md: md.signed.targets.pop(next(p for p in md.signed.targets if p.endswith(name))))


DAMAGE: dict[str, tuple[Callable[[Site], object], str]] = {
    "weights changed": (lambda s: weights(s).write_bytes(weights(s).read_bytes()[:-1] + b"x"), "is not the file that is signed"),
    "weights cut": (lambda s: weights(s).write_bytes(weights(s).read_bytes()[:-1]), "bytes, not the"),
    "weights gone": (lambda s: weights(s).unlink(), "No such file"),
    "index gone": (lambda s: shutil.rmtree(s.public / "targets" / "models"), "No such file"),
    "no root": (lambda s: s.root.unlink(), "no 1.root.json"),
    "root of another version": (lambda s: shutil.copy(s.root, s.root.with_name("2.root.json")), "is version 1"),
    "gap between roots": (lambda s: shutil.copy(s.root, s.root.with_name("3.root.json")), "missing before 3.root.json"),
    "root without signatures": (lambda s: rewrite(s, "root", lambda _md: None, sign=False), "lacks signatures"),
    "no timestamp": (lambda s: (s.public / "metadata" / "timestamp.json").unlink(), "No such file"),
    "timestamp is junk": (lambda s: (s.public / "metadata" / "timestamp.json").write_bytes(b"junk"), "no TUF metadata"),
    "timestamp is another role": (
        lambda s: shutil.copy(newest(s, "snapshot"), s.public / "metadata" / "timestamp.json"),
        "does not say that it is timestamp",
    ),
    "snapshot gone": (lambda s: newest(s, "snapshot").unlink(), "No such file"),
    "snapshot differs": (lambda s: newest(s, "snapshot").write_bytes(newest(s, "snapshot").read_bytes() + b" "), "length"),
    "line unsigned": (lambda s: rewrite(s, LINE, lambda _md: None, sign=False), "lacks signatures"),
    "line of another version": (
        lambda s: shutil.copy(s.public / "metadata" / f"1.{LINE}.json", newest(s, LINE)),
        "is version 1",
    ),
    "line not in the snapshot": (
        lambda s: rewrite(s, "targets", delegate_twice),
        "second is delegated but not in the snapshot",
    ),
    "line delegates further": (lambda s: rewrite(s, LINE, delegate_further), "delegates further"),
    "line signs another's file": (
        lambda s: rewrite(s, LINE, lambda md: md.signed.targets.update({"rollout/x.json": md.signed.targets[f"models/{LINE}/line.json"]})),
        "outside what",
    ),
    "targets signs files itself": (
        lambda s: rewrite(s, "targets", lambda md: md.signed.targets.update({"x": TargetFile.from_data("x", b"")})),
        "files of its own",
    ),
    "delegation of other paths": (
        lambda s: rewrite(s, "targets", lambda md: md.signed.delegations.roles["rollout"].paths.append("models/*/*")),
        "is not terminating or has other paths",
    ),
    "delegation that is not terminating": (
        lambda s: rewrite(s, "targets", lambda md: setattr(md.signed.delegations.roles[LINE], "terminating", False)),
        "terminating",
    ),
    "rollout of an unsigned version": (point_at_nothing, "the role of no model line has signed"),
    "index that is none": (junk_index, "not valid"),
    "manifest that is none": (junk_manifest, "manifest.json is not valid"),
    "index not signed": (drop_target("line.json"), "is not signed"),
    "manifest not signed": (drop_target("0.1.0/manifest.json"), "not the file that the version names"),
    "weights not signed": (drop_target("0.1.0/model_fp32.onnx"), "not the file that the version names"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(site: Site, name: str) -> None:
    damage, says = DAMAGE[name]
    damage(site)
    found = site.library.verify()
    assert not found.is_clean
    assert any(says in problem for problem in found.problems), found.problems


def test_a_whole_tree_is_counted(site: Site) -> None:
    told: list[tuple[int, int]] = []
    found = site.library.verify(lambda done, total: told.append((done, total)))
    assert found.is_clean
    assert found.targets == len(told) == 15  # six files twice, index, delta, rollout
    assert told[-1] == (found.bytes, found.bytes)
    assert any("earlier states" in note for note in found.notes)
    assert found.valid_until is not None


def test_every_expiry_is_found(site: Site) -> None:
    for days, role in ((8, "timestamp"), (15, "snapshot"), (31, "rollout"), (181, "targets"), (181, LINE), (366, "root")):
        found = library_check.verify(site.public, datetime.now(timezone.utc) + timedelta(days=days))
        assert any(problem.startswith(f"{role} expired") for problem in found.problems), role


def later(site: Site, days: float) -> Library:
    return Library(site.library.files.directory, clock=lambda: datetime.now(timezone.utc) + timedelta(days=days))


@pytest.mark.parametrize(
    ("days", "says"),
    [
        (0, "next: nothing to do"),
        (4, "WARNING: timestamp expires in 3.0 days"),
        (4, "`model-library refresh-timestamp LIB`"),
        (8, "WARNING: timestamp has EXPIRED"),
        (28, "next: `model-library renew LIB rollout`"),
        (335, "WARNING: root expires in 30.0 days"),
    ],
)
def test_status_counts_down_and_says_what_to_do(site: Site, days: float, says: str) -> None:
    text = "\n".join(status_lines(later(site, days).status()))
    assert says in text, text


def test_status_is_a_table_for_people(site: Site) -> None:
    lines = status_lines(site.library.status())
    assert lines[0].split() == ["ROLE", "PUBLIC", "WAITING", "SIGNATURES", "EXPIRES", "KEYS"]
    assert any(line.split()[:2] == ["root", "v1"] and "3 of 2" in line and "alice, bob, carol" in line for line in lines)
    assert any(line.split()[:3] == ["stable", LINE, "0.2.0"] for line in lines)
    assert all(len(line) < 120 for line in lines)


def test_status_names_who_is_missing(site: Site) -> None:
    library = site.by_hand()
    library.renew("root")
    library.sign("root", site.holders["root"][0])
    assert "next: root waits for 1 more: `model-library sign LIB --key KEY.pem` (bob or carol)" in status_lines(library.status())


def test_chinese_names_keep_the_table_straight(site: Site) -> None:
    alice = site.holders["root"][0].public_key.keyid
    site.library.name_holders({alice: "王医生"})
    assert any("王医生" in line for line in status_lines(site.library.status()))


def words(site: Site, role: str, library: Library) -> str:
    new = library.staged(role)
    assert new is not None

    def read(target: TargetFile) -> bytes | None:
        where = library.files.find_target(target)
        return where.read_bytes() if where is not None else None

    return "\n".join(describe(role, new, library.published(role), library.files.config().name, read))


def test_what_is_signed_is_said_in_plain_words(site: Site, tmp_path: Path) -> None:
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path / "new", "0.3.0"), deltas=False, minimum_version="0.2.0")
    publish.withdraw(library, LINE, "0.1.0", "misses effusions")
    text = words(site, LINE, library)
    for part in ("+ version 0.3.0: manifest", "! WITHDRAWN 0.1.0: misses effusions", "! minimum: boxes take no version older than 0.2.0"):
        assert part in text
    assert f"+ models/{LINE}/0.3.0/model_fp32.onnx" in text
    assert "0.2.0/model_fp32.onnx" not in text


def test_a_rollout_is_said_in_plain_words(site: Site) -> None:
    library = site.by_hand()
    rollouts.rollout(library, "stable", LINE, "0.1.0", 5.0, datetime(2030, 1, 2, 3, 4, tzinfo=timezone.utc), 12.0, paused=True)
    assert f"! ring stable: {LINE} 0.1.0 to 5 % of boxes from 2030-01-02 03:04 UTC over 12 h" in words(site, "rollout", library)
    assert "PAUSED" in words(site, "rollout", library)


def test_a_key_change_is_said_in_plain_words(site: Site) -> None:
    library, fresh = site.by_hand(), CryptoSigner.generate_ed25519().public_key
    library.name_holders({fresh.keyid: "dave"})
    library.rotate_key("root", site.holders["root"][1].public_key.keyid, fresh, threshold=3)
    text = words(site, "root", library)
    assert "+ key of root: dave" in text
    assert "- key of root: bob" in text
    assert "! root needs 3 of 3 signatures" in text
    library.renew("targets")
    assert "nothing else changes" in words(site, "targets", library)


def test_an_index_that_is_not_at_hand_is_not_passed_over(site: Site) -> None:
    library = site.by_hand()
    publish.withdraw(library, LINE, "0.1.0", "misses effusions")
    new = library.staged(LINE)
    assert new is not None
    text = "\n".join(describe(LINE, new, library.published(LINE), str, lambda _target: None))
    assert "cannot be shown" in text


def test_an_online_key_that_nobody_needs_is_named(tmp_path: Path) -> None:
    from model_sync.library.keys import generate

    site = make_site(tmp_path / "lib")
    generate(site.library.files.online / "old.pem", "a long enough passphrase")
    assert any("old.pem is the key of no role" in text for text in Library(site.library.files.directory).status()["warnings"])
