"""Accounts: one-time passwords, lockout, sessions that die on the server."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from appliance.core.errors import StoreError
from appliance.store.accounts import Account, Accounts
from appliance.store.store import Store
from model_sync.login_throttle import LOCKOUT_S, MAX_FAILURES


@pytest.fixture
def accounts(store: Store) -> Iterator[Accounts]:
    yield Accounts(store)


def test_r1_no_default_account(accounts: Accounts) -> None:
    assert accounts.find("demo") is None
    assert accounts.login("demo", "demo", "peer") is None


def test_one_time_password_must_be_changed_and_ends_every_session(accounts: Accounts) -> None:
    password = accounts.add("Demo", "clinician", "t")
    token = accounts.login("demo", password, "peer")
    assert token
    account = accounts.resume(token)
    assert account
    assert account.must_change
    accounts.change_password(account, password, "a new phrase 7")
    assert accounts.resume(token) is None
    assert accounts.login("demo", password, "peer") is None
    changed = accounts.resume(accounts.login("demo", "a new phrase 7", "peer") or "")
    assert changed
    assert not changed.must_change


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("wrong", "a new phrase 7", "account.wrong_password"),
        ("", "short", "account.weak_password"),
        ("", "aaaaaaaaaaaa", "account.weak_password"),
    ],
)
def test_bad_new_passwords(accounts: Accounts, old: str, new: str, code: str) -> None:
    password = accounts.add("demo", "clinician", "t")
    account = accounts.find("demo")
    assert account
    with pytest.raises(StoreError) as caught:
        accounts.change_password(account, old or password, new)
    assert caught.value.code == code


def test_the_old_password_is_no_new_one(accounts: Accounts) -> None:
    password = accounts.add("demo", "clinician", "t")
    with pytest.raises(StoreError, match="weak"):
        accounts.change_password(Account(1, "demo", "clinician", True), password, password)


def test_r3_five_failures_lock_for_fifteen_minutes(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    password = accounts.add("demo", "clinician", "t")
    for _ in range(MAX_FAILURES):
        assert accounts.login("demo", "wrong", "peer") is None
    assert accounts.login("demo", password, "peer") is None
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: start + LOCKOUT_S + 1)
    assert accounts.login("demo", password, "peer")


def test_a_success_clears_the_failures(accounts: Accounts) -> None:
    password = accounts.add("demo", "clinician", "t")
    for _ in range(3):
        for _ in range(MAX_FAILURES - 1):
            assert accounts.login("demo", "wrong", "peer") is None
        assert accounts.login("demo", password, "peer")


def test_r5_sessions_end_at_logout_idleness_and_age(accounts: Accounts, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    password = accounts.add("demo", "clinician", "t")
    token = accounts.login("demo", password, "peer") or ""
    accounts.logout(token)
    assert accounts.resume(token) is None
    accounts.logout(token)
    token = accounts.login("demo", password, "peer") or ""
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: start + 60)
    assert accounts.resume(token)
    monkeypatch.setattr(time, "time", lambda: start + 60 + store.settings.session_idle_s - 1)
    assert accounts.resume(token)
    monkeypatch.setattr(time, "time", lambda: start + 60 + 2 * store.settings.session_idle_s)
    assert accounts.resume(token) is None
    token = accounts.login("demo", password, "peer") or ""
    began = time.time()
    for step in range(1, 60):
        monkeypatch.setattr(time, "time", lambda now=began + step * store.settings.session_idle_s * 0.9: now)
        if accounts.resume(token) is None:
            break
    assert time.time() - began >= store.settings.session_absolute_s


def test_no_token_or_password_is_stored_plain(accounts: Accounts, store: Store) -> None:
    password = accounts.add("demo", "clinician", "t")
    token = accounts.login("demo", password, "peer") or ""
    dump = "\n".join(str(tuple(row)) for table in ("users", "sessions", "audit") for row in store.database.query(f"SELECT * FROM {table}"))  # noqa: S608
    assert password not in dump
    assert token not in dump


def test_every_login_is_audited(accounts: Accounts, store: Store) -> None:
    accounts.add("demo", "clinician", "t")
    accounts.login("demo", "wrong", "peer")
    accounts.login("nobody-here", "wrong", "peer")
    entries = [row["entry"] for row in store.database.query("SELECT entry FROM audit")]
    assert sum('"110114"' in entry for entry in entries) == 2
    assert not any("nobody-here" in entry for entry in entries)
