"""What `check` does with what it cannot trust to be sane: hostile files, damaged sets, times out of range, another library."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Timestamp

from model_sync import atomic_files
from model_sync.errors import LibraryUnreachable, TrustError
from model_sync.trust import metadata, offline_check, rollback_protection, trusted_metadata
from model_sync.trust.rollback_protection import BUILT_AT, AnchoredRoot, RollbackState, issued_at
from tests.support.library_site import Site, make_site, serve, tiny_bundle
from tests.support.sync_box import LINE, Box, days, expires, forge, make_box, newest

OTHER = "bone-age"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A library that these tests only look at."""
    directory = tmp_path_factory.mktemp("library")
    site = make_site(directory / "library")
    site.publish(tiny_bundle(directory))
    site.rollout("stable", LINE, "0.1.0")
    return site


@pytest.fixture(scope="module")
def url(site: Site) -> Iterator[str]:
    with serve(site.public) as url:
        yield url


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, site: Site, url: str) -> Path:
    """What a box has after its first pull; tests take a copy."""
    directory = tmp_path_factory.mktemp("pulled") / "box"
    make_box(directory, site, url).pull()
    return directory


@pytest.fixture
def box(result: Path, tmp_path: Path, site: Site, url: str) -> Box:
    shutil.copytree(result, tmp_path / "box", symlinks=True)
    return make_box(tmp_path / "box", site, url)


def printed(box: Box, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """What `check` answers: exactly one JSON object, whatever it meets."""
    capsys.readouterr()
    code = offline_check.print_check(box.settings.exchange_dir, box.settings.root)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0])


