"""The envelope of the keys: key files encrypted by a master key, which the machine seals; migration, moved disks, kills (R46)."""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store import master_key
from appliance.store.key_escrow import read_escrow, write_escrow
from appliance.store.keys import ACCOUNTS_KEY, AUDIT_KEY, CONTENT_KEY, DATABASE_KEY, WEB_KEY, Keys
from appliance.store.master_key import KEY_BYTES, SEALINGS, is_sealed, sealed_files
from appliance.store.store import Store
from tests.support.killed_work import kill_at
from tests.support.processes import run_here

NAMES = (CONTENT_KEY, "content.0011223344556677.key", DATABASE_KEY, AUDIT_KEY, WEB_KEY, ACCOUNTS_KEY)
PASSPHRASE = "four words of nobody"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-creds") is None or os.geteuid() != 0, reason="needs systemd-creds and root")
needs_tpm = pytest.mark.skipif(None in (shutil.which("swtpm"), shutil.which("tpm2_unseal")), reason="needs swtpm and tpm2-tools")


def is_right(_name: str, _key: bytes) -> bool:
    """What the box says of every key that is present: it opens nothing."""
    return False


def old_keys(data_dir: Path, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
    """Key files as an older appliance wrote them, with one that was replaced."""
    keys = {name: secrets.token_bytes(KEY_BYTES) for name in (*names, "audit.key.replaced-17")}
    (data_dir / "keys").mkdir(parents=True)
    for name, key in keys.items():
        (data_dir / "keys" / name).write_bytes(key)
    return keys


def loaded(data_dir: Path, names: dict[str, bytes]) -> dict[str, bytes]:
    keys = Keys(data_dir)
    return {name: keys.load(name) for name in names}


def plain_on_disk(data_dir: Path, keys: dict[str, bytes]) -> list[str]:
    """The files that hold a key as it is."""
    return [path.name for path in data_dir.rglob("*") if path.is_file() and any(key in path.read_bytes() for key in keys.values())]


def leftovers(data_dir: Path) -> list[str]:
    return [path.name for path in (data_dir / "keys").iterdir() if path.name.endswith((".plain", ".sealing", ".tmp"))]


def state(folder: Path) -> dict[str, bytes]:
    skipped = ("-wal", "-shm")
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith(skipped)}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this the machine of a name: systemd runs on it, and its host key is its own."""
    monkeypatch.setattr(master_key, "_SYSTEMD_RUNS", tmp_path)

    def use(name: str) -> None:
        (tmp_path / "hosts").mkdir(mode=0o700, exist_ok=True)
        monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "hosts" / name))
        subprocess.run(["systemd-creds", "setup"], capture_output=True, check=True)

    return use


@pytest.fixture
def tpm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make this the machine with the TPM of a name, by the software TPM of IBM and Stefan Berger."""
    folder, started = tmp_path_factory.mktemp("t"), dict[str, subprocess.Popen[bytes]]()
    monkeypatch.setattr(master_key, "_TPM_DEVICE", folder)

    def use(name: str) -> None:
        socket = folder / f"{name}.socket"
        if name not in started:
            (folder / name).mkdir()
            command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder / name}", "--flags", "not-need-init,startup-clear"]
            command += ["--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={socket}.ctrl"]
            started[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not socket.exists():
                assert started[name].poll() is None
                time.sleep(0.01)
        monkeypatch.setenv("TPM2TOOLS_TCTI", f"swtpm:path={socket}")

    yield use
    for process in started.values():
        process.kill()
        process.wait()


def test_r46_plain_key_files_of_an_older_box_are_encrypted_in_place(tmp_path: Path) -> None:
    keys = old_keys(tmp_path)
    write_escrow(tmp_path / "escrow", Keys(tmp_path).escrowed(), PASSPHRASE)
    assert loaded(tmp_path, keys) == keys
    for _ in range(2):
        Keys(tmp_path).seal()
        assert loaded(tmp_path, keys) == keys
    assert (plain_on_disk(tmp_path, keys), leftovers(tmp_path)) == ([], [])
    assert len(list(sealed_files(tmp_path / "keys"))) == len(NAMES)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}
    (tmp_path / "keys" / CONTENT_KEY).unlink()
    Keys(tmp_path).restore(read_escrow(tmp_path / "escrow", PASSPHRASE), is_right)
    assert loaded(tmp_path, keys) == keys


