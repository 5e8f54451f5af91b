"""The signed life of a model, whole, with the real commands, servers and processes, and with keys that nobody has twice.

Three key holders, a central server over TLS, two boxes on the line and one without; the agents run as an account that cannot read
the boxes' patients (where the test
runs as root and others may run its Python). One test tells it from the first key to the USB stick, each step on the one before.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance.core.domain import Source
from appliance.core.settings import Settings
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from model_sync.fleet.cli import main as model_library
from quantize.reference.phantom import Phantom, dataset
from tests.support.fleet_site import make_tls
from tests.support.library_site import tiny_bundle
from tests.support.processes import run_here
from tests.support.scans import encode

ROOT = Path(__file__).resolve().parents[3]
LINE = "cxr-pneumonia"
PATIENCE_S = 60.0


def account() -> dict[str, Any]:
    """The agents' own account, when the test may choose one and that one may run this Python."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    own = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", "import model_sync.agent.client"], cwd=ROOT, check=True, capture_output=True, **own)
    except (PermissionError, subprocess.CalledProcessError):
        return {}
    return own


def wait_for(what: str, ready: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < limit, f"waited in vain for: {what}"
        time.sleep(0.1)


def command(module: str, *arguments: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, f"{module} {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def film(number: int) -> bytes:
    """A drawn chest film of one patient after the other."""
    made = dataset(Phantom(rows=512, cols=512, seed=number), name=f"story-{number}", bits=16)
    return encode(made)


@dataclass
class Central:
    """The central team: a library, its server, and people with one key each."""

    directory: Path
    server: subprocess.Popen[str] | None = None
    url: str = ""

    @property
    def library(self) -> Path:
        return self.directory / "library"

    def run(self, *arguments: object, check: bool = True, module: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``model-library`` in this process, or as another module in its own; server, agents and boxes have their own in any case."""
        secret = self.directory / "passphrase"
        environment = {name: str(secret) for name in ("MODEL_LIBRARY_PASSPHRASE_FILE", "MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE")}
        if module:
            return command(module, *arguments, check=check, env=os.environ | environment)
        done = run_here(model_library, *arguments, environment=environment)
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def public_key(self, name: str) -> Path:
        return self.directory / f"{name}.pem.pub.json"

    def sign(self, *names: str) -> None:
        for name in names:
            self.run("sign", self.library, "--key", self.key(name), "--yes")

    def begin(self) -> None:
        self.directory.mkdir()
        (self.directory / "passphrase").write_text("a passphrase of five words\n")
        (self.directory / "passphrase").chmod(0o600)
        for name in ("alice", "bob", "carol", "line-1", "line-2", "rollout"):
            self.run("key", "new", self.key(name))
        keys = [argument for name in ("alice", "bob", "carol") for argument in ("--key", self.public_key(name))]
        self.run("init", self.library, *keys)
        one = self.run("sign", self.library, "--key", self.key("alice"), "--yes")
        assert not (self.library / "public" / "metadata" / "timestamp.json").exists(), one.stdout
        self.sign("bob")
        self.run("add-line", self.library, LINE, "--key", self.public_key("line-1"), "--key", self.public_key("line-2"))
        self.sign("carol", "alice", "line-1", "line-2")
        self.run("rollout-keys", self.library, "--key", self.public_key("rollout"))
        self.sign("bob", "carol", "rollout")

    def publish(self, bundle: Path, module: str = "") -> None:
        self.run("publish", self.library, bundle, module=module)
        self.sign("line-1", "line-2")

    def rollout(self, ring: str, version: str) -> None:
        self.run("rollout", self.library, "--ring", ring, "--line", LINE, "--version", version)
        self.sign("rollout")

    def serve(self) -> None:
        make_tls(self.directory)
        secret = self.directory / "passphrase"
        self.run("device-ca", self.directory / "device-ca", "--passphrase-file", secret)
        self.server = subprocess.Popen(
            [sys.executable, "-m", "model_sync.fleet.cli", "serve", str(self.library), "--port", "0",
             "--device-ca", str(self.directory / "device-ca"), "--passphrase-file", str(secret),
             "--tls-certificate", str(self.directory / "tls.pem"), "--tls-key", str(self.directory / "tls.key")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.server.stdout is not None
        self.url = next(word for word in self.server.stdout.readline().split() if word.startswith("https://")).rstrip("/.,")


@dataclass
class Box:
    """One box: a worker with its patients, and an agent that cannot see them."""

    directory: Path
    name: str
    worker: subprocess.Popen[bytes] | None = None
    settings: Settings = field(init=False)

    @property
    def sync(self) -> Path:
        return self.directory / "sync"

    def lay(self, root: Path, url: str, ring: str, ca: Path) -> None:
        self.directory.mkdir(mode=0o755)
        agent = account()
        for path in (self.sync, self.directory / "exchange"):
            path.mkdir(mode=0o755)
            if agent:
                os.chown(path, agent["user"], agent["group"])
        shutil.copy(root, self.directory / "root.json")
        (self.directory / "root.json").chmod(0o644)
        urls = ["--url", url] if url else []
        self.agent("init", "--state", self.sync, "--exchange", self.directory / "exchange", "--root", self.directory / "root.json",
                   "--box-id", self.name, "--ring", ring, *urls)  # fmt: skip
        with (self.sync / "sync.toml").open("a") as file:
            file.write(f'disk_reserve_bytes = 0\nbackoff_s = 0.05\nattempts = 3\nca_certificate = "{ca}"\n')
            if url:
                file.write(f'report_url = "{url}"\n')
        self.settings = Settings.parse(
            {
                "data_dir": self.directory / "box", "disk_reserve_bytes": 0, "exchange_dir": self.directory / "exchange",
                "library_root": self.directory / "root.json", "web_port": 0, "dicom_port": 0, "tune_at_activation": False,
            }
        )  # fmt: skip
        self.settings.data_dir.mkdir(mode=0o700)
        lines = (f'{name} = "{getattr(self.settings, name)}"\n' for name in ("exchange_dir", "library_root"))
        (self.settings.data_dir / "box.toml").write_text("disk_reserve_bytes = 0\ntune_at_activation = false\n" + "".join(lines))
        self.start()

    def start(self) -> None:
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "appliance", "worker", "--data-dir", str(self.settings.data_dir)], cwd=ROOT, stderr=subprocess.DEVNULL
        )

    def agent(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return command("model_sync", "--config", self.sync, *arguments, check=check, **account())

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.agent("status", "--json").stdout))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        store = Store(self.settings)
        try:
            return [tuple(row) for row in store.database.query(sql)]
        finally:
            store.close()

    def active(self) -> str:
        return "".join(row[0] for row in self.query("SELECT version FROM models WHERE state = 'active'"))

    def journal(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.query("SELECT version, state FROM activations ORDER BY id")}

    def reported(self) -> dict[str, str]:
        """What the box last laid out for the agent to report: version and state, the newest entry of a version counts."""
        report = json.loads((self.directory / "exchange" / "box-report.json").read_text())
        return {row["version"]: row["state"] for row in reversed(report["activations"])}

    def read_a_scan(self, number: int) -> str:
        """Send a scan through the door and return the version that read it, or the state it ended in."""
        store = Store(self.settings)
        try:
            accepted = Ingest(store).accept(
                film(number),
                Source("cli", "story"),
            )
            store.planner.close_series([accepted.stored.series_id])
            wait_for(f"scan {number} on {self.name}", lambda: not store.queue.pending_jobs())
            made = store.database.one("SELECT model_version FROM findings WHERE instance_id = ?", accepted.stored.instance_id)
            state = store.database.one("SELECT state FROM instances WHERE id = ?", accepted.stored.instance_id)
            assert state is not None
            return str(made["model_version"]) if made else str(state["state"])
        finally:
            store.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every account may enter."""
    directory = Path(tempfile.mkdtemp(prefix="story-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.timeout(1200)
def test_the_signed_life_of_a_model_from_the_first_key_to_the_usb_stick(place: Path) -> None:
    central = Central(place / "central")
    canary, steady, offline = (Box(place / name, name) for name in ("canary-1", "steady-1", "offline-1"))
    boxes = (canary, steady, offline)
    try:
        _tell(place, central, canary, steady, offline)
    finally:
        for process in (central.server, *(box.worker for box in boxes)):
            if process is not None:
                process.terminate()
                process.wait(30)
        if central.server is not None and central.server.stdout is not None:
            central.server.stdout.close()


def _tell(place: Path, central: Central, canary: Box, steady: Box, offline: Box) -> None:
    bundles = place / "bundles"
    central.begin()
    root = central.library / "public" / "metadata" / "1.root.json"
    # version 1, to everybody
    central.publish(tiny_bundle(bundles, "1.0.0", hidden=600))
    for ring in ("canary", "stable"):
        central.rollout(ring, "1.0.0")
    central.serve()
    for box, ring in ((canary, "canary"), (steady, "stable")):
        box.lay(root, central.url, ring, central.directory / "tls-ca.pem")
        _enrol(central, box, ring)
        box.agent("pull")
    for box in (canary, steady):
        wait_for(f"version 1 on {box.name}", lambda box=box: box.active() == "1.0.0")  # type: ignore[misc]
        assert box.read_a_scan(1) == "1.0.0"
    # version 2 does not keep its golden cases, and an older library did not run them: the canary finds out, nobody else ever has it
    central.publish(tiny_bundle(bundles, "2.0.0", hidden=600, good=False), module="tests.support.older_library")
    central.rollout("canary", "2.0.0")
    for box in (canary, steady):
        box.agent("pull")
    wait_for("the failed self-test", lambda: canary.journal().get("2.0.0") == "failed")
    assert canary.active() == steady.active() == "1.0.0"
    assert "2.0.0" not in steady.journal()
    assert canary.read_a_scan(2) == "1.0.0"
    wait_for("the box's report of it", lambda: canary.reported().get("2.0.0") == "failed")
    canary.agent("report")
    assert _fleet_knows(central, "canary-1", "2.0.0", "failed")
    # version 3 comes as a delta, and is far smaller on the line than the file it makes
    bundle = tiny_bundle(bundles, "3.0.0", hidden=600, drift=1e-6)
    central.publish(bundle)
    for ring in ("canary", "stable"):
        central.rollout(ring, "3.0.0")
    for box in (canary, steady):
        before = box.status()["received_bytes"]
        box.agent("pull")
        received = box.status()["received_bytes"] - before
        assert 0 < received < 0.7 * (bundle / "model_fp32.onnx").stat().st_size
        wait_for(f"version 3 on {box.name}", lambda box=box: box.active() == "3.0.0")  # type: ignore[misc]
        assert box.read_a_scan(3) == "3.0.0"
    # it is withdrawn: both boxes go back to version 1 by themselves, and what version 3 said is marked
    central.run("withdraw", central.library, LINE, "3.0.0", "--reason", "reads too many healthy children as ill")
    central.sign("line-1", "line-2")
    for box in (canary, steady):
        box.agent("pull", check=False)
        wait_for(f"version 1 again on {box.name}", lambda box=box: box.active() == "1.0.0")  # type: ignore[misc]
        assert box.read_a_scan(4) == "1.0.0"
        assert box.query("SELECT count(*) FROM jobs WHERE notes LIKE '%model.withdrawn%'") == [(1,)]
    _by_usb(place, central, offline)
    for box in (canary, steady, offline):
        assert command("appliance", "audit", "verify", "--data-dir", box.settings.data_dir).stdout.startswith("audit chain whole")


def _enrol(central: Central, box: Box, ring: str) -> None:
    token = central.run("token", "new", box.name, "--ring", ring, "--library", central.library).stdout.strip().splitlines()[-1]
    path = box.directory / "token"
    path.write_text(token)
    path.chmod(0o644)
    box.agent("enrol", "--token-file", path)


def _fleet_knows(central: Central, box: str, version: str, state: str) -> bool:
    """Ask the fleet's own database, as the page does."""
    with sqlite3.connect(f"file:{central.library}/fleet.db?mode=ro", uri=True) as database:
        rows = database.execute("SELECT version, state FROM activations WHERE box_id = ?", (box,)).fetchall()
    database.close()
    return (version, state) in rows


def _by_usb(place: Path, central: Central, offline: Box) -> None:
    """A box that has never had a line gets version 4 from a stick; then an older stick cannot take it back."""
    older, stick = place / "older-stick", place / "stick"
    central.rollout("stable", "1.0.0")
    older.mkdir()
    central.run("export-usb", central.library, older)
    central.publish(tiny_bundle(place / "bundles", "4.0.0", seed=4))
    central.rollout("stable", "4.0.0")
    stick.mkdir()
    central.run("export-usb", central.library, stick)
    for path in (older, stick):
        path.chmod(0o755)
    offline.lay(central.library / "public" / "metadata" / "1.root.json", "", "stable", central.directory / "tls-ca.pem")
    offline.agent("import-usb", stick)
    wait_for("version 4 on the box without a line", lambda: offline.active() == "4.0.0")
    assert offline.read_a_scan(1) == "4.0.0"
    assert {row[0] for row in offline.query("SELECT source FROM activations WHERE version = '4.0.0'")} == {"usb"}
    refused = offline.agent("import-usb", older, check=False)
    assert refused.returncode == 1
    assert "hint" in refused.stderr
    with suppress(FileNotFoundError):
        shutil.rmtree(older)
    assert offline.active() == "4.0.0"