def lay(what: str, path: Path) -> None:
    """Put something in the place of a file that no file should be."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "endless device":
        path.symlink_to("/dev/zero")
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what == "directory":
        path.mkdir()
    elif what == "deep JSON":
        path.write_text("[" * 200_000)
    elif what == "huge":
        with path.open("wb") as stream:
            stream.truncate(1 << 40)
    else:
        raise AssertionError(what)


HOSTILE = ["pipe", "endless device", "link to itself", "directory", "deep JSON", "huge"]
TOP = dict.fromkeys(("pipe", "endless device", "link to itself", "directory"), "trust.unreadable")


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_neither_waited_for_nor_taken_in(what: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    exchange = box.settings.exchange_dir
    for relative in ("floor.json", "trust/metadata/root_history/2.root.json"):  # they only tell of more
        lay(what, exchange / relative)
        assert printed(box, capsys)[0] == 0, relative
    for relative in (f"trust/documents/models/{LINE}/line.json", f"trust/metadata/{LINE}.json"):
        lay(what, exchange / relative)
        code, facts = printed(box, capsys)
        assert code == 0, relative
        assert facts["lines"] == {}
        assert facts["troubles"][LINE]["code"] in ("trust.digest", "trust.metadata")
    for role in ("targets", "snapshot", "timestamp"):
        lay(what, exchange / f"trust/metadata/{role}.json")
        code, facts = printed(box, capsys)
        assert (code, facts["ok"]) == (1, False)
        assert facts["code"] in (TOP.get(what, ""), "trust.digest", "trust.metadata")
    lay(what, box.settings.root)
    code, facts = printed(box, capsys)
    assert code == 1
    assert facts["code"] in ("trust.unreadable", "trust.metadata")


def test_a_provisioned_root_may_be_a_link(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.settings.root.rename(box.settings.root.with_name("kept.json"))
    box.settings.root.symlink_to("kept.json")
    assert printed(box, capsys)[0] == 0


LINKS: dict[str, Callable[[Path], str]] = {
    "to itself": lambda _: "trust",
    "out of the directory": lambda exchange: str(exchange / "elsewhere"),
    "up and down": lambda exchange: f"../{exchange.name}/elsewhere",
    "to a link": lambda _: "metadata",
    "to the directory itself": lambda _: ".",
}


@pytest.mark.parametrize("name", LINKS)
def test_only_one_link_is_followed_and_not_out_of_the_directory(name: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    link = box.settings.exchange_dir / "trust"
    shutil.copytree(link.resolve(), box.settings.exchange_dir / "elsewhere")
    link.unlink()
    link.symlink_to(LINKS[name](box.settings.exchange_dir))
    code, facts = printed(box, capsys)
    assert (code, facts["code"]) == (1, "trust.unreadable")
    with pytest.raises(LibraryUnreachable):
        box.facts()


@pytest.mark.parametrize("folder", ["metadata", "metadata/root_history", "documents"])
def test_a_link_in_the_place_of_a_folder_is_not_followed(folder: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    place = (box.settings.exchange_dir / "trust").resolve() / folder
    place.rename(place.with_name("moved"))
    place.symlink_to("moved")
    assert printed(box, capsys)[1]["code"] == "trust.unreadable"


def test_a_link_on_the_way_to_a_document_is_that_lines_trouble(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    models = (box.settings.exchange_dir / "trust" / "documents" / "models").resolve()
    models.rename(models.with_name("moved"))
    models.symlink_to("moved")
    code, facts = printed(box, capsys)
    assert (code, facts["lines"], facts["troubles"][LINE]["code"]) == (0, {}, "trust.digest")


def test_no_more_roots_are_read_than_there_can_be(box: Box, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MAX_ROOTS", 0)
    history = (box.settings.exchange_dir / "trust").resolve() / "metadata" / "root_history"
    os.mkfifo(history / "2.root.json")
    assert metadata.load_newest_root(history.parent, site.root.read_bytes()).version == 1


def test_whatever_breaks_the_check_it_answers(box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def break_down(*_: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(trusted_metadata.TrustedMetadata, "refuse_older", break_down)
    code, facts = printed(box, capsys)
    assert (code, facts["ok"], facts["code"]) == (1, False, "trust.unchecked")
    assert "RecursionError" in facts["message"]
    assert facts["hint"]


def test_metadata_larger_than_a_box_reads_is_said_so(box: Box) -> None:
    file = (box.settings.exchange_dir / "trust").resolve() / "metadata" / "targets.json"
    file.write_bytes(b" " * (metadata.MAX_METADATA_BYTES + 1))
    with pytest.raises(TrustError, match="larger than") as caught:
        box.facts()
    assert caught.value.code == "trust.metadata"


def test_a_reason_in_chinese_is_printed_alike_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path))
    site.withdraw(LINE, "0.1.0", "漏诊胸腔积液")
    with serve(site.public) as url:
        box = make_box(tmp_path / "box", site, url, lines=[LINE])
        box.pull()
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="gb18030", write_through=True))
    assert offline_check.print_check(box.settings.exchange_dir, box.settings.root) == 0
    facts = json.loads(printed.getvalue().decode("utf-8"))
    assert facts["lines"][LINE]["withdrawn"]["0.1.0"]["reason"] == "漏诊胸腔积液"


# -- times ------------------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = ["9999-12-31T23:59:59-10:00", "0001-01-01T00:00:00+14:00", "1969-07-20T20:17:00Z", "2200-01-01T00:00:00Z"]


@pytest.mark.parametrize("text", OUT_OF_RANGE)
def test_a_signed_issue_time_out_of_range_counts_as_none(text: str, site: Site) -> None:
    timestamp: Timestamp = newest(site, "timestamp").signed
    timestamp.unrecognized_fields["x-issued-at"] = text
    assert issued_at(timestamp) is None


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00", "9999-12-31T23:59:59-10:00"])
def test_a_floor_whose_time_is_out_of_range_is_damaged(text: str, box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    file = box.settings.exchange_dir / "floor.json"
    for name in ("system", "issued"):
        file.write_text(json.dumps(json.loads(file.read_bytes()) | {name: text}))
        assert RollbackState.load([file]) == RollbackState()
        assert printed(box, capsys)[0] == 0


def test_every_time_is_printed_with_a_year_of_four_digits() -> None:
    last, first = datetime.max.replace(tzinfo=timezone(timedelta(hours=-10))), datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))
    assert rollback_protection.iso(last) == "9999-12-31T23:59:59Z"
    assert rollback_protection.iso(first) == "0001-01-01T00:00:00Z"
    assert rollback_protection.iso(datetime(2026, 5, 1, 14, 0, 0, 5, timezone(timedelta(hours=2)))) == "2026-05-01T12:00:00Z"


def test_metadata_that_expired_in_the_year_one_breaks_nothing(box: Box) -> None:
    trusted = trusted_metadata.TrustedMetadata.load(box.metadata, box.settings.root.read_bytes())
    trusted.timestamp.expires = datetime.min.replace(tzinfo=timezone.utc)
    clocks = trusted.clocks(RollbackState(), days(0))
    raised = RollbackState().advance(trusted.root, trusted.timestamp, trusted.snapshot, clocks, trusted.valid_until())
    assert raised.earliest_time(trusted.root) == BUILT_AT


# -- lines apart --------------------------------------------------------------------------------------------------------------


def test_a_line_that_expires_early_is_expired_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = make_site(tmp_path / "library", lines=(LINE, OTHER))
    forge(site, {OTHER: expires(days(2))})
    with serve(site.public) as url:
        box = make_box(tmp_path / "box", site, url, lines=[LINE, OTHER])
        box.pull()
    facts = box.facts(days(3)).to_dict()
    assert {name: line["expired"] for name, line in facts["lines"].items()} == {LINE: False, OTHER: True}
    assert facts["expired"]
    assert {line["expired"] for line in printed(box, capsys)[1]["lines"].values()} == {False}


# -- sets that were damaged or lost ---------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a role cut": lambda trusted: cut(trusted / "metadata" / "targets.json"),
    "a role lost": lambda trusted: (trusted / "metadata" / "snapshot.json").unlink(),
    "a role that is a pipe": lambda trusted: lay("pipe", trusted / "metadata" / "timestamp.json"),
    "a document cut": lambda trusted: cut(trusted / "documents" / "models" / LINE / "line.json"),
    "documents lost": lambda trusted: shutil.rmtree(trusted / "documents"),
    "all of it lost": shutil.rmtree,
    "a file in its place": lambda trusted: (shutil.rmtree(trusted), trusted.write_text("x")),
    "a link in its place": lambda trusted: trusted.rename(trusted.with_name("y")) and trusted.symlink_to("y"),
    "its link lost": lambda trusted: (trusted.parent / "trust").unlink(),
    "a folder in place of its link": lambda trusted: ((trusted.parent / "trust").unlink(), (trusted.parent / "trust").mkdir()),
    "a link for people lost": lambda trusted: (trusted.parent / "metadata").unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_set_is_laid_anew_by_the_next_pull(name: str, box: Box) -> None:
    exchange = box.settings.exchange_dir
    DAMAGE[name]((exchange / "trust").resolve())
    box.pull()
    assert box.facts().lines[LINE]
    assert box.facts().problems == {}
    for part in ("metadata", "documents"):
        assert (exchange / part).resolve() == (exchange / "trust").resolve() / part
    before = {str(path): path.lstat().st_mtime_ns for path in exchange.rglob("*") if path.name != "sync-status.json" and path.is_file()}
    box.pull()
    assert {path: Path(path).lstat().st_mtime_ns for path in before} == before, "a whole set is not laid again"


def test_sets_that_were_damaged_again_and_again_do_not_pile_up(box: Box) -> None:
    for _ in range(6):
        cut((box.settings.exchange_dir / "trust").resolve() / "metadata" / "targets.json")
        box.pull()
        assert box.facts().lines[LINE]
    assert len(list(box.settings.exchange_dir.glob(".trust-*"))) <= 3


# -- another library ------------------------------------------------------------------------------------------------------------


def follow(box: Box, site: Site, url: str) -> Box:
    """What a technician does: the new library's first root, and its address."""
    shutil.copyfile(site.root, box.settings.root)
    return Box(box.settings.model_copy(update={"urls": [url]}))