def test_r46_a_box_is_encrypted_when_it_is_opened_by_its_own_account_alone(tmp_path: Path) -> None:
    settings = Settings.parse({"data_dir": tmp_path / "box", "disk_reserve_bytes": 0})
    Store(settings).close()
    folder = tmp_path / "box" / "keys"
    key = Keys(settings.data_dir).load(CONTENT_KEY)
    (folder / CONTENT_KEY).write_bytes(key)
    assert Keys(settings.data_dir).protection() == "file"
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        Store(settings).close()
        assert (folder / CONTENT_KEY).read_bytes() == key
        os.chown(folder, 0, 0)
    Store(settings).close()
    assert is_sealed((folder / CONTENT_KEY).read_bytes())


def test_r46_the_migration_killed_before_each_of_its_operations_loses_no_key(tmp_path: Path) -> None:
    is_killed, operation = True, 0
    while is_killed:
        operation += 1
        data_dir = tmp_path / str(operation)
        keys = old_keys(data_dir, (CONTENT_KEY,))
        is_killed = kill_at(operation, Keys(data_dir).seal)
        assert loaded(data_dir, keys) == keys
        Keys(data_dir).seal()
        assert loaded(data_dir, keys) == keys
        assert (plain_on_disk(data_dir, keys), leftovers(data_dir)) == ([], [])
    assert operation > 12


@needs_systemd
def test_r46_the_sealing_killed_before_each_of_its_operations_loses_no_key(tmp_path: Path, machine: Callable[[str], None]) -> None:
    machine("one")
    is_killed, operation = True, 0
    while is_killed:
        operation += 1
        data_dir = tmp_path / str(operation)
        keys = {CONTENT_KEY: secrets.token_bytes(KEY_BYTES)}
        (data_dir / "keys").mkdir(parents=True)
        (data_dir / "keys" / "master.key").write_bytes(secrets.token_bytes(KEY_BYTES))
        Keys(data_dir).install(CONTENT_KEY, keys[CONTENT_KEY])
        master = {"": (data_dir / "keys" / "master.key").read_bytes()}
        is_killed = kill_at(operation, Keys(data_dir).seal)
        assert loaded(data_dir, keys) == keys
        Keys(data_dir).seal()
        assert loaded(data_dir, keys) == keys
        assert (plain_on_disk(data_dir, master), leftovers(data_dir)) == ([], [])
    assert operation > 5


