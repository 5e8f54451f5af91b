"""Downloads against a server that misbehaves: ranges, retries, mirrors. "What model updates must survive", line "Ranges"."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadError, DownloadHTTPError, LengthOrHashMismatchError

from model_sync.errors import LibraryUnreachable
from model_sync.transport.errors import DownloadFailure, NotTheLibrary, RangeViolation, Refused, TooLong, TooSlow, Unreachable
from model_sync.transport.fetcher import Fetcher
from model_sync.transport.transfer import check_content_range
from tests.support.bad_server import (
    CAPTIVE_FORBIDDEN,
    CAPTIVE_PORTAL,
    CAPTIVE_REDIRECT,
    DOWN,
    GOOD,
    GZIP,
    HUGE_HEADERS,
    BadServer,
    Reply,
    Request,
    etag_of,
)
from tests.support.fetcher_site import DATA, METADATA, NAME, PLAIN, SIZE, Make, fetch, leave_part, make, part_of, server, sync_settings

__all__ = ["make", "server"]  # fixtures


def test_a_target_arrives_and_leaves_no_part(make: Make, server: BadServer, tmp_path: Path) -> None:
    fetcher = make()
    assert fetch(fetcher) == DATA
    assert list((tmp_path / "parts").iterdir()) == []
    assert fetcher.received_bytes == SIZE
    assert fetcher.last_server_date is not None
    assert "range" not in server.log[0].headers


def test_an_empty_target_needs_no_request(make: Make, server: BadServer) -> None:
    assert fetch(make(), "targets/empty", 0) == b""
    assert server.log == []


def test_a_broken_download_goes_on_where_it_stopped_in_the_next_run(make: Make, server: BadServer, tmp_path: Path) -> None:
    leave_part(make, server, 150_000)
    assert part_of(tmp_path).stat().st_size == 150_000
    assert fetch(make()) == DATA
    (request,) = server.log
    assert request.headers["range"] == "bytes=150000-"
    assert request.headers["if-range"] == etag_of(DATA)
    assert request.body_bytes == SIZE - 150_000


def test_a_reset_in_the_middle_is_as_good_as_a_cut(make: Make, server: BadServer) -> None:
    server.script(f"/{NAME}", Reply(cut_after=200_000, reset=True))
    assert fetch(make()) == DATA


def test_a_complete_part_is_handed_over_without_a_request(make: Make, server: BadServer, tmp_path: Path) -> None:
    """The process died between the last byte and the caller's check."""
    leave_part(make, server, SIZE - 1)
    with part_of(tmp_path).open("ab") as stream:
        stream.write(DATA[-1:])
    assert fetch(make()) == DATA
    assert server.log == []


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Reply(shift=-1000), id="early_start"),
        pytest.param(Reply(shift=1000), id="late_start"),
        pytest.param(Reply(content_range=""), id="missing"),
        pytest.param(Reply(content_range="bytes=150000..399999 of 400000"), id="garbled"),
        pytest.param(Reply(content_range="octets 150000-399999/400000"), id="another_unit"),
        pytest.param(Reply(content_range="bytes 150000-399999/400000, bytes 0-9/400000"), id="multiple"),
        pytest.param(Reply(headers={"Content-Type": "multipart/byteranges; boundary=x"}), id="multipart"),
        pytest.param(Reply(content_range="bytes -150000-399999/400000"), id="negative"),
        pytest.param(Reply(content_range="bytes 150000-399999/-400000"), id="negative_length"),
        pytest.param(Reply(content_range="bytes 150000-399999/400001"), id="changed_length"),
        pytest.param(Reply(content_range="bytes 150000-399999/*"), id="unknown_length"),
        pytest.param(Reply(content_range="bytes 150000-399998/400000"), id="early_end"),
        pytest.param(Reply(headers={"Content-Length": "100"}), id="wrong_content_length"),
        pytest.param(Reply(headers={"ETag": '"another"'}), id="piece_of_another_file"),
        pytest.param(Reply(status=204), id="another_status"),
    ],
)
def test_wrong_range(make: Make, server: BadServer, tmp_path: Path, bad: Reply) -> None:
    """Nothing of the wrong piece is written; with one attempt that is the error, with more the whole file is asked for instead."""
    leave_part(make, server, 150_000)
    server.always(f"/{NAME}", bad)
    with pytest.raises(RangeViolation) as caught:
        fetch(make(attempts=1))
    assert isinstance(caught.value, DownloadError)
    assert isinstance(caught.value, LibraryUnreachable)
    assert part_of(tmp_path).read_bytes() == DATA[:150_000]

    server.always(f"/{NAME}", GOOD)
    server.script(f"/{NAME}", bad)
    fetcher = make()
    assert fetch(fetcher) == DATA
    assert "range" not in server.log[-1].headers
    assert fetcher.restarts == 1


