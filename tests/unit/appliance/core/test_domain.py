"""Clinical types: ages, states, reasons, settings, scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.applicability import applies
from appliance.core.domain import STATE_URGENCY, Note, ScanState, age_years
from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from model_sync.bundle import Synonyms
from tests.support.stored_scans import RULE, scan


@pytest.mark.parametrize(
    ("age", "born", "taken", "years"),
    [
        ("004Y", "", "", 4.0),
        ("018M", "", "", 1.5),
        ("003W", "", "", 21 / 365.25),
        ("010D", "", "", 10 / 365.25),
        ("", "20200101", "20240101", 4.0),
        ("62", "19010101", "", None),
        ("062", "", "", None),
        ("", "20240101", "20200101", None),
        ("", "00000000", "20200101", None),
        ("", "", "", None),
    ],
)
def test_age_comes_from_age_or_dates_and_is_never_guessed(age: str, born: str, taken: str, years: float | None) -> None:
    got = age_years(age, born, taken)
    assert got == (None if years is None else pytest.approx(years, abs=0.01))


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_age_never_raises(age: str, born: str, taken: str) -> None:
    got = age_years(age, born, taken)
    assert got is None or got >= 0


def test_every_state_has_its_urgency() -> None:
    assert set(STATE_URGENCY) == set(ScanState)


def test_settings_unknown_key_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text("webport = 1\n")
    with pytest.raises(ApplianceError, match="webport"):
        Settings.load(tmp_path)


@pytest.mark.parametrize("text", ["web_port = 'x'", "web_port = 70000", "series_idle_s = 0", "language = 'fr'", "= broken", "\udcff"])
def test_settings_bad_value_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "box.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ApplianceError) as caught:
        Settings.load(tmp_path)
    assert caught.value.code == "settings.invalid"
    assert caught.value.hint


def test_settings_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ApplianceError, match="There is no such folder or settings file"):
        Settings.load(tmp_path / "box.toml")


def test_settings_relative_paths_belong_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text("data_dir = 'data'\ntls_certificate = 'keys/web.crt'\n")
    settings = Settings.load(tmp_path / "box.toml")
    assert settings.data_dir == tmp_path / "data"
    assert settings.tls_certificate == tmp_path / "keys" / "web.crt"


def test_a_relative_data_directory_is_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("box").mkdir()
    assert Settings.load(Path("box")).data_dir == tmp_path / "box"


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"modality": "CT"}, "scope.modality"),
        ({"modality": ""}, "scope.modality"),
        ({"sop_class_uid": "1.2"}, "scope.sop_class"),
        ({"number_of_frames": 2}, "scope.frames"),
        ({"body_part_examined": "HAND"}, "scope.body_part"),
        ({"view_position": "LL"}, "scope.view"),
        ({"view_position": "LATERAL"}, "scope.view"),
    ],
)
def test_out_of_scope_has_its_reason(changes: dict[str, Any], refusal: str) -> None:
    verdict = applies(RULE, scan(**changes))
    assert verdict.refusal is not None
    assert verdict.refusal.code == refusal


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, []),
        ({"view_position": "AP SUPINE"}, []),
        ({"patient_age_years": 5.9}, []),
        ({"body_part_examined": ""}, ["assume.body_part"]),
        ({"view_position": ""}, ["assume.view"]),
        ({"patient_age_years": None}, ["caution.age_unknown"]),
        ({"patient_age_years": 64.0}, ["caution.age_outside"]),
        ({"notes": (Note("caution.photograph"),)}, ["caution.photograph"]),
    ],
)
def test_what_was_assumed_is_said(changes: dict[str, Any], notes: list[str]) -> None:
    verdict = applies(RULE, scan(**changes))
    assert verdict.refusal is None
    assert [note.code for note in verdict.notes] == notes


@pytest.mark.parametrize(
    ("rule", "changes", "refusal"),
    [
        ({"when_body_part_absent": "out_of_scope"}, {"body_part_examined": ""}, "scope.body_part"),
        ({"when_view_absent": "out_of_scope"}, {"view_position": ""}, "scope.view"),
        ({"age": RULE.age.model_copy(update={"outside": "out_of_scope"})}, {"patient_age_years": 64.0}, "scope.age"),
        ({"age": RULE.age.model_copy(update={"absent": "out_of_scope"})}, {"patient_age_years": None}, "scope.age"),
    ],
)
def test_a_manifest_may_refuse_what_is_absent(rule: dict[str, Any], changes: dict[str, Any], refusal: str) -> None:
    verdict = applies(RULE.model_copy(update=rule), scan(**changes))
    assert verdict.refusal is not None
    assert verdict.refusal.code == refusal


SYNONYMS = Synonyms(body_part={"CHEST": ["RTG KLP", "Grudnoy  Kletki"], "HAND": ["CXR HAND"]}, view={"PA": ["Z-A"], "LL": ["AP BOK"]})


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"body_part_examined": "RTG KLP"}, None),
        ({"body_part_examined": " rtg klp "}, None),
        ({"body_part_examined": "RTG KLP 2"}, "scope.body_part"),  # not the whole value
        ({"body_part_examined": "RTG  KLP"}, "scope.body_part"),  # spaces count except at the ends
        ({"body_part_examined": "CXR HAND"}, "scope.body_part"),  # CXR alone means the chest: the manifest's word comes first
        ({"view_position": "z-a"}, None),
        ({"view_position": "AP BOK"}, "scope.view"),  # AP alone is in scope: the manifest's word comes first
        ({"body_part_examined": "THORAX", "view_position": "AP SUPINE"}, None),  # the box's own words hold as before
    ],
)
def test_words_of_the_manifest_are_understood_before_those_of_the_box(changes: dict[str, Any], refusal: str | None) -> None:
    rule = RULE.model_copy(update={"synonyms": SYNONYMS})
    verdict = applies(rule, scan(**changes))
    assert (verdict.refusal.code if verdict.refusal else None) == refusal
    without = applies(RULE, scan(body_part_examined="RTG KLP"))
    assert without.refusal is not None
