"""How long a login takes while 20 threads guess passwords: from one machine with many names, and from 20 machines at one name."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import statistics
import threading
import time
from pathlib import Path
from typing import Any, Final

from requests import RequestException
from requests.adapters import HTTPAdapter

from appliance.core.roles import Role
from tests.support.web_box import PASSWORD, Box, Person, own_password, served

GUESSERS: Final = 20
LIMIT_MS: Final = 300.0
_LOGINS: Final = 20
_WARM_UP_S: Final = 5.0


class _From(HTTPAdapter):
    """Connections from another address of the loopback network, as from another machine."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self._address, 0), **options)


def run(scratch: Path) -> list[dict[str, Any]]:
    """Measure each kind of attack on a box of its own; returns one row per kind, times in milliseconds."""
    rows = []
    for kind in ("nobody guesses", "one machine, many names", "20 machines, the owner's name"):
        with served(scratch / kind.replace(" ", "-")) as (_, box):
            rows.append(_measure(box, kind))
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'a login while':32} {'median ms':>10} {'slowest ms':>11} {'guesses/s':>10}   (limit {LIMIT_MS:.0f} ms)")
    for row in rows:
        print(f"{row['kind']:32} {row['median_ms']:10.0f} {row['slowest_ms']:11.0f} {row['guesses_per_s']:10.1f}")


def _measure(box: Box, kind: str) -> dict[str, Any]:
    own_password(box.accounts, "owner", Role.CLINICIAN)
    _time_login(box)  # the owner's own PC is known from now on
    context = multiprocessing.get_context("spawn")
    stop, guesses = context.Event(), context.Value("L", 0)
    guesser = context.Process(target=_guess_in_threads, args=(box.base, kind, stop, guesses))
    if kind != "nobody guesses":
        guesser.start()
        time.sleep(_WARM_UP_S)
    before, start = guesses.value, time.monotonic()
    times = [_time_login(box) for _ in range(_LOGINS)]
    rate = (guesses.value - before) / (time.monotonic() - start)
    stop.set()
    if guesser.pid is not None:
        guesser.join()
    return {"kind": kind, "median_ms": statistics.median(times), "slowest_ms": max(times), "guesses_per_s": rate}


def _guess_in_threads(base: str, kind: str, stop: Any, guesses: Any) -> None:
    """Guess from ``GUESSERS`` threads in a process that yields to the box: guessers have processors of their own."""
    os.nice(19)
    threads = [threading.Thread(target=_guess, args=(base, kind, number, stop, guesses)) for number in range(GUESSERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _time_login(box: Box) -> float:
    """Log the owner in; returns the milliseconds from sending the password to the answer."""
    person = Person(box.base)
    person.open("/login")
    start = time.perf_counter()
    answer = person.post("/login", data={"username": "owner", "password": PASSWORD})
    elapsed = (time.perf_counter() - start) * 1000
    assert answer.status_code == 302, answer.status_code
    return elapsed


def _guess(base: str, kind: str, number: int, stop: Any, guesses: Any) -> None:
    """Guess without a pause, until ``stop``."""
    is_one_machine = kind == "one machine, many names"
    person = Person(base)
    person.mount("http://", _From("127.0.9.1" if is_one_machine else f"127.0.9.{number + 1}"))
    person.open("/login")
    while not stop.is_set():
        name = secrets.token_hex(6) if is_one_machine else "owner"
        try:
            person.post("/login", data={"username": name, "password": secrets.token_hex(6)})
            with guesses.get_lock():
                guesses.value += 1
        except RequestException:
            time.sleep(0.05)  # the box refused the connection
