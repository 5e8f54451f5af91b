"""Texts of the report in Chinese and English; the reason codes come from ``quantize.gate`` (``verdicts``, ``selection``)."""

from __future__ import annotations

from typing import Final

from appliance.reasons import REASONS, text

Pair = tuple[str, str]

REASON_TEXTS: Final[dict[str, Pair]] = {
    "gate.auc": ("AUC 与浮点模型相差过大", "the AUC differs too much from the float model's"),
    "gate.sensitivity": ("灵敏度超出浮点模型的置信区间", "the sensitivity leaves the float model's confidence interval"),
    "gate.specificity": ("特异度超出浮点模型的置信区间", "the specificity leaves the float model's confidence interval"),
    "gate.score": ("个别影像的分数变化过大", "a single score changes too much"),
    "gate.cam": ("类激活图变化过大", "the class activation map changes too much"),
    "gate.dice": ("分割与浮点模型的重合度不足", "the masks overlap too little with the float model's"),
    "gate.not_finite": ("输出含 NaN 或无穷大", "it answers NaN or Inf"),
    "gate.output": ("缺少输出", "an output is missing"),
    "gate.untested": ("没有可用的运行时验证", "no runtime here could try it"),
    "make.failed": ("无法生成", "it could not be made"),
    "calibration.other_better": ("同类配方中另一种校准更准确", "another calibration of the same recipe is more accurate"),
    "speed.slower": ("不比更精确的变体快", "no faster than a more exact variant"),
    "speed.other_better": ("同类变体中另一种更快，或同样快而更准确", "another variant of its kind is faster, or as fast and more accurate"),
}

WORDS: Final[dict[str, Pair]] = {
    "report": ("量化报告", "Quantization report"),
    "summary": ("结论", "In words"),
    "variants": ("变体：精度与验收", "Variants and the gate"),
    "roc": ("ROC：浮点与各变体", "ROC: float against each variant"),
    "scatter": ("分数对比：浮点（横轴）与变体（纵轴）", "Scores: float (across) against the variant (up)"),
    "layers": ("各层单独量化的误差", "Error of each layer quantized by itself"),
    "speed": ("速度与大小", "Speed and size"),
    "sources": ("按来源", "Per source"),
    "sets": ("所用影像", "The pictures used"),
    "refused": ("未采用的候选及原因", "Candidates left out, and why"),
    "environment": ("测量环境", "Where it was measured"),
    "calibration": ("校准集", "calibration set"),
    "evaluation": ("验证集", "evaluation set"),
    "variant": ("变体", "variant"),
    "runtime": ("运行时", "runtime"),
    "gate": ("验收", "gate"),
    "passed": ("通过", "passed"),
    "failed": ("未通过", "failed"),
    "shipped": ("随包发布", "shipped"),
    "left_out": ("未采用", "left out"),
    "auc_difference": ("AUC 差", "AUC difference"),
    "sensitivity": ("灵敏度", "sensitivity"),
    "specificity": ("特异度", "specificity"),
    "largest": ("最大分数变化", "largest change"),
    "mean": ("平均分数变化", "mean change"),
    "sides": ("跨越阈值", "crossed the threshold"),
    "map": ("激活图差异", "map difference"),
    "dice": ("Dice", "Dice"),
    "size": ("大小", "size"),
    "median": ("中位时间", "median"),
    "ratio": ("相对 fp32", "against fp32"),
    "load": ("载入", "load"),
    "memory": ("内存", "memory"),
    "really": ("实际运行精度（层数）", "what really ran (layers)"),
    "source": ("来源", "source"),
    "counts": ("阳性 / 阴性", "positive / negative"),
    "gated": ("是否计入", "gated"),
    "yes": ("是", "yes"),
    "too_few": ("样本过少，仅列出", "too few, listed only"),
    "reason": ("原因", "reason"),
    "pictures": ("张影像", "pictures"),
    "threshold": ("阈值", "threshold"),
    "auc": ("AUC", "AUC"),
    "absent": ("此处未测", "not measured here"),
    "absent_note": ("由设备上的标准病例决定", "the golden cases decide on the box"),
    "tolerance": ("标准病例容差", "tolerance of the golden cases"),
    "notes": ("说明", "Remarks"),
    "not_on": ("不用于", "not on"),
    "more": ("另有", "more not shown:"),
    "no_layers": ("未测量各层误差。", "Per-layer errors were not measured."),
    "method": ("配方", "recipe"),
}


def reason(code: str) -> Pair:
    """The text of a reason's code; an appliance's code has its text there, an unknown one stands for itself."""
    if code in REASON_TEXTS:
        return REASON_TEXTS[code]
    return (text(code, "zh"), text(code, "en")) if code in REASONS else (code, code)
