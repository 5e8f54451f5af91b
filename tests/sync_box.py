"""A box that follows a test library, and what somebody with the keys could do to that library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Targets

from model_sync.agent.client import Client
from model_sync.agent.decision import Pulled
from model_sync.bundle import ModelBundle
from model_sync.settings import SyncSettings
from model_sync.trust import offline_check
from tests.library_site import Site

LINE = "cxr-pneumonia"


@dataclass
class Box:
    """One box: its settings, and short ways to what it believes and wants."""

    settings: SyncSettings

    def client(self, **options: Any) -> Client:
        return Client(self.settings, **options)

    def pull(self, on_progress: Callable[[Any], None] | None = None, **options: Any) -> Pulled:
        return self.client(**options).pull(on_progress)

    def facts(self, now: datetime | None = None) -> offline_check.Facts:
        return offline_check.check(self.settings.exchange_dir, self.settings.root, now)

    def wants(self, line: str = LINE) -> str | None:
        file = self.settings.exchange_dir / "directives.json"
        lines = json.loads(file.read_text())["lines"] if file.exists() else {}
        return lines[line]["version"] if line in lines else None

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.settings.exchange_dir / "sync-status.json").read_text())
        return status

    def bundles(self) -> set[str]:
        """The versions whose bundle is visible; each is loaded, so that half a bundle fails the test."""
        folder = self.settings.exchange_dir / "bundles"
        visible = [path for path in folder.glob("*") if not path.name.startswith(".")] if folder.is_dir() else []
        loaded = [(path, ModelBundle.load(path)) for path in visible]
        assert all(path.name == bundle.digest for path, bundle in loaded)
        return {bundle.manifest.version for _, bundle in loaded}

    @property
    def metadata(self) -> Path:
        return self.settings.state_dir / "metadata"


def make_box(directory: Path, site: Site, *urls: str, **options: Any) -> Box:
    """Provision a box in ``directory`` with the root of ``site``."""
    values = {
        "state_dir": directory / "state", "exchange_dir": directory / "exchange", "root": directory / "root.json", "box_id": "box-1",
        "urls": list(urls), "attempts": 1, "backoff_s": 0.0, "disk_reserve_bytes": 0, "min_speed_bytes_per_s": 0,
    } | options  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(site.root, directory / "root.json")
    return Box(SyncSettings.parse(values))


def write_config(box: Box) -> Path:
    """Lay the box's settings as a file, for the command line; returns it."""
    file = box.settings.state_dir / "sync.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in box.settings.model_dump(mode="json").items() if value is not None}
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return file


def newest(site: Site, role: str) -> Metadata[Any]:
    """The newest public metadata of a role."""
    folder = site.public / "metadata"
    if role == "timestamp":
        return Metadata.from_file(str(folder / "timestamp.json"))
    version = max(int(file.name.split(".")[0]) for file in folder.glob(f"*.{role}.json"))
    return Metadata.from_file(str(folder / f"{version}.{role}.json"))


def forge(
    site: Site,
    edits: Mapping[str, Callable[[Any], None]],
    *,
    signers: Mapping[str, Iterable[CryptoSigner]] | None = None,
    bump: bool = True,
) -> None:
    """Edit roles behind the library's back and sign them with the keys that the holders have (or with ``signers``).

    Snapshot and timestamp follow. Roles are edited in the order given, so a delegator comes before its roles.
    """
    folder = site.public / "metadata"
    by_role = {role: list(holders) for role, holders in {**site.holders, **(signers or {})}.items()}
    written: dict[str, bytes] = {}

    def sign(role: str, edit: Callable[[Any], None]) -> Any:
        md = newest(site, role)
        md.signed.version += 1
        edit(md.signed)
        md.signatures.clear()
        for signer in by_role[role]:
            md.sign(signer, append=True)
        name = "timestamp.json" if role == "timestamp" else f"{md.signed.version}.{role}.json"
        written[role] = md.to_bytes()
        (folder / name).write_bytes(written[role])
        return md.signed

    versions = {role: sign(role, edit).version for role, edit in edits.items() if role not in ("snapshot", "timestamp")}

    def snapshot(signed: Any) -> None:
        for role, version in versions.items():
            if role != "root":
                signed.meta[f"{role}.json"] = MetaFile.from_data(version, written[role], ["sha256"])
        edits.get("snapshot", _as_it_is)(signed)

    version = sign("snapshot", snapshot).version

    def timestamp(signed: Any) -> None:
        signed.snapshot_meta = MetaFile.from_data(version, written["snapshot"], ["sha256"])
        signed.unrecognized_fields["x-issued-at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        edits.get("timestamp", _as_it_is)(signed)

    sign("timestamp", timestamp)


def _as_it_is(signed: Any) -> None:
    """Change nothing."""


def revoke(role: str) -> Callable[[Targets], None]:
    """The edit of ``targets`` that takes a role's delegation away."""

    def edit(targets: Targets) -> None:
        assert targets.delegations is not None
        assert targets.delegations.roles is not None
        del targets.delegations.roles[role]

    return edit


def expires(moment: datetime) -> Callable[[Any], None]:
    """The edit that gives a role another expiry."""

    def edit(signed: Any) -> None:
        signed.expires = moment.replace(microsecond=0)

    return edit


def days(count: float) -> datetime:
    """Now and so many days."""
    return datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=count)
