"""What one box, or one account of the machine, can do to the centre's database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from model_sync.agent.report import StatusReport
from model_sync.fleet.database import ACTIVATIONS_PER_BOX, Fleet
from model_sync.fleet.tables import activations, boxes
from tests.support.fleet_site import Postgres, box_report, stamp, status_json

LINE = "cxr-pneumonia"


@pytest.fixture(params=["sqlite", "postgresql"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    cluster = Postgres() if request.param == "postgresql" else None
    opened = Fleet(cluster.database() if cluster else f"sqlite:///{tmp_path}/fleet.db")
    yield opened
    opened.close()
    if cluster:
        cluster.stop()


def invented(number: int) -> dict[str, Any]:
    """Return as many activations of versions that nobody published as a report takes, beside the model that runs."""
    item = {"line": LINE, "state": "failed", "code": "model.self_test", "at": stamp(-60 + number)}
    many = [item | {"version": f"1.{number}.{count}", "digest": f"{number * 64 + count:064x}"} for count in range(64)]
    return box_report("0.1.0") | {"activations": many}


def test_a_box_that_invents_versions_fills_nothing_and_what_it_runs_is_kept(fleet: Fleet) -> None:
    with fleet.writing() as tx:
        tx.execute(boxes.insert().values(box_id="box-1", ring="stable", enrolled_at=1))
        old = {"box_id": "box-1", "line": LINE, "state": "failed", "code": "", "at": 1, "ring": "stable"}
        tx.execute(activations.insert(), [old | {"version": f"9.{number}.0"} for number in range(5_000)])  # of a release before
    for number in range(1, 4):
        fleet.store_report(StatusReport.model_validate_json(status_json("box-1", number, box=invented(number))), per_hour=60)
        with fleet.reading() as tx:
            assert tx.execute(select(func.count()).select_from(activations)).scalar_one() == ACTIVATIONS_PER_BOX
    assert fleet.tally("stable", LINE, "0.1.0").running == 1
    assert fleet.tally("stable", LINE, "1.3.5").failed == 1
    assert fleet.tally("stable", LINE, "1.1.5").failed == 0


@pytest.mark.parametrize("before", [False, True])
def test_the_database_is_for_its_owner_alone_whoever_made_it(tmp_path: Path, before: bool) -> None:
    file = tmp_path / "fleet.db"
    if before:
        file.touch(0o644)
    usual = os.umask(0o022)
    try:
        opened = Fleet(f"sqlite:///{file}")
        opened.record("wang", "withdraw", ring="stable", line="cxr", subject="1.0.0", figures="")
        found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("fleet.db*")}
        assert len(found) == 3
        assert set(found.values()) == {0o600}
        opened.close()
    finally:
        os.umask(usual)