@needs_systemd
def test_r46_a_box_that_was_moved_to_another_machine_refuses_and_is_restored_from_escrow(
    tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("first")
    settings = Settings.parse({"data_dir": tmp_path / "box", "disk_reserve_bytes": 0})
    with closing(Store(settings)) as store:
        store.content.write(b"image", lambda: "ab" * 32)
        web_key = store.keys.load_web_key()
        store.account_secrets.ensure_key()
        write_escrow(tmp_path / "escrow", store.keys.escrowed(), PASSPHRASE)
    assert (Keys(settings.data_dir).protection(), (tmp_path / "box" / "keys" / "master.key").exists()) == ("systemd-creds", False)
    machine("second")
    before = state(tmp_path / "box")
    for use in (lambda: Store(settings), Keys(settings.data_dir).load_web_key):
        with pytest.raises(StoreError, match=r"key\.sealed_elsewhere") as refused:
            use()
        assert "appliance keys restore" in refused.value.hint
    assert state(tmp_path / "box") == before
    Keys(settings.data_dir).restore(read_escrow(tmp_path / "escrow", PASSPHRASE), is_right)
    with closing(Store(settings)) as store:
        assert store.content.read("ab" * 32) == b"image"
        assert store.keys.load_web_key() != web_key
        assert store.keys.protection() == "systemd-creds"
    assert list((tmp_path / "box" / "keys").glob("master.systemd-creds.replaced-*"))


def test_r46_a_restore_killed_before_each_of_its_operations_is_done_again(tmp_path: Path) -> None:
    keys = old_keys(tmp_path / "box")
    Keys(tmp_path / "box").seal()
    escrow = {name: keys[name] for name in (CONTENT_KEY, DATABASE_KEY)}
    (tmp_path / "box" / "keys" / "master.key").unlink()
    is_killed, operation = True, 0
    while is_killed:
        operation += 1
        data_dir = tmp_path / str(operation)
        shutil.copytree(tmp_path / "box", data_dir)
        is_killed = kill_at(operation, lambda folder=data_dir: Keys(folder).restore(escrow, is_right))  # type: ignore[misc]
        Keys(data_dir).restore(escrow, is_right)
        assert loaded(data_dir, escrow) == escrow
    assert operation > 10


@needs_tpm
def test_r46_the_tpm_seals_the_master_key_and_another_tpm_does_not_open_it(tmp_path: Path, tpm: Callable[[str], None]) -> None:
    tpm("first")
    keys = old_keys(tmp_path)
    Keys(tmp_path).seal()
    assert (Keys(tmp_path).protection(), loaded(tmp_path, keys)) == ("tpm2", keys)
    assert (leftovers(tmp_path), (tmp_path / "keys" / "master.key").exists()) == ([], False)
    tpm("second")
    with pytest.raises(StoreError, match=r"key\.sealed_elsewhere"):
        Keys(tmp_path).load(CONTENT_KEY)
    tpm("first")
    assert loaded(tmp_path, keys) == keys
    for damaged in (b"", b"{}", b"[1]", b'{"public": "x", "private": 1}'):
        (tmp_path / "keys" / "master.tpm2").write_bytes(damaged)
        with pytest.raises(StoreError, match=r"key\.sealed_elsewhere"):
            Keys(tmp_path).load(CONTENT_KEY)


def test_a_tool_that_fails_leaves_an_owner_only_master_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tpm2_unseal", "systemd-creds"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\necho it does not work >&2\nexit 1\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(master_key, "_TPM_DEVICE", tmp_path)
    monkeypatch.setattr(master_key, "_SYSTEMD_RUNS", tmp_path)
    keys = old_keys(tmp_path / "box")
    Keys(tmp_path / "box").seal()
    assert loaded(tmp_path / "box", keys) == keys
    assert Keys(tmp_path / "box").protection() == "file"
    assert (tmp_path / "box" / "keys" / "master.key").stat().st_mode & 0o777 == 0o600
    assert "not installed" in caplog.text  # tpm2_createprimary
    assert ("it does not work" in caplog.text) == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("master lost", "key.missing"),
        ("master empty", "key.missing"),
        ("master of another box", "key.wrong"),
        ("key file cut", "key.missing"),
        ("key file changed", "key.missing"),
        ("key file of another name", "key.missing"),
    ],
)
def test_r46_damaged_keys_are_refused_and_not_made_anew(tmp_path: Path, fault: str, code: str) -> None:
    old_keys(tmp_path)
    Keys(tmp_path).seal()
    master, content = (tmp_path / "keys" / name for name in ("master.key", CONTENT_KEY))
    blob = content.read_bytes()
    {
        "master lost": master.unlink,
        "master empty": lambda: master.write_bytes(b""),
        "master of another box": lambda: master.write_bytes(secrets.token_bytes(KEY_BYTES)),
        "key file cut": lambda: content.write_bytes(blob[:40]),
        "key file changed": lambda: content.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1])),
        "key file of another name": lambda: content.write_bytes((tmp_path / "keys" / DATABASE_KEY).read_bytes()),
    }[fault]()
    before = state(tmp_path)
    with pytest.raises(StoreError) as refused:
        Keys(tmp_path).load(CONTENT_KEY, lambda: True)
    assert (refused.value.code, state(tmp_path)) == (code, before)


def test_on_a_full_disk_the_plain_keys_go_on_to_open(tmp_path: Path) -> None:
    keys = old_keys(tmp_path)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
        try:
            Keys(tmp_path).seal()
        except OSError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert loaded(tmp_path, keys) == keys


def test_processes_that_start_at_once_have_the_same_new_keys(tmp_path: Path) -> None:
    for number in range(5):
        children = []
        for _ in range(4):
            reader, writer = os.pipe()
            if os.fork() == 0:
                try:
                    os.write(writer, Keys(tmp_path / str(number)).load(CONTENT_KEY, lambda: True))
                finally:
                    os._exit(0)
            os.close(writer)
            children.append(reader)
        found = set()
        for reader in children:
            with open(reader, "rb") as stream:
                found.add(stream.read())
            os.wait()
        assert found == {Keys(tmp_path / str(number)).load(CONTENT_KEY)}


def test_keys_check_says_what_seals_them_in_both_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.cli.main import main

    Store(Settings.parse({"data_dir": tmp_path / "box", "disk_reserve_bytes": 0})).close()
    for language, words in (("C", ("not sealed", "tpm2-tools")), ("zh_CN.UTF-8", ("没有由本机硬件封存", "tpm2-tools"))):
        monkeypatch.setenv("LC_ALL", language)
        done = run_here(main, "keys", "check", "--data-dir", str(tmp_path / "box"))
        assert done.returncode == 0
        assert all(word in done.stdout for word in words)


def test_each_sealing_has_a_file_of_its_own() -> None:
    assert [sealing.file_name for sealing in SEALINGS] == ["master.tpm2", "master.systemd-creds"]