def test_a_piece_that_nobody_asked_for_is_refused(make: Make, server: BadServer) -> None:
    server.always(f"/{NAME}", Reply(status=206, body=DATA, headers={"Content-Range": f"bytes 0-{SIZE - 1}/{SIZE}"}))
    with pytest.raises(RangeViolation) as caught:
        fetch(make())
    assert caught.value.final
    assert len(server.log) == 1


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_file_of_another_length_is_refused_before_a_byte_is_written(make: Make, server: BadServer, tmp_path: Path, size: int) -> None:
    leave_part(make, server, 150_000)
    server.put(f"/{NAME}", DATA[:size] + b"x" * (size - SIZE))
    with pytest.raises(RangeViolation):
        fetch(make())
    assert part_of(tmp_path).read_bytes() == DATA[:150_000]


def test_more_bytes_than_promised_are_cut_off(make: Make, server: BadServer) -> None:
    server.script(f"/{NAME}", Reply(endless=True))
    fetcher = make()
    assert fetch(fetcher) == DATA
    assert fetcher.received_bytes == SIZE


def test_chunked_answers_are_read_to_the_promised_length(make: Make, server: BadServer) -> None:
    server.script(f"/{NAME}", Reply(chunked=True, cut_after=100_000), Reply(chunked=True))
    assert fetch(make()) == DATA


def test_a_chunked_answer_that_ends_too_early_is_gone_on_with(make: Make, server: BadServer) -> None:
    """Chunked coding says that this is the end, the signed length says that it is not."""
    server.script(f"/{PLAIN}", Reply(chunked=True, body=DATA[:1000], headers={"ETag": etag_of(DATA)}))
    fetcher = make()
    assert fetch(fetcher, PLAIN) == DATA
    assert server.log[1].headers["range"] == "bytes=1000-"
    assert fetcher.restarts == 0


