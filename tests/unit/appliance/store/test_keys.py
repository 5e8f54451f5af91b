"""The keys of a box: checked against its data, never silently replaced, restored from an escrow copy (R46)."""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pyotp
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.cli.main import main
from appliance.core.errors import StoreError
from appliance.core.process import Lock
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.store.accounts import Accounts
from appliance.store.database import APPLICATION_ACTIVITY
from appliance.store.key_escrow import read_escrow, write_escrow
from appliance.store.keys import ACCOUNTS_KEY, AUDIT_KEY, CONTENT_KEY, DATABASE_KEY, RECORD_NAME, Keys, key_id
from appliance.store.logins import Logins
from appliance.store.store import Store

PASSPHRASE = "four words of nobody"
IMAGE, NAME = b"DICM" * 100, "ab" * 32


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A box with one image."""
    made = make_box(tmp_path / "box")
    with closing(Store(made)) as store:
        store.content.write(IMAGE, lambda: NAME)
        store.record(APPLICATION_ACTIVITY, "test", "E", "x:1")
    return made


def make_box(data_dir: Path) -> Settings:
    made = Settings.parse({"data_dir": data_dir, "disk_reserve_bytes": 0})
    Store(made).close()
    return made


def damage(settings: Settings, how: str) -> None:
    """What happens to ``content.key``."""
    path = settings.data_dir / "keys" / "content.key"
    if how == "lost":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other bytes":
        path.write_bytes(secrets.token_bytes(32))
    else:
        other = make_box(settings.data_dir.parent / "other")
        path.write_bytes((other.data_dir / "keys" / "content.key").read_bytes())


DAMAGE = {"lost": "key.missing", "empty": "key.missing", "other bytes": "key.wrong", "of another box": "key.wrong"}


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a box, but not SQLite's own and no lock."""
    skipped = ("-wal", "-shm", ".lock")
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith(skipped)}


