"""The live feed: server-sent events (WHATWG HTML 9.2) whose id is the store's revision, so that a reader misses nothing.

The worker writes from another process, so one thread here looks at the revision a few times a second while anybody
listens. Each stream holds one of the server's threads: their number is bounded well below the pool, the next reader gets
503 and its page asks at intervals instead.
"""

from __future__ import annotations

import json
import logging
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from flask import Blueprint, Response, abort, jsonify, request
from flask.typing import ResponseReturnValue
from flask_login import current_user
from werkzeug.exceptions import ServiceUnavailable

from appliance.core.errors import StoreError
from appliance.store.worklist import Worklist
from webui.box import the_box

logger = logging.getLogger(__name__)
blueprint: Final = Blueprint("events", __name__, url_prefix="/api/v1")

_LOOK_EVERY_S: Final = 0.25
_TICK_S: Final = 1.0
_HEARTBEAT_S: Final = 15.0
# A stream ends by itself and the browser comes back with the last id: no reader keeps a thread, or a session, for ever.
_LONGEST_S: Final = 600.0
_RETRY_MS: Final = 2000
_POLLRDHUP: Final = getattr(select, "POLLRDHUP", 0x2000)


class Feed:
    """Tells the streams of this process when the revision moves.

    Args:
        worklist: the reading side of the store.
        threads: size of the server's pool, of which at most half serves streams and at least four threads never do.
    """

    def __init__(self, worklist: Worklist, threads: int) -> None:
        self._worklist = worklist
        self._moved = threading.Condition()
        self._revision = 0
        self._readers = 0
        self._watching = False
        self._stopped = threading.Event()
        self._slots = threading.BoundedSemaphore(max(1, min(threads // 2, threads - 4)))

    def enter(self) -> bool:
        """Take a place among the streams; False when all are taken."""
        if self._stopped.is_set() or not self._slots.acquire(blocking=False):
            return False
        with self._moved:
            self._readers += 1
            if not self._watching:
                self._watching = True
                self._revision = 0
                threading.Thread(target=self._watch, name="feed", daemon=True).start()
        return True

    def leave(self) -> None:
        """Give the place back."""
        with self._moved:
            self._readers -= 1
        self._slots.release()

    @property
    def stopped(self) -> bool:
        """Whether the process is on its way out."""
        return self._stopped.is_set()

    def wait(self, since: int, timeout_s: float) -> None:
        """Sleep until the revision is past ``since``, the time is over, or the process stops."""
        with self._moved:
            self._moved.wait_for(lambda: self._revision > since or self._stopped.is_set(), timeout_s)

    def stop(self) -> None:
        """End every stream; safe to call from a signal handler's thread while others wait."""
        self._stopped.set()

    def _watch(self) -> None:
        """Look at the revision while anybody listens."""
        while True:
            try:
                revision = self._worklist.revision()
            except StoreError:
                logger.exception("revision not read")
                revision = 0
            with self._moved:
                if revision > self._revision:
                    self._revision = revision
                    self._moved.notify_all()
                if self._readers == 0 or self._stopped.is_set():
                    self._watching = False
                    self._moved.notify_all()
                    return
            self._stopped.wait(_LOOK_EVERY_S)


@blueprint.get("/events")
def stream() -> ResponseReturnValue:
    """What changed since ``Last-Event-ID`` (or ``?since=``), then everything that changes, as it does.

    Event ``studies``: ``{"revision", "studies": [{"id", "state", "position", "urgent"}], "queue"}``; the event's id is the revision.
    """
    box, token = the_box(), current_user.token
    since = _since(box.worklist)
    if not box.feed.enter():
        raise ServiceUnavailable(retry_after=30)
    gone = _line_watch(request.environ.get("gunicorn.socket"))
    alive = lambda: not gone() and box.accounts.resume(token, touch=False) is not None  # noqa: E731 - two conditions, one name
    response = Response(_Stream(box.feed, box.worklist, since, alive), content_type="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"
    return response


@blueprint.get("/revision")
def revision() -> ResponseReturnValue:
    """The number of the last change, for pages that cannot have a stream."""
    return jsonify(revision=the_box().worklist.revision())


def _since(worklist: Worklist) -> int:
    value = request.headers.get("Last-Event-ID") or request.args.get("since") or ""
    if not value:
        return worklist.revision()
    if not value.isascii() or not value.isdigit() or len(value) > 15:
        abort(400)
    return int(value)


class _Stream:
    """The body of one stream; a class, since ``close`` must give the place back even when nothing was ever sent."""

    def __init__(self, feed: Feed, worklist: Worklist, since: int, alive: Callable[[], bool]) -> None:
        self._feed = feed
        self._events = _events(feed, worklist, since, alive)
        self._left = False

    def __iter__(self) -> Iterator[bytes]:
        return self._events

    def close(self) -> None:
        """Give the place back, once."""
        if not self._left:
            self._left = True
            self._feed.leave()


def _events(feed: Feed, worklist: Worklist, since: int, alive: Callable[[], bool]) -> Iterator[bytes]:
    started = last_sent = time.monotonic()
    yield b"retry: %d\n\n" % _RETRY_MS
    while not feed.stopped and time.monotonic() - started < _LONGEST_S:
        seen = worklist.revision()  # before the rows: what moves in between wakes the wait below at once
        rows = worklist.changes(since)
        if rows:
            since, last_sent = rows[-1].revision, time.monotonic()
            studies = [{"id": row.id, "state": row.state.value, "position": row.position, "urgent": row.urgent is not None} for row in rows]
            yield _event(since, {"revision": since, "studies": studies, "queue": worklist.queue_length()})
            continue
        feed.wait(max(since, seen), _TICK_S)
        if not alive():
            return
        if time.monotonic() - last_sent > _HEARTBEAT_S:
            last_sent = time.monotonic()
            yield b": still here\n\n"


def _event(revision: int, data: dict[str, Any]) -> bytes:
    return f"id: {revision}\nevent: studies\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def _line_watch(connection: Any) -> Callable[[], bool]:
    """A question to the kernel whether the browser is gone, asked without reading from the connection (it may be TLS)."""
    if connection is None:
        return lambda: False
    poll = select.poll()
    poll.register(connection.fileno(), _POLLRDHUP)
    return lambda: bool(poll.poll(0))
