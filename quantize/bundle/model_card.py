"""A model card in Chinese and English, from the draft and the measurements; a team that writes its own puts it beside the draft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from model_sync.bundle import Group, Interval, OperatingPoint, SourceMeasure
from quantize.bundle.assembly import OperatingPoints
from quantize.draft import Draft
from quantize.gate.gate_runs import GateContext
from quantize.gate.selection import VariantResult

_CARD: Final = Path(__file__).with_suffix(".md")


def write_card(draft: Draft, operating: OperatingPoints, gate: str) -> str:
    """Return ``MODEL_CARD.md``; ``gate`` is :func:`gate_chapter`."""
    training = draft.training_data
    return _CARD.read_text(encoding="utf-8").format(
        name=draft.name,
        version=draft.version,
        title_zh=draft.title.zh,
        title_en=draft.title.en,
        use_zh=draft.intended_use.zh,
        use_en=draft.intended_use.en,
        n_images=training.n_images,
        training_zh=training.description.zh,
        training_en=training.description.en,
        sources="\n".join(f"- {source.name}: {source.n_images} ({source.licence})" for source in training.sources),
        points="\n\n".join(_point(point) for point in operating.points) or "–",
        gate=gate,
        licence=draft.licence,
    )


def gate_chapter(context: GateContext, shipped: Sequence[VariantResult]) -> str:
    """Return the results of the gate per variant and runtime, as a chapter of the card."""
    lines = [
        "## 量化与验收 / Precision variants and the gate",
        "",
        "各变体与 fp32 在同一批影像上逐一比较；未在此处测过的运行时由设备上的标准病例决定。",
        "Each variant was held against fp32 on the same pictures; on runtimes not measured here the golden cases decide on the box.",
        "",
        "| 变体 variant | 运行时 runtime | AUC 差 difference | 灵敏度 sensitivity | 特异度 specificity | 最大变化 largest change |",
        "|---|---|---|---|---|---|",
    ]
    for entry in shipped:
        for target in entry.passed:
            for label in entry.verdicts[target].figures.get("labels", {}).values():
                rates = (label["sensitivity"]["value"], label["specificity"]["value"])
                cells = (
                    _kind(entry),
                    target.title if target in entry.run_here else f"{target.title} (模拟 simulated)",
                    f"{label['auc_difference']:.4f}",
                    *(f"{rate:.3f}" for rate in rates),
                    label["max_abs_delta"],
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    if context.unavailable:
        lines += ["", f"未测 / not measured here: {', '.join(sorted(context.unavailable))}"]
    return "\n".join(lines)


def interval(value: Interval | None) -> str:
    """A fraction with its interval, as text."""
    return "–" if value is None else f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})"


def table(measures: Sequence[SourceMeasure]) -> str:
    """The measures per source, as a Markdown table."""
    lines = [
        "| 来源 source | 阳性 positive | 阴性 negative | 灵敏度 sensitivity | 特异度 specificity | AUC |",
        "|---|---|---|---|---|---|",
    ]
    for one in measures:
        area = "–" if one.auc is None else f"{one.auc:.3f}"
        cells = (one.source, one.n_positive, one.n_negative, interval(one.sensitivity), interval(one.specificity), area)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def groups_table(groups: Sequence[Group]) -> str:
    """The measures per group of patients, as a Markdown table; a dash where the draft names no populations."""
    if not groups:
        return "–"
    words = {"child": "儿童 children", "adult": "成人 adults"}
    lines = ["| 人群 patients | 阳性 positive | 阴性 negative | 灵敏度 sensitivity | 特异度 specificity |", "|---|---|---|---|---|"]
    for group in groups:
        who = f"{words[group.population]} {group.min_years:g}–{group.max_years:g}"
        cells = (who, group.n_positive, group.n_negative, interval(group.sensitivity), interval(group.specificity))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _kind(entry: VariantResult) -> str:
    return f"{entry.precision} {entry.activations}" if entry.activations else entry.precision


def _point(point: OperatingPoint) -> str:
    head = f"{point.label}: {point.threshold:.4f}; {interval(point.sensitivity)} / {interval(point.specificity)}; {point.measured_on}"
    return f"{head}\n\n{groups_table(point.groups)}\n\n{table(point.per_source)}"
