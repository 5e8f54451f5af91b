"""The two profiles of rules for passwords, and the list of common ones."""

from __future__ import annotations

import pytest

from appliance.core.errors import StoreError
from appliance.core.roles import Role
from appliance.store import passwords
from appliance.store.accounts import Accounts
from appliance.store.logins import Logins
from appliance.store.passwords import HISTORY, ROTATION_S, Profile, common_passwords, is_common, readable_secret, weakness
from appliance.store.store import Store
from tests.support.clocks import TestClock

pytestmark = pytest.mark.usefixtures("quick_passwords")


def test_r2_the_list_of_common_passwords_has_more_than_3000_words() -> None:
    words = common_passwords()
    assert len(words) >= 3000
    assert all(len(word) >= passwords.MIN_PASSWORD_CHARS for word in words)


@pytest.mark.parametrize(
    "password",
    [
        "password1", "P@ssw0rd", "P@ssw0rd123!", "Admin@2024", "Adm1n@2024", "zhangwei1985", "Woaini1314", "clinicbox1", "1qaz2wsx",
        "qwertyui",
        "poiuytre",
        "19850312", "12031985", "03121985", "abcdefgh", "87654321", "11112222", "abcdabcd", "weishengyuan",
        "admin_123", "2024admin",
    ],
)  # fmt: skip
def test_r2_what_guessers_try_first_is_common(password: str) -> None:
    assert is_common(password)


@pytest.mark.parametrize("password", ["Spring-4-Rain", "a new phrase 7", "k7#mpQz2", "青山绿水人家在", "we98472651kd", "x"])
def test_r2_what_is_not_common(password: str) -> None:
    assert not is_common(password)


@pytest.mark.parametrize(
    ("profile", "new", "code"),
    [
        ("asvs", "short7!", "account.weak_password"),
        ("asvs", "aabbaabbcc", "account.weak_password"),
        ("asvs", "x1y2" * 65, "account.long_password"),
        ("asvs", "password1", "account.common_password"),
        ("asvs", "DrSunWei12", "account.common_password"),
        ("asvs", "three quiet words", ""),
        ("mlps3", "three quiet words", "account.password_classes"),
        ("mlps3", "Three quiet words", ""),
        ("mlps3", "THREEquiet7words", ""),
        ("mlps3", "threequiet7words", "account.password_classes"),
    ],
)
def test_r2_the_rules_of_both_profiles(profile: Profile, new: str, code: str) -> None:
    assert weakness(profile, new, "drsunwei", []) == code


def test_r2_one_time_passwords_are_no_common_ones_and_differ() -> None:
    issued = {readable_secret() for _ in range(200)}
    assert len(issued) == 200
    assert not any(is_common(item) for item in issued)


def test_r2_mlps3_asks_for_a_change_every_90_days_and_refuses_the_last_five(store: Store) -> None:
    clock = TestClock()
    store.settings = store.settings.model_copy(update={"password_profile": "mlps3"})
    accounts = Accounts(store, clock)
    logins = Logins(store, accounts)
    current = accounts.add("wang", Role.CLINICIAN, "t")
    own = [f"Quiet-Morning-{number}" for number in range(HISTORY + 1)]
    for new in own:
        accounts.change_password(accounts.require("wang"), current, new)
        current = new
    for former in own[1:]:
        with pytest.raises(StoreError) as refused:
            accounts.change_password(accounts.require("wang"), current, former)
        assert refused.value.code == "account.reused_password"
    clock.wait(ROTATION_S - 1)
    assert not accounts.require("wang").must_change
    clock.wait(2)
    account = accounts.require("wang")
    assert account.must_change
    assert not account.is_one_time
    assert logins.login("wang", current, "peer")  # never locked out by its age
    accounts.change_password(account, current, own[0])
    assert not accounts.require("wang").must_change


def test_r2_a_password_set_while_the_clock_was_a_year_ahead_is_due_90_days_after_the_next_login(store: Store) -> None:
    clock = TestClock()
    store.settings = store.settings.model_copy(update={"password_profile": "mlps3"})
    accounts = Accounts(store, clock)
    clock.set_by(365 * 86400)
    one_time = accounts.add("wang", Role.CLINICIAN, "t")
    accounts.change_password(accounts.require("wang"), one_time, "Quiet-Morning-1")
    clock.restart()
    clock.set_by(-365 * 86400)
    assert Logins(store, accounts).login("wang", "Quiet-Morning-1", "peer")
    clock.wait(ROTATION_S + 1)
    assert accounts.require("wang").must_change


def test_r2_asvs_never_asks_for_a_change(store: Store) -> None:
    clock = TestClock()
    accounts = Accounts(store, clock)
    one_time = accounts.add("wang", Role.CLINICIAN, "t")
    accounts.change_password(accounts.require("wang"), one_time, "three quiet words")
    clock.wait(10 * ROTATION_S)
    assert not accounts.require("wang").must_change