def rotate_root(site: Site) -> None:
    """A second root, so that the new library begins below what the box has seen."""
    forge(site, {"root": lambda _: None})


def test_a_box_that_gets_the_first_root_of_a_new_library_follows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = make_site(tmp_path / "old"), make_site(tmp_path / "new")
    for site, version in ((old, "0.1.0"), (new, "3.0.0")):
        site.publish(tiny_bundle(tmp_path / version, version))
        site.rollout("stable", LINE, version)
    for _ in range(3):
        rotate_root(old)
    with serve(old.public) as url:
        box = make_box(tmp_path / "box", old, url)
        box.pull()
    assert RollbackState.load([box.settings.exchange_dir / "floor.json"]).root == 4
    with serve(new.public) as url:
        box = follow(box, new, url)
        code, facts = printed(box, capsys)
        assert (code, facts["code"]) == (1, "trust.missing"), "what lies here is not called forged"
        assert "followed before" in facts["message"]
        box.pull()
        assert box.wants() == "3.0.0"
        assert printed(box, capsys)[1]["lines"][LINE]["versions"].keys() == {"3.0.0"}
        assert box.status()["state"] == "ok"
        rollback_state = RollbackState.load([box.settings.exchange_dir / "floor.json"])
        assert (rollback_state.root, rollback_state.anchor) == (
            1,
            AnchoredRoot.of(newest(new, "root").signed, new.root.read_bytes()).anchor,
        )
        behind = tmp_path / "behind"
        shutil.copytree(new.public, behind)
        new.publish(tiny_bundle(tmp_path / "more", "3.1.0", seed=1))
        box.pull()
    with serve(behind) as url, pytest.raises(TrustError) as caught:
        Box(box.settings.model_copy(update={"urls": [url]})).pull()
    assert caught.value.code == "trust.rollback", "the floors of the new library hold as those of the old did"


