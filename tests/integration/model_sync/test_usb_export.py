"""A USB stick: written, brought up to date, too small, worn; through a real FAT image and back, and a box that reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from model_sync.errors import PublishError, SettingsError
from model_sync.library import check as library_check
from model_sync.library import usb_export
from model_sync.transport.directory_fetcher import DirectoryFetcher
from model_sync.trust.documents import LineIndex
from tests.support.library_follower import Follower
from tests.support.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = make_site(tmp_path / "lib")
    made.publish(tiny_bundle(tmp_path, "0.1.0", seed=1, hidden=200))
    made.publish(tiny_bundle(tmp_path, "0.2.0", seed=1, hidden=200, drift=1e-4))
    made.rollout("stable", LINE, "0.2.0")
    return made


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    (tmp_path / "stick").mkdir()
    return tmp_path / "stick"


def tree(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def read_by_a_box(site: Site, folder: Path, kept: Path) -> LineIndex:
    """Refresh a box's trust state from a stick."""
    box = Follower(site, kept)
    box.fetcher = DirectoryFetcher(folder)
    assert box.look("rollout/stable.json")
    return box.index()


def test_a_box_reads_a_stick_as_it_reads_the_network(site: Site, stick: Path, tmp_path: Path) -> None:
    done = usb_export.export(site.public, stick)
    assert done.versions == {LINE: ["0.1.0", "0.2.0"]}
    folder = stick / "clinic-models"
    index = read_by_a_box(site, folder, tmp_path / "box")
    assert [release.version for release in index.versions] == ["0.1.0", "0.2.0"]
    assert library_check.verify(folder, datetime.now(timezone.utc)).problems == []
    public = tree(site.public)
    assert all(public[name] == data for name, data in tree(folder).items())
    assert len(index.deltas) == 1
    assert any(name.startswith("targets/deltas/") for name in tree(folder))


def test_every_root_there_ever_was_is_on_the_stick(site: Site, stick: Path, tmp_path: Path) -> None:
    for role in ("root", "snapshot", "timestamp", "root"):
        fresh = CryptoSigner.generate_ed25519()
        site.library.signers[fresh.public_key.keyid] = fresh
        site.library.rotate_key(role, site.holders[role][0].public_key.keyid, fresh.public_key)
        site.holders[role] = [*site.holders[role][1:], fresh]
    usb_export.export(site.public, stick)
    names = {path.name for path in (stick / "clinic-models" / "metadata").iterdir()}
    assert {f"{version}.root.json" for version in range(1, 6)} <= names
    read_by_a_box(site, stick / "clinic-models", tmp_path / "box")


def test_lines_and_versions_can_be_chosen(tmp_path: Path, stick: Path) -> None:
    site = make_site(tmp_path / "lib", lines=["a", "b"])
    for line in ("a", "b"):
        for version in ("0.1.0", "0.2.0"):
            site.publish(tiny_bundle(tmp_path, version, line=line, seed=len(version)))
    done = usb_export.export(site.public, stick, ["a"], ["0.2.0"])
    assert done.versions == {"a": ["0.2.0"]}
    models = {name.split("/")[2] + "/" + name.split("/")[3] for name in tree(stick / "clinic-models") if name.count("/") > 3}
    assert models == {"a/0.2.0"}
    box = Follower(site, tmp_path / "box")
    box.fetcher = DirectoryFetcher(stick / "clinic-models")
    assert LineIndex.parse(box.look("models/b/line.json")).line == "b", "a withdrawal of another line is on every stick"
    for lines, versions in ((["c"], None), (None, ["9.9.9"])):
        with pytest.raises(SettingsError):
            usb_export.export(site.public, stick, lines, versions)