def cli(*arguments: object, passphrase: str = PASSPHRASE) -> int:
    """A command with the passphrase on its standard input; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(passphrase + "\n"))
        return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("how", DAMAGE)
def test_r46_a_box_whose_key_does_not_open_its_data_is_not_opened_and_not_changed(settings: Settings, how: str) -> None:
    damage(settings, how)
    before = state(settings.data_dir)
    with pytest.raises(StoreError) as refused:
        Store(settings)
    assert refused.value.code == DAMAGE[how]
    assert state(settings.data_dir) == before


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("recorded", ["beside the content", "in the database"])
def test_r46_either_check_value_alone_shows_the_wrong_key(settings: Settings, how: str, recorded: str) -> None:
    if recorded == "in the database":
        (settings.data_dir / RECORD_NAME).unlink()
    else:
        with closing(Store(settings)) as store, store.database.transaction() as tx:
            tx.execute("DELETE FROM meta WHERE key GLOB 'key_ids:*'")
    damage(settings, how)
    with pytest.raises(StoreError, match=DAMAGE[how]):
        Store(settings)


@pytest.mark.parametrize("how", DAMAGE)
def test_r46_a_box_of_an_older_appliance_recorded_no_key_and_is_checked_by_its_files(settings: Settings, how: str) -> None:
    forget_records(settings)
    damage(settings, how)
    with pytest.raises(StoreError, match=DAMAGE[how]):
        Store(settings)


def forget_records(settings: Settings) -> None:
    """Make the box look like one that recorded no key."""
    with closing(Store(settings)) as store, store.database.transaction() as tx:
        tx.execute("DELETE FROM meta WHERE key GLOB 'key_ids:*'")
    (settings.data_dir / RECORD_NAME).unlink()


def test_r46_one_damaged_file_on_an_old_box_does_not_condemn_its_key(settings: Settings) -> None:
    (settings.data_dir / "content" / "00" / ("00" * 32)).write_bytes(b"CEA1damaged")
    forget_records(settings)
    with closing(Store(settings)) as store:
        assert store.content.read(NAME) == IMAGE


def test_files_of_older_versions_stay_readable(settings: Settings) -> None:
    """``CEA1``: nonce, then the image and its name, without the id of the key."""
    key, nonce, name = Keys(settings.data_dir).load("content.key"), secrets.token_bytes(12), "cd" * 32
    path = settings.data_dir / "content" / "cd" / name
    path.write_bytes(b"CEA1" + nonce + AESGCM(key).encrypt(nonce, b"older" + bytes.fromhex(name), None))
    with closing(Store(settings)) as store:
        assert store.content.read(name) == b"older"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(StoreError, match=r"store\.tampered"):
            store.content.read(name)


def test_a_changed_header_is_found(settings: Settings) -> None:
    path = settings.data_dir / "content" / NAME[:2] / NAME
    data = path.read_bytes()
    for position in range(0, 24, 5):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with closing(Store(settings)) as store, pytest.raises(StoreError, match=r"store\.tampered"):
            store.content.read(NAME)


@pytest.mark.parametrize("role", ["serve", "worker", "receive", "web"])
def test_r46_every_program_of_the_box_refuses_with_the_code_and_says_how_to_restore(settings: Settings, role: str) -> None:
    damage(settings, "lost")
    (settings.data_dir / "box.toml").write_text("web_port = 0\ndicom_port = 0\n")
    command = ["-m", "webui"] if role == "web" else ["-m", "appliance", role]
    done = subprocess.run(
        [sys.executable, *command, "--data-dir", str(settings.data_dir)], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"LANG": "en_US.UTF-8", "LANGUAGE": "en"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "key of this box is lost" in done.stderr
    assert "All data are kept" in done.stderr
    assert "appliance keys restore" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", DAMAGE)
def test_r46_the_escrow_copy_restores_a_box(settings: Settings, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "escrow.json"
    assert cli("keys", "escrow", "--out", copy, "--data-dir", settings.data_dir) == 0
    damage(settings, how)
    assert cli("keys", "check", "--data-dir", settings.data_dir) == 1
    assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 0
    with closing(Store(settings)) as store:
        assert store.content.read(NAME) == IMAGE
        store.database.verify_audit()


def test_r46_a_restored_box_keeps_the_key_that_was_in_the_way(settings: Settings, tmp_path: Path) -> None:
    copy, key = tmp_path / "escrow.json", settings.data_dir / "keys" / "content.key"
    cli("keys", "escrow", "--out", copy, "--data-dir", settings.data_dir)
    damage(settings, "other bytes")
    foreign = key.read_bytes()
    cli("keys", "restore", copy, "--data-dir", settings.data_dir)
    (kept,) = (settings.data_dir / "keys").glob("content.key.replaced-*")
    assert Keys(settings.data_dir).load(kept.name) == foreign


def test_r46_a_restore_leaves_a_key_that_opens_the_data(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An older copy has an earlier audit.key than the one that replaced a lost one."""
    copy, directory = tmp_path / "escrow.json", settings.data_dir / "keys"
    cli("keys", "escrow", "--out", copy, "--data-dir", settings.data_dir)
    (directory / AUDIT_KEY).unlink()
    assert cli("audit", "new-key", "--reason", "case 8", "--data-dir", settings.data_dir) == 0
    new = Keys(settings.data_dir).load(AUDIT_KEY)
    capsys.readouterr()
    assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 0
    assert "nothing was changed" in capsys.readouterr().out
    damage(settings, "lost")
    assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 0
    assert "restored: content.key" in capsys.readouterr().out
    assert Keys(settings.data_dir).load(AUDIT_KEY) == new
    assert not list(directory.glob("audit.key.replaced-*"))
    Keys(settings.data_dir).install(AUDIT_KEY, b"k" * 32)  # one that opens nothing
    copy_of_new = tmp_path / "new.json"
    write_escrow(copy_of_new, Keys(settings.data_dir).escrowed() | {AUDIT_KEY: new}, PASSPHRASE)
    assert cli("keys", "restore", copy_of_new, "--data-dir", settings.data_dir) == 0
    assert Keys(settings.data_dir).load(AUDIT_KEY) == new
    with closing(Store(settings)) as store:
        assert store.content.read(NAME) == IMAGE


