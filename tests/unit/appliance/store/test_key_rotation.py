"""The exchange of the content key while the box runs, killed at any point, with writers in other processes (R13, R46)."""

from __future__ import annotations

import hashlib
import random
import secrets
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.core.errors import ApplianceError, StoreError
from appliance.core.process import Lock
from appliance.core.settings import Settings
from appliance.store.key_rotation import Rotation, rotate_content_key
from appliance.store.keys import CONTENT_KEY, Keys, key_id
from appliance.store.store import Store
from tests.support.killed_work import kill_at
from tests.support.paths import ROOT
from tests.support.processes import run_here

OLDEST = "cd" * 32


def make_box(data_dir: Path, files: int = 3) -> tuple[Settings, dict[str, bytes]]:
    """A box with files of this version and one of the oldest, by name."""
    settings = Settings.parse({"data_dir": data_dir, "disk_reserve_bytes": 0})
    images = {hashlib.sha256(bytes([number])).hexdigest(): bytes([number]) * 100 for number in range(files)}
    with closing(Store(settings)) as store:
        for name, data in images.items():
            store.content.write(data, lambda name=name: name)  # type: ignore[misc]
    nonce = secrets.token_bytes(12)
    sealed = AESGCM(Keys(data_dir).load(CONTENT_KEY)).encrypt(nonce, b"older" + bytes.fromhex(OLDEST), None)
    (data_dir / "content" / "cd" / OLDEST).write_bytes(b"CEA1" + nonce + sealed)
    return settings, images | {OLDEST: b"older"}


def rotate(settings: Settings) -> Rotation:
    with closing(Store(settings)) as store:
        return rotate_content_key(store, lambda _done, _of: None)


def read_all(settings: Settings, images: dict[str, bytes]) -> None:
    with closing(Store(settings)) as store:
        assert {name: store.content.read(name) for name in images} == images


def content_keys(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "keys").glob("content.*"))


@pytest.mark.parametrize("name", ["content.next.key", "content.0011223344556677.key"])
def test_a_key_whose_destruction_is_killed_at_any_operation_does_not_stop_the_box(tmp_path: Path, name: str) -> None:
    settings, images = make_box(tmp_path / "box")
    is_killed, operation = True, 0
    while is_killed:
        operation += 1
        Keys(settings.data_dir).install(name, secrets.token_bytes(32))
        is_killed = kill_at(operation, lambda: Keys(settings.data_dir).destroy(name))
        for path in (settings.data_dir / "keys").glob("content.*.key"):
            assert len(Keys(settings.data_dir).load(path.name)) == 32
        Keys(settings.data_dir).destroy(name)
    read_all(settings, images)
    assert content_keys(settings.data_dir) == [CONTENT_KEY]


def test_a_running_box_uses_the_new_key_at_once_and_opens_everything(tmp_path: Path) -> None:
    settings, images = make_box(tmp_path / "box")
    old = Keys(settings.data_dir).load(CONTENT_KEY)
    with closing(Store(settings)) as running, closing(Store(settings)) as reader:
        assert rotate(settings) == Rotation(4, 0)
        name = running.content.write(b"fresh", lambda: "ef" * 32)
        images[name] = b"fresh"
        for store in (running, reader):
            assert {name: store.content.read(name) for name in images} == images
        new = Keys(settings.data_dir).load(CONTENT_KEY)
        assert new != old
        assert {running.content.key_of(name) for name in images} == {key_id(new)}
    read_all(settings, images)
    assert content_keys(settings.data_dir) == [CONTENT_KEY]
    assert Keys(settings.data_dir).recorded(CONTENT_KEY) == [key_id(new)]
    with pytest.raises(StoreError, match=r"key\.other_box|key\.escrow_old"):
        Keys(settings.data_dir).restore({CONTENT_KEY: old}, lambda _name, _key: False)