def test_a_negative_chunk_size_brings_nothing_in(make: Make, server: BadServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.script(f"/{NAME}", Reply(raw=head + b"-5\r\n" + b"y" * 9000), Reply(raw=head + b"zz\r\n" + b"y" * 9000))
    got = fetch(make())
    assert len(got) == SIZE
    assert got == DATA or got.startswith(b"y")  # in the second case the caller's hash finds it


def test_200_instead_of_206_starts_again_from_the_first_byte(make: Make, server: BadServer) -> None:
    leave_part(make, server, 150_000)
    server.script(f"/{NAME}", Reply(ignore_range=True))
    fetcher = make()
    assert fetch(fetcher) == DATA
    assert fetcher.restarts == 1


def test_changed_content_under_the_same_name_starts_again(make: Make, server: BadServer) -> None:
    leave_part(make, server, 150_000, PLAIN)
    server.put(f"/{PLAIN}", DATA[::-1])
    fetcher = make()
    assert fetch(fetcher, PLAIN) == DATA[::-1]
    assert server.log[0].headers["if-range"] == etag_of(DATA)
    assert fetcher.restarts == 1


def test_a_server_that_ignores_if_range_mixes_no_two_files(make: Make, server: BadServer) -> None:
    leave_part(make, server, 150_000, PLAIN)
    server.put(f"/{PLAIN}", DATA[::-1])
    server.always(f"/{PLAIN}", Reply(ignore_if_range=True))
    assert fetch(make(), PLAIN) == DATA[::-1]


def test_416_starts_again(make: Make, server: BadServer, tmp_path: Path) -> None:
    leave_part(make, server, 150_000)
    server.script(f"/{NAME}", Reply(status=416, headers={"Content-Range": "bytes */400000"}))
    fetcher = make()
    assert fetch(fetcher) == DATA
    assert [("range" in request.headers) for request in server.log] == [True, False]
    assert fetcher.restarts == 1


def test_416_for_good_is_an_error_and_keeps_the_part(make: Make, server: BadServer, tmp_path: Path) -> None:
    leave_part(make, server, 150_000)
    server.always(f"/{NAME}", Reply(status=416))
    with pytest.raises(DownloadHTTPError) as caught:
        fetch(make())
    assert caught.value.status_code == 416
    assert part_of(tmp_path).read_bytes() == DATA[:150_000]


def test_garbled_bytes_are_not_gone_on_with(make: Make, server: BadServer, tmp_path: Path) -> None:
    """The caller finds the digest wrong: the part is gone, the next attempt begins anew and succeeds."""
    leave_part(make, server, 150_000)
    server.script(f"/{NAME}", Reply(garble=1000))
    with pytest.raises(LengthOrHashMismatchError), make().download_file(f"library:{NAME}", SIZE) as stream:
        assert stream.read() != DATA
        raise LengthOrHashMismatchError("the digest differs")
    assert list((tmp_path / "parts").iterdir()) == []
    assert fetch(make()) == DATA


def test_a_caller_without_disk_space_or_time_keeps_the_part(make: Make, server: BadServer, tmp_path: Path) -> None:
    """The bytes are right: what failed is the copy, or the process was told to go."""
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), make().download_file(f"library:{NAME}", SIZE):
            raise error
        assert part_of(tmp_path).read_bytes() == DATA
    with pytest.raises(OSError, match="broken"), make().download_file(f"library:{NAME}", SIZE):
        raise OSError(5, "broken")
    assert not part_of(tmp_path).exists()
    assert len(server.log) == 1


@pytest.mark.parametrize("bad", [DOWN, Reply(hang_up=True), Reply(status=429), Reply(status=408), Reply(status=500)])
def test_server_down_20_times_with_enough_retries(make: Make, server: BadServer, bad: Reply) -> None:
    server.script(f"/{NAME}", *[bad] * 20)
    assert fetch(make(attempts=21)) == DATA
    assert len(server.log) == 21


@pytest.mark.parametrize("bad", [DOWN, Reply(hang_up=True), Reply(status=429), Reply(status=408), Reply(status=500)])
def test_server_down_20_times_with_too_few_retries(make: Make, server: BadServer, bad: Reply) -> None:
    server.script(f"/{NAME}", *[bad] * 20)
    with pytest.raises(DownloadError):
        fetch(make(attempts=20))
    assert len(server.log) == 20


def test_connection_refused_20_times_then_up(make: Make, server: BadServer) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 20:
            server.start()

    server.stop()
    assert fetch(make(attempts=21, backoff_s=0.5, max_backoff_s=0.9, options={"sleep": sleep})) == DATA
    assert len(pauses) == 20
    assert max(pauses) <= 0.9


def test_a_link_cut_every_1_5_mb_costs_at_most_two_percent_more(make: Make, server: BadServer) -> None:
    """30 MB over 20 connections; everything that the server sent is counted, headers too."""
    whole = random.Random(5).randbytes(30_000_000)
    name = f"targets/{hashlib.sha256(whole).hexdigest()}.big"
    server.put(f"/{name}", whole)
    server.always(f"/{name}", Reply(cut_after=1_500_000))
    fetcher = make(attempts=1)
    assert fetch(fetcher, name, len(whole)) == whole
    assert len(server.log) == 20
    assert server.sent_bytes <= 1.02 * len(whole)
    assert fetcher.restarts == 0


