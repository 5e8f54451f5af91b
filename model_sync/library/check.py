"""Whether a public tree is whole: every signature, length, hash and delegation, and whether what is signed agrees with itself.

It reads plain files only, so the same walk serves the library, a mirror and a USB stick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from model_sync.bundle.manifest import MANIFEST_NAME, Manifest
from model_sync.errors import BundleError, ModelSyncError, TrustError
from model_sync.library.files import read_metadata
from model_sync.library.roles import ROLE_FIELD, AnyMetadata, delegated, verifies
from model_sync.trust.documents import ROLLOUT_PATTERN, ROLLOUT_ROLE, LineIndex, Rollout, file_path, line_path, line_patterns

_CHUNK_BYTES = 1 << 20
Progress = Callable[[int, int], None]


@dataclass
class Verified:
    """What ``verify`` found.

    Attributes:
        problems: what a box would refuse, or what no box should be told; empty when the tree is whole.
        notes: what is no fault but worth knowing.
        targets: files checked.
        bytes: their length together.
        valid_until: when the first role that boxes need expires.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: int = 0
    bytes: int = 0
    valid_until: datetime | None = None

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


class _Broken(Exception):  # noqa: N818  (it ends the walk: what follows hangs on what is missing)
    """A document without which the others cannot be judged."""


def verify(public: Path, now: datetime, progress: Progress | None = None, only: Callable[[str], bool] | None = None) -> Verified:
    """Walk the public tree.

    Args:
        public: the folder that holds ``metadata`` and ``targets``.
        now: what expiry is judged by.
        progress: called with the bytes of targets read and how many there are.
        only: the target paths whose files have to be there; all of them when None.
    """
    walk = _Walk(public, now)
    try:
        walk.metadata()
        walk.files(progress or (lambda _done, _total: None), only or (lambda _path: True))
        walk.documents()
    except _Broken:
        assert walk.found.problems
    return walk.found


