"""Downloads through process death, power cuts, full disks, captive portals and bad TLS, and from USB sticks."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tuf.api.exceptions import DownloadError, DownloadHTTPError

from model_sync.transport.directory_fetcher import DirectoryFetcher
from model_sync.transport.errors import DiskFull, NotTheLibrary, Refused, TooLong, Unreachable
from model_sync.transport.parts import SYNC_S, open_part
from tests.support.bad_server import CAPTIVE_FORBIDDEN, CAPTIVE_PORTAL, CAPTIVE_REDIRECT, GOOD, LOGIN_PAGE, BadServer, Reply
from tests.support.certificates import authority_usage
from tests.support.fetcher_site import (
    DATA,
    METADATA,
    NAME,
    SIZE,
    Make,
    fetch,
    leave_part,
    make,
    part_of,
    server,
)

__all__ = ["make", "server"]  # fixtures
CHECKOUT = Path(__file__).resolve().parents[3]

# -- captive portals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "portal",
    [
        pytest.param(CAPTIVE_PORTAL, id="page"),
        pytest.param(CAPTIVE_REDIRECT, id="redirect"),
        pytest.param(Reply(body=LOGIN_PAGE, headers={"Content-Type": "application/json"}), id="page_that_says_json"),
        pytest.param(Reply(body=METADATA, headers={"Content-Type": "text/html"}), id="page_type"),
        pytest.param(Reply(body=b'{"error": "log in"}'), id="other_json"),
        pytest.param(Reply(body=b"[" * 15_000), id="deep_json"),
        pytest.param(Reply(body=b""), id="empty"),
        pytest.param(Reply(status=204), id="no_content"),
        pytest.param(Reply(status=206, body=METADATA), id="partial"),
        pytest.param(Reply(status=304), id="not_modified"),
    ],
)
def test_a_captive_portal_is_not_the_library(make: Make, server: BadServer, portal: Reply) -> None:
    """Known at once, on every mirror in turn, and not remembered: after the login the same fetcher works."""
    server.always("*", portal)
    with BadServer() as mirror:
        mirror.always("*", portal)
        fetcher = make([server.url, mirror.url], attempts=20)
        with fetcher.cached_metadata():
            with pytest.raises(NotTheLibrary) as caught:
                fetcher.download_bytes("library:metadata/timestamp.json", 16384)
            assert (len(server.log), len(mirror.log)) == (1, 1)
            server.always("*", GOOD)
            assert fetcher.download_bytes("library:metadata/timestamp.json", 16384) == METADATA
    assert isinstance(caught.value, DownloadError)
    assert caught.value.code == "sync.not_the_library"


@pytest.mark.parametrize("portal", [CAPTIVE_PORTAL, CAPTIVE_REDIRECT])
def test_a_captive_portal_writes_nothing_into_a_target(make: Make, server: BadServer, tmp_path: Path, portal: Reply) -> None:
    leave_part(make, server, 150_000)
    server.always(f"/{NAME}", portal)
    with pytest.raises(NotTheLibrary):
        fetch(make())
    assert part_of(tmp_path).read_bytes() == DATA[:150_000]


def test_a_captive_portal_on_one_mirror_does_not_hide_the_other(make: Make, server: BadServer) -> None:
    with BadServer() as portal:
        portal.always("*", CAPTIVE_PORTAL)
        assert make([portal.url, server.url]).download_bytes("library:metadata/timestamp.json", 16384) == METADATA
        assert fetch(make([portal.url, server.url])) == DATA


def test_a_captive_portal_403_on_the_next_root_means_no_newer_root_and_the_timestamp_tells(make: Make, server: BadServer) -> None:
    """python-tuf takes 403 and 404 for "there is none"; what follows it meets the portal again."""
    server.always("*", CAPTIVE_FORBIDDEN)
    fetcher = make()
    with pytest.raises(DownloadHTTPError) as caught:
        fetcher.download_bytes("library:metadata/2.root.json", 512_000)
    assert caught.value.status_code == 403
    with pytest.raises(DownloadHTTPError):
        fetcher.download_bytes("library:metadata/timestamp.json", 16384)


def test_a_web_page_that_is_a_target_may_be_one(make: Make, server: BadServer) -> None:
    server.put("/targets/card.html", LOGIN_PAGE)
    server.always("/targets/card.html", Reply(headers={"Content-Type": "text/html"}))
    assert fetch(make(), "targets/card.html", len(LOGIN_PAGE)) == LOGIN_PAGE


# -- process death and power cuts ------------------------------------------------------------------------------------------

PULL = """
import json, sys
from pathlib import Path
from model_sync.transport.fetcher import Fetcher
from model_sync.settings import SyncSettings
values, parts, name, size = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
fetcher = Fetcher(SyncSettings.parse(values), parts)
with fetcher.download_file("library:" + name, size) as stream:
    Path(sys.argv[5]).write_bytes(stream.read())
