"""A full disk drops no entry of the audit: what cannot be recorded is not done, and logins and refusals still are (R11)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from appliance.core.settings import Settings
from appliance.inference.worker import run
from appliance.store import audit
from appliance.store.audit_reserve import RESERVE_BYTES, RESERVE_NAME, fill, make_room
from appliance.store.database import Database
from appliance.store.store import Store
from tests.support.paths import ROOT
from tests.support.stored_scans import add_scan

_ON_A_SMALL_DISK = """
import json, os, sys
from pathlib import Path
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store import audit
from appliance.store.accounts import Accounts
from appliance.store.audit_reserve import RESERVE_NAME
from appliance.store.logins import Logins
from appliance.store.store import Store
from tests.support.stored_scans import add_scan

disk = Path(sys.argv[1])
store = Store(Settings.parse({"data_dir": disk / "box", "disk_reserve_bytes": 0}))
accounts = Accounts(store)
logins = Logins(store, accounts)
password = accounts.add("doctor", "clinician", "test")
add_scan(store)
reserved = (disk / "box" / RESERVE_NAME).stat().st_blocks * 512
with open(disk / "filler", "wb", buffering=0) as filler:
    for size in (1 << 20, 4096, 1):
        try:
            while filler.write(bytes(size)):
                pass
        except OSError:
            continue

def entries():
    return store.database.number("SELECT count(*) FROM audit")

def images():
    return store.database.number("SELECT count(*) FROM instances")

free, before = os.statvfs(disk).f_bavail, entries()
failures = []
for number in range(2, 200):
    try:
        add_scan(store, number, data=bytes(50_000))
    except StoreError as error:
        failures.append(error.code)
refused_images, stored = len(failures), images()
audited = store.database.number("SELECT count(*) FROM audit WHERE entry LIKE '%\\"instance:%'")
tokens = [logins.login("doctor", password, "10.0.0.1") for _ in range(40)]
for number in range(300):
    store.refusals.record("doctor", "10.0.0.1", "web.forbidden")
left = (disk / "box" / RESERVE_NAME).stat().st_size
print(json.dumps({
    "reserved": reserved, "free": free, "failures": sorted(set(failures)), "refused": refused_images, "stored": stored, "audited": audited,
    "tokens": sum(token is not None for token in tokens), "forbidden": store.database.number(
        "SELECT count(*) FROM audit WHERE entry LIKE '%web.forbidden%'"), "left": left, "whole": store.database.verify_audit() == entries(),
}))
"""


@pytest.fixture(scope="module")
def small_disk() -> list[str]:
    """A command for a folder, an interpreter and a script: runs it with a disk of 64 MiB there; needs no root."""
    script = 'mount -t tmpfs -o size=64m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command[:4], "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel lets nobody but root mount a small disk")
    return command


def test_r11_on_a_full_disk_nothing_happens_unrecorded_and_logins_and_refusals_are_recorded(small_disk: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*small_disk, str(tmp_path), sys.executable, _ON_A_SMALL_DISK],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["reserved"] >= RESERVE_BYTES
    assert result["free"] == 0
    assert result["failures"] == ["ingest.disk_full"]
    assert result["stored"] == result["audited"]
    assert result["tokens"] == 40
    assert result["forbidden"] == 300
    assert 0 < result["left"] < RESERVE_BYTES
    assert result["whole"]


def test_r11_the_reserve_is_filled_up_again_and_given_back_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    reserve = tmp_path / RESERVE_NAME
    assert reserve.stat().st_size == RESERVE_BYTES
    assert make_room(tmp_path) == 0  # there is room
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: real._replace(free=0))
    freed = make_room(tmp_path)
    assert 0 < freed < RESERVE_BYTES
    fill(tmp_path)
    assert reserve.stat().st_size == RESERVE_BYTES - freed
    while make_room(tmp_path):
        pass
    assert reserve.stat().st_size == 0
    monkeypatch.undo()
    fill(tmp_path)
    assert reserve.stat().st_size == RESERVE_BYTES


def test_r11_entries_older_than_180_days_stay_whatever_the_box_does(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (datetime.now(timezone.utc) - timedelta(days=400)).isoformat(timespec="milliseconds")
    with closing(Store(settings)) as store, monkeypatch.context() as patch:
        patch.setattr("appliance.store.audit.utc_now", lambda: old)
        with store.database.transaction() as tx:
            for number in range(600):
                Database.audit(tx, audit.APPLICATION_ACTIVITY, "t", "E", f"x:{number}")
    with closing(Store(settings)) as store:
        add_scan(store)
        store.content.sweep()
    run(settings, until_idle=True)
    with closing(Store(settings)) as store:
        assert store.database.number("SELECT count(*) FROM audit WHERE entry LIKE ?", f'%"{old}"%') == 600
        assert [anchor.head.seq >= 600 for anchor in store.database.anchors().read()] == [True]
        store.database.verify_audit()
    sources = [path.read_text("utf-8") for package in ("appliance", "webui") for path in (ROOT / package).rglob("*.py")]
    assert not [text for text in sources if "DELETE FROM audit" in text or "DROP TABLE audit" in text]