def test_r46_a_restore_without_any_record_of_keys_leaves_those_that_open_the_data(settings: Settings, tmp_path: Path) -> None:
    """What is recorded beside the content is gone: the copy of another box must not take the place of good keys."""
    of_other = tmp_path / "other.json"
    cli("keys", "escrow", "--out", of_other, "--data-dir", make_box(tmp_path / "another").data_dir)
    (settings.data_dir / RECORD_NAME).unlink()
    keys = Keys(settings.data_dir)
    before = [keys.load(name) for name in (AUDIT_KEY, CONTENT_KEY, DATABASE_KEY)]
    cli("keys", "restore", of_other, "--data-dir", settings.data_dir)
    assert [keys.load(name) for name in (AUDIT_KEY, CONTENT_KEY, DATABASE_KEY)] == before
    with closing(Store(settings)) as store:
        assert store.content.read(NAME) == IMAGE


@pytest.mark.usefixtures("quick_passwords")
def test_r46_accounts_key_is_restored_only_where_it_opens_no_second_factor(settings: Settings, tmp_path: Path) -> None:
    with_second_factor(settings)
    keys, copy = Keys(settings.data_dir), tmp_path / "escrow.json"
    right = keys.load(ACCOUNTS_KEY)
    write_escrow(copy, keys.escrowed() | {ACCOUNTS_KEY: b"o" * 32}, PASSPHRASE)
    assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 0
    assert keys.load(ACCOUNTS_KEY) == right
    write_escrow(tmp_path / "right.json", keys.escrowed(), PASSPHRASE)
    keys.install(ACCOUNTS_KEY, b"o" * 32)
    assert cli("keys", "restore", tmp_path / "right.json", "--data-dir", settings.data_dir) == 0
    assert keys.load(ACCOUNTS_KEY) == right


def test_r46_a_restore_is_refused_while_the_box_runs(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "escrow.json"
    cli("keys", "escrow", "--out", copy, "--data-dir", settings.data_dir)
    damage(settings, "other bytes")
    before = state(settings.data_dir / "keys")
    lock = Lock(settings.data_dir, "supervisor")
    try:
        assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 2
        assert "is using this data directory" in capsys.readouterr().err
    finally:
        lock.release()
    assert state(settings.data_dir / "keys") == before
    assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 0


_START = """
import sys
from pathlib import Path
from appliance.core.settings import Settings
from appliance.store.store import Store
settings = Settings.parse({"data_dir": Path(sys.argv[1])})
print("ready", flush=True)
sys.stdin.readline()
Store(settings).close()
"""


def test_r46_programs_that_start_together_on_a_new_box_create_its_keys_once(tmp_path: Path) -> None:
    for number in range(3):
        data_dir = tmp_path / str(number)
        command = [sys.executable, "-c", _START, str(data_dir)]
        started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(5)]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [process.communicate()[1].decode() for process in started] == [""] * len(started)
        assert [process.returncode for process in started] == [0] * len(started)
        with closing(Store(Settings.parse({"data_dir": data_dir}))) as store:
            assert store.keys.recorded(CONTENT_KEY) == [key_id(store.keys.load(CONTENT_KEY))]


