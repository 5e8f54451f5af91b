"""Coded reasons of how a model is run on this box and what became of the other ways: part of the catalogue in :mod:`appliance.reasons`."""

from __future__ import annotations

from typing import Final

from appliance.lifecycle_reasons import Reason

_NOTHING_ZH, _NOTHING_EN = "无需处理。", "Nothing to do."

TUNE_REASONS: Final[dict[str, Reason]] = {
    "choice.measured": Reason("本机实测最快", "Measured fastest on this box", _NOTHING_ZH, _NOTHING_EN),
    "choice.measured_part": Reason(
        "已测方式中最快；因时间不够，部分方式未测量",
        "Fastest of the ways that were measured; some were not, for lack of time",
        "可增大 tune_measuring_s 或 activation_deadline_s 后运行 `appliance tune`。",
        "Raise tune_measuring_s or activation_deadline_s and run `appliance tune`.",
    ),
    "choice.by_hand": Reason(
        "精度由人工指定",
        "Precision chosen by hand",
        "无需处理；`appliance models activate 版本 --precision any` 可取消指定并重新测量。",
        "Nothing to do; `appliance models activate VERSION --precision any` takes it back and measures all of them.",
    ),
    "choice.untuned": Reason(
        "未测量，按标准方式运行",
        "Not measured: run the plain way",
        "可用 `appliance tune` 测量并选用最快的正确方式。",
        "`appliance tune` measures and takes the fastest way that is right.",
    ),
    "choice.fallback": Reason(
        "选定的方式无法运行，已改用标准方式",
        "The chosen way does not run; the plain way is used instead",
        "结果同样可靠，但可能较慢。本机会自动重新测量；若仍出现，请通知技术人员运行 `appliance tune`。",
        "Results are as right as before, perhaps slower. The box measures again by itself; if this stays, have a technician run"
        " `appliance tune`.",
    ),
    "choice.other_device": Reason(
        "选定的方式是在另一种硬件或软件上测量的",
        "The chosen way was measured on other hardware or software",
        "已在本机用标准病例核对无误。空闲时会自动重新测量，也可随时运行 `appliance tune`。",
        "The golden cases were right on this box as it is now. It measures again when it is idle; `appliance tune` does so at any time.",
    ),
    "tune.fastest": Reason("结果正确，且最快", "Right, and the fastest", _NOTHING_ZH, _NOTHING_EN),
    "tune.more_exact": Reason(
        "结果正确，与最快者相差不到 3%，且精度更高", "Right, within 3 % of the fastest, and more exact", _NOTHING_ZH, _NOTHING_EN
    ),
    "tune.faster_together": Reason(
        "结果正确，最快，且多幅同时读取更快", "Right, the fastest, and faster still with several images at once", _NOTHING_ZH, _NOTHING_EN
    ),
    "tune.slower": Reason("结果正确，但较慢", "Right, but slower", _NOTHING_ZH, _NOTHING_EN),
    "tune.slower_less_exact": Reason("比精度更高的方式还慢", "Slower than a more exact one", _NOTHING_ZH, _NOTHING_EN),
    "tune.less_exact": Reason("一样快，但精度较低", "As fast, but less exact", _NOTHING_ZH, _NOTHING_EN),
    "tune.no_faster": Reason("结果正确，但不更快", "Right, but no faster", _NOTHING_ZH, _NOTHING_EN),
    "tune.batch_no_faster": Reason("成批读取并不更快", "Several images at once are no faster", _NOTHING_ZH, _NOTHING_EN),
    "tune.no_batch_gain": Reason(
        "成批读取节省的时间太少，或未超出测量波动",
        "Several images at once gain too little, or no more than the times vary",
        _NOTHING_ZH,
        _NOTHING_EN,
    ),
    "tune.other_batch": Reason("另一种批量更好", "Another number of images at once is better", _NOTHING_ZH, _NOTHING_EN),
    "tune.batch_taken": Reason("采用同一方式的成批读取", "Taken with several images at once", _NOTHING_ZH, _NOTHING_EN),
    "tune.alike": Reason(
        "各幅图像的结果无法区分，无法证明成批读取正确",
        "The answers to different images cannot be told apart: not proven that each gets its own",
        _NOTHING_ZH,
        _NOTHING_EN,
    ),
    "tune.unreadable": Reason(
        "上次测量的记录无法读取，视为没有",
        "The record of the last measuring cannot be read and counts as none",
        "运行 `appliance tune` 重新测量。",
        "Run `appliance tune` to measure again.",
    ),
    "tune.wrong": Reason(
        "标准病例的结果超出允许误差",
        "A golden case came out beyond the tolerance",
        "此方式不会使用。请把表格报告给中心。",
        "This way is not used. Report the table to the central team.",
    ),
    "tune.not_on": Reason("中心已知此版本在该引擎上失败", "Known by the central team to fail on this runtime", _NOTHING_ZH, _NOTHING_EN),
    "tune.no_time": Reason(
        "时间不够，未测量",
        "Not measured: no time",
        "可增大 tune_measuring_s 或 activation_deadline_s 后运行 `appliance tune`。",
        "Raise tune_measuring_s or activation_deadline_s and run `appliance tune`.",
    ),
}
