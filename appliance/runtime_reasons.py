"""Coded reasons of the runtimes: part of the catalogue in :mod:`appliance.reasons`, which is where to look them up."""

from __future__ import annotations

from typing import Final

from appliance.lifecycle_reasons import Reason

_OTHER_ZH: Final = "改用其他可用的运行方式；`appliance tune --show` 列出各方式及原因。"
_OTHER_EN: Final = "Another way to run the model is used; `appliance tune --show` lists each with its reason."

RUNTIME_REASONS: Final[dict[str, Reason]] = {
    "runtime.unavailable": Reason("本机不能使用此推理引擎", "This runtime cannot be used on this box", _OTHER_ZH, _OTHER_EN),
    "runtime.crashed": Reason(
        "推理引擎在加载或运行此模型时崩溃", "The runtime crashed while loading or running this model", _OTHER_ZH, _OTHER_EN
    ),
    "runtime.deadline": Reason("推理引擎加载或运行此模型超时", "The runtime took too long to load or run this model", _OTHER_ZH, _OTHER_EN),
    "runtime.memory": Reason(
        "推理引擎加载或运行此模型时内存不足", "The runtime ran out of memory loading or running this model", _OTHER_ZH, _OTHER_EN
    ),
    "runtime.build": Reason("推理引擎无法编译此模型", "The runtime could not build this model", _OTHER_ZH, _OTHER_EN),
    "runtime.precision": Reason(
        "实际运行的精度不是此模型文件的精度",
        "What ran is not the precision of this file",
        "不采用此方式，因为它会静默地以另一精度运行。" + _OTHER_ZH,
        "It is not used, because it would silently run in another precision. " + _OTHER_EN,
    ),
}
