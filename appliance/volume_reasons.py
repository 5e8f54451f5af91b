"""Coded reasons of volumes: part of the catalogue in :mod:`appliance.reasons`, which is where to look them up."""

from __future__ import annotations

from typing import Final

from appliance.lifecycle_reasons import Reason

_AGAIN_ZH: Final = "影像已保存，可以阅片，但没有作体积分析。请核对序列是否完整，从设备重新发送整个序列；否则由医生直接阅片。"
_AGAIN_EN: Final = (
    "The images are kept and can be viewed, but the volume was not analysed. Check that the series is complete and send all of it again"
    " from the scanner; otherwise read it without AI."
)
_DOCTOR_ZH: Final = "影像已保存，可以阅片，但没有作体积分析。请由医生直接阅片。"
_DOCTOR_EN: Final = "The images are kept and can be viewed, but the volume was not analysed. A doctor must read them without AI."

VOLUME_REASONS: Final[dict[str, Reason]] = {
    "volume.no_position": Reason(
        "切片没有位置、方向或像素间距，无法组成体积",
        "Slices without position, orientation or pixel spacing: no volume",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.too_few_slices": Reason("切片太少，不能组成体积", "Too few slices for a volume", _AGAIN_ZH, _AGAIN_EN),
    "volume.missing_slices": Reason("序列缺少切片", "Slices are missing from the series", _AGAIN_ZH, _AGAIN_EN),
    "volume.duplicate_slice": Reason("同一位置有多张切片", "Several slices lie at the same position", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.uneven_spacing": Reason("切片间距不均匀", "The slices are not evenly spaced", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.scattered": Reason("切片不在一条直线上", "The slices do not lie along one line", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.mixed_orientation": Reason("切片方向或坐标系不一致", "The slices have different orientations", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.mixed_size": Reason("切片的大小或像素间距不一致", "The slices differ in size or pixel spacing", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.mixed_kind": Reason("序列中混有不同类型的影像", "The series mixes images of different kinds", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.mixed_acquisition": Reason(
        "序列中混有不同的采集（回波、对比剂、重建等）",
        "The series mixes acquisitions (echoes, contrast agent, reconstruction)",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.no_units": Reason(
        "数值没有可用的单位：CT 或 PET 的重定标不完整，或 CT 不是 HU",
        "The values have no usable unit: the rescale of a CT or PET is incomplete, or a CT is not in HU",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.bad_values": Reason(
        "像素值或重定标后的数值无效",
        "The pixel values, or what the rescale makes of them, are not valid numbers",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.mixed_units": Reason(
        "切片的灰度含义（重定标、单位）不一致",
        "The grey values of the slices mean different things (rescale, units)",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.mixed_scope": Reason(
        "序列中的影像属性不一致，模型只适用于其中一部分",
        "The images of the series differ; the model applies to some of them only",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.too_coarse": Reason(
        "切片间距过大，超出模型的适用范围",
        "The slices are farther apart than the model can read",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.tilt": Reason(
        "机架倾斜角过大，或与切片位置不符",
        "The gantry tilt is too large or contradicts the slices' positions",
        _DOCTOR_ZH,
        _DOCTOR_EN,
    ),
    "volume.too_large": Reason("体积过大，本机内存不够", "The volume is too large for the memory of this box", _DOCTOR_ZH, _DOCTOR_EN),
    "volume.localizer": Reason(
        "序列中的定位像没有计入体积",
        "Scout views of the series were left out of the volume",
        "请单独阅看定位像。",
        "View the scout images on their own.",
    ),
    "volume.straightened": Reason(
        "机架有倾斜，体积已按切片位置校正",
        "The gantry was tilted; the volume was straightened by the slices' positions",
        "请在原始切片上核对轮廓。",
        "Check the outline on the original slices.",
    ),
    "volume.incomplete": Reason(
        "影像可能不全：少于设备标注的数量，或编号有缺",
        "Images may be missing: fewer than the scanner says, or gaps in their numbers",
        "体积可能偏小。请核对两端的切片；如有缺失，请重新发送整个序列。",
        "Volumes may be too small. Check the slices at both ends; if some are missing, send the whole series again.",
    ),
}
