"""Queries for the results of volume models, for the pages and ``appliance analyze --json``."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from appliance.core.domain import Measurement, Note, parse_notes
from appliance.core.run_summary import RunSummary
from appliance.store.store import Store
from appliance.store.study_summary import RECALLED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# The colours of Okabe and Ito, which colour-blind people can distinguish; for the outline of each label in the key images.
COLOURS: Final = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#d55e00", "#cc79a7")
_COLUMNS: Final = ("label", "code", "title_zh", "title_en", "value", "unit")


@dataclass(frozen=True)
class VolumeView:
    """One model's result on one series.

    ``planes`` are the names of its key images; ``recall`` is why the model version was withdrawn, None where it was not; ``ran`` is what
    ran the model, and why.
    """

    job_id: int
    series_id: int
    measurements: tuple[Measurement, ...]
    classes: tuple[str, ...]
    slices: int
    model: str
    model_version: str
    model_digest: str
    precision: str
    runtime: str
    planes: tuple[str, ...]
    recall: Note | None
    ran: RunSummary | None

    def to_json(self) -> dict[str, Any]:
        """The result as ``appliance analyze --json`` prints it; the mask stays in the store."""
        names = ("model", "model_version", "model_digest", "precision", "runtime", "slices")
        return {name: getattr(self, name) for name in names} | {"measurements": [item.to_json() for item in self.measurements]}


class VolumeResults:
    """Queries over one store."""

    def __init__(self, store: Store) -> None:
        self._db = store.database

    def of_study(self, study_id: int) -> list[VolumeView]:
        """Every volume of a study, in the order of analysis."""
        return self._views("SELECT id FROM series WHERE study_id = ?", study_id)

    def of_series(self, series_id: int) -> list[VolumeView]:
        """Every volume of a series."""
        return self._views("SELECT ?", series_id)

    def _views(self, series: str, value: int) -> list[VolumeView]:
        rows = self._db.query(
            "SELECT v.job_id, v.series_id, v.model, v.model_version, v.model_digest, v.precision, v.runtime, v.geometry,"  # noqa: S608
            " j.notes, j.runtime AS ran FROM volumes v JOIN jobs j ON j.id = v.job_id"
            f" WHERE v.series_id IN ({series}) AND j.outcome = 'ai_ready' ORDER BY v.job_id",
            value,
        )
        return [self._view(dict(row)) for row in rows]

    def _view(self, row: dict[str, Any]) -> VolumeView:
        geometry, notes = json.loads(row.pop("geometry")), parse_notes(row.pop("notes"))
        ran = RunSummary.of(json.loads(row.pop("ran") or "{}"))
        measured = self._db.query("SELECT * FROM measurements WHERE job_id = ? ORDER BY id", row["job_id"])
        planes = self._db.query("SELECT plane FROM key_pictures WHERE job_id = ? ORDER BY plane", row["job_id"])
        return VolumeView(
            measurements=tuple(Measurement(**{name: item[name] for name in _COLUMNS}) for item in measured),
            classes=tuple(geometry["classes"]),
            slices=geometry["shape"][0],
            planes=tuple(item["plane"] for item in planes),
            recall=next((note for note in notes if note.code in RECALLED), None),
            ran=ran,
            **row,
        )

    def picture(self, job_id: int, plane: str) -> bytes:
        """A key image as PNG; raises StoreError ``store.missing``."""
        sql = "SELECT png FROM key_pictures WHERE job_id = ? AND plane = ?"
        return bytes(self._db.require(f"key picture {job_id} {plane}", sql, job_id, plane)["png"])

    def study_of(self, job_id: int) -> int:
        """The study a volume belongs to; raises StoreError ``store.missing``."""
        sql = "SELECT s.study_id FROM volumes v JOIN series s ON s.id = v.series_id WHERE v.job_id = ?"
        return int(self._db.require(f"volume {job_id}", sql, job_id)["study_id"])

    def mask(self, job_id: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """The mask, uint8 [slices, rows, columns], and its ``affine``, ``classes`` and ``slices`` (SOP Instance UID, frame).

        Raises:
            StoreError: ``store.missing``.
        """
        import numpy as np

        row = self._db.require(f"volume {job_id}", "SELECT mask, geometry FROM volumes WHERE job_id = ?", job_id)
        geometry: dict[str, Any] = json.loads(row["geometry"])
        return np.frombuffer(zlib.decompress(row["mask"]), np.uint8).reshape(geometry["shape"]), geometry
