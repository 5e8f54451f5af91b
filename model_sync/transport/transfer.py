"""One file over one request: the answer is checked before a byte of it is believed; :mod:`model_sync.transport.fetcher` repeats it.

Ranges are those of RFC 9110 section 14, If-Range its section 13.1.5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from model_sync.transport.connection import Answer, Connection, host_of
from model_sync.transport.errors import NotTheLibrary, RangeViolation, Refused, TooLong, Unreachable
from model_sync.transport.parts import Part

# Documents up to this length may use the reserve of the day's budget, as metadata may.
SMALL_TARGET_BYTES = 1024 * 1024
_CONTENT_RANGE = re.compile(r"(?i:bytes) ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII)


def fetch_metadata(connection: Connection, url: str, max_length: int) -> bytes:
    """Return one metadata file, held in memory.

    Raises:
        NotTheLibrary: it is a page or no TUF metadata at all. What it says is not judged here.
        TooLong: more than ``max_length`` bytes.
        Unreachable, TooSlow, Refused, BudgetExhausted: see there.
    """
    with connection.get(url, {}, small=True) as answer:
        if answer.status != 200 or answer.is_page:
            raise NotTheLibrary(f"{answer.host} answered {answer.status} with something that is no metadata (a login page?)")
        if (answer.content_length() or 0) > max_length:
            raise TooLong(f"{answer.host} announces metadata of more than {max_length} bytes")
        body = bytearray()
        while chunk := answer.read(max_length + 1 - len(body)):
            body += chunk
            if len(body) > max_length:
                raise TooLong(f"{answer.host} sent metadata of more than {max_length} bytes")
        if not is_metadata(bytes(body)):
            raise NotTheLibrary(f"{answer.host} sent something that is no metadata (a login page?)")
        return bytes(body)


def fetch_target(connection: Connection, url: str, part: Part, *, whole: bool, on_chunk: Callable[[], None]) -> None:
    """Receive what a part lacks.

    Args:
        connection: The way to the library.
        url: Where the file is.
        part: Where it goes; complete on return.
        whole: Do not ask for a range: this server got one wrong.
        on_chunk: Called when bytes were written.

    Raises:
        RangeViolation: another piece, or another length; nothing was written.
        NotTheLibrary, Unreachable, TooSlow, Refused, BudgetExhausted, DiskFull: see there; what had come is kept.
    """
    headers = {} if whole else _range_headers(part, host_of(url))
    try:
        with connection.get(url, headers, small=part.length <= SMALL_TARGET_BYTES) as answer:
            _begin(answer, part, headers)
            while not part.complete:
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


def _begin(answer: Answer, part: Part, headers: dict[str, str]) -> None:
    """Check that the answer is the piece that was asked for, or the whole file, and cut the part where it begins."""
    start, final = 0, not headers
    if answer.is_page and not part.note.path.endswith((".html", ".htm")):
        raise NotTheLibrary(f"{answer.host} sent a web page instead of {part.name} (a login page?)")
    if answer.status == 206 and headers:
        start = part.size
        check_content_range(answer.headers, start, part.length)
        if _of_another_file(answer, headers.get("If-Range", "")):
            raise RangeViolation(f"{answer.host} sent a piece of another {part.name} than the part is of", final=final)
    elif answer.status != 200:
        raise RangeViolation(f"{answer.host} answered {answer.status} for {part.name}, which was not asked for", final=final)
    announced = answer.content_length()
    if announced is not None and announced != part.length - start:
        raise RangeViolation(f"{answer.host} announces {announced} bytes of {part.name} instead of {part.length - start}", final=final)
    part.begin(validator=answer.validator, host=answer.host, at=start)


def _of_another_file(answer: Answer, validator: str) -> bool:
    """Say whether a 206 answer carries another validator of the kind that was sent: the server ignored If-Range."""
    given = answer.etag if validator.startswith('"') else answer.headers.get("Last-Modified", "").strip()
    return validator != "" and given not in ("", validator)


def check_content_range(headers: Mapping[str, str], start: int, length: int) -> None:
    """Check that a 206 answer carries exactly the bytes from ``start`` to the end of a file of ``length`` bytes.

    Raises:
        RangeViolation: Content-Range is missing, garbled or says anything else, or there are several pieces.
    """
    kind = headers.get("Content-Type", "").strip().lower()
    text = headers.get("Content-Range", "").strip()
    match = _CONTENT_RANGE.fullmatch(text)
    if kind.startswith("multipart/") or match is None:
        raise RangeViolation(f"the answer to a range has no readable Content-Range ({text[:60]!r})", final=False)
    if tuple(map(int, match.groups())) != (start, length - 1, length):
        raise RangeViolation(f"asked for bytes {start}-{length - 1}/{length}, the answer is {text[:80]!r}", final=False)


def _range_headers(part: Part, host: str) -> dict[str, str]:
    """Return the headers that ask for the rest of a part; none when the whole file has to be asked for.

    A validator speaks for the server that gave it. On another mirror the rest may be asked for without one when the file's name
    holds its digest: a file of that name is that file, and a lie is found when the whole is hashed.
    """
    note = part.note
    if part.size == 0:
        return {}
    if note.validator and note.host == host:
        return {"Range": f"bytes={part.size}-", "If-Range": note.validator}
    return {"Range": f"bytes={part.size}-"} if part.hashed else {}


def is_metadata(body: bytes) -> bool:
    """Say whether bytes have the outer form of signed TUF metadata; what is inside, python-tuf judges."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "signed" in document and "signatures" in document
