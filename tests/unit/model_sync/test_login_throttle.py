"""How often a password may be tried: by name and machine, by name, by machine."""

from __future__ import annotations

from model_sync.login_throttle import LOCKOUT_S, MAX_FAILURES, MAX_WAIT_S, SLOW_AFTER, SLOW_S, LoginThrottle


class Watch:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_r3_names_that_do_not_exist_are_locked_like_those_that_do() -> None:
    throttle = LoginThrottle(Watch())
    for name, secret in (("doctor", "hash"), ("nobody", "")):
        for _ in range(MAX_FAILURES):
            assert not throttle.is_blocked(name, secret, "10.0.0.1")
            throttle.add_failure(name, secret, "10.0.0.1")
        assert throttle.is_blocked(name, secret, "10.0.0.1")
        assert not throttle.is_blocked(name, secret, "10.0.0.2")


def test_r3_a_name_guessed_from_many_machines_is_slowed_and_never_locked() -> None:
    watch = Watch()
    throttle = LoginThrottle(watch)
    for number in range(200):
        throttle.add_failure("doctor", "hash", f"10.0.1.{number}")
    assert not throttle.is_blocked("doctor", "hash", "10.0.0.7")
    assert throttle.wait_s("doctor", "10.0.0.7") == 0
    waits = [throttle.wait_s("doctor", "10.0.0.7") for _ in range(int(MAX_WAIT_S / SLOW_S))]
    assert waits == [SLOW_S * (number + 1) for number in range(len(waits))]
    assert throttle.wait_s("doctor", "10.0.0.7") is None
    watch.now += MAX_WAIT_S + SLOW_S
    assert throttle.wait_s("doctor", "10.0.0.7") == 0


def test_r3_the_machine_of_the_owner_is_not_slowed_by_guessing_from_others() -> None:
    throttle = LoginThrottle(Watch())
    throttle.clear("doctor", "10.0.0.7")
    for number in range(200):
        throttle.add_failure("doctor", "hash", f"10.0.1.{number}")
    assert [throttle.wait_s("doctor", "10.0.0.7") for _ in range(9)] == [0] * 9


def test_r3_a_machine_that_tries_many_names_is_slowed() -> None:
    watch = Watch()
    throttle = LoginThrottle(watch)
    for number in range(SLOW_AFTER):
        assert throttle.wait_s(f"name{number}", "10.0.0.9") == 0
        throttle.add_failure(f"name{number}", "", "10.0.0.9")
    assert throttle.is_suspect("10.0.0.9")
    assert throttle.wait_s("one", "10.0.0.9") == 0
    assert throttle.wait_s("two", "10.0.0.9") == SLOW_S
    assert throttle.wait_s("two", "10.0.0.8") == 0
    watch.now += LOCKOUT_S + 1
    assert not throttle.is_suspect("10.0.0.9")
    assert [throttle.wait_s("one", "10.0.0.9") for _ in range(3)] == [0] * 3


def test_memory_is_bounded() -> None:
    throttle = LoginThrottle(Watch())
    for number in range(25_000):
        throttle.add_failure(f"name{number}", "", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(throttle._entries) <= 10_000
    assert len(throttle._turns) <= 10_000