fetcher.close()
"""


def start_pull(tmp_path: Path, url: str, name: str, size: int) -> subprocess.Popen[bytes]:
    """Start a process that downloads one target."""
    values = {key: str(tmp_path / key) for key in ("state_dir", "exchange_dir", "root")}
    values |= {"box_id": "box-1", "urls": [url], "disk_reserve_bytes": 0, "backoff_s": 0.0}
    arguments = [json.dumps(values), str(tmp_path / "parts"), name, str(size), str(tmp_path / "out")]
    return subprocess.Popen([sys.executable, "-c", PULL, *arguments], cwd=CHECKOUT)


def test_sigkill_at_random_moments_and_resume_across_restarts(tmp_path: Path) -> None:
    """A real process is killed five times; in all, each byte comes once, but for what was under way at a kill."""
    whole = random.Random(7).randbytes(6_000_000)
    name = f"targets/{hashlib.sha256(whole).hexdigest()}.model.onnx"
    moments = random.Random(11)
    under_way = 0
    with BadServer({f"/{name}": whole}) as server:
        for _ in range(5):
            done = sum(request.body_bytes for request in server.log)
            goal = min(len(whole) - 500_000, done + moments.randrange(50_000, 1_200_000))
            server.always("*", Reply(drip=(32_768, 0.002)))
            process = start_pull(tmp_path, server.url, name, len(whole))
            while sum(request.body_bytes for request in server.log) < goal:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            while not server.idle:
                time.sleep(0.002)
            kept = part_of(tmp_path, name).stat().st_size
            under_way += sum(request.body_bytes for request in server.log) - under_way - kept
        server.always("*", GOOD)
        process = start_pull(tmp_path, server.url, name, len(whole))
        assert process.wait(timeout=60) == 0
        assert (tmp_path / "out").read_bytes() == whole
        assert sum(request.body_bytes for request in server.log) == len(whole) + under_way
        assert len(server.log) == 6
        assert all("if-range" in request.headers for request in server.log[1:])
    # What the kernel had taken in and the process had not read yet; never a part of the file once more.
    assert under_way < len(whole) / 2
    assert list((tmp_path / "parts").iterdir()) == []


def test_after_a_power_cut_only_synced_bytes_are_trusted(make: Make, server: BadServer, tmp_path: Path) -> None:
    """Another run of the kernel: the file may have its length but not its content."""
    leave_part(make, server, 150_000)
    part = part_of(tmp_path)
    note_file = part.with_name(part.name + ".json")
    note = json.loads(note_file.read_bytes())
    assert note["synced_bytes"] == 150_000  # an attempt that ended orderly has synced all
    note_file.write_text(json.dumps(note | {"synced_bytes": 100_000, "boot_id": "another"}))
    part.write_bytes(DATA[:100_000] + b"\0" * 50_000)
    assert fetch(make()) == DATA
    assert server.log[0].headers["range"] == "bytes=100000-"


def test_bytes_are_synced_every_megabyte(make: Make, server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_sync.transport.fetcher.PROGRESS_S", 0.0)
    whole = random.Random(9).randbytes(4_000_000)
    server.put("/targets/big", whole)
    part = part_of(tmp_path, "targets/big")
    seen: list[tuple[int, int]] = []

    def look(_progress: object) -> None:
        note = part.with_name(part.name + ".json")
        if note.exists():
            seen.append((part.stat().st_size, json.loads(note.read_bytes())["synced_bytes"]))

    fetcher = make(options={"on_progress": look})
    assert fetch(fetcher, "targets/big", len(whole)) == whole
    assert len(seen) > 10
    assert all(0 <= size - synced < 1024 * 1024 for size, synced in seen)


def test_bytes_of_a_slow_line_are_synced_every_two_seconds(tmp_path: Path) -> None:
    now = [0.0]
    with open_part(tmp_path, "targets/slow", 1000, lambda: now[0]) as part:
        part.start_at(validator="", host="host", at=0)
        part.write(b"x" * 10)
        assert part.info.synced_bytes == 0
        now[0] = SYNC_S
        part.write(b"y" * 10)
        assert part.info.synced_bytes == 20
        part.write(b"z")
        assert part.info.synced_bytes == 20
    with open_part(tmp_path, "targets/slow", 1000, lambda: now[0]) as part:
        assert (part.size, part.info.synced_bytes) == (21, 21)


def test_parts_that_nobody_goes_on_with_are_removed_after_a_month(make: Make, server: BadServer, tmp_path: Path) -> None:
    leave_part(make, server, 1000)
    old = part_of(tmp_path)
    for file in (old, old.with_name(old.name + ".json")):
        os.utime(file, (time.time() - 31 * 86400,) * 2)
    server.put("/targets/other", b"other")
    assert fetch(make(), "targets/other", 5) == b"other"
    assert list((tmp_path / "parts").iterdir()) == []


# -- disk ----------------------------------------------------------------------------------------------------------------


def test_no_room_is_said_before_anything_is_asked_for(make: Make, server: BadServer) -> None:
    with pytest.raises(DiskFull, match=r"^\d+ bytes of disk space are missing") as caught:
        fetch(make(disk_reserve_bytes=1 << 60))
    assert int(caught.value.message.split()[0]) > 1 << 59
    assert caught.value.code == "sync.disk_full"
    assert isinstance(caught.value, DownloadError)
    assert server.log == []


def test_the_reserve_is_kept_while_others_fill_the_disk(make: Make, server: BadServer, tmp_path: Path) -> None:
    """The room is looked at again with each megabyte; the reserve is made of what is free now."""
    whole = bytes(4_000_000)
    server.put("/targets/big", whole)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    ballast = tmp_path / "ballast"

    def fill(_progress: object) -> None:
        if not ballast.exists():
            with ballast.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, 512 * 2**20)

    fetcher = make(disk_reserve_bytes=free - 256 * 2**20, options={"on_progress": fill})
    with pytest.raises(DiskFull, match=r"^\d+ bytes of disk space are missing"):
        fetch(fetcher, "targets/big", len(whole))
    assert whole.startswith(part_of(tmp_path, "targets/big").read_bytes())
    ballast.unlink(missing_ok=True)
    assert fetch(make(), "targets/big", len(whole)) == whole


FILL = """
import sys
from pathlib import Path
from model_sync.transport.fetcher import Fetcher
from model_sync.transport.errors import DiskFull
from tests.support.bad_server import BadServer
from tests.support.fetcher_site import sync_settings
disk = Path(sys.argv[1])
data = bytes(range(256)) * 12288  # 3 MiB
ballast = disk / "ballast"
with BadServer({"/targets/f": data}) as server:
    fetcher = Fetcher(sync_settings(disk, urls=[server.url], **eval(sys.argv[2])), disk / "parts")
    filled = []
    def fill(progress):  # somebody else takes the rest of the disk in the middle of the download
        if progress > 1_000_000 and not filled:
            filled.append(True)
            with ballast.open("wb", buffering=0) as stream:
                try:
                    while True:
                        stream.write(bytes(4096))
                except OSError:
                    pass
    import model_sync.transport.fetcher
    model_sync.transport.fetcher.PROGRESS_S = 0.0
    fetcher._on_progress = fill
    try:
        with fetcher.download_file("library:targets/f", len(data)):
            print("no error")
    except DiskFull as error:
        print(error.code)
    (part,) = (disk / "parts").glob("*.part")
    kept = part.read_bytes()
    print(len(kept) > 900_000, data.startswith(kept))
    ballast.unlink(missing_ok=True)
    with fetcher.download_file("library:targets/f", len(data)) as stream:
        print(stream.read() == data, server.log[-1].headers.get("range", "").startswith("bytes="), fetcher.restarts)
    fetcher.close()