def test_r46_a_program_waits_while_another_one_creates_the_keys(tmp_path: Path) -> None:
    """The lock that the first start holds is the one that every other first start waits for."""
    data_dir = tmp_path / "box"
    data_dir.mkdir()
    descriptor = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    command = [sys.executable, "-c", _START, str(data_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(b"\n", timeout=1)
    assert not (data_dir / "keys").exists()
    os.close(descriptor)
    assert process.communicate()[1] == b""
    assert process.returncode == 0


@pytest.mark.parametrize("is_recorded", [True, False])
def test_r46_a_box_that_has_lost_everything_but_its_images_creates_no_key(settings: Settings, tmp_path: Path, is_recorded: bool) -> None:
    """A key of today would keep the escrow copy from restoring what a backup of the database brings back."""
    copy, backup = tmp_path / "escrow.json", tmp_path / "backup"
    cli("keys", "escrow", "--out", copy, "--data-dir", settings.data_dir)
    shutil.copytree(settings.data_dir, backup)
    shutil.rmtree(settings.data_dir / "keys")
    for path in settings.data_dir.glob("box.sqlite3*"):
        path.unlink()
    if not is_recorded:
        (settings.data_dir / RECORD_NAME).unlink()
    with pytest.raises(StoreError, match=r"key\.missing"):
        Store(settings)
    assert not (settings.data_dir / "keys").exists()
    shutil.copy(backup / "box.sqlite3", settings.data_dir)
    assert cli("keys", "restore", copy, "--data-dir", settings.data_dir) == 0
    with closing(Store(settings)) as store:
        assert store.content.read(NAME) == IMAGE


def test_r46_wrong_passphrase_and_the_copy_of_another_box_change_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    copy, of_other = tmp_path / "escrow.json", tmp_path / "other.json"
    cli("keys", "escrow", "--out", copy, "--data-dir", settings.data_dir)
    cli("keys", "escrow", "--out", of_other, "--data-dir", make_box(tmp_path / "another").data_dir)
    damage(settings, "lost")
    before = state(settings.data_dir)
    for path, passphrase, words in (
        (copy, "not these words at all", "passphrase does not open"),
        (of_other, PASSPHRASE, "of another box"),
        (settings.data_dir / RECORD_NAME, PASSPHRASE, "no escrow copy"),
    ):
        assert cli("keys", "restore", path, "--data-dir", settings.data_dir, passphrase=passphrase) == 1
        assert words in capsys.readouterr().err
        assert state(settings.data_dir) == before


def test_an_escrow_copy_is_encrypted_and_replaces_no_file(settings: Settings, tmp_path: Path) -> None:
    copy = tmp_path / "escrow.json"
    with closing(Store(settings)) as store:
        store.account_secrets.ensure_key()
        keys = store.keys.escrowed()
    write_escrow(copy, keys, PASSPHRASE)
    assert not any(key.hex().encode() in copy.read_bytes() or key in copy.read_bytes() for key in keys.values())
    assert copy.stat().st_mode & 0o777 == 0o600
    assert read_escrow(copy, PASSPHRASE) == keys
    with pytest.raises(FileExistsError):
        write_escrow(copy, keys, PASSPHRASE)
    with pytest.raises(StoreError, match=r"key\.weak_passphrase"):
        write_escrow(tmp_path / "weak", keys, "short")
    assert not (tmp_path / "weak").exists()


def test_a_lost_web_key_only_ends_the_sessions(settings: Settings) -> None:
    keys = Keys(settings.data_dir)
    first = keys.load_web_key()
    assert keys.load_web_key() == first
    for broken in (b"", b"short"):
        (keys.directory / "web.key").write_bytes(broken)
        fresh = keys.load_web_key()
        assert (len(fresh), fresh != first) == (32, True)
        assert keys.load_web_key() == fresh


def test_a_key_check_value_depends_on_every_bit() -> None:
    key = secrets.token_bytes(32)
    others = {bytes([*key[:at], key[at] ^ 1 << bit, *key[at + 1 :]]) for at in range(32) for bit in range(8)}
    assert len({key_id(other) for other in {key, *others}}) == 257


SECOND_FACTOR_PASSWORD = "a new phrase 7"


def with_second_factor(settings: Settings) -> pyotp.TOTP:
    """Give the box a technician with a second factor; returns the phone."""
    with closing(Store(settings)) as store:
        accounts = Accounts(store)
        one_time = accounts.add("zhao", Role.TECHNICIAN, "t")
        accounts.change_password(accounts.require("zhao"), one_time, SECOND_FACTOR_PASSWORD)
        logins = Logins(store, accounts)
        session = logins.resume(logins.login("zhao", SECOND_FACTOR_PASSWORD, "10.0.0.1") or "")
        assert session
        phone = pyotp.TOTP(logins.second_factors.begin(session.account, session.id))
        logins.second_factors.confirm(session.account, session.id, phone.now())
    return phone


def damage_accounts_key(settings: Settings, how: str) -> None:
    path = settings.data_dir / "keys" / "accounts.key"
    if how == "lost":
        path.unlink()
    elif how == "of another box":
        other = make_box(settings.data_dir.parent / "other")
        with_second_factor(other)
        Keys(settings.data_dir).install("accounts.key", Keys(other.data_dir).load("accounts.key"))
    else:
        path.write_bytes(b"" if how == "empty" else secrets.token_bytes(32))


@pytest.mark.usefixtures("quick_passwords")
@pytest.mark.parametrize("how", DAMAGE)
def test_r46_a_lost_key_of_the_second_factors_is_refused_at_the_start_and_restored_from_the_escrow_copy(
    settings: Settings, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    copy, box = tmp_path / "escrow.json", ("--data-dir", settings.data_dir)
    (settings.data_dir / "keys" / "accounts.key").write_bytes(b"")  # nothing needs it yet
    assert cli("keys", "escrow", "--out", copy, *box) == 0  # at provisioning, before anybody has a second factor
    phone = with_second_factor(settings)
    damage_accounts_key(settings, how)
    before = state(settings.data_dir)
    with pytest.raises(StoreError, match=r"key\.accounts"):
        Store(settings)
    assert cli("keys", "check", *box) == 1
    assert state(settings.data_dir) == before
    said = capsys.readouterr().err
    assert "appliance keys restore" in said
    assert "appliance keys forget-second-factors" in said
    assert cli("keys", "restore", copy, *box) == 0
    with closing(Store(settings)) as store:
        accounts = Accounts(store)
        later = phone.at(int(accounts.clock.wall_s()) + 30)  # the code of the set-up is used
        assert Logins(store, accounts).second_factors.take(accounts.require("zhao"), later) == "totp"


@pytest.mark.usefixtures("quick_passwords")
@pytest.mark.parametrize("how", DAMAGE)
def test_r46_without_a_copy_the_second_factors_are_removed_by_a_command_and_that_is_audited(settings: Settings, how: str) -> None:
    with_second_factor(settings)
    box = ("--data-dir", settings.data_dir)
    assert cli("keys", "forget-second-factors", "--reason", "why", *box) == 2  # the key is whole
    damage_accounts_key(settings, how)
    assert cli("keys", "forget-second-factors", "--reason", " ", *box) == 2
    lock = Lock(settings.data_dir, "supervisor")
    assert cli("keys", "forget-second-factors", "--reason", "why", *box) == 2  # the box runs
    lock.release()
    assert cli("keys", "forget-second-factors", "--reason", "case 8", *box) == 0
    with closing(Store(settings)) as store:
        accounts = Accounts(store)
        assert not accounts.require("zhao").has_second_factor
        last = json.loads(store.database.query("SELECT entry FROM audit ORDER BY seq DESC LIMIT 1")[0]["entry"])
        assert last["object"] == "user:zhao"
        assert last["detail"] | {"changed": "second factor removed", "code": "key.accounts", "reason": "case 8"} == last["detail"]
        logins = Logins(store, accounts)
        session = logins.resume(logins.login("zhao", SECOND_FACTOR_PASSWORD, "10.0.0.1") or "")
        assert session
        phone = pyotp.TOTP(logins.second_factors.begin(session.account, session.id))
        logins.second_factors.confirm(session.account, session.id, phone.now())
    Store(settings).close()


@pytest.mark.usefixtures("quick_passwords")
def test_r46_one_damaged_second_factor_does_not_condemn_the_key(settings: Settings) -> None:
    with_second_factor(settings)
    with closing(Store(settings)) as store:
        Accounts(store).add("other", Role.TECHNICIAN, "t")
        with store.database.transaction() as tx:
            tx.execute("UPDATE users SET totp_secret = X'00' WHERE username = 'other'")
    Store(settings).close()