def test_floors_of_another_root_do_not_count_and_those_of_before_anchors_do(box: Box, site: Site) -> None:
    trusted = trusted_metadata.TrustedMetadata.load(box.metadata, box.settings.root.read_bytes())
    known = RollbackState.load([box.settings.exchange_dir / "floor.json"])
    assert known.anchor == trusted.root.anchor
    far = RollbackState(known.serial, 9, days(3000), days(3000), known.clock_keys, known.roles, "0" * 64)
    trusted.refuse_older(far)
    assert far.earliest_time(trusted.root) == BUILT_AT
    raised = far.advance(trusted.root, trusted.timestamp, trusted.snapshot, trusted.clocks(far, days(0)), trusted.valid_until())
    assert (raised.serial, raised.root, raised.anchor) == (far.serial + 1, 1, trusted.root.anchor)
    assert raised.system < days(1)
    before_anchors = RollbackState(known.serial, 9, known.system, known.issued, known.clock_keys, known.roles)
    with pytest.raises(TrustError) as caught:
        trusted.refuse_older(before_anchors)
    assert caught.value.code == "trust.rollback"


def test_metadata_of_another_root_is_set_aside_and_not_mixed(box: Box, site: Site, tmp_path: Path) -> None:
    other = make_site(tmp_path / "other", lines=())
    assert not metadata.set_aside(box.metadata, site.root.read_bytes())
    assert not metadata.set_aside(tmp_path / "nothing", site.root.read_bytes())
    cut(box.metadata / "root_history" / "1.root.json")
    assert not metadata.set_aside(box.metadata, site.root.read_bytes()), "damaged is not another's"
    shutil.copyfile(site.root, box.metadata / "root_history" / "1.root.json")
    for _ in range(2):
        (box.metadata / "root_history").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(site.root, box.metadata / "root_history" / "1.root.json")
        assert metadata.set_aside(box.metadata, other.root.read_bytes())
        assert not box.metadata.exists()
        assert (box.metadata.with_name("metadata.other") / "root_history" / "1.root.json").is_file()


def test_reading_a_plain_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert atomic_files.read(file, 5) == b"12345"
    with pytest.raises(atomic_files.NotRegularFileError):
        atomic_files.read(file, 4)
    with pytest.raises(FileNotFoundError):
        atomic_files.read(tmp_path / "absent", 5)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert atomic_files.read(link, 5, follow=True) == b"12345"
    with pytest.raises(atomic_files.NotRegularFileError):
        atomic_files.read(link, 5)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(atomic_files.NotRegularFileError):
        atomic_files.read(tmp_path / "pipe", 5)
