"""A model made for T1 reads T1: what else an MR scanner makes of the same head is out of scope, with a reason."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from appliance.core.applicability import Verdict
from appliance.core.domain import Note
from appliance.imaging.volumes.acquisition import acquisitions, applies_to_sequence
from model_sync.bundle import BundleError, Manifest, SequenceRule
from tests.support import series as made_up
from tests.support import volume_bundle

FILES = {"model_fp32.onnx": b"", "golden/a.npz": b"", "MODEL_CARD.md": b"", "gate.json": b""}
T1 = {"EchoTime": "3.1", "RepetitionTime": "7.25", "ScanningSequence": ["GR", "IR"], "ImageType": ["ORIGINAL", "PRIMARY", "M", "UCA"]}
RULE = SequenceRule.model_validate(volume_bundle.T1_SEQUENCE)


def header(**changes: Any) -> Dataset:
    """What a T1 of a head says, with changes; None takes an attribute away."""
    ds = Dataset()
    for keyword, value in ({"Modality": "MR"} | T1 | changes).items():
        if value is not None:
            setattr(ds, keyword, value)
    return ds


def verdict(*headers: Dataset, **rule: Any) -> Verdict:
    return applies_to_sequence(RULE.model_copy(update=rule), [frame for one in headers for frame in acquisitions(one)])


def parse(value: dict[str, Any]) -> Manifest:
    return Manifest.parse(json.dumps(value).encode())


# -- the format ----------------------------------------------------------------------------------------------------------


def with_sequence(rule: Any) -> dict[str, Any]:
    manifest = volume_bundle.manifest_of(FILES)
    manifest["applies_to"]["sequence"] = rule
    return manifest


def test_manifest_without_the_rule_is_the_same_bytes_as_before() -> None:
    read = parse(volume_bundle.manifest_of(FILES))
    assert read.applies_to.sequence is None and b"sequence" not in read.to_json()
    assert Manifest.parse(read.to_json()).to_json() == read.to_json()


def test_manifest_with_the_rule_comes_back_as_it_was() -> None:
    read = parse(with_sequence(volume_bundle.T1_SEQUENCE))
    assert read.applies_to.sequence == RULE and read.applies_to.sequence.when_absent == "out_of_scope"
    assert Manifest.parse(read.to_json()) == read


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "must require something"),
        ({"when_absent": "assume"}, "must require something"),
        ({"echo_time_ms": {"low": 30, "high": 3}}, "low < high"),
        ({"echo_time_ms": {"low": -1, "high": 3}}, "echo_time_ms.low"),
        ({"repetition_time_ms": {"low": 1}}, "repetition_time_ms.high"),
        ({"scanning_sequence": ["T1"]}, "scanning_sequence"),
        ({"image_type_not": ["derived"]}, "image_type_not"),
        ({"image_type_not": ["MIP"], "when_absent": "guess"}, "when_absent"),
        ({"contrast_agent": "assume"}, "contrast_agent"),
        ({"flip_angle": 9}, "flip_angle"),
    ],
)
def test_rule_that_makes_no_sense_is_refused(rule: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        parse(with_sequence(rule))


def test_model_of_images_has_no_such_rule() -> None:
    """Nothing of the box would hold an image against it: better no rule than one that is not kept."""
    from appliance.lifecycle.model_control import reference_bundle

    manifest = json.loads((reference_bundle() / "manifest.json").read_bytes())
    manifest["applies_to"]["sequence"] = volume_bundle.T1_SEQUENCE
    with pytest.raises(BundleError, match=r"sequence needs an input of layout NCDHW"):
        parse(manifest)


# -- what a T1 model reads, and what not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"EchoTime": "2.98", "RepetitionTime": "2300", "ScanningSequence": ["GR", "IR"]},
        {"EchoTime": "4.6", "RepetitionTime": "25", "ScanningSequence": "GR"},
    ],
    ids=["UIH GRE-FSP", "MPRAGE", "FLASH"],
)
def test_t1_is_read(changes: dict[str, Any]) -> None:
    assert verdict(header(**changes)) == Verdict()


@pytest.mark.parametrize(
    ("changes", "code", "detail"),
    [
        ({"EchoTime": "92", "RepetitionTime": "5200", "ScanningSequence": "SE"}, "scope.sequence", "ScanningSequence SE; GR, IR"),
        ({"EchoTime": "120", "RepetitionTime": "9000"}, "scope.sequence", "EchoTime 120 ms; 0-15 ms"),
        ({"EchoTime": "4", "RepetitionTime": "9000"}, "scope.sequence", "RepetitionTime 9000 ms; 0-3000 ms"),
        ({"EchoTime": "22", "RepetitionTime": "2300", "ScanningSequence": "SE"}, "scope.sequence", "ScanningSequence SE; GR, IR"),
        ({"EchoTime": "80", "ScanningSequence": ["EP", "SE"]}, "scope.sequence", "ScanningSequence EP, SE; GR, IR"),
        ({"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}, "scope.image_type", "DERIVED, ADC"),
        (
            {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP"]},
            "scope.image_type",
            "DERIVED, SECONDARY, PROJECTION IMAGE, MIP",
        ),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "MPR"]}, "scope.image_type", "MPR"),
        ({"ContrastBolusAgent": "GADOBUTROL"}, "scope.contrast_agent", ""),
    ],
    ids=["T2", "FLAIR", "long TR", "PD", "DWI", "ADC", "MIP", "MPR", "contrast"],
)
def test_series_that_is_no_plain_t1_is_out_of_scope(changes: dict[str, Any], code: str, detail: str) -> None:
    assert verdict(header(**changes)).refusal == Note(code, detail)


@pytest.mark.parametrize("keyword", sorted(T1))
@pytest.mark.parametrize("value", [None, "", "nonsense"])
def test_what_the_header_does_not_say_is_not_assumed(keyword: str, value: str | None) -> None:
    if value == "nonsense":
        if keyword in ("ScanningSequence", "ImageType"):
            return  # any word is a value there
        ds = header(**{keyword: None})
        element = {"EchoTime": 0x00180081, "RepetitionTime": 0x00180080}[keyword]
        ds.add_new(element, "LO", "soon")
    else:
        ds = header(**{keyword: value})
    assert verdict(ds).refusal == Note("scope.sequence_absent", keyword)
    assert verdict(ds, when_absent="assume") == Verdict(notes=(Note("assume.sequence", keyword),))


def test_contrast_agent_may_be_a_caution() -> None:
    assert verdict(header(ContrastBolusAgent="GADOBUTROL"), contrast_agent="caution").notes == (Note("caution.contrast_agent"),)
    assert verdict(header(ContrastBolusAgent="NONE")) == Verdict()
    assert verdict(header(ContrastBolusAgent="GADOBUTROL"), contrast_agent=None) == Verdict()


def test_one_slice_of_another_sequence_makes_the_series_no_volume() -> None:
    refusal = verdict(header(), header(), header(EchoTime="92")).refusal
    assert refusal == Note("volume.mixed_scope", "1 of 2: scope.sequence")


def test_scout_views_are_not_held_against_the_series() -> None:
    scout = header(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], EchoTime="92")
    assert verdict(header(), scout) == Verdict() and verdict(scout) == Verdict()


def enhanced(**frame: Any) -> Dataset:
    """An Enhanced MR image: times in functional groups, pulses in words."""
    image = made_up.enhanced(made_up.slices(3, rows=4, columns=4))
    image.ImageType, image.EchoPulseSequence, image.InversionRecovery = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "GRADIENT", "YES"
    timing, echo = Dataset(), Dataset()
    timing.RepetitionTime = frame.get("repetition", 2300.0)
    image.SharedFunctionalGroupsSequence[0].MRTimingAndRelatedParametersSequence = Items([timing])
    for number, group in enumerate(image.PerFrameFunctionalGroupsSequence):
        echo = Dataset()
        echo.EffectiveEchoTime = frame.get("echoes", (3.0, 3.0, 3.0))[number]
        group.MREchoSequence = Items([echo])
        kind = Dataset()
        kind.FrameType = frame.get("kind", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
        group.MRImageFrameTypeSequence = Items([kind])
    return image


def test_enhanced_images_say_it_in_their_functional_groups() -> None:
    assert verdict(enhanced()) == Verdict()
    assert verdict(enhanced(repetition=9000.0)).refusal == Note("scope.sequence", "RepetitionTime 9000 ms; 0-3000 ms")
    assert verdict(enhanced(kind=["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"])).refusal == Note("scope.image_type", "DERIVED")
    assert verdict(enhanced(echoes=(3.0, 90.0, 3.0))).refusal == Note("volume.mixed_scope", "1 of 2: scope.sequence")
    spin = enhanced()
    spin.EchoPulseSequence, spin.EchoPlanarPulseSequence = "SPIN", "YES"
    assert verdict(spin).refusal == Note("scope.sequence", "ScanningSequence SE, EP; GR, IR")
    del spin.EchoPulseSequence
    assert verdict(spin).refusal == Note("scope.sequence_absent", "ScanningSequence")


@given(st.text(max_size=12), st.text(max_size=12), st.lists(st.text(max_size=8), max_size=4))
def test_any_header_ends_in_a_verdict(echo: str, kind: str, image_type: list[str]) -> None:
    ds = header(EchoTime=None, ImageType=None, ScanningSequence=None)
    ds.add_new(0x00180081, "LO", echo)
    ds.add_new(0x00180020, "LO", kind)
    ds.add_new(0x00080008, "LO", image_type)
    found = verdict(copy.deepcopy(ds))
    assert found.refusal is None or found.refusal.code.startswith("scope.")
