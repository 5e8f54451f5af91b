"""Coded reasons of what a series is and how much of it was measured: part of the catalogue in :mod:`appliance.reasons`."""

from __future__ import annotations

from typing import Final

from appliance.lifecycle_reasons import Reason

_ORIGINAL_ZH: Final = "影像已保存，可以阅片。如有适合该模型的原始序列，请发送该序列；否则由医生直接阅片。"
_ORIGINAL_EN: Final = (
    "The images are kept and can be viewed. Where there is an original series of the kind the model was made for, send that one;"
    " otherwise read it without AI."
)

SEQUENCE_REASONS: Final[dict[str, Reason]] = {
    "scope.sequence": Reason(
        "扫描序列（回波时间、重复时间或序列类型）不在模型适用范围内",
        "The pulse sequence (echo time, repetition time or kind) is outside the model's scope",
        _ORIGINAL_ZH,
        _ORIGINAL_EN,
    ),
    "scope.image_type": Reason(
        "影像是重建或后处理得到的（如 MIP、ADC、重组），不在模型适用范围内",
        "The images are of a kind (derived, projected, computed) that is outside the model's scope",
        _ORIGINAL_ZH,
        _ORIGINAL_EN,
    ),
    "scope.contrast_agent": Reason(
        "使用了对比剂，不在模型适用范围内", "A contrast agent was given; that is outside the model's scope", _ORIGINAL_ZH, _ORIGINAL_EN
    ),
    "scope.sequence_absent": Reason(
        "影像未注明扫描参数，无法判断是否适用于该模型",
        "The images do not say how they were acquired, so it cannot be told whether the model was made for them",
        _ORIGINAL_ZH,
        _ORIGINAL_EN,
    ),
    "assume.sequence": Reason(
        "影像未注明扫描参数，按模型适用的序列处理",
        "The images do not say how they were acquired; taken for the sequence the model was made for",
        "请核对扫描序列。",
        "Check which sequence it is.",
    ),
    "caution.contrast_agent": Reason(
        "使用了对比剂，测量可能不准确",
        "A contrast agent was given; the measurement may be less exact",
        "请谨慎参考。",
        "Take it with care.",
    ),
    "caution.sequence_unverified": Reason(
        "模型没有说明适用的扫描序列，未核对序列类型",
        "The model does not say which pulse sequences it was made for; this was not checked",
        "请核对扫描序列是否适合该模型。",
        "Check that the sequence is one the model was made for.",
    ),
    "caution.cropped": Reason(
        "部分组织在模型的视野之外，没有计入测量",
        "Tissue lies outside the field that the model takes; it was not measured",
        "测量值可能偏小，请对照原始切片。",
        "The figures may be too small; compare them with the slices.",
    ),
}
