"""A worker in the test's own process, and chest images for it."""

from __future__ import annotations

from collections.abc import Callable

from appliance.core.domain import Source
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from quantize.reference.phantom import Phantom, dataset
from tests.support.scans import encode

SOURCE = Source("upload", "demo")


def chest(seed: int, rows: int = 512, columns: int = 512) -> bytes:
    """A chest phantom as a DICOM file."""
    return encode(dataset(Phantom(rows=rows, cols=columns, seed=seed), name=f"test-{seed}"))


def small_chest(seed: int = 1, columns: int = 256) -> bytes:
    """A chest phantom of 256 rows; a narrow one has dark borders in the model's input."""
    return chest(seed, 256, columns)


def take(store: Store, data: bytes) -> int:
    """Accept a scan and plan it; the image's number."""
    accepted = Ingest(store).accept(data, SOURCE)
    store.planner.close_series([accepted.stored.series_id])
    return accepted.stored.instance_id


def prepared_worker(store: Store, on_deadline: Callable[[float], object] = lambda _seconds: None) -> Worker:
    """A worker in this process that has loaded its models."""
    made = Worker(store, on_deadline)
    made.prepare()
    return made
