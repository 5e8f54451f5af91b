"""Several base URLs: one that is behind, damaged or rotten neither stops an update nor raises a false alarm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_sync.errors import LibraryUnreachable, TrustError
from tests.support.bad_server import DOWN, BadServer, Reply
from tests.support.library_site import Site, make_site, tiny_bundle
from tests.support.sync_box import LINE, Box, make_box

GARBLED = Reply(garble=0)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = make_site(tmp_path / "library")
    site.publish(tiny_bundle(tmp_path / "made"))
    site.rollout("stable", LINE, "0.1.0")
    return site


@pytest.fixture
def servers(site: Site, tmp_path: Path) -> Iterator[tuple[BadServer, BadServer]]:
    """A mirror that stays behind, and one that serves what the library has now."""
    shutil.copytree(site.public, tmp_path / "behind")
    site.publish(tiny_bundle(tmp_path / "made", "0.2.0", seed=2))
    site.rollout("stable", LINE, "0.2.0")
    with BadServer(directory=tmp_path / "behind") as behind, BadServer(directory=site.public) as good:
        yield behind, good


def forged(site: Site) -> bytes:
    """A timestamp that nobody signed."""
    timestamp = json.loads((site.public / "metadata" / "timestamp.json").read_text())
    timestamp["signed"]["version"] += 1
    return json.dumps(timestamp).encode()


def box_with(tmp_path: Path, site: Site, *servers: BadServer) -> Box:
    box = make_box(tmp_path / "box", site)
    changes = {"urls": [server.url for server in servers], "attempts": 2, "backoff_s": 0.01, "max_backoff_s": 0.02}
    return Box(box.settings.model_copy(update=changes))


def test_a_first_mirror_that_fell_behind_is_passed_over(servers: tuple[BadServer, BadServer], site: Site, tmp_path: Path) -> None:
    behind, good = servers
    box = box_with(tmp_path, site, good)
    box.client().pull()
    both = Box(box.settings.model_copy(update={"urls": [behind.url, good.url]}))
    both.client().pull()
    assert both.status()["state"] == "ok"
    assert both.wants() == "0.2.0"


def test_a_mirror_that_is_behind_while_the_other_is_down_is_no_alarm(
    servers: tuple[BadServer, BadServer], site: Site, tmp_path: Path
) -> None:
    behind, good = servers
    box = box_with(tmp_path, site, good)
    box.client().pull()
    good.always("*", DOWN)
    both = Box(box.settings.model_copy(update={"urls": [good.url, behind.url]}))
    with pytest.raises(LibraryUnreachable):
        both.client().pull()
    assert both.status()["state"] == "unreachable"


def test_a_mirror_with_damaged_metadata_is_passed_over(servers: tuple[BadServer, BadServer], site: Site, tmp_path: Path) -> None:
    behind, good = servers
    behind.always("/metadata/timestamp.json", Reply(body=forged(site)))
    box = box_with(tmp_path, site, behind, good)
    box.client().pull()
    assert box.wants() == "0.2.0"
    assert box.status()["state"] == "ok"


def test_a_forgery_is_an_alarm_although_the_other_mirrors_are_down(
    servers: tuple[BadServer, BadServer], site: Site, tmp_path: Path
) -> None:
    behind, good = servers
    behind.always("/metadata/timestamp.json", Reply(body=forged(site)))
    good.always("*", DOWN)
    with pytest.raises(TrustError):
        box_with(tmp_path, site, behind, good).client().pull()


def test_a_mirror_whose_files_rot_is_passed_over(servers: tuple[BadServer, BadServer], site: Site, tmp_path: Path) -> None:
    _, good = servers
    with BadServer(directory=site.public) as rotten:
        for path in (site.public / "targets").rglob("*.onnx"):
            rotten.always(f"/targets/{path.relative_to(site.public / 'targets')}", GARBLED)
        box = box_with(tmp_path, site, rotten, good)
        box.client().pull()
        assert box.wants() == "0.2.0"
        alone = Box(box_with(tmp_path / "second", site, rotten).settings)
        alone.client().pull()
        assert alone.status()["state"] == "untrusted"
        assert alone.wants() is None
