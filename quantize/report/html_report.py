"""The report of a run as one HTML file without external references: styles, plots and both languages are inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from model_sync import messages
from quantize.errors import QuantizeError
from quantize.messages import WORDS, Code
from quantize.report import plots

_MIB: Final = 1 << 20
Pair = tuple[str, str]


def write(record: dict[str, Any], path: Path) -> None:
    """Write the HTML report of a run.

    Raises:
        QuantizeError: matplotlib is not installed.
    """
    path.write_text(render(record), encoding="utf-8")


def load_record(path: Path) -> dict[str, Any]:
    """Read a record that ``quantize run`` wrote.

    Raises:
        QuantizeError: ``report.record``: the file cannot be read, or is no record of this version.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantizeError(f"the record {path} cannot be read: {error.strerror}", code=Code.REPORT_RECORD) from error
    except ValueError as error:
        raise QuantizeError(f"{path} is no record of a run", code=Code.REPORT_RECORD) from error
    if not isinstance(value, dict) or value.get("schema") != 1 or "variants" not in value:
        raise QuantizeError(f"{path} is no record of a run", code=Code.REPORT_RECORD)
    return value


def render(record: dict[str, Any]) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("quantize.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shipped = [entry for entry in record["variants"] if entry["refused"] is None]
    drawings = {name: [(title, Markup(svg)) for title, svg in pairs] for name, pairs in _drawings(record, shipped).items()}  # noqa: S704
    words = {code.removeprefix("page."): _pair(code) for code in WORDS}
    return environment.get_template("report.html").render(
        record=record, shipped=shipped, words=words, reason=_pair, drawings=drawings, summary=_summary(record, shipped), mib=_MIB,
        rows=_gate_rows(record), speed=_speed_rows(record), kind=_kind,
    )  # fmt: skip


def _pair(code: str) -> Pair:
    """Return a code's text in Chinese and in English; an unknown code of another version is shown as it is."""
    return (messages.text(code, "zh"), messages.text(code, "en")) if messages.is_known(code) else (code, code)


def _kind(entry: dict[str, Any]) -> str:
    return f"{entry['precision']} {entry['activations']}" if entry["activations"] else str(entry["precision"])


def _drawings(record: dict[str, Any], shipped: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    drawings: dict[str, list[tuple[str, str]]] = {"roc": [], "scatter": [], "layers": [], "speed": []}
    positive, reference = np.array(record["positive"], bool), np.array(record["reference"], np.float64)
    for number, label in enumerate(record["labels"]):
        scores = _scores(shipped, number)
        curves = [(name, score) for name, score in scores if not name.startswith("fp32 ")]
        drawings["roc"].append((label["name"], plots.roc_curves(positive[:, number], reference[:, number], curves, f"roc{number}")))
        if curves:
            drawn = plots.scatters(positive[:, number], reference[:, number], curves, record["thresholds"][number], f"scatter{number}")
            drawings["scatter"].append((label["name"], drawn))
    for entry in record["variants"]:
        if entry["layers"]:
            drawings["layers"].append(
                (
                    entry["name"],
                    plots.layer_errors([(layer["name"], layer["error"]) for layer in entry["layers"]], f"layers-{entry['name']}"),
                )
            )
    if bars := [(f"{row['name']}, {row['place']}", row["timed"]["median_ms"]) for row in _speed_rows(record)]:
        drawings["speed"].append(("", plots.speeds(bars)))
    return drawings


def _scores(shipped: Sequence[dict[str, Any]], label: int) -> list[tuple[str, NDArray[np.float64]]]:
    return [
        (f"{_kind(entry)} {place}", np.array(on["scores"], np.float64)[:, label])
        for entry in shipped
        for place, on in entry["places"].items()
        if on["scores"] is not None
    ]


def _gate_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shipped variant, place and label; one without label figures where the task has no scores."""
    rows = []
    for entry in record["variants"]:
        if entry["refused"] is not None:
            continue
        for place, on in entry["places"].items():
            for label, figures in (on.get("labels") or {"": {}}).items():
                rows.append({"entry": entry, "place": place, "on": on, "label": label, "figures": figures})
    return rows


def _speed_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"name": entry["name"], "entry": entry, "place": place, "timed": on["timed"], "describe": on["describe"]}
        for entry in record["variants"]
        for place, on in entry["places"].items()
        if on["timed"] is not None
    ]
    base = next((row["timed"]["median_ms"] for row in rows if row["name"] == "fp32" and row["place"] == "onnxruntime"), None)
    for row in rows:
        row["ratio"] = None if base is None else base / row["timed"]["median_ms"]
    return sorted(rows, key=lambda row: -row["timed"]["median_ms"])


def _summary(record: dict[str, Any], shipped: Sequence[dict[str, Any]]) -> list[Pair]:
    """Return the summary: the most important results of the run."""
    sizes = ", ".join(f"{_kind(entry)} {entry['bytes'] / _MIB:.1f} MiB" for entry in shipped)
    tried, left = len(record["variants"]), len(record["variants"]) - len(shipped)
    lines = [(f"随包发布：{sizes}。共试 {tried} 种，{left} 种未采用。", f"Shipped: {sizes}. {tried} variants were tried, {left} left out.")]
    rows = [row for row in _speed_rows(record) if row["entry"]["refused"] is None]
    if rows and rows[-1]["ratio"] is not None:
        row = rows[-1]
        what, ms, ratio = f"{_kind(row['entry'])}, {row['place']}", row["timed"]["median_ms"], row["ratio"]
        lines.append(
            (
                f"本机最快：{what}，每张 {ms:.2f} 毫秒，是 ONNX Runtime fp32 的 {ratio:.1f} 倍速。",
                f"Fastest here: {what}, {ms:.2f} ms per picture, {ratio:.1f} times as fast as ONNX Runtime's fp32.",
            )
        )
    gated = [row for row in _gate_rows(record) if row["on"]["passed"] and row["figures"]]
    if gated:
        worst = max(gated, key=lambda row: row["figures"]["auc_difference"])
        difference, allowed, where = (
            worst["figures"]["auc_difference"],
            record["limits"]["auc"],
            f"{_kind(worst['entry'])}, {worst['place']}",
        )
        lines.append(
            (
                f"AUC 与浮点模型最多相差 {difference:.4f}（{where}），允许 {allowed:g}。",
                f"The AUC differs from the float model's by at most {difference:.4f} ({where}); {allowed:g} is allowed.",
            )
        )
    if record["absent"]:
        names = ", ".join(sorted(record["absent"]))
        lines.append(
            (f"此处无法测试：{names}；由设备上的标准病例决定。", f"Not measured here: {names}; the golden cases decide on the box.")
        )
    return lines