"""


@pytest.mark.parametrize("budget", ["{}", "{'day_budget_bytes': 10**9}"])
def test_disk_full_in_the_middle_keeps_the_part_and_goes_on_later(tmp_path: Path, budget: str) -> None:
    """A real file system of 4 MiB that somebody else fills up while the download runs."""
    script = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1" "$4"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL, budget]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("this kernel lets no user mount a file system of its own")
    assert done.stdout.split() == ["sync.disk_full", "True", "True", "True", "True", "0"], done.stderr


def test_a_parts_directory_that_cannot_be_written_is_said(make: Make, server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "parts").write_bytes(b"a file in the way")
    with pytest.raises(Unreachable) as caught:
        fetch(make())
    assert caught.value.code == "sync.disk"


# -- TLS -----------------------------------------------------------------------------------------------------------------


def certificate(directory: Path, name: str, *, days: int = 10) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=20)).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(authority_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    files = directory / f"{name}.pem", directory / f"{name}.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return files


def tls_context(files: tuple[Path, Path], client_ca: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context


def test_tls_with_the_library_authority(make: Make, tmp_path: Path) -> None:
    library, box = certificate(tmp_path, "library"), certificate(tmp_path, "box")
    with BadServer({"/metadata/timestamp.json": METADATA, f"/{NAME}": DATA}, tls=tls_context(library)) as server:
        fetcher = make([server.url], ca_certificate=library[0])
        assert fetcher.download_bytes("library:metadata/timestamp.json", 1000) == METADATA
        assert fetch(fetcher) == DATA
    with BadServer({"/metadata/timestamp.json": METADATA}, tls=tls_context(library, box[0])) as server, pytest.raises(Unreachable):
        make([server.url], ca_certificate=library[0], attempts=1).download_bytes("library:metadata/timestamp.json", 1000)


@pytest.mark.parametrize("days", [10, -1])
def test_a_foreign_or_expired_certificate_is_unreachable_and_never_untrusted(make: Make, tmp_path: Path, days: int) -> None:
    library = certificate(tmp_path, "library", days=days)
    authority = library[0] if days < 0 else certificate(tmp_path, "other")[0]
    with BadServer({"/metadata/timestamp.json": METADATA}, tls=tls_context(library)) as server:
        with pytest.raises(Unreachable) as caught:
            make([server.url], ca_certificate=authority, attempts=2).download_bytes("library:metadata/timestamp.json", 1000)
        assert server.log == []
    assert caught.value.code == "sync.tls"


def test_a_missing_authority_file_is_said(make: Make) -> None:
    with pytest.raises(Unreachable, match="CA certificate"):
        make(["https://127.0.0.1:1"], ca_certificate=Path("/nonexistent.pem"), attempts=1).download_bytes("library:metadata/x.json", 10)


def test_no_proxy_of_the_environment_is_used(make: Make, server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")
    assert make().download_bytes("library:metadata/timestamp.json", 1000) == METADATA


# -- USB -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    """A stick with a timestamp and a target."""
    root = tmp_path / "stick"
    (root / "metadata").mkdir(parents=True)
    (root / "metadata" / "timestamp.json").write_bytes(METADATA)
    (root / "targets" / "a").mkdir(parents=True)
    (root / "targets" / "a" / "x.bin").write_bytes(DATA)
    return root


def test_a_stick_gives_metadata_and_targets(stick: Path) -> None:
    fetcher = DirectoryFetcher(stick)
    assert fetcher.download_bytes("library:metadata/timestamp.json", 1000) == METADATA
    with fetcher.download_file("library:targets/a/x.bin", SIZE) as stream:
        assert stream.read() == DATA
        stream.seek(5)
        assert stream.read(3) == DATA[5:8]
    assert b"".join(fetcher.fetch("library:targets/a/x.bin")) == DATA


@pytest.mark.parametrize(
    "path",
    ["metadata/2.root.json", "targets/b/x.bin", "targets/a", "targets/a/x.bin/y", "targets/../../outside", "../outside", "/etc/passwd",
     "targets//a/x.bin", "targets/./a/x.bin", "targets/a/x.bin\0", "targets/link", "targets/folder/x.bin", "targets/pipe", ""],
)  # fmt: skip
def test_what_is_not_on_the_stick_or_leads_out_of_it_is_404(stick: Path, path: str) -> None:
    (stick.parent / "outside").write_bytes(METADATA)
    (stick / "targets" / "link").symlink_to(stick / "targets" / "a" / "x.bin")
    (stick / "targets" / "folder").symlink_to(stick / "targets" / "a")
    os.mkfifo(stick / "targets" / "pipe")
    with pytest.raises(DownloadHTTPError) as caught:
        DirectoryFetcher(stick).download_bytes(f"library:{path}", 1 << 20)
    assert caught.value.status_code == 404


def test_only_library_urls_lead_to_a_stick(stick: Path) -> None:
    with pytest.raises(Refused):
        DirectoryFetcher(stick).download_bytes(f"file://{stick}/metadata/timestamp.json", 1000)


def test_a_file_longer_than_it_may_be_is_refused(stick: Path) -> None:
    with pytest.raises(TooLong):
        DirectoryFetcher(stick).download_bytes("library:metadata/timestamp.json", 10)


def test_damaged_metadata_on_a_stick_is_no_metadata(stick: Path) -> None:
    (stick / "metadata" / "timestamp.json").write_bytes(METADATA[:20])
    with pytest.raises(NotTheLibrary):
        DirectoryFetcher(stick).download_bytes("library:metadata/timestamp.json", 1000)


def test_a_stick_that_is_not_there_is_unreachable_and_no_404(tmp_path: Path) -> None:
    """404 on the next root would mean that there is none."""
    with pytest.raises(Unreachable) as caught:
        DirectoryFetcher(tmp_path / "none").download_bytes("library:metadata/2.root.json", 1000)
    assert caught.value.code == "sync.usb"


def test_a_stick_pulled_out_while_the_caller_reads_is_a_download_error() -> None:
    """/proc/self/mem is a plain file whose first byte cannot be read: a real EIO, as from a stick that is gone."""
    with (
        pytest.raises(Unreachable) as caught,
        DirectoryFetcher(Path("/proc")).download_file(f"library:{os.getpid()}/mem", 1000) as stream,
    ):
        stream.read(10)
    assert caught.value.code == "sync.usb"
