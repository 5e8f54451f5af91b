"""Words for body part, view and species as real senders write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.clinical_terms import body_parts_of, is_human, view_of


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("CHEST PA", {"CHEST"}), ("CHEST_1_VIEW", {"CHEST"}), ("CHEST1VIEW", {"CHEST"}), ("THORAX AP", {"CHEST"}), ("TORAX", {"CHEST"}),
        ("Tórax", {"CHEST"}), ("胸部", {"CHEST"}), ("胸部正位", {"CHEST"}), ("DR胸片", {"CHEST"}), ("Thorax/Chest", {"CHEST"}),
        ("CHESTABDOMEN", {"CHEST", "ABDOMEN"}), ("HAND PA", {"HAND"}), ("左手正斜位", {"HAND"}), ("膝关节正侧位", {"KNEE"}),
        ("胸椎正位", {"TSPINE"}), ("C-SPINE", {"CSPINE"}), ("L SPINE", {"LSPINE"}), ("Knie links", {"KNEE"}), ("腹部立位", {"ABDOMEN"}),
        ("胸腹部", {"CHEST", "ABDOMEN"}), ("", set()), ("XYZ", set()), ("PA", set()), ("Handover", set()), ("胸部手术后", {"CHEST"}),
    ],
)  # fmt: skip
def test_body_part(text: str, parts: set[str]) -> None:
    assert body_parts_of(text) == parts


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("PA", "PA"), ("AP SUPINE", "AP"), ("PA ERECT", "PA"), ("FRONTAL", "FRONTAL"), ("正位", "FRONTAL"), ("后前位", "PA"),
        ("前后位", "AP"), ("侧位", "LATERAL"), ("左侧位", "LL"), ("LAT", "LATERAL"), ("LL", "LL"), ("postero-anterior", "PA"),
        ("Antero posterior", "AP"), ("RAO", "OBLIQUE"), ("PA LAT", ""), ("正侧位", ""), ("AP OBLIQUE", "OBLIQUE"), ("CHEST", ""),
        ("", ""), ("胸部正位片", "FRONTAL"), ("L-LAT", "LATERAL"),
    ],
)  # fmt: skip
def test_view(text: str, view: str) -> None:
    assert view_of(text) == view


@pytest.mark.parametrize(
    ("description", "code", "human"),
    [
        ("", "", True), ("Homo sapiens", "", True), ("human", "", True), ("Canine", "", False), ("犬", "", False),
        ("Feline", "448169003", False), ("", "337915000", True), ("", "L-80700", False),
    ],
)  # fmt: skip
def test_species(description: str, code: str, human: bool) -> None:
    assert is_human(description, code) is human


@given(st.text(max_size=40))
def test_any_text_is_allowed(text: str) -> None:
    assert isinstance(body_parts_of(text), frozenset)
    assert isinstance(view_of(text), str)
