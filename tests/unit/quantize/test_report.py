"""The report of records that a run could leave: several labels, none, hostile texts, nothing but fp32."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest

from model_sync import messages
from quantize.report import html_report, plots
from quantize.report.html_report import _pair as reason

RNG = np.random.default_rng(0)
N = 40


def figures(auc: float | None = 0.95) -> dict[str, Any]:
    rate = {"value": 0.9, "low": 0.8, "high": 0.95}
    source = {
        "source": "Hospital <b>&", "n_positive": 30, "n_negative": 0, "sensitivity": rate, "specificity": None, "auc": None,
        "auc_float": None, "gated": False,
    }  # fmt: skip
    return {
        "threshold": 0.5, "auc": auc, "auc_float": 0.95, "auc_difference": 0.001, "sensitivity": rate, "specificity": rate,
        "max_abs_delta": 0.1, "mean_abs_delta": 0.01, "changed_sides": 2, "per_source": [source],
    }  # fmt: skip


def on(labels: list[str], *, passed: bool = True) -> dict[str, Any]:
    found = {
        "passed": passed, "reasons": [] if passed else [{"code": "gate.auc", "detail": "AUC <0.5>"}], "cam_difference": 0.01,
        "labels": {name: figures() for name in labels}, "scores": RNG.random((N, len(labels))).tolist(), "describe": {"layers": {"u8": 3}},
        "timed": {"median_ms": 2.5, "best_ms": 2.0, "load_ms": 100.0, "peak_rss_bytes": 1 << 27},
    }  # fmt: skip
    return found if labels else found | {"labels": {}, "dice": {"1": 0.999}}


def variant(name: str, precision: str, labels: list[str], refused: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "name": name, "precision": precision, "activations": "unsigned" if precision == "int8" else None, "recipe": "r", "bytes": 5 << 20,
        "refused": refused, "not_on": [], "layers": [{"name": "conv<1>", "op_type": "Conv", "error": 0.1}] if precision == "int8" else [],
        "places": {"onnxruntime": on(labels), "openvino": on(labels)},
    }  # fmt: skip


def record(labels: list[str], *variants: dict[str, Any]) -> dict[str, Any]:
    pictures = {"directory": "set", "n": N, "digest": "ab" * 32, "positive": [20] * len(labels), "sources": {"A": N}, "with_patient": 0}
    return {
        "schema": 1, "name": "model", "version": "1.0.0", "title": {"zh": "模型<script>", "en": "Model <script>alert(1)</script>"},
        "made_at": "2026-01-01T00:00:00+00:00", "environment": {"processor": "CPU <x>"}, "notes": ["a & b"],
        "labels": [{"name": name, "title": {"zh": "甲", "en": name}} for name in labels], "limits": {"auc": 0.01},
        "thresholds": [0.5] * len(labels), "points": [], "positive": (np.arange(N * max(1, len(labels))).reshape(N, -1) % 3 == 0).tolist(),
        "reference": RNG.random((N, max(1, len(labels)))).tolist(), "calibration": copy.deepcopy(pictures), "evaluation": pictures,
        "places": [], "absent": {"tensorrt": "no GPU: <none>"}, "variants": list(variants), "tolerance": {"fp32": 0.002}, "files": {},
    }  # fmt: skip


@pytest.mark.parametrize("labels", [["one", "two"], []])
def test_a_page_is_drawn_for_any_number_of_labels(labels: list[str]) -> None:
    refusal = {"code": "speed.slower", "detail": "3 ms, the more exact fp32 2 ms"}
    page = html_report.render(
        record(labels, *(variant(p, p, labels) for p in ("fp32", "fp16", "int8")), variant("slow", "int8", labels, refusal))
    )
    assert page.count("<svg") == page.count("</svg>") >= 2
    assert "不比更精确的变体快" in page
    assert "3 ms, the more exact fp32 2 ms" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    if not labels:
        assert "Dice: 1: 0.9990" in page


def test_texts_of_others_cannot_become_markup() -> None:
    page = html_report.render(record(["one"], variant("fp32", "fp32", ["one"]), variant("int8", "int8", ["one"])))
    assert "<script" not in page
    assert "Hospital &lt;b&gt;&amp;" in page
    assert "CPU &lt;x&gt;" in page
    assert "conv&lt;1&gt;" in page


def test_a_bundle_of_fp32_alone_has_a_report_too() -> None:
    page = html_report.render(record(["one"], variant("fp32", "fp32", ["one"])))
    assert "未测量各层误差" in page


def test_a_runtime_on_which_a_shipped_variant_failed_is_shown_with_the_reason() -> None:
    int8 = variant("int8", "int8", ["one"])
    int8["not_on"] = ["openvino"]
    int8["places"]["openvino"] = {
        "passed": False, "reasons": [{"code": "runtime.crashed", "detail": "SIGSEGV in load"}],
        "scores": None, "describe": {}, "timed": None,
    }  # fmt: skip
    page = html_report.render(record(["one"], variant("fp32", "fp32", ["one"]), int8))
    assert "SIGSEGV in load" in page
    assert "not on" in page


def test_drawings_are_the_same_every_time() -> None:
    positive, score = np.arange(N) % 2 == 0, RNG.random(N)
    first, second = (plots.roc_curves(positive, score, [("int8", score)], "a") for _ in range(2))
    assert first == second
    assert plots.roc_curves(positive, score, [("int8", score)], "b") != first


def test_reasons_have_texts_the_box_s_own_included() -> None:
    assert reason("gate.auc")[1].startswith("the AUC")
    assert messages.is_known("runtime.crashed")
    assert reason("runtime.crashed")[0] != "runtime.crashed"
    assert reason("unheard.of") == ("unheard.of", "unheard.of")