def test_a_server_without_ranges_on_a_cut_line_ends_at_the_byte_budget(make: Make, server: BadServer, tmp_path: Path) -> None:
    """However many attempts there are, a file costs at most three times its length, a megabyte and what is under way."""
    whole = DATA * 8
    server.put("/targets/big", whole)
    server.always("/targets/big", Reply(ignore_range=True, cut_after=len(whole) - 1))
    fetcher = make(attempts=1000)
    with pytest.raises(DownloadError, match="3 times the length"):
        fetch(fetcher, "targets/big", len(whole))
    assert fetcher.received_bytes <= 4 * len(whole) + 1024 * 1024


def test_a_byte_per_connection_is_no_progress(make: Make, server: BadServer) -> None:
    server.always(f"/{NAME}", Reply(cut_after=1))
    with pytest.raises(Unreachable):
        fetch(make(attempts=7))
    assert len(server.log) == 7


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_other_4xx_stop_at_once(make: Make, server: BadServer, status: int) -> None:
    server.always(f"/{NAME}", Reply(status=status))
    with pytest.raises(DownloadHTTPError) as caught:
        fetch(make(attempts=20))
    assert caught.value.status_code == status
    assert len(server.log) == 1


def test_retry_after_is_honoured_up_to_the_longest_pause(make: Make, server: BadServer) -> None:
    pauses: list[float] = []
    server.script(
        f"/{NAME}",
        Reply(status=503, headers={"Retry-After": "7"}),
        Reply(status=429, headers={"Retry-After": "86400"}),
        Reply(status=503, headers={"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
        Reply(status=503, headers={"Retry-After": "soon"}),
    )
    assert fetch(make(attempts=5, max_backoff_s=20.0, options={"sleep": pauses.append})) == DATA
    assert sum(pauses) == pytest.approx(7 + 20 + 20)
    assert max(pauses) <= 1.0  # so that somebody who wants to stop is heard


def test_the_next_base_url_is_asked_and_the_one_that_worked_is_first_afterwards(make: Make, server: BadServer) -> None:
    with BadServer() as empty:
        fetcher = make([empty.url, server.url])
        assert fetch(fetcher) == DATA
        assert len(empty.log) == 1
        assert fetch(fetcher) == DATA
        assert len(empty.log) == 1


def test_a_dead_base_url_costs_no_pause(make: Make, server: BadServer) -> None:
    pauses: list[float] = []
    with BadServer() as dead:
        pass
    assert fetch(make([dead.url, server.url], options={"sleep": pauses.append}, backoff_s=1.0, max_backoff_s=1.0)) == DATA
    assert pauses == []


def test_no_newer_root_does_not_wait_for_a_mirror_that_is_down(make: Make, server: BadServer) -> None:
    pauses: list[float] = []
    with BadServer() as dead:
        pass
    fetcher = make([dead.url, server.url], options={"sleep": pauses.append}, backoff_s=1.0, max_backoff_s=1.0)
    with pytest.raises(DownloadHTTPError) as caught:
        fetcher.download_bytes("library:metadata/2.root.json", 1000)
    assert caught.value.status_code == 404
    assert pauses == []


@pytest.mark.parametrize("trouble", [DOWN, Reply(hang_up=True), Reply(status=416)])
def test_a_target_is_waited_for_although_another_mirror_lacks_it(make: Make, server: BadServer, trouble: Reply) -> None:
    leave_part(make, server, 150_000)
    server.script(f"/{NAME}", *[trouble] * (1 if trouble.status == 416 else 3))
    with BadServer() as empty:
        assert fetch(make([empty.url, server.url])) == DATA
        assert len(empty.log) == 1


@pytest.mark.parametrize("name", [NAME, PLAIN])
def test_another_mirror_goes_on_with_a_part_when_the_name_holds_the_digest(make: Make, server: BadServer, name: str) -> None:
    """A validator speaks for its own server only; a plain name is asked for anew, a hashed one is the same everywhere."""
    leave_part(make, server, 150_000, name)
    with BadServer({f"/{name}": DATA}) as mirror:
        assert fetch(make([mirror.url]), name) == DATA
        headers = mirror.log[0].headers
    assert "if-range" not in headers
    assert headers.get("range") == ("bytes=150000-" if name == NAME else None)


def test_a_range_that_one_mirror_gets_wrong_another_gets_right(make: Make, server: BadServer) -> None:
    leave_part(make, server, 150_000)
    server.always(f"/{NAME}", Reply(shift=5))
    with BadServer({f"/{NAME}": DATA}) as mirror:
        fetcher = make([server.url, mirror.url])
        assert fetch(fetcher) == DATA
    assert fetcher.restarts == 0


def test_a_weak_etag_is_no_validator(make: Make, server: BadServer) -> None:
    server.script(f"/{PLAIN}", Reply(headers={"ETag": 'W/"weak"', "Last-Modified": None}, cut_after=100_000))
    server.script(f"/{PLAIN}", Reply(headers={"ETag": 'W/"weak"'}, cut_after=100_000))
    fetcher = make()
    assert fetch(fetcher, PLAIN) == DATA
    first, second, third = (request.headers for request in server.log)
    assert "range" not in first
    assert "range" not in second
    assert third["if-range"] == "Thu, 01 Jan 2026 00:00:00 GMT"


def test_no_credentials_in_any_message(make: Make, server: BadServer) -> None:
    with BadServer() as dead:
        pass
    for base in (dead.url, server.url, "http://[broken", "https://127.0.0.1:1"):
        url = base.replace("://", "://agent:s3cret@")
        with pytest.raises(DownloadError) as caught:
            make([url], attempts=1).download_bytes("library:metadata/9.root.json", 100)
        assert "s3cret" not in str(caught.value)
        assert "agent" not in str(caught.value).replace("agent's", "")


def test_trouble_is_told_before_each_pause(make: Make, server: BadServer) -> None:
    told: list[tuple[str, float]] = []
    server.script(f"/{NAME}", DOWN, Reply(hang_up=True))

    def on_retry(error: DownloadFailure, pause: float) -> None:
        told.append((error.message, pause))

    options = {"on_retry": on_retry, "sleep": lambda _seconds: None}
    assert fetch(make(options=options, backoff_s=5.0, max_backoff_s=8.0)) == DATA
    assert [("503" in message, 0 <= pause <= 8.0) for message, pause in told] == [(True, True), (False, True)]


def test_a_url_that_is_none_is_not_tried_again(make: Make) -> None:
    pauses: list[float] = []
    for url in ("http://[broken", "ftp://127.0.0.1/", "nonsense"):
        with pytest.raises(Unreachable):
            make([url], options={"sleep": pauses.append}, backoff_s=1.0, max_backoff_s=1.0).download_bytes("library:metadata/x.json", 100)
    with pytest.raises(Unreachable, match="no library URL"):
        make([]).download_bytes("library:metadata/x.json", 100)
    assert pauses == []


def test_a_name_that_does_not_resolve_is_unreachable(make: Make) -> None:
    with pytest.raises(Unreachable, match="no-such-host"):
        make(["http://no-such-host.invalid/"], attempts=2).download_bytes("library:metadata/x.json", 100)


def test_endless_metadata_ends_at_its_longest(make: Make, server: BadServer) -> None:
    server.always("/metadata/timestamp.json", Reply(endless=True))
    fetcher = make()
    with pytest.raises(TooLong):
        fetcher.download_bytes("library:metadata/timestamp.json", 5000)
    assert fetcher.received_bytes == 5001
    server.always("/metadata/timestamp.json", Reply(body=METADATA + b" " * 5000))
    with pytest.raises(TooLong):
        fetcher.download_bytes("library:metadata/timestamp.json", 5000)
    assert fetcher.received_bytes == 5001


@pytest.mark.parametrize("bad", [HUGE_HEADERS, Reply(raw=b"garbage\r\n\r\n"), Reply(raw=b"HTTP/1.1 two hundred\r\n\r\n"), Reply(raw=b"")])
def test_an_answer_that_is_no_http_is_tried_again(make: Make, server: BadServer, bad: Reply) -> None:
    server.script(f"/{NAME}", bad)
    assert fetch(make()) == DATA
    server.always(f"/{NAME}", bad)
    with pytest.raises(Unreachable):
        fetch(make())


def test_an_encoding_that_nobody_asked_for_is_refused(make: Make, server: BadServer) -> None:
    server.always("*", GZIP)
    for download in (lambda fetcher: fetch(fetcher), lambda fetcher: fetcher.download_bytes("library:metadata/timestamp.json", 1000)):
        with pytest.raises(NotTheLibrary, match="gzip"):
            download(make())
    assert all(request.headers["accept-encoding"] == "identity" for request in server.log)


def test_a_view_remembers_metadata_and_that_there_is_none(make: Make, server: BadServer) -> None:
    now = [0.0]
    fetcher = make(options={"clock": lambda: now[0]})
    with fetcher.cached_metadata(ttl_s=60.0):
        for _ in range(3):
            with fetcher.cached_metadata():
                assert fetcher.download_bytes("library:metadata/timestamp.json", 1000) == METADATA
            with pytest.raises(Refused) as caught:
                fetcher.download_bytes("library:metadata/2.root.json", 1000)
            assert caught.value.status_code == 404
        assert len(server.log) == 2
        with pytest.raises(TooLong):
            fetcher.download_bytes("library:metadata/timestamp.json", 10)
        now[0] = 61.0
        fetcher.download_bytes("library:metadata/timestamp.json", 1000)
        assert len(server.log) == 3
    fetcher.download_bytes("library:metadata/timestamp.json", 1000)
    assert len(server.log) == 4


def test_a_view_remembers_no_failure(make: Make, server: BadServer) -> None:
    fetcher = make(attempts=1)
    server.script("/metadata/timestamp.json", DOWN)
    with fetcher.cached_metadata():
        with pytest.raises(DownloadHTTPError):
            fetcher.download_bytes("library:metadata/timestamp.json", 1000)
        assert fetcher.download_bytes("library:metadata/timestamp.json", 1000) == METADATA


def test_metadata_may_be_asked_for_as_a_file_and_plain_urls_as_they_are(make: Make, server: BadServer) -> None:
    fetcher = make([])
    with make().download_file("library:metadata/timestamp.json", 1000) as stream:
        assert stream.read() == METADATA
    assert fetcher.download_bytes(f"{server.url}/metadata/timestamp.json", 1000) == METADATA
    with fetcher.download_file(f"{server.url}/{PLAIN}", SIZE) as stream:
        assert stream.read() == DATA
    with pytest.raises(Unreachable, match="length"):
        list(fetcher.fetch(f"{server.url}/{PLAIN}"))


def test_an_idle_poll_is_small_and_uses_one_connection(make: Make, server: BadServer) -> None:
    """The request for N+1.root.json and the timestamp: nothing else is asked for, and the headers are short."""
    body = b'{"signatures": [], "signed": {"x": "' + b"x" * 900 + b'"}}'
    server.put("/metadata/timestamp.json", body)
    fetcher = make()
    server.script("/metadata/2.root.json", Reply(status=404, body=b"<html>not here</html>"), Reply(status=404))
    for _ in range(2):
        with pytest.raises(DownloadHTTPError):
            fetcher.download_bytes("library:metadata/2.root.json", 512_000)
        fetcher.download_bytes("library:metadata/timestamp.json", 16384)
    assert fetch(fetcher) == DATA
    assert fetch(fetcher) == DATA
    assert server.connections == 1
    assert set(server.log[0].headers) == {"host", "user-agent", "accept-encoding"}
    assert server.log[0].headers["user-agent"].startswith("model-sync/")
    assert sum(request.sent_bytes + request.received_bytes for request in server.log[:2]) < 2000


def test_cookies_of_a_login_page_are_not_kept(make: Make, server: BadServer) -> None:
    server.script("/metadata/timestamp.json", Reply(status=503, headers={"Set-Cookie": "session=1; Path=/"}))
    make().download_bytes("library:metadata/timestamp.json", 1000)
    assert "cookie" not in server.log[1].headers


def test_stopping_between_two_chunks_keeps_the_part(make: Make, server: BadServer, tmp_path: Path) -> None:
    calls = [0]

    def check_stop() -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fetch(make(options={"check_stop": check_stop}))
    kept = part_of(tmp_path).read_bytes()
    assert kept
    assert DATA.startswith(kept)
    assert fetch(make()) == DATA
    assert server.log[-1].headers["range"] == f"bytes={len(kept)}-"


def test_progress_reports_the_received_bytes(make: Make, server: BadServer) -> None:
    reported: list[int] = []
    now = [0.0]

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    assert fetch(make(options={"on_progress": reported.append, "clock": clock}, min_speed_bytes_per_s=0.0)) == DATA
    assert (reported[0], reported[-1]) == (0, SIZE)
    assert reported == sorted(reported)


@pytest.mark.parametrize("damage", ["note_lost", "note_garbled", "note_of_another_length", "part_too_long", "part_is_a_link"])
def test_a_part_that_cannot_be_trusted_is_dropped(make: Make, server: BadServer, tmp_path: Path, damage: str) -> None:
    leave_part(make, server, 150_000)
    part = part_of(tmp_path)
    note = part.with_name(part.name + ".json")
    if damage == "note_lost":
        note.unlink()
    elif damage == "note_garbled":
        note.write_bytes(b'{"path": 3}')
    elif damage == "note_of_another_length":
        note.write_bytes(note.read_bytes().replace(b"400000", b"500000"))
    elif damage == "part_too_long":
        part.write_bytes(DATA + b"x")
    else:
        (tmp_path / "elsewhere").write_bytes(b"precious")
        part.unlink()
        part.symlink_to(tmp_path / "elsewhere")
    assert fetch(make()) == DATA
    assert "range" not in server.log[0].headers
    if damage == "part_is_a_link":
        assert (tmp_path / "elsewhere").read_bytes() == b"precious"


_offsets = st.integers(0, SIZE)
_replies = st.one_of(
    st.builds(Reply, cut_after=_offsets, reset=st.booleans(), chunked=st.booleans()),
    st.builds(Reply, shift=st.integers(-SIZE, SIZE), cut_after=st.none() | _offsets),
    st.builds(
        Reply, content_range=st.sampled_from(["", "bytes 0-9/10", "bytes */400000", "bytes 1-2/3, bytes 4-5/6", "x"]), cut_after=_offsets
    ),
    st.builds(Reply, ignore_range=st.booleans(), ignore_if_range=st.just(True), cut_after=_offsets),
    st.builds(Reply, status=st.sampled_from([200, 204, 206, 302, 304, 400, 404, 408, 416, 418, 429, 500, 503])),
    st.builds(Reply, hang_up=st.just(True), reset=st.booleans()),
    st.builds(Reply, raw=st.binary(max_size=40)),
    st.sampled_from([CAPTIVE_PORTAL, CAPTIVE_REDIRECT, CAPTIVE_FORBIDDEN, GZIP, GOOD]),
    st.builds(
        Reply, headers=st.dictionaries(st.sampled_from(["ETag", "Content-Length", "Content-Type"]), st.sampled_from(['"x"', "7", "-1", ""]))
    ),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(_replies, max_size=8), st.booleans())
def test_whatever_the_server_does_no_wrong_byte_is_kept(
    tmp_path_factory: pytest.TempPathFactory, replies: list[Reply], hashed: bool
) -> None:
    """Faults in any order: the file, or an error of the download and a part that is a piece of the file; in the end the file."""
    directory = tmp_path_factory.mktemp("run")
    name = NAME if hashed else PLAIN
    with BadServer({f"/{name}": DATA}) as server:
        server.script(f"/{name}", *replies)
        fetcher = Fetcher(sync_settings(directory, urls=[server.url]), directory / "parts")
        for _ in range(len(replies) + 1):
            try:
                assert fetch(fetcher, name) == DATA
                break
            except DownloadError as error:
                assert isinstance(error, LibraryUnreachable)
                assert error.hint
                assert DATA.startswith(part_of(directory, name).read_bytes())
        else:
            pytest.fail("the script is used up, and still no file")
        fetcher.close()


_number = st.one_of(st.integers(-5, 1 << 70).map(str), st.sampled_from(["", "*", "١٢٣", "1e3", "+1", " 1", "0x10"]))


@given(
    st.one_of(
        st.text(max_size=60), st.builds("{} {}-{}/{}".format, st.sampled_from(["bytes", "Bytes", "items", ""]), _number, _number, _number)
    )
)
def test_no_content_range_but_the_exact_one_passes(text: str) -> None:
    headers = {"Content-Range": text}
    if text.strip().lower() == "bytes 150000-399999/400000":
        check_content_range(headers, 150_000, SIZE)
        return
    with pytest.raises(RangeViolation):
        check_content_range(headers, 150_000, SIZE)


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 50))
def test_the_exact_content_range_passes_at_any_size(start: int, rest: int) -> None:
    check_content_range({"Content-Range": f"bytes {start}-{start + rest - 1}/{start + rest}"}, start, start + rest)


