"""The check of a public tree: every signature, length, hash and delegation, and the consistency of the signed documents.

It reads files only, so the same check works for the library, a mirror and a USB stick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from model_sync.bundle import MANIFEST_NAME, Manifest, sha256_of
from model_sync.errors import BundleError, ModelSyncError, TrustError
from model_sync.library.files import read_metadata
from model_sync.library.roles import ROLE_FIELD, AnyMetadata, delegated, verifies
from model_sync.trust.documents import ROLLOUT_PATTERN, ROLLOUT_ROLE, LineIndex, Rollout, file_path, line_path, line_patterns

Progress = Callable[[int, int], None]


@dataclass
class VerificationResult:
    """The result of ``verify``.

    Attributes:
        problems: what a box would refuse; empty when the tree is intact.
        notes: remarks that are no problems.
        targets: number of checked files.
        bytes: their total length.
        valid_until: the earliest expiry of a role that boxes need.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: int = 0
    bytes: int = 0
    valid_until: datetime | None = None

    @property
    def is_clean(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


class _CannotContinueError(Exception):
    """A document is wrong that is needed to check the others."""


def verify(
    public: Path, now: datetime, on_progress: Progress | None = None, only: Callable[[str], bool] | None = None
) -> VerificationResult:
    """Verify the public tree.

    Args:
        public: the folder that holds ``metadata`` and ``targets``.
        now: the time against which expiry is checked.
        on_progress: called with the bytes of targets read so far and in all.
        only: returns whether the file of a target path has to exist; all have to when None.
    """
    verifier = _TreeVerifier(public, now)
    try:
        verifier.metadata()
        verifier.files(on_progress or (lambda _done, _total: None), only or (lambda _path: True))
        verifier.documents()
    except _CannotContinueError:
        assert verifier.result.problems
    return verifier.result


class _TreeVerifier:
    def __init__(self, public: Path, now: datetime) -> None:
        self.result = VerificationResult()
        self._metadata, self._targets, self._now = public / "metadata", public / "targets", now
        self._roles: dict[str, Targets] = {}

    def metadata(self) -> None:
        """Check the chain of roots, then timestamp, snapshot, targets and every delegated role."""
        root = self._roots()
        timestamp = self._read("timestamp.json", Timestamp.type)
        self._require_signatures(root, Timestamp.type, timestamp)
        snapshot = self._read_listed(Snapshot.type, timestamp.signed.snapshot_meta)
        self._require_signatures(root, Snapshot.type, snapshot)
        self._targets_role(root, Targets.type, snapshot.signed)
        top = self._roles[Targets.type]
        for role in delegated(top):
            self._targets_role(top, role, snapshot.signed)
        for name in sorted(snapshot.signed.meta.keys() - {f"{role}.json" for role in self._roles}):
            # Boxes treat a role that vanishes from the snapshot as an attack, so the role of an ended model line stays.
            self.result.notes.append(f"the snapshot names {name}, which has no delegation any more: a model line that was ended")
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
            self._problem(f"a root version is missing before {', '.join(sorted(later))}: no box can verify a later one")
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

    def _read_listed(self, role: str, info: MetaFile) -> AnyMetadata:
        """Read a versioned document and compare it with the metadata that names it."""
        name = f"{info.version}.{role}.json"
        md = self._read(name, role)
        try:
            info.verify_length_and_hashes((self._metadata / name).read_bytes())
        except LengthOrHashMismatchError as error:
            self._problem(f"{name}: {error}")
        if md.signed.version != info.version:
            self._stop(f"{name} is version {md.signed.version}")
        return md

    def _require_signatures(self, delegator: Root | Targets, role: str, md: AnyMetadata) -> None:
        if not verifies(delegator, role, md):
            self._stop(f"{role} version {md.signed.version} lacks signatures")
        self._expiry(role, md.signed.expires)

    def _targets_role(self, delegator: Root | Targets, role: str, snapshot: Snapshot) -> None:
        info = snapshot.meta.get(f"{role}.json")
        if info is None:
            self._stop(f"{role} is delegated but not in the snapshot")
        md = self._read_listed(role, info)
        self._require_signatures(delegator, role, md)
        self._roles[role] = md.signed

    def _expiry(self, role: str, expires: datetime) -> None:
        until = self.result.valid_until
        self.result.valid_until = expires if until is None else min(until, expires)
        if expires <= self._now:
            self._problem(f"{role} expired on {expires:%Y-%m-%d %H:%M} UTC")

    def _delegations(self, top: Targets) -> None:
        roles = delegated(top)
        for name, role in roles.items():
            wanted = [ROLLOUT_PATTERN] if name == ROLLOUT_ROLE else line_patterns(name)
            if role.paths != wanted or not role.terminating:
                self._problem(f"the delegation to {name} is not terminating or has other paths than its own")
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
            self._problem("the targets role signs files of its own; only model lines and rollout may")

    def files(self, on_progress: Progress, only: Callable[[str], bool]) -> None:
        """Hash every target's file."""
        targets = [target for role in self._roles.values() for target in role.targets.values() if only(target.path)]
        total = sum(target.length for target in targets)
        for target in targets:
            self._file(target)
            self.result.targets += 1
            self.result.bytes += target.length
            on_progress(self.result.bytes, total)
        known = {self._where(target) for role in self._roles.values() for target in role.targets.values()}
        if more := sum(1 for path in self._targets.rglob("*") if path.is_file() and path not in known):
            self.result.notes.append(f"{more} files of earlier states still exist: boxes may be downloading them")

    def _where(self, target: TargetFile) -> Path:
        return self._targets / target.get_prefixed_paths()[0]

    def _file(self, target: TargetFile) -> None:
        path = self._where(target).resolve()
        try:
            length, digest = path.stat().st_size, sha256_of(path)
        except OSError as error:
            self._problem(f"{target.path}: {error.strerror}")
            return
        if length != target.length:
            self._problem(f"{target.path} has {length} bytes, not the {target.length} that are signed")
        elif digest != target.hashes.get("sha256"):
            self._problem(f"{target.path} is not the file that is signed")

    def documents(self) -> None:
        """Compare indexes, manifests and rollouts with the targets that they name."""
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
                    self._problem(f"{path} names {line} {step.version}, which the role of no model line has signed")
                elif refusal is not None:
                    self.result.notes.append(f"{path} names {line} {step.version}, which is {refusal}: no box installs it")

    def _parse(self, kind: Any, targets: Targets, path: str) -> Any:
        target = targets.targets.get(path)
        try:
            return kind.parse(self._where(target).read_bytes()) if target is not None else self._problem(f"{path} is not signed")
        except OSError:
            return None  # reported when its file was hashed
        except TrustError as error:
            return self._problem(f"{path}: {error.message}")

    def _index(self, index: LineIndex, targets: Targets) -> None:
        for release in index.versions:
            path = file_path(index.line, release.version, MANIFEST_NAME)
            self._check_target(targets, path, release.digest)
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
                self._check_target(targets, file_path(index.line, release.version, file), sha256)
        signed = {target.hashes.get("sha256") for target in targets.targets.values()}
        for delta in index.deltas:
            if delta.path not in targets.targets or not {delta.from_sha256, delta.to_sha256} <= signed:
                self._problem(f"{delta.path} is from or to a file that is not signed")

    def _check_target(self, targets: Targets, path: str, sha256: str) -> None:
        target = targets.targets.get(path)
        if target is None or target.hashes.get("sha256") != sha256:
            self._problem(f"{path} is not the file that the version names")

    def _problem(self, what: str) -> None:
        self.result.problems.append(what)

    def _stop(self, what: str) -> NoReturn:
        self._problem(what)
        raise _CannotContinueError
