"""A clinic whose box follows a library: the library, the sync agent of one box, and the box.

The first clinic of a process is made for real: keys, a signed release, a pull, a self-test. The others are copies of its directory, with
the same keys; what a copy says of places (the box's settings, where a bundle came from) is written anew.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from appliance.core.settings import Settings
from appliance.lifecycle.activation import Activator
from appliance.store.store import Store
from model_sync.agent.report import BoxReport
from model_sync.library.library import Library
from tests.support.activation_box import LINE, Box, digest_of, write_settings
from tests.support.library_site import Site, make_site, serve, tiny_bundle
from tests.support.sync_box import Box as Agent
from tests.support.sync_box import make_box

_templates: dict[tuple[str, ...], tuple[Path, Site]] = {}


class Clinic:
    """A library, the agent of one box, and the box."""

    def __init__(self, directory: Path, settings: Settings, url: str, site: Site) -> None:
        self.site = site
        self.agent: Agent = make_box(directory / "agent", site, url)
        self.exchange = self.agent.settings.exchange_dir
        self.exchange.mkdir(parents=True, exist_ok=True)
        given = {"exchange_dir": self.exchange, "library_root": self.agent.settings.root}
        self.box = Box(directory, Store(write_settings(settings, **given)))
        self.activator: Activator = self.box.activator()

    def release(self, version: str, bundle: Path | None = None, **options: Any) -> str:
        """Publish a version and let this box's ring have it; its digest."""
        made = bundle or self.box.bundle(version)
        self.site.publish(made, **options)
        self.site.rollout("stable", LINE, version)
        return digest_of(made)

    def follow(self) -> None:
        """The agent pulls, the box follows until it has nothing more to do."""
        self.agent.pull()
        self.settle()

    def settle(self) -> None:
        """The box does what there is to do."""
        self.activator = self.box.activator()  # as after a restart: nothing is known but what is on the disk
        self.box.settle(self.activator)

    def direct(self, **changes: str) -> None:
        """What an agent that was broken into might want."""
        path = self.exchange / "directives.json"
        directives = json.loads(path.read_text())
        directives["lines"][LINE] |= changes
        path.unlink()
        path.write_text(json.dumps(directives))

    def report(self) -> dict[str, Any]:
        """What the box tells, held against the centre's schema."""
        raw = (self.exchange / "box-report.json").read_bytes()
        BoxReport.parse(raw)
        report: dict[str, Any] = json.loads(raw)
        return report

    def audited(self, actor: str | None = None) -> list[dict[str, Any]]:
        """Audit entries about the library."""
        rows = self.box.store.database.query("SELECT entry FROM audit ORDER BY seq")
        entries = [json.loads(row["entry"]) for row in rows]
        return [entry for entry in entries if entry["object"] == "library" and actor in (None, entry["actor"])]


def _template(settings: Settings, lines: tuple[str, ...]) -> tuple[Path, Site]:
    """The directory of a clinic that runs version 1.0.0 of the first line, closed, and its library."""
    if lines not in _templates:
        directory = Path(tempfile.mkdtemp(prefix="clinic-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        site = make_site(directory / "library", lines=lines)
        with serve(site.public) as url:
            made = Clinic(directory, settings.model_copy(update={"data_dir": directory / "box"}), url, site)
            for line in lines[1:]:
                site.publish(tiny_bundle(made.box.bundles, "1.0.0", line=line))
            made.release("1.0.0")
            made.follow()
            assert made.box.last() == ("good", "")
            made.box.store.close()
        _templates[lines] = directory, site
    return _templates[lines]


@contextmanager
def open_clinic(directory: Path, settings: Settings, lines: tuple[str, ...] = (LINE,)) -> Iterator[Clinic]:
    """A box that runs version 1.0.0 of the library's first line; the others are only signed."""
    template, original = _template(settings, lines)
    places = {"library": directory / "library", "agent": directory / "agent", "bundles": directory / "bundles", "box": settings.data_dir}
    for name, place in places.items():
        shutil.copytree(template / name, place, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    library = Library(directory / "library", original.library.signers.values())
    public = library.files.public
    site = replace(original, library=library, public=public, root=public / "metadata" / "1.root.json", holders=dict(original.holders))
    with serve(site.public) as url:
        made = Clinic(directory, settings, url, site)
        with made.box.store.database.transaction() as tx:
            tx.execute("UPDATE activations SET origin = replace(origin, ?, ?)", (str(template), str(directory)))
        yield made
        made.box.store.database.verify_audit()
        made.box.store.close()
