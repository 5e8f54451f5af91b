"""Decide whether a model applies to an image or a series. Pure functions; the manifest says what an absent attribute means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from appliance.core.clinical_terms import FRONTAL, body_parts_of, view_of
from appliance.core.domain import Note, Scan
from model_sync.bundle import AppliesTo, Manifest, VolumeSpec

# Notes about an image that no model is for: an animal, a test image, an image that is not for people to look at.
EXCLUSIONS: Final = ("scope.species", "scope.quality_control", "scope.for_processing")
# The detail of a refusal because of an attribute that the image does not have.
ABSENT: Final = "-"


@dataclass(frozen=True)
class AgeOutside:
    """A patient's age and the range the model is for, in years, as the detail of ``caution.age_outside`` holds them."""

    years: str
    min_years: str
    max_years: str

    def to_note(self) -> Note:
        """The note as stored."""
        return Note("caution.age_outside", f"{self.years}; {self.min_years}-{self.max_years}")

    @classmethod
    def from_note(cls, note: Note) -> AgeOutside | None:
        """Read what :meth:`to_note` wrote; None for another note."""
        match = re.fullmatch(r"(\S+); (\S+)-(\S+)", note.detail) if note.code == "caution.age_outside" else None
        return cls(match[1], match[2], match[3]) if match else None


@dataclass(frozen=True)
class Verdict:
    """Why a model does not apply (``refusal``), else the assumptions and cautions (``notes``)."""

    refusal: Note | None = None
    notes: tuple[Note, ...] = ()


def is_volume_model(manifest: Manifest) -> bool:
    """Whether a model analyses a series and not single images."""
    return isinstance(manifest.input, VolumeSpec)


def applies_to_series(rule: AppliesTo, scans: Sequence[Scan]) -> Verdict:
    """Check a series against ``applies_to``; all of its images must pass."""
    return combine_verdicts([applies(rule, scan, frames=True) for scan in scans])


def combine_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """Combine the verdicts on the images of a series: refused where any image is."""
    refusals = [verdict.refusal for verdict in verdicts if verdict.refusal is not None]
    if refusals and len(refusals) == len(verdicts):
        return Verdict(refusals[0])
    if refusals:
        return Verdict(Note("volume.mixed_scope", f"{len(refusals)} of {len(verdicts)}: {refusals[0].code}"))
    return Verdict(notes=tuple(dict.fromkeys(note for verdict in verdicts for note in verdict.notes)))


def applies(rule: AppliesTo, scan: Scan, *, frames: bool = False) -> Verdict:
    """Check one image against ``applies_to``; with ``frames`` a multi-frame image is accepted, as volume models do."""
    if scan.modality not in rule.modality:
        return Verdict(Note("scope.modality", scan.modality or ABSENT))
    if scan.sop_class_uid not in rule.sop_class_uid:
        return Verdict(Note("scope.sop_class", scan.sop_class_uid))
    if scan.number_of_frames > 1 and not frames:
        return Verdict(Note("scope.frames", str(scan.number_of_frames)))
    excluded = next((note for note in scan.notes if note.code in EXCLUSIONS), None)
    if excluded is not None:
        return Verdict(excluded)
    notes: list[Note] = list(scan.notes)
    for check in (_body_part, _view, _age):
        refusal, remarks = check(rule, scan)
        if refusal:
            return Verdict(refusal)
        notes.extend(remarks)
    return Verdict(notes=tuple(notes))


def _defined_term(synonyms: Mapping[str, Sequence[str]], stated: str) -> str:
    """The defined term that the manifest names for a whole value, else the value; case and spaces at the ends do not matter."""
    value = stated.strip().upper()
    return next((term for term, words in synonyms.items() if value in {word.strip().upper() for word in words}), value)


def _body_part(rule: AppliesTo, scan: Scan) -> tuple[Note | None, list[Note]]:
    stated = _defined_term(rule.synonyms.body_part if rule.synonyms else {}, scan.body_part_examined)
    if not stated:
        if rule.when_body_part_absent == "out_of_scope":
            return Note("scope.body_part", ABSENT), []
        return None, [Note("assume.body_part", rule.assumed_body_part)]
    if stated in rule.body_part:
        return None, []
    allowed = frozenset[str]().union(*(body_parts_of(part) | {part} for part in rule.body_part))
    parts = body_parts_of(stated)
    if not parts & allowed:
        return Note("scope.body_part", stated), []
    return None, [Note("caution.body_part_several", ", ".join(sorted(parts)))] if parts - allowed else []


def _view(rule: AppliesTo, scan: Scan) -> tuple[Note | None, list[Note]]:
    if not rule.view_position and rule.when_view_absent == "assume":
        return None, []  # slices have no view
    stated = _defined_term(rule.synonyms.view if rule.synonyms else {}, scan.view_position)
    if not stated:
        if rule.when_view_absent == "out_of_scope":
            return Note("scope.view", ABSENT), []
        return None, [Note("assume.view", rule.assumed_view)]
    view = view_of(stated)
    if view in rule.view_position or stated in rule.view_position:
        return None, []
    if view == FRONTAL and {"PA", "AP"} & set(rule.view_position):
        return None, [Note("assume.view_frontal")]
    return Note("scope.view", stated), []


def _age(rule: AppliesTo, scan: Scan) -> tuple[Note | None, list[Note]]:
    age = rule.age
    if scan.patient_age_years is None:
        return (Note("scope.age", ABSENT), []) if age.absent == "out_of_scope" else (None, [Note("caution.age_unknown")])
    if age.includes(scan.patient_age_years):
        return None, []
    years = f"{scan.patient_age_years:.0f}"
    if age.outside == "out_of_scope":
        return Note("scope.age", years), []
    return None, [AgeOutside(years, f"{age.min_years:g}", f"{age.max_years:g}").to_note()]