def test_withdrawn_versions_and_those_below_the_minimum_stay_at_home(site: Site, stick: Path, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.3.0", seed=5), minimum_version="0.2.0")
    site.withdraw(LINE, "0.2.0")
    assert usb_export.export(site.public, stick).versions == {LINE: ["0.3.0"]}
    assert not any("/0.1.0/" in name or "/0.2.0/" in name for name in tree(stick))
    with pytest.raises(SettingsError, match=r"0\.2\.0"):
        usb_export.export(site.public, stick, None, ["0.2.0"])


def test_exporting_again_writes_only_what_is_new_and_removes_only_what_is_ours(site: Site, stick: Path, tmp_path: Path) -> None:
    usb_export.export(site.public, stick)
    mine = {
        "holiday.jpg": stick / "holiday.jpg",
        "notes": stick / "clinic-models" / "notes.txt",
        "deep": stick / "clinic-models" / "targets" / "models" / "mine.onnx",
        "meta": stick / "clinic-models" / "metadata" / "readme.json",
    }
    for path in mine.values():
        path.write_bytes(b"mine")
    again = usb_export.export(site.public, stick)
    assert (again.files, again.removed) == (0, 0)
    site.withdraw(LINE, "0.1.0")
    update = usb_export.export(site.public, stick)
    assert 0 < update.files < 10
    assert update.removed > 6
    assert not any("/0.1.0/" in name for name in tree(stick))
    assert all(path.read_bytes() == b"mine" for path in mine.values())
    assert read_by_a_box(site, stick / "clinic-models", tmp_path / "box").refusal("0.1.0") == "withdrawn"


def test_a_damaged_file_on_the_stick_is_written_again(site: Site, stick: Path) -> None:
    usb_export.export(site.public, stick)
    weights = next(stick.rglob("*.onnx"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"x")
    assert usb_export.export(site.public, stick).files == 1
    assert weights.read_bytes() == good


def test_a_stick_with_too_little_room_is_refused_before_anything_is_written(site: Site, stick: Path) -> None:
    free = shutil.disk_usage(stick).free
    with pytest.raises(PublishError, match="MiB more") as caught:
        usb_export.export(site.public, stick, reserve_bytes=free)
    assert "larger stick" in caught.value.hint
    assert tree(stick) == {}


def test_a_stick_that_is_full_after_all_keeps_whole_files_only(site: Site, stick: Path) -> None:
    """The disk says no in the middle of a file: here by a limit on the size of files, as a quota or a worn stick would."""
    script = (
        "import sys, signal, resource\nfrom pathlib import Path\nfrom model_sync.library import usb_export\n"
        "from model_sync.errors import PublishError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "before = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))\n"
        "try:\n    usb_export.export(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except PublishError as error:\n    print(error)\n"
        "finally:\n    resource.setrlimit(resource.RLIMIT_FSIZE, before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, site.public, stick], capture_output=True, text=True, check=True)
    assert "the stick cannot be written" in done.stdout
    written = {name: data for name, data in tree(stick / "clinic-models").items() if not name.endswith(".part")}
    assert all(tree(site.public)[name] == data for name, data in written.items())
    assert "metadata/timestamp.json" not in written
    usb_export.export(site.public, stick)
    assert library_check.verify(stick / "clinic-models", datetime.now(timezone.utc)).is_clean
    assert not (stick / "clinic-models" / "clinic-models.part").exists()


def test_a_library_that_is_not_whole_or_has_expired_is_not_exported(site: Site, stick: Path) -> None:
    with pytest.raises(PublishError, match="expired"):
        usb_export.export(site.public, stick, now=datetime.now(timezone.utc) + timedelta(days=8))
    weights = next((site.public / "targets").rglob("*.onnx"))
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    with pytest.raises(PublishError, match="not intact"):
        usb_export.export(site.public, stick)
    assert tree(stick) == {}


def test_no_stick(site: Site, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a directory"):
        usb_export.export(site.public, tmp_path / "absent")


def test_no_library_to_export(stick: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="No such file"):
        usb_export.export(tmp_path, stick)


def test_progress_is_told(site: Site, stick: Path) -> None:
    told: list[tuple[int, int]] = []
    done = usb_export.export(site.public, stick, on_progress=lambda now, total: told.append((now, total)))
    assert told[-1] == (done.bytes, done.bytes)
    assert sorted(told) == told


def test_through_a_real_fat_file_system_and_back(site: Site, stick: Path, tmp_path: Path) -> None:
    usb_export.export(site.public, stick)
    image, back = tmp_path / "fat.img", tmp_path / "back"
    with image.open("wb") as stream:
        stream.truncate(40 * 2**20)
    back.mkdir()
    environment = os.environ | {"MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout

    run("mkfs.vfat", "-F", "32", image)
    run("mcopy", "-s", "-i", image, stick / "clinic-models", "::")
    run("fsck.vfat", "-n", image)
    run("mcopy", "-s", "-i", image, "::clinic-models", back)
    assert tree(back / "clinic-models") == tree(stick / "clinic-models")
    assert library_check.verify(back / "clinic-models", datetime.now(timezone.utc)).is_clean
    read_by_a_box(site, back / "clinic-models", tmp_path / "box")


def test_names_are_legal_on_fat_and_differ_by_more_than_case(site: Site, stick: Path) -> None:
    usb_export.export(site.public, stick)
    names = [path.relative_to(stick).as_posix() for path in stick.rglob("*")]
    assert len({name.lower() for name in names}) == len(names)
    assert not any(set(name) & set(':*?"<>|\\') or name.endswith((".", " ")) for name in names)
    assert not any(path.is_symlink() for path in stick.rglob("*"))
    assert max(len(part) for name in names for part in name.split("/")) <= 255
