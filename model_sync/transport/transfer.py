"""One file by one request: the response is checked before its bytes are used; :mod:`model_sync.transport.fetcher` repeats it.

Ranges are those of RFC 9110 section 14, If-Range its section 13.1.5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from model_sync.transport.connection import Connection, LibraryResponse, host_of
from model_sync.transport.errors import NotTheLibrary, RangeViolation, Refused, TooLong, Unreachable
from model_sync.transport.parts import Part

# Documents up to this length may use the reserve of the day's budget, like metadata.
SMALL_TARGET_BYTES = 1024 * 1024
_CONTENT_RANGE = re.compile(r"(?i:bytes) ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII)


def fetch_metadata(connection: Connection, url: str, max_length: int) -> bytes:
    """Return one metadata file, held in memory.

    Raises:
        NotTheLibrary: it is a web page or no TUF metadata. Its content is not checked here.
        TooLong: more than ``max_length`` bytes.
        Unreachable, TooSlow, Refused, BudgetExhausted: see there.
    """
    with connection.get(url, {}, small=True) as answer:
        if answer.status != 200 or answer.is_page:
            raise NotTheLibrary(f"{answer.host} answered {answer.status}, and not with metadata (a login page?)")
        if (answer.content_length() or 0) > max_length:
            raise TooLong(f"{answer.host} announces metadata of more than {max_length} bytes")
        body = bytearray()
        while chunk := answer.read(max_length + 1 - len(body)):
            body += chunk
            if len(body) > max_length:
                raise TooLong(f"{answer.host} sent metadata of more than {max_length} bytes")
        if not is_metadata(bytes(body)):
            raise NotTheLibrary(f"{answer.host} sent something other than metadata (a login page?)")
        return bytes(body)


def fetch_target(connection: Connection, url: str, part: Part, *, without_range: bool, on_chunk: Callable[[], None]) -> None:
    """Receive the missing bytes of a part.

    Args:
        connection: The connection to the library.
        url: The URL of the file.
        part: The part to complete.
        without_range: Request the full file: this server answered a range wrongly.
        on_chunk: Called when bytes were written.

    Raises:
        RangeViolation: another range or another length; nothing was written.
        NotTheLibrary, Unreachable, TooSlow, Refused, BudgetExhausted, DiskFull: see there; the received bytes are kept.
    """
    headers = {} if without_range else _range_headers(part, host_of(url))
    try:
        with connection.get(url, headers, small=part.length <= SMALL_TARGET_BYTES) as answer:
            _start(answer, part, headers)
            while not part.is_complete:
                wanted = part.length - part.size
                chunk = answer.read(wanted)
                if not chunk:
                    raise Unreachable(f"{answer.host} ended {part.name} after {part.size} of {part.length} bytes")
                part.write(chunk[:wanted])
                on_chunk()
    except Refused as error:
        if error.status_code == 416 and headers:
            raise RangeViolation(f"{error.message} for {part.name}: it does not have the rest of the file", final=False) from error
        raise


def _start(answer: LibraryResponse, part: Part, headers: dict[str, str]) -> None:
    """Check that the response is the requested range or the full file, and truncate the part where it starts."""
    start, final = 0, not headers
    if answer.is_page and not part.info.path.endswith((".html", ".htm")):
        raise NotTheLibrary(f"{answer.host} sent a web page instead of {part.name} (a login page?)")
    if answer.status == 206 and headers:
        start = part.size
        check_content_range(answer.headers, start, part.length)
        if _of_another_file(answer, headers.get("If-Range", "")):
            raise RangeViolation(f"{answer.host} sent a range of another version of {part.name}", final=final)
    elif answer.status != 200:
        raise RangeViolation(f"{answer.host} answered {answer.status} for {part.name}, which was not asked for", final=final)
    announced = answer.content_length()
    if announced is not None and announced != part.length - start:
        raise RangeViolation(f"{answer.host} announces {announced} bytes of {part.name} instead of {part.length - start}", final=final)
    part.start_at(validator=answer.validator, host=answer.host, at=start)


def _of_another_file(answer: LibraryResponse, validator: str) -> bool:
    """Return whether a 206 response has another validator of the kind that was sent: the server ignored If-Range."""
    given = answer.etag if validator.startswith('"') else answer.headers.get("Last-Modified", "").strip()
    return validator != "" and given not in ("", validator)


def check_content_range(headers: Mapping[str, str], start: int, length: int) -> None:
    """Check that a 206 response carries exactly the bytes from ``start`` to the end of a file of ``length`` bytes.

    Raises:
        RangeViolation: Content-Range is missing, not readable or different, or there are several ranges.
    """
    kind = headers.get("Content-Type", "").strip().lower()
    text = headers.get("Content-Range", "").strip()
    match = _CONTENT_RANGE.fullmatch(text)
    if kind.startswith("multipart/") or match is None:
        raise RangeViolation(f"the answer to a range has no readable Content-Range ({text[:60]!r})", final=False)
    if tuple(map(int, match.groups())) != (start, length - 1, length):
        raise RangeViolation(f"asked for bytes {start}-{length - 1}/{length}, the answer is {text[:80]!r}", final=False)


def _range_headers(part: Part, host: str) -> dict[str, str]:
    """Return the headers that request the rest of a part; none when the full file has to be requested.

    A validator is valid only for the server that sent it. On another mirror the rest may be requested without one when the file
    name contains the digest: it is the same file everywhere, and a wrong one is found when the complete file is hashed.
    """
    info = part.info
    if part.size == 0:
        return {}
    if info.validator and info.host == host:
        return {"Range": f"bytes={part.size}-", "If-Range": info.validator}
    return {"Range": f"bytes={part.size}-"} if part.is_content_addressed else {}


def is_metadata(body: bytes) -> bool:
    """Return whether bytes have the outer form of signed TUF metadata; python-tuf checks the content."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "signed" in document and "signatures" in document
