"""Processes that start and end during a test, and commands that need none of their own."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pytest


def run_here(
    main: Callable[[list[str]], int | None], *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command's ``main`` in this process, without an input; an answer as of ``subprocess.run``.

    For tests that ask what a command does, not what happens to its process: a start costs half a second of processor time.
    """
    line, out, err = [str(argument) for argument in arguments], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO())
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        try:
            code: Any = main(line)
        except SystemExit as leaving:
            code = leaving.code
    return subprocess.CompletedProcess(line, code or 0, out.getvalue(), err.getvalue())


def children_running(word: str, pid: int | None = None) -> list[psutil.Process]:
    """The live descendants of a process (this one by default) that have ``word`` in an argument.

    One that ends while it is looked at, or has ended and is not yet waited for, is not among them.
    """
    found = []
    for child in psutil.Process(pid or os.getpid()).children(recursive=True):
        try:
            if any(word in argument for argument in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:  # ZombieProcess is one of these
            continue
    return found


def has_ended(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends in that time; one that nobody has waited for yet has ended."""
    try:
        process = psutil.Process(pid)
        limit = time.monotonic() + within_s
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > limit:
                return False
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return True
    return True


def wait_for(what: Any, timeout_s: float = 90.0) -> Any:
    """Poll until ``what()`` is true; what it returned."""
    limit = time.monotonic() + timeout_s
    while not (got := what()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
    return got
