"""Killed commands: the public tree is whole at every moment, a box that follows along never objects, and a second run finishes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from model_sync.library import publish, rollouts
from model_sync.library.files import LibraryFiles
from model_sync.library.library import Library
from tests.support.library_follower import Follower
from tests.support.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"
Act = Callable[[Site], object]


def in_a_process(act: Callable[[], object]) -> int:
    """Fork a process that does something and ends; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid


def killed_at(site: Site, act: Act, write: int, after: bool) -> bool:
    """Run ``act`` in a process that is killed at its n-th write, before or after the rename; says whether it came to that."""

    def run() -> None:
        place, count = LibraryFiles._place, 0

        def counted(self: LibraryFiles, source: Path, path: Path) -> None:
            nonlocal count
            count += 1
            if count == write and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            place(self, source, path)
            if count == write:
                os.kill(os.getpid(), signal.SIGKILL)

        LibraryFiles._place = counted  # type: ignore[method-assign]
        act(site)

    _, status = os.waitpid(in_a_process(run), 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def fresh(site: Site) -> CryptoSigner:
    signer = CryptoSigner.generate_ed25519()
    site.library.signers[signer.public_key.keyid] = signer
    return signer


def rotation(role: str) -> Callable[[Site, Path], Act]:
    def prepare(site: Site, _tmp: Path) -> Act:
        new, old = fresh(site).public_key, site.holders[role][0].public_key.keyid

        def act(site: Site) -> None:
            site.library.rotate_key(role, old, new)

        return act

    return prepare


def publishing(_site: Site, tmp: Path) -> Act:
    bundle = tiny_bundle(tmp / "new", "0.2.0", seed=1, hidden=200, drift=1e-4)
    return lambda site: publish.publish(site.library, bundle)


def rolling_out(_site: Site, _tmp: Path) -> Act:
    return lambda site: rollouts.rollout(site.library, "stable", LINE, "0.1.0", 50.0)


def adding_a_line(site: Site, _tmp: Path) -> Act:
    key = fresh(site).public_key

    def act(site: Site) -> None:
        library = site.library
        if "ct-lung" not in library.lines() or not (library.staged("ct-lung") or library.published("ct-lung")):
            library.add_line("ct-lung", [key], 1)
        library.promote_complete()

    return act


ACTS = {
    "publish": publishing,
    "rollout": rolling_out,
    "add-line": adding_a_line,
    "refresh-timestamp": lambda _site, _tmp: lambda site: site.library.refresh_timestamp(),
    **{f"rotate {role}": rotation(role) for role in ("root", "targets", "snapshot", "timestamp", "rollout", LINE)},
}


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
@pytest.mark.parametrize("name", ACTS)
def test_killed_at_every_write_the_tree_stays_whole_and_a_second_run_finishes(tmp_path: Path, name: str, after: bool) -> None:
    site = make_site(tmp_path / "lib")
    site.publish(tiny_bundle(tmp_path, "0.1.0", seed=1, hidden=200))
    box = Follower(site, tmp_path / "box")
    box.look()
    act = ACTS[name](site, tmp_path)
    write = 0
    while killed_at(site, act, write := write + 1, after):
        assert site.library.verify().problems == [], f"killed at write {write}"
        box.look()
        assert write < 100
    assert site.library.staged_roles() == []
    assert site.library.verify().problems == []
    box.look()


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
def test_a_killed_init_is_finished_by_a_second_run(tmp_path: Path, after: bool) -> None:
    people = [CryptoSigner.generate_ed25519() for _ in range(3)]
    keys = [signer.public_key for signer in people]

    def init(_site: Site) -> Library:
        return Library.init(tmp_path / "lib", keys, keys, snapshot_key=keys[0], timestamp_key=keys[1])

    site = Site(Library(tmp_path / "lib"), tmp_path, tmp_path)
    write = 0
    while killed_at(site, init, write := write + 1, after) and not (tmp_path / "lib" / "staged" / "targets.json").exists():
        assert write < 20
    assert write >= 3
    library = Library(tmp_path / "lib", people)
    library.promote_complete()
    assert library.verify().problems == []


@pytest.mark.parametrize("versions", [4, pytest.param(12, marks=pytest.mark.long)])
def test_killed_at_random_moments_of_a_publication(tmp_path: Path, versions: int) -> None:
    site = make_site(tmp_path / "lib")
    box = Follower(site, tmp_path / "box")
    bundles = [tiny_bundle(tmp_path, f"0.{n}.0", seed=n, hidden=400) for n in range(1, versions + 1)]
    took = time.perf_counter()
    publish.publish(site.library, bundles[0], deltas=False)
    took = time.perf_counter() - took
    killed = 0
    for n, bundle in enumerate(bundles[1:], 2):
        for _ in range(5):
            pid = in_a_process(lambda bundle=bundle: publish.publish(site.library, bundle, deltas=False))  # type: ignore[misc]
            time.sleep(random.random() * 1.2 * took)
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            assert site.library.verify().problems == []
            assert len(box.index().versions) in (n - 1, n)
        publish.publish(site.library, bundle, deltas=False)
        assert [release.version for release in box.index().versions] == [f"0.{m}.0" for m in range(1, n + 1)]
    assert killed > 0
    print(f"{killed} kills struck a publication at work")


def test_a_lost_online_key_is_replaced_although_nothing_can_be_signed_by_both(tmp_path: Path) -> None:
    """The one gap that no order of two files can close: a kill right between them, healed by running the command again."""
    site = make_site(tmp_path / "lib")
    box = Follower(site, tmp_path / "box")
    box.look()
    lost = site.holders["timestamp"][0].public_key.keyid
    del site.library.signers[lost]
    site.library.rotate_key("timestamp", lost, fresh(site).public_key)
    assert site.library.staged_roles() == []
    box.look()
    assert site.library.verify().problems == []
