"""The directory fetcher: python-tuf's ``FetcherInterface`` on a directory, such as a USB stick."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tuf.ngclient.fetcher import FetcherInterface

from model_sync.transport.errors import NotTheLibrary, Refused, TooLong, Unreachable
from model_sync.transport.transfer import is_metadata

LIBRARY_SCHEME = "library:"
_COPY_BYTES = 1024 * 1024


class DirectoryFetcher(FetcherInterface):
    """Reads ``library:`` URLs from a directory, such as a USB stick's ``clinic-models``.

    The stick is not trusted: links and paths outside the directory are refused, lengths are checked.

    Args:
        directory: The directory with ``metadata`` and ``targets``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self._open(url) as stream:
            while chunk := stream.read(_COPY_BYTES):
                yield chunk

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return one metadata file of at most ``max_length`` bytes; errors as :meth:`download_file`, and NotTheLibrary."""
        with self.download_file(url, max_length) as stream:
            body = stream.read(max_length + 1)
        if not is_metadata(body):
            raise NotTheLibrary(f"{url.removeprefix(LIBRARY_SCHEME)} on the stick is no metadata: the file is damaged")
        return body

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """Yield an open file of at most ``max_length`` bytes, to be read from its beginning.

        Raises:
            Refused: 404, there is no such file, or it is a link.
            TooLong: it is longer than ``max_length``.
            Unreachable: the stick cannot be read, or was removed.
        """
        with self._open(url) as stream:
            if os.fstat(stream.fileno()).st_size > max_length:
                raise TooLong(f"{url.removeprefix(LIBRARY_SCHEME)} has more than {max_length} bytes")
            yield stream

    def _open(self, url: str) -> IO[bytes]:
        """Open a file segment by segment, following no link."""
        names = url.removeprefix(LIBRARY_SCHEME).split("/")
        if not url.startswith(LIBRARY_SCHEME) or any(name in ("", ".", "..") or "\0" in name for name in names):
            raise Refused(f"{url!r} is no file of a library", 404)
        with _translated_errors(str(self._directory), absent=False):
            folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        path = "/".join(names)
        with _translated_errors(path):
            try:
                for name in names[:-1]:
                    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                    os.close(folder)
                    folder = inner
                file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            finally:
                os.close(folder)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise Refused(f"{path} on the stick is no plain file", 404)
        return io.BufferedReader(_StickFile(file, path))


class _StickFile(io.FileIO):
    """A file on a stick that may be removed during the read, which is not an error of the box's own disk."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._path = path
        super().__init__(descriptor, "rb")

    def readinto(self, buffer: Any) -> int:
        with _translated_errors(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _translated_errors(self._path):
            return super().readall()


@contextmanager
def _translated_errors(path: str, *, absent: bool = True) -> Iterator[None]:
    """Translate a failed read to an error of the download; with ``absent`` a missing file is a 404."""
    try:
        yield
    except OSError as error:
        if absent and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
            raise Refused(f"{path} is not on the stick", 404) from error
        raise Unreachable(f"{path} cannot be read: {error.strerror or error}", code="sync.usb", final=True) from error