WRITE = """
import hashlib, os, sys, time
from pathlib import Path
from appliance.core.settings import Settings
from appliance.store.store import Store
store = Store(Settings.parse({"data_dir": Path(sys.argv[1]), "disk_reserve_bytes": 0}))
print("ready", flush=True)
number = 0
while not Path(sys.argv[1], "stop").exists():
    data = f"{os.getpid()} {number}".encode()
    name = store.content.write(data, lambda: hashlib.sha256(data).hexdigest())
    assert store.content.read(name) == data
    print(name, flush=True)
    number += 1
    time.sleep(0.01)
"""


def test_processes_that_write_meanwhile_lose_nothing_and_leave_no_file_of_the_old_key(tmp_path: Path) -> None:
    settings, images = make_box(tmp_path / "box")
    command = [sys.executable, "-c", WRITE, str(settings.data_dir)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert [writer.stdout.readline().strip(), bool(writer.stdout.readline())] == ["ready", True]
    for _ in range(3):
        assert rotate(settings).damaged == 0
    (settings.data_dir / "stop").touch()
    written = [name for writer in writers for name in writer.communicate()[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]
    read_all(settings, images)
    current = key_id(Keys(settings.data_dir).load(CONTENT_KEY))
    with closing(Store(settings)) as store:
        assert {store.content.key_of(name) for name in [*written, *images]} == {current}
        assert all(hashlib.sha256(store.content.read(name)).hexdigest() == name for name in written)
    assert content_keys(settings.data_dir) == [CONTENT_KEY]


def check_kill(data_dir: Path, operation: int) -> bool:
    """Kill the exchange before its n-th operation: every file opens, and the next call ends it. Returns whether it came so far."""
    settings, images = make_box(data_dir)
    first = Keys(data_dir).load(CONTENT_KEY)
    is_killed = kill_at(operation, lambda: rotate(settings))
    read_all(settings, images)
    assert rotate(settings).damaged == 0
    read_all(settings, images)
    assert content_keys(data_dir) == [CONTENT_KEY]
    assert Keys(data_dir).load(CONTENT_KEY) != first
    return is_killed


def test_an_exchange_killed_at_random_operations_goes_on(tmp_path: Path) -> None:
    chosen = random.Random(7)
    killed = [check_kill(tmp_path / str(number), chosen.randrange(20, 110)) for number in range(6)]
    assert any(killed)


@pytest.mark.long
def test_an_exchange_killed_before_each_of_its_operations_goes_on(tmp_path: Path) -> None:
    operation = 1
    while check_kill(tmp_path / str(operation), operation):
        operation += 1
    assert operation > 60


def test_a_damaged_file_keeps_the_earlier_key_until_it_is_gone(tmp_path: Path) -> None:
    settings, images = make_box(tmp_path / "box")
    path = settings.data_dir / "content" / "cd" / OLDEST
    blob = path.read_bytes()
    path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert rotate(settings) == Rotation(4, 1)
    assert len(content_keys(settings.data_dir)) == 2
    path.write_bytes(blob)  # repaired from a backup: the earlier key opens it
    read_all(settings, images)
    assert rotate(settings) == Rotation(4, 0)
    read_all(settings, images)
    assert content_keys(settings.data_dir) == [CONTENT_KEY]


def test_two_exchanges_at_once_are_refused(tmp_path: Path) -> None:
    settings, _ = make_box(tmp_path / "box")
    lock = Lock(settings.data_dir, "key-rotation")
    with pytest.raises(ApplianceError, match=r"box\.busy"):
        rotate(settings)
    lock.release()


def test_the_command_says_what_it_did_in_both_languages_and_is_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.cli.main import main

    settings, images = make_box(tmp_path / "box")
    for language, words in (("C", ("earlier key is destroyed", "new escrow copy")), ("zh_CN.UTF-8", ("原密钥已销毁", "托管副本"))):
        monkeypatch.setenv("LC_ALL", language)
        done = run_here(main, "keys", "rotate", "--data-dir", str(settings.data_dir))
        assert done.returncode == 0
        assert all(word in done.stdout for word in words)
    read_all(settings, images)
    with closing(Store(settings)) as store:
        entries = [row["entry"] for row in store.database.query("SELECT entry FROM audit")]
        store.database.verify_audit()
    assert sum("keys:rotated" in entry for entry in entries) == 2
