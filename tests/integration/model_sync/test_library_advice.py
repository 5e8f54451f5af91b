"""The next step after a withdrawal or a raised minimum: never a version that is known to be bad; what boxes really do; warnings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from model_sync.agent.report import StatusReport
from model_sync.fleet import cli
from model_sync.fleet.database import Fleet
from model_sync.fleet.field_results import mark_database, sqlite_url
from model_sync.fleet.rollout_pause_policy import SERVER
from model_sync.fleet.tables import boxes
from model_sync.library import publish, rollouts
from model_sync.library.library import Library
from model_sync.library.text import status_lines
from tests.support.fleet_site import box_report, status_json
from tests.support.library_site import Site, make_site, tiny_bundle

LINE = "cxr-pneumonia"
VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.4.0")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A library with four public versions; ring stable takes 0.3.0."""
    directory = tmp_path_factory.mktemp("published")
    site = make_site(directory / "library")
    for number, version in enumerate(VERSIONS):
        site.publish(tiny_bundle(directory / "bundles", version, number), deltas=False)
    site.rollout("stable", LINE, "0.3.0", 40.0)
    return site


@pytest.fixture
def site(published: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A copy of that library, which the test may change."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for variable in ("MODEL_LIBRARY_PASSPHRASE_FILE", "MODEL_LIBRARY_ONLINE_PASSPHRASE_FILE"):
        monkeypatch.delenv(variable, raising=False)
    shutil.copytree(published.library.files.directory, tmp_path / "library")
    library = Library(tmp_path / "library", published.library.signers.values())
    return Site(library, library.files.public, library.files.public / "metadata" / "1.root.json", published.holders)


@pytest.fixture
def run(site: Site, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``model-library`` on the library; returns what it printed."""

    def run_command(command: str, *arguments: str, expect: int = 0) -> str:
        assert cli.main([command, str(site.library.files.directory), *arguments]) == expect
        return capsys.readouterr().out

    return run_command


def take(fleet: Fleet, box_id: str, version: str, state: str = "good", code: str | None = None, *, sequence: int = 1) -> None:
    """Store a report of a box that is enrolled without a connection."""
    with fleet.writing() as tx:
        tx.execute(fleet.insert(boxes).values(box_id=box_id, ring="stable", enrolled_at=1).on_conflict_do_nothing())
    report = StatusReport.model_validate_json(status_json(box_id, sequence, box=box_report(version, state, code)))
    fleet.store_report(report, per_hour=60)


@pytest.fixture
def fleet(site: Site) -> Fleet:
    """The fleet database where ``model-library serve`` keeps it."""
    return Fleet(sqlite_url(site.library.files.directory))


def proposed(text: str) -> list[str]:
    """Return the versions that a next step names."""
    return re.findall(r"next: `model-library rollout .*--version (\S+)", text)


# -- no version that is known to be bad


@pytest.mark.parametrize("command", ["withdraw", "minimum"])
def test_the_next_step_names_no_version_that_failed_its_self_test(run: Callable[..., str], fleet: Fleet, command: str) -> None:
    take(fleet, "box-1", "0.4.0", "failed", "model.self_test")
    take(fleet, "box-2", "0.2.0")
    fleet.close()
    if command == "withdraw":
        text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
        assert proposed(text) == ["0.2.0"]
        assert "0.4.0 is not proposed: it failed on 1 box" in text
    else:
        text = run("minimum", LINE, "0.4.0")
        assert proposed(text) == []
        assert f"every version of {LINE} that boxes may run is known to be bad: publish a new one" in text


def test_the_next_step_names_no_version_that_the_failure_budget_stopped(run: Callable[..., str], fleet: Fleet) -> None:
    fleet.record(SERVER, "paused", ring="canary", line=LINE, subject="0.4.0", figures="2/4")
    fleet.record("wang", "resumed", ring="canary", line=LINE, subject="0.4.0", figures="2/4")
    fleet.record(SERVER, "budget-spent", ring="canary", line=LINE, subject="0.2.0", figures="2/4")
    fleet.close()
    text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
    assert proposed(text) == ["0.1.0"]
    for version in ("0.4.0", "0.2.0"):
        assert f"{version} is not proposed: the failure budget stopped it" in text


def test_the_next_step_names_no_version_whose_rollout_is_paused(run: Callable[..., str], site: Site) -> None:
    """A pause is signed, so it is known without a fleet database too."""
    site.rollout("canary", LINE, "0.4.0", paused=True)
    text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
    assert proposed(text) == ["0.2.0"]
    assert "0.4.0 is not proposed: its rollout to ring canary is paused" in text


def test_the_next_step_names_no_version_that_was_withdrawn_or_still_waits(run: Callable[..., str], site: Site, tmp_path: Path) -> None:
    site.withdraw(LINE, "0.2.0")
    publish.publish(site.by_hand(), tiny_bundle(tmp_path / "bundles", "0.5.0", 5), deltas=False)
    publish.withdraw(site.by_hand(), LINE, "0.4.0", "reads too many healthy children as ill")
    assert proposed(run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")) == ["0.1.0"]


def test_a_version_that_works_on_boxes_is_named_before_one_that_nobody_has_tried(run: Callable[..., str], fleet: Fleet) -> None:
    take(fleet, "box-1", "0.2.0")
    fleet.close()
    text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
    assert proposed(text) == ["0.2.0"]
    assert "1 box runs it" in text


def test_a_version_that_nobody_has_tried_is_named_as_that(run: Callable[..., str]) -> None:
    text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
    assert proposed(text) == ["0.4.0"]
    assert "no box is known to run it: begin with few boxes (--percent)" in text


def test_without_the_results_of_boxes_that_exist_no_version_is_named(run: Callable[..., str], site: Site, fleet: Fleet) -> None:
    """The server was started with another database: what failed is known there, and not here."""
    fleet.close()
    (site.library.files.directory / "fleet.db").unlink()
    mark_database(site.library.files.directory, "postgresql+psycopg://fleet@/fleet")
    text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
    assert proposed(text) == []
    assert "give --db" in text
    mark_database(site.library.files.directory, sqlite_url(site.library.files.directory))
    assert proposed(run("minimum", LINE, "0.4.0")) == ["0.4.0"]


def test_results_are_read_from_the_database_that_is_given(run: Callable[..., str], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    elsewhere = Fleet(url)
    take(elsewhere, "box-1", "0.4.0", "rolled-back", "activation.failures")
    elsewhere.close()
    assert proposed(run("withdraw", LINE, "0.3.0", "--reason", "misses effusions", "--db", url)) == ["0.2.0"]


# -- what boxes really do


def test_a_raised_minimum_is_not_said_to_switch_anything_off(run: Callable[..., str]) -> None:
    text = run("minimum", LINE, "0.4.0")
    assert "the rollout of ring stable names cxr-pneumonia 0.3.0, which is older than the minimum 0.4.0" in text
    assert "no further box takes it; boxes that run it go on with it" in text
    assert "roll back" not in text


def test_a_withdrawal_is_said_to_stop_the_version(run: Callable[..., str]) -> None:
    text = run("withdraw", LINE, "0.3.0", "--reason", "misses effusions")
    assert "boxes that run it stop using it at their next poll" in text
    assert "an earlier version analyses again, or images are not analysed" in text
    assert "roll back by themselves" not in text, "a box without an earlier version analyses nothing"


# -- warnings of the status


def test_the_status_warns_of_a_rollout_to_a_withdrawn_version_and_names_the_next_step(run: Callable[..., str], site: Site) -> None:
    site.withdraw(LINE, "0.3.0")
    text = run("status")
    assert f"WARNING: the rollout of ring stable names {LINE} 0.3.0, which is withdrawn: no box installs it" in text
    assert proposed(text) == ["0.4.0"]


def test_the_status_warns_of_a_rollout_below_the_minimum(run: Callable[..., str], site: Site) -> None:
    publish.set_minimum(site.library, LINE, "0.4.0")
    text = run("status")
    assert f"WARNING: the rollout of ring stable names {LINE} 0.3.0, which is older than the minimum 0.4.0: no further box takes it" in text
    assert proposed(text) == ["0.4.0"]
    assert "nothing to do" not in text


def test_the_status_warns_of_the_public_rollout_while_another_one_waits(run: Callable[..., str], site: Site) -> None:
    site.withdraw(LINE, "0.3.0")
    rollouts.rollout(site.by_hand(), "stable", LINE, "0.4.0", 10.0)
    text = run("status")
    assert f"WARNING: the rollout of ring stable names {LINE} 0.3.0, which is withdrawn" in text
    assert proposed(text) == []
    assert "next: rollout waits for 1 more" in text


def test_the_status_proposes_no_bad_version_either(run: Callable[..., str], site: Site, fleet: Fleet) -> None:
    take(fleet, "box-1", "0.4.0", "failed", "model.self_test")
    fleet.close()
    site.withdraw(LINE, "0.3.0")
    assert proposed(run("status")) == ["0.2.0"]


def later(site: Site, days: float) -> list[str]:
    """Return the status some days from now."""
    clock = datetime.now(timezone.utc) + timedelta(days=days)
    return status_lines(Library(site.library.files.directory, site.library.signers.values(), clock=lambda: clock).status())


@pytest.mark.parametrize(("role", "validity"), [("rollout", 30), (LINE, 180), ("targets", 180), ("root", 365), ("snapshot", 14)])
def test_the_status_warns_ten_days_before_a_role_expires(site: Site, role: str, validity: int) -> None:
    assert any(line.startswith(f"WARNING: {role} expires in ") for line in later(site, validity - 9.9))


def test_a_rollout_that_is_valid_for_long_enough_is_no_warning(site: Site) -> None:
    assert not any("rollout expires" in line for line in later(site, 19.5))
    assert any("`model-library renew LIB rollout`" in line for line in later(site, 20.5))


def test_a_timestamp_that_is_signed_every_day_is_no_warning(site: Site) -> None:
    """Its seven days are fewer than the ten of the warning: half of its validity counts."""
    assert not any("timestamp" in line and "WARNING" in line for line in later(site, 3))
    assert any(line.startswith("WARNING: timestamp expires in 3.0 days") for line in later(site, 4))


def test_the_daily_command_keeps_snapshot_and_timestamp_without_a_warning(site: Site) -> None:
    for day in range(12):
        clock = datetime.now(timezone.utc) + timedelta(days=day)
        library = Library(site.library.files.directory, site.library.signers.values(), clock=lambda clock=clock: clock)
        assert not [text for text in library.status()["warnings"] if "snapshot" in text], day
        library.refresh_timestamp()
