"""The model card of the reference bundle, in Chinese and English; its other texts stand in ``draft.toml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from model_sync.bundle import OperatingPoint, SourceMeasure
from quantize.bundle.model_card import groups_table, interval, table

_CARD: Final = Path(__file__).with_suffix(".md")


def card(version: str, point: OperatingPoint, independent: Sequence[SourceMeasure], gate: str) -> str:
    """Return ``MODEL_CARD.md``; ``gate`` is the chapter on the variants."""
    return _CARD.read_text(encoding="utf-8").format(
        version=version,
        threshold=f"{point.threshold:.4f}",
        sensitivity=interval(point.sensitivity),
        specificity=interval(point.specificity),
        groups=groups_table(point.groups),
        n_held_out=_size(point.per_source),
        held_out=table(point.per_source),
        n_independent=_size(independent),
        independent=table(independent),
        gate=gate,
    )


def _size(measures: Sequence[SourceMeasure]) -> int:
    return sum(measure.n_positive + measure.n_negative for measure in measures)
