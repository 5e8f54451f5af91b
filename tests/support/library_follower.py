"""A box that follows a library with python-tuf alone, and the refusals of the library."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuf.ngclient import FetcherInterface, Updater

from model_sync.errors import PublishError
from model_sync.transport.directory_fetcher import DirectoryFetcher
from model_sync.trust.documents import LineIndex
from tests.support.library_site import Site

LINE = "cxr-pneumonia"


class Follower:
    """A box's Updater that keeps its trust state, with the tree as its network."""

    def __init__(self, site: Site, directory: Path) -> None:
        self.fetcher: FetcherInterface = DirectoryFetcher(site.public)
        self.directory, self.root = directory, site.root.read_bytes()
        directory.mkdir(parents=True, exist_ok=True)

    def look(self, path: str = f"models/{LINE}/line.json") -> bytes:
        """Refresh from scratch on the kept state and return one verified file."""
        updater = Updater(
            str(self.directory), "library:metadata/", str(self.directory), "library:targets/", fetcher=self.fetcher, bootstrap=self.root
        )
        target = updater.get_targetinfo(path)
        assert target is not None, path
        return Path(updater.download_target(target, str(self.directory / "file"))).read_bytes()

    def index(self) -> LineIndex:
        """The line's index, verified."""
        return LineIndex.parse(self.look())


def refused(says: str) -> pytest.RaisesExc[PublishError]:
    return pytest.raises(PublishError, match=says)
