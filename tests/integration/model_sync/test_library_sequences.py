"""Any sequence of what a central team does leaves a whole tree, which a box that follows along accepts."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from securesystemslib.signer import CryptoSigner

from model_sync.library import publish, rollouts, usb_export
from model_sync.library.library import Library
from model_sync.trust.documents import Rollout
from tests.support.library_follower import Follower
from tests.support.library_site import make_site, tiny_bundle

LINES = ("a", "b")
MEMORY = "/dev/shm"  # noqa: S108  (a name of its own is made in it)
ROLES = ("root", "targets", "snapshot", "timestamp", "rollout", *LINES)


class Centre(RuleBasedStateMachine):
    """A central team that publishes, withdraws, rolls out and changes keys, some of it signed late and by others."""

    @initialize()
    def begin(self) -> None:
        # In memory where the machine has it: thousands of fsyncs would wait for the disk, and no power is cut here.
        self.directory = Path(tempfile.mkdtemp(prefix="centre-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
        self.site = make_site(self.directory / "lib", lines=LINES)
        self.library = self.site.library
        self.box = Follower(self.site, self.directory / "box")
        self.versions: dict[str, list[str]] = {line: [] for line in LINES}
        self.withdrawn: dict[str, set[str]] = {line: set() for line in LINES}
        self.late: list[str] = []
        self.count = 0

    def working(self, late: bool) -> Library:
        """The library with every key at hand, or with the online ones only."""
        return self.site.by_hand() if late else self.library

    @rule(line=st.sampled_from(LINES), late=st.booleans(), raised=st.booleans())
    def publish(self, line: str, late: bool, raised: bool) -> None:
        self.count += 1
        version = f"0.{self.count}.0"
        bundle = tiny_bundle(self.directory / "bundles", version, seed=self.count % 3, line=line)
        library = self.working(late)
        publish.publish(library, bundle, deltas=not late, minimum_version=version if raised else None)
        shutil.rmtree(bundle)
        self.versions[line].append(version)

    @precondition(lambda self: any(self.versions.values()))
    @rule(data=st.data(), late=st.booleans())
    def withdraw(self, data: st.DataObject, late: bool) -> None:
        line = data.draw(st.sampled_from([line for line in LINES if self.versions[line]]))
        version = data.draw(st.sampled_from(self.versions[line]))
        if version not in self.withdrawn[line]:
            self.withdrawn[line].add(version)
            publish.withdraw(self.working(late), line, version, "for a test")

    @rule(data=st.data(), percent=st.floats(0, 100), paused=st.booleans(), ring=st.sampled_from(["stable", "canary"]))
    def rollout(self, data: st.DataObject, percent: float, paused: bool, ring: str) -> None:
        line = data.draw(st.sampled_from(LINES))
        index = self.library.public_index(line)
        usable = [release.version for release in index.versions if index.refusal(release.version) is None]
        if usable:
            version = data.draw(st.sampled_from(usable))
            rollouts.rollout(self.library, ring, line, version, percent, paused=paused)
            if "rollout" not in self.library.staged_roles():
                assert Rollout.parse(self.box.look(f"rollout/{ring}.json")).lines[line].version == version

    @rule(role=st.sampled_from(ROLES), number=st.integers(0, 2), lost=st.booleans())
    def rotate(self, role: str, number: int, lost: bool) -> None:
        signers = self.site.holders[role]
        old, new = signers[number % len(signers)], CryptoSigner.generate_ed25519()
        self.library.signers[new.public_key.keyid] = new
        if lost and role in ("root", "targets"):
            self.library.signers.pop(old.public_key.keyid, None)
        self.library.rotate_key(role, old.public_key.keyid, new.public_key)
        self.site.holders[role] = [signer for signer in signers if signer is not old] + [new]

    @rule(role=st.sampled_from(["root", "targets", "rollout", *LINES]), late=st.booleans())
    def renew(self, role: str, late: bool) -> None:
        self.working(late).renew(role)

    @rule(line=st.sampled_from(LINES))
    def end_and_begin_again(self, line: str) -> None:
        self.everybody_signs()
        while line in self.library.lines():
            rollouts.end_line(self.library, line)
            self.everybody_signs_what_waits()
        assert line not in self.box_lines()
        assert self.library.verify().problems == []
        self.library.add_line(line, [signer.public_key for signer in self.site.holders[line]])
        self.everybody_signs()

    @rule()
    def refresh(self) -> None:
        self.library.refresh_timestamp()

    def everybody_signs_what_waits(self) -> None:
        people = [signer for signers in self.site.holders.values() for signer in signers] + list(self.library.signers.values())
        for role in self.library.staged_roles():
            for signer in people:
                if role in self.library.staged_roles() and signer.public_key.keyid in self.library.keys(role):
                    self.library.sign(role, signer)
        assert self.library.staged_roles() == []

    @rule()
    def everybody_signs(self) -> None:
        self.everybody_signs_what_waits()
        for line in LINES:
            index = self.box_index(line)
            assert [release.version for release in index.versions] == self.versions[line]
            assert {item.version for item in index.withdrawn} == self.withdrawn[line]

    @rule()
    def a_stick_is_whole(self) -> None:
        (self.directory / "stick").mkdir(exist_ok=True)
        usb_export.export(self.site.public, self.directory / "stick")

    def box_lines(self) -> list[str]:
        found = []
        for line in LINES:
            with contextlib.suppress(AssertionError):
                self.box_index(line)
                found.append(line)
        return found

    def box_index(self, line: str):  # type: ignore[no-untyped-def]
        from model_sync.trust.documents import LineIndex

        return LineIndex.parse(self.box.look(f"models/{line}/line.json"))

    @invariant()
    def the_tree_is_whole_and_a_box_accepts_it(self) -> None:
        if hasattr(self, "library"):
            assert self.library.verify().problems == []
            for line in LINES:
                self.box_index(line)
            self.library.status()

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)


Centre.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestCentre = Centre.TestCase
