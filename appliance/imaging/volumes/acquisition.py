"""How a series was acquired, checked against ``applies_to.sequence`` of a model. Pure functions.

Modality and body part do not distinguish a T1 from a FLAIR, a diffusion map or a vessel projection; echo time, repetition time, scanning
sequence and image type do. Attributes are read from classic and from enhanced images (PS3.3 C.8.3.1 and C.8.13.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from appliance.core.applicability import Verdict, combine_verdicts
from appliance.core.domain import Note
from appliance.imaging.greyscale import frame_type, frame_value, numbers, words
from appliance.imaging.pixels import frame_count

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from model_sync.bundle import SequenceRule

# Enhanced images have flags and words in place of the codes of Scanning Sequence (PS3.3 C.8.13.4).
_PULSES: Final = {"SPIN": ("SE",), "GRADIENT": ("GR",), "BOTH": ("SE", "GR")}
_NO_AGENT: Final = {"NONE", "NO", "N"}
_FLAGS: Final = {"InversionRecovery": "IR", "EchoPlanarPulseSequence": "EP"}


@dataclass(frozen=True)
class Acquisition:
    """The acquisition attributes of one frame; None and empty where absent."""

    echo_time_ms: float | None
    repetition_time_ms: float | None
    scanning_sequence: tuple[str, ...]
    image_type: tuple[str, ...]
    contrast_agent: bool

    @property
    def is_localizer(self) -> bool:
        """Whether it is a scout view, which is not part of the volume."""
        return "LOCALIZER" in self.image_type


def acquisitions(ds: Dataset) -> list[Acquisition]:
    """The distinct acquisitions of the frames of an image; reads no pixels."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    frames = min(frame_count(ds), len(per_frame)) or 1
    return list(dict.fromkeys(_frame(ds, frame) for frame in range(frames)))


def _frame(ds: Dataset, frame: int) -> Acquisition:
    echo = frame_value(ds, frame, "MREchoSequence", "EffectiveEchoTime")
    return Acquisition(
        _milliseconds(ds.get("EchoTime") if echo is None else echo),
        _milliseconds(frame_value(ds, frame, "MRTimingAndRelatedParametersSequence", "RepetitionTime")),
        _distinct(words(ds.get("ScanningSequence"))) or _pulses(ds),
        _distinct((*words(ds.get("ImageType")), *frame_type(ds, frame))),
        bool(set(_distinct(words(ds.get("ContrastBolusAgent")))) - _NO_AGENT or ds.get("ContrastBolusAgentSequence")),
    )


def _milliseconds(value: object) -> float | None:
    """Parse one duration; None for several values, such as the echoes of one image."""
    values = numbers(value)
    return values[0] if len(values) == 1 and math.isfinite(values[0]) and values[0] >= 0 else None


def _distinct(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, texts)))


def _pulses(ds: Dataset) -> tuple[str, ...]:
    """The Scanning Sequence codes of an enhanced image; empty where Echo Pulse Sequence is absent."""
    echoes = _PULSES.get(str(ds.get("EchoPulseSequence") or "").strip().upper(), ())
    flags = tuple(code for keyword, code in _FLAGS.items() if str(ds.get(keyword) or "").strip().upper() == "YES")
    return (*echoes, *flags) if echoes else ()


def applies_to_sequence(rule: SequenceRule, frames: Sequence[Acquisition]) -> Verdict:
    """Check the frames of a series against the rule of a model; all frames but scout views must pass."""
    return combine_verdicts([_applies(rule, frame) for frame in dict.fromkeys(frames) if not frame.is_localizer])


def _applies(rule: SequenceRule, frame: Acquisition) -> Verdict:
    absent = []
    if rule.image_type_not and not frame.image_type:
        absent.append("ImageType")
    if wrong := [word for word in frame.image_type if word in rule.image_type_not]:
        return Verdict(Note("scope.image_type", ", ".join(wrong)))
    if rule.scanning_sequence and not frame.scanning_sequence:
        absent.append("ScanningSequence")
    if rule.scanning_sequence and (other := [word for word in frame.scanning_sequence if word not in rule.scanning_sequence]):
        return Verdict(Note("scope.sequence", f"ScanningSequence {', '.join(other)}; {', '.join(rule.scanning_sequence)}"))
    times = (("EchoTime", rule.echo_time_ms, frame.echo_time_ms), ("RepetitionTime", rule.repetition_time_ms, frame.repetition_time_ms))
    for name, span, value in times:
        if span is not None and value is None:
            absent.append(name)
        elif span is not None and value is not None and not span.low <= value <= span.high:
            return Verdict(Note("scope.sequence", f"{name} {value:g} ms; {span.low:g}-{span.high:g} ms"))
    if frame.contrast_agent and rule.contrast_agent == "out_of_scope":
        return Verdict(Note("scope.contrast_agent"))
    if absent and rule.when_absent == "out_of_scope":
        return Verdict(Note("scope.sequence_absent", ", ".join(absent)))
    notes = [Note("assume.sequence", ", ".join(absent))] if absent else []
    return Verdict(notes=(*notes, *([Note("caution.contrast_agent")] if frame.contrast_agent and rule.contrast_agent else [])))
