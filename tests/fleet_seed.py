"""A fleet of thousands of boxes, written straight into the database: what the page has to show, and how fast."""

from __future__ import annotations

import random
from datetime import datetime, timezone
from typing import Any

from model_sync.fleet.database import Fleet
from model_sync.fleet.tables import activations, box_models, boxes, certificates, events
from model_sync.trust.documents import RolloutStep, decide
from tests.fleet_site import DIGEST

LINE = "cxr-pneumonia"
PLACES = ("ankang", "baoji", "dali", "enshi", "ganzi", "honghe", "liangshan", "longnan", "tongren", "zhaotong")
REASONS = ("model.self_test", "activation.latency", "activation.memory", "activation.failures", "bundle.digest_mismatch")


def seed(fleet: Fleet, count: int, step: RolloutStep, *, ring: str = "stable", old: str = "0.1.0", failures: float = 0.0) -> None:
    """Fill the tables as if ``count`` boxes had reported: those whose turn it is run the step's version, ``failures`` of them failed."""
    draw, now, start = random.Random(7), fleet.now(), int(step.start.timestamp())
    rows: dict[str, list[dict[str, Any]]] = {"boxes": [], "models": [], "activations": [], "events": [], "certificates": []}
    for number in range(count):
        box_id = f"{PLACES[number % len(PLACES)]}-{number:05d}"
        mine = ring if number % 20 else "canary"
        chosen = mine == ring and decide(step, LINE, box_id, fleet_time(now)).take
        failed = chosen and draw.random() < failures
        at = min(now, start + int(draw.random() * 0.3 * 3600) + _turn(step, box_id))
        rows["boxes"].append(_box(box_id, mine, number, now, draw, failed, step.version))
        rows["certificates"].append(
            {"serial": f"{number + 1:x}", "box_id": box_id, "not_after": now + 20 * 86400, "revoked_at": None, "pem": ""}
        )
        if number % 97 == 0:
            continue  # enrolled, never reported
        version = step.version if chosen and not failed else old
        rows["models"].append(
            {"box_id": box_id, "position": 0, "line": LINE, "version": version, "digest": DIGEST, "state": "active", "precision": "int8",
             "runtime": "onnxruntime 1.20.1", "running": 1}
        )  # fmt: skip
        if not (chosen and not failed):
            before = {"box_id": box_id, "line": LINE, "version": old, "state": "good", "code": "", "at": start - 40 * 86400, "ring": mine}
            rows["activations"].append(before | {"running_since": start - 40 * 86400, "ended_at": None})
        if chosen:
            code = draw.choice(REASONS) if failed else ""
            event = {
                "box_id": box_id,
                "line": LINE,
                "version": step.version,
                "state": "failed" if failed else "good",
                "code": code,
                "at": at,
            }
            rows["activations"].append(event | {"ring": mine, "running_since": None if failed else at, "ended_at": at if failed else None})
            rows["events"].append(event | {"digest": DIGEST, "said_at": at})
    with fleet.writing() as tx:
        for table, name in (
            (boxes, "boxes"),
            (certificates, "certificates"),
            (box_models, "models"),
            (activations, "activations"),
            (events, "events"),
        ):
            if rows[name]:
                tx.execute(table.insert(), rows[name])


def fleet_time(now: int) -> Any:
    """Return a moment with zone."""
    return datetime.fromtimestamp(now, timezone.utc)


def _turn(step: RolloutStep, box_id: str) -> int:
    at = decide(step, LINE, box_id, step.start.replace(year=2020)).at
    return int((at - step.start).total_seconds()) if at is not None else 0


def _box(box_id: str, ring: str, number: int, now: int, draw: random.Random, failed: bool, version: str) -> dict[str, Any]:
    state, code = "ok", "sync.ok"
    if number % 41 == 3:
        state, code = "unreachable", "sync.unreachable"
    elif number % 1301 == 7:
        state, code = "untrusted", "trust.signature"
    elif number % 53 == 1:
        state, code = "downloading", "sync.downloading"
    if number % 97 == 0:
        state, code = "unknown", ""
    silent = number % 67 == 5
    return {
        "box_id": box_id, "ring": ring, "reported_ring": ring, "enrolled_at": now - 90 * 86400,
        "last_seen": None if number % 97 == 0 else now - (draw.randrange(90000, 900000) if silent else draw.randrange(3500)),
        "sequence": 100, "report_sha256": "", "report": None, "sync_state": state, "sync_code": code, "sync_since": now - 7000,
        "appliance_version": "0.1.0", "trouble": "model.self_test" if failed else "", "trouble_line": LINE if failed else "",
        "trouble_version": version if failed else "", "denied_at": now - 86400 if number % 997 == 11 else None,
    }  # fmt: skip