def test_slow_drip_is_given_up_and_the_part_kept(make: Make, server: BadServer, tmp_path: Path) -> None:
    """100 bytes each 20 ms never fall silent, and would take a minute; the window is short and in the server's time."""
    server.always(f"/{NAME}", Reply(drip=(100, 0.02)))
    with pytest.raises(TooSlow, match="bytes/s"):
        fetch(make(attempts=2, min_speed_bytes_per_s=50_000.0, min_speed_window_s=0.2))
    assert len(server.log) == 2
    kept = part_of(tmp_path).read_bytes()
    assert kept
    assert DATA.startswith(kept)
    server.always(f"/{NAME}", GOOD)
    assert fetch(make()) == DATA


def test_a_drip_of_headers_is_given_up(make: Make, server: BadServer) -> None:
    server.always(f"/{NAME}", Reply(drip=(1, 0.05), drip_headers=True))
    with pytest.raises(DownloadError):
        fetch(make(attempts=1, read_timeout_s=0.3))
    assert server.log[0].body_bytes == 0


def test_a_drip_in_the_body_of_an_error_is_given_up(make: Make, server: BadServer) -> None:
    server.always(f"/{NAME}", Reply(status=404, body=b"x" * 4000, drip=(1, 0.01)))
    with pytest.raises(DownloadHTTPError) as caught:
        fetch(make(min_speed_bytes_per_s=50_000.0, min_speed_window_s=0.1))
    assert caught.value.status_code == 404


@pytest.mark.parametrize("stall", [Reply(stall_after=0), Reply(stall_after=100_000)])
def test_a_stall_is_given_up_and_tried_again(make: Make, server: BadServer, stall: Reply) -> None:
    server.script(f"/{NAME}", stall)
    assert fetch(make(read_timeout_s=0.3)) == DATA
    server.always(f"/{NAME}", Reply(stall_after=10))
    with pytest.raises(TooSlow, match="silent"):
        fetch(make(attempts=2, read_timeout_s=0.2))


def test_scripts_may_be_functions(make: Make, server: BadServer) -> None:
    """The server's own door for what depends on the request."""
    server.always(f"/{NAME}", lambda request: Reply(cut_after=1000) if "range" not in request.headers else GOOD)
    assert fetch(make()) == DATA
    assert isinstance(server.log[0], Request)