class _Walk:
    def __init__(self, public: Path, now: datetime) -> None:
        self.found = Verified()
        self._metadata, self._targets, self._now = public / "metadata", public / "targets", now
        self._roles: dict[str, Targets] = {}

    # --- metadata -----------------------------------------------------------------------------------------------------

    def metadata(self) -> None:
        """Check the chain of roots, then timestamp, snapshot, targets and every delegated role."""
        root = self._roots()
        timestamp = self._read("timestamp.json", Timestamp.type)
        self._signed_by(root, Timestamp.type, timestamp)
        snapshot = self._described(Snapshot.type, timestamp.signed.snapshot_meta)
        self._signed_by(root, Snapshot.type, snapshot)
        self._targets_role(root, Targets.type, snapshot.signed)
        top = self._roles[Targets.type]
        for role in delegated(top):
            self._targets_role(top, role, snapshot.signed)
        for name in sorted(snapshot.signed.meta.keys() - {f"{role}.json" for role in self._roles}):
            # Boxes take a role that vanishes from the snapshot for an attack, so that of a line that was ended stays.
            self.found.notes.append(f"the snapshot names {name}, to which nobody delegates any more: a line that was ended")
        self._delegations(top)

    def _roots(self) -> Root:
        before: Root | None = None
        version = 1
        while (self._metadata / f"{version}.root.json").is_file():
            md = self._read(f"{version}.root.json", Root.type)
            if md.signed.version != version:
                self._stop(f"{version}.root.json is version {md.signed.version}")
            if not md.signed.get_root_verification_result(before, md.signed_bytes, md.signatures):
                self._stop(f"root version {version} lacks signatures of the root before it or of its own keys")
            before, version = md.signed, version + 1
        if before is None:
            self._stop("there is no 1.root.json")
        numbers = {path.name: path.name.split(".")[0] for path in self._metadata.glob("*.root.json")}
        later = [name for name, number in numbers.items() if number.isdigit() and int(number) > version]
        if later:
            self._problem(f"a root version is missing before {', '.join(sorted(later))}: no box gets past it")
        assert before is not None
        self._expiry(Root.type, before.expires)
        return before

    def _read(self, name: str, role: str) -> AnyMetadata:
        try:
            md = read_metadata(self._metadata / name)
        except ModelSyncError as error:
            self._stop(error.message)
        if md.signed.unrecognized_fields.get(ROLE_FIELD) != role:
            self._stop(f"{name} does not say that it is {role}")
        return md

    def _described(self, role: str, info: MetaFile) -> AnyMetadata:
        """Read a versioned document and hold it against what names it."""
        name = f"{info.version}.{role}.json"
        md = self._read(name, role)
        try:
            info.verify_length_and_hashes((self._metadata / name).read_bytes())
        except LengthOrHashMismatchError as error:
            self._problem(f"{name}: {error}")
        if md.signed.version != info.version:
            self._stop(f"{name} is version {md.signed.version}")
        return md

    def _signed_by(self, delegator: Root | Targets, role: str, md: AnyMetadata) -> None:
        if not verifies(delegator, role, md):
            self._stop(f"{role} version {md.signed.version} lacks signatures")
        self._expiry(role, md.signed.expires)

    def _targets_role(self, delegator: Root | Targets, role: str, snapshot: Snapshot) -> None:
        info = snapshot.meta.get(f"{role}.json")
        if info is None:
            self._stop(f"{role} is delegated but not in the snapshot")
        md = self._described(role, info)
        self._signed_by(delegator, role, md)
        self._roles[role] = md.signed

    def _expiry(self, role: str, expires: datetime) -> None:
        until = self.found.valid_until
        self.found.valid_until = expires if until is None else min(until, expires)
        if expires <= self._now:
            self._problem(f"{role} expired on {expires:%Y-%m-%d %H:%M} UTC")

    def _delegations(self, top: Targets) -> None:
        roles = delegated(top)
        for name, role in roles.items():
            wanted = [ROLLOUT_PATTERN] if name == ROLLOUT_ROLE else line_patterns(name)
            if role.paths != wanted or not role.terminating:
                self._problem(f"{name} is not delegated as its own paths, terminating")
            if delegated(self._roles[name]):
                self._problem(f"{name} delegates further: a role has one delegator")
            for path in self._roles[name].targets:
                if not role.is_delegated_path(path):
                    self._problem(f"{path} is outside what {name} may sign")
        for (one, left), (other, right) in combinations(roles.items(), 2):
            patterns = [pattern.replace("*", "x") for pattern in right.paths or []]
            if any(left.is_delegated_path(pattern) for pattern in patterns):
                self._problem(f"{one} and {other} are delegated the same paths")
        if top.targets:
            self._problem("the targets role signs files of its own; only lines and rollout do")

    # --- files --------------------------------------------------------------------------------------------------------

    def files(self, progress: Progress, only: Callable[[str], bool]) -> None:
        """Hash every target's file."""
        targets = [target for role in self._roles.values() for target in role.targets.values() if only(target.path)]
        total = sum(target.length for target in targets)
        for target in targets:
            self._file(target)
            self.found.targets += 1
            self.found.bytes += target.length
            progress(self.found.bytes, total)
        known = {self._where(target) for role in self._roles.values() for target in role.targets.values()}
        if more := sum(1 for path in self._targets.rglob("*") if path.is_file() and path not in known):
            self.found.notes.append(f"{more} files of earlier states are still there: boxes in the middle of a download may want them")

    def _where(self, target: TargetFile) -> Path:
        return self._targets / target.get_prefixed_paths()[0]

    def _file(self, target: TargetFile) -> None:
        digest, length = hashlib.sha256(), 0
        try:
            with self._where(target).open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    length += len(chunk)
        except OSError as error:
            self._problem(f"{target.path}: {error.strerror}")
            return
        if length != target.length:
            self._problem(f"{target.path} has {length} bytes, not the {target.length} that are signed")
        elif digest.hexdigest() != target.hashes.get("sha256"):
            self._problem(f"{target.path} is another file than the one that is signed")

    # --- documents ----------------------------------------------------------------------------------------------------

    def documents(self) -> None:
        """Hold indexes, manifests and rollouts against the targets they speak of."""
        indexes = {}
        for role, targets in self._roles.items():
            if role not in (Targets.type, ROLLOUT_ROLE):
                index = self._parse(LineIndex, targets, line_path(role))
                if index is not None:
                    indexes[role] = index
                    self._index(index, targets)
        rollouts = self._roles.get(ROLLOUT_ROLE)
        for path in rollouts.targets if rollouts is not None else ():
            assert rollouts is not None
            document = self._parse(Rollout, rollouts, path)
            for line, step in document.lines.items() if document is not None else ():
                refusal = indexes[line].refusal(step.version) if line in indexes else "unknown"
                if refusal == "unknown":
                    self._problem(f"{path} names {line} {step.version}, which no line role has signed")
                elif refusal is not None:
                    self.found.notes.append(f"{path} names {line} {step.version}, which is {refusal}: no box takes it")

    def _parse(self, kind: Any, targets: Targets, path: str) -> Any:
        target = targets.targets.get(path)
        try:
            return kind.parse(self._where(target).read_bytes()) if target is not None else self._problem(f"{path} is not signed")
        except OSError:
            return None  # said already, when its file was hashed
        except TrustError as error:
            return self._problem(f"{path}: {error.message}")

    def _index(self, index: LineIndex, targets: Targets) -> None:
        for release in index.versions:
            path = file_path(index.line, release.version, MANIFEST_NAME)
            self._agrees(targets, path, release.digest)
            if (target := targets.targets.get(path)) is None or not self._where(target).is_file():
                continue
            try:
                manifest = Manifest.parse(self._where(target).read_bytes())
            except BundleError as error:
                self._problem(f"{path}: {error.message}")
                continue
            if (manifest.name, manifest.version) != (index.line, release.version):
                self._problem(f"{path} is the manifest of {manifest.name} {manifest.version}")
            for file, sha256 in manifest.digests().items():
                self._agrees(targets, file_path(index.line, release.version, file), sha256)
        whole = {target.hashes.get("sha256") for target in targets.targets.values()}
        for delta in index.deltas:
            if delta.path not in targets.targets or not {delta.from_sha256, delta.to_sha256} <= whole:
                self._problem(f"{delta.path} leads from or to a file that is not signed")

    def _agrees(self, targets: Targets, path: str, sha256: str) -> None:
        target = targets.targets.get(path)
        if target is None or target.hashes.get("sha256") != sha256:
            self._problem(f"{path} is not the file that the version names")

    def _problem(self, what: str) -> None:
        self.found.problems.append(what)

    def _stop(self, what: str) -> NoReturn:
        self._problem(what)
        raise _Broken
