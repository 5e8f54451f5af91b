"""The head of the audit in the report to the centre, and the head that the centre confirmed (R10)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.main import main
from appliance.core.settings import Settings
from appliance.lifecycle.exchange import Exchange
from appliance.store import audit
from appliance.store.audit_anchors import CONFIRMED_NAME
from appliance.store.database import Database
from appliance.store.store import Store
from model_sync.agent.report import BoxReport
from model_sync.fleet.audit_heads import AuditState, compare
from tests.support.box_database import raw_connection


@pytest.fixture
def store(settings: Settings, tmp_path: Path) -> Iterator[Store]:
    made = Store(settings.model_copy(update={"exchange_dir": tmp_path}))
    yield made
    made.close()


def write(store: Store, count: int) -> None:
    with store.database.transaction() as tx:
        for _ in range(count):
            Database.audit(tx, audit.APPLICATION_ACTIVITY, "t", "E", "x")


def report(exchange: Exchange) -> Any:
    """What the sync agent reads, and tells the box when the centre has it."""
    exchange.write_report()
    parsed = BoxReport.parse((exchange.directory / "box-report.json").read_bytes()).audit
    assert parsed
    return parsed


def confirm(exchange: Exchange, head: Any) -> None:
    (exchange.directory / CONFIRMED_NAME).write_text(json.dumps({"entries": head.entries, "digest": head.digest}))


def test_r10_a_report_proves_that_the_audit_goes_on_and_a_cut_one_is_found_by_the_centre(store: Store, tmp_path: Path) -> None:
    exchange = Exchange(store, tmp_path)
    stored = ""
    for _ in range(3):
        write(store, 20)
        now = report(exchange)
        stored, state = compare(stored, now)
        assert state is AuditState.WHOLE
        confirm(exchange, now.head)
    with closing(raw_connection(store.settings.data_dir)) as raw:
        raw.execute("DROP TRIGGER audit_no_delete")
        raw.execute("DELETE FROM audit WHERE seq > 30")
    assert compare(stored, report(exchange))[1] is AuditState.BACKWARDS
    write(store, 40)
    after = report(exchange)
    assert [(item.entries, item.digest) for item in after.anchors] == [(60, "0" * 64)]
    assert compare(stored, after)[1] is AuditState.CHANGED


def test_r10_verify_compares_with_the_head_that_the_centre_confirmed(
    store: Store, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(store, 5)
    (settings.data_dir / "box.toml").write_text(f'exchange_dir = "{tmp_path}"\n')
    box = ["--data-dir", str(settings.data_dir)]
    (tmp_path / CONFIRMED_NAME).write_text('{"entries": 5, "digest": "' + audit.digest_at(store.database.connection(), 5) + '"}')
    assert main(["audit", "verify", *box]) == 0
    (tmp_path / CONFIRMED_NAME).write_text('{"entries": 7, "digest": "' + "ab" * 32 + '"}')
    assert main(["audit", "verify", *box]) == 1
    assert "entry 7, of which there is an anchor, is missing" in capsys.readouterr().err
    for hostile in ("", "[]", '{"entries": -1, "digest": ""}', '{"entries": 1e400, "digest": "x"}'):
        (tmp_path / CONFIRMED_NAME).write_text(hostile)
        assert main(["audit", "verify", *box]) == 0
