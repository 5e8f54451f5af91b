"""The catalogue of coded reasons: one code, its text in zh-CN and en, and what to do about it.

Every refusal, assumption, caution and failure that a person may see has a code here, so that "not analysed" never looks
like "negative" and the same words stand on the page, in the JSON and, later, in the SR. Texts never hold patient data.
"""

from __future__ import annotations

from typing import Final, Literal

from appliance.lifecycle_reasons import MODEL_REASONS, Reason
from appliance.runtime_reasons import RUNTIME_REASONS
from appliance.sequence_reasons import SEQUENCE_REASONS
from appliance.tuning_reasons import TUNE_REASONS
from appliance.volume_reasons import VOLUME_REASONS

__all__ = ["REASONS", "Language", "Reason", "hint", "text"]

Language = Literal["zh", "en"]


_SENDER_KEEPS_ZH = "文件未保存，请从原设备重新导出后再发送。"
_SENDER_KEEPS_EN = "Nothing was kept. Export the image again from its source and send it once more."
_OTHER_MODEL_ZH = "影像已保存，可以阅片；本机没有适用的模型。请由医生阅片。"
_OTHER_MODEL_EN = "The image is kept and can be viewed; no model on this box reads it. A doctor must read it."
_RETRY_ZH = "影像已保存。请点“重试”；若仍失败，请由医生直接阅片并通知技术人员。"
_RETRY_EN = "The image is kept. Press “Retry”; if it fails again, read the image without AI and call the technician."
_RETAKE_ZH = "影像已保存，未作分析。请检查曝光后重新拍摄或重新导出。"
_RETAKE_EN = "The image is kept but was not analysed. Check the exposure and take or export it again."

REASONS: Final[dict[str, Reason]] = {
    "ingest.not_dicom": Reason(
        "不是 DICOM 文件", "Not a DICOM file", "请选择 DICOM、PNG 或 JPEG 文件。", "Choose a DICOM, PNG or JPEG file."
    ),
    "ingest.empty": Reason("文件为空（0 字节）", "The file is empty (0 bytes)", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN),
    "ingest.truncated": Reason("文件不完整（被截断）", "The file is cut short", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN),
    "ingest.unreadable": Reason(
        "DICOM 文件损坏，无法读取", "The DICOM file is damaged and cannot be read", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN
    ),
    "ingest.no_pixel_data": Reason(
        "文件中没有影像",
        "The file holds no image",
        "报告、波形等非影像对象不在此保存。",
        "Reports, waveforms and other non-image objects are not kept here.",
    ),
    "ingest.too_large": Reason(
        "文件超过允许的大小",
        "The file is larger than allowed",
        "请联系技术人员调整 max_upload_bytes。",
        "Ask the technician about the setting max_upload_bytes.",
    ),
    "ingest.absurd_dimensions": Reason(
        "影像尺寸或帧数与数据不符或过大", "Image size or frame count is absurd or does not fit the data", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN
    ),
    "ingest.unsupported_syntax": Reason(
        "不支持的压缩格式（传输语法）",
        "Unsupported compression (transfer syntax)",
        "请以未压缩、JPEG、JPEG-LS、JPEG 2000 或 RLE 格式重新导出。",
        "Export again uncompressed or as JPEG, JPEG-LS, JPEG 2000 or RLE.",
    ),
    "ingest.pixel_representation": Reason(
        "像素表示法（有无符号）标记错误或缺失",
        "Pixel Representation (signed or unsigned) is missing or wrong",
        _SENDER_KEEPS_ZH,
        _SENDER_KEEPS_EN,
    ),
    "ingest.pixel_attributes": Reason(
        "像素属性缺失或互相矛盾", "Pixel attributes are missing or contradict each other", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN
    ),
    "ingest.missing_uid": Reason("缺少必需的 UID", "A required UID is missing", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN),
    "ingest.invalid_uid": Reason(
        "UID 含非法字符或过长", "A UID has forbidden characters or is too long", _SENDER_KEEPS_ZH, _SENDER_KEEPS_EN
    ),
    "ingest.conflict": Reason(
        "另有一份影像的 SOP Instance UID 相同而内容不同；两份均已保存",
        "Another image with the same SOP Instance UID but other content is stored too; both are kept",
        "请核对两份影像属于哪位患者，并通知技术人员。",
        "Check which patient each image belongs to and tell the technician.",
    ),
    "ingest.archive_unsafe": Reason(
        "压缩包内含不安全的路径，该条目已跳过",
        "The archive holds an unsafe path; the entry was skipped",
        "请重新制作压缩包。",
        "Make the archive again.",
    ),
    "ingest.archive_bomb": Reason(
        "压缩包解压后过大", "The archive unpacks to more than is allowed", "请分成较小的压缩包上传。", "Upload it in smaller archives."
    ),
    "ingest.archive_encrypted": Reason(
        "压缩包已加密，无法打开",
        "The archive is encrypted and cannot be opened",
        "请上传未加密的压缩包。",
        "Upload an archive without a password.",
    ),
    "ingest.archive_corrupt": Reason("压缩包损坏", "The archive is damaged", "请重新制作压缩包。", "Make the archive again."),
    "ingest.too_many_files": Reason("一次的文件过多", "Too many files at once", "请分批上传。", "Upload them in several batches."),
    "ingest.disk_full": Reason(
        "磁盘空间不足，未接收；已有数据没有删除",
        "The disk is full; the file was refused and nothing stored was deleted",
        "请通知技术人员清理或扩充磁盘，然后重新发送。",
        "Ask the technician to free disk space, then send again.",
    ),
    "ingest.memory": Reason(
        "内存暂时不足，未接收",
        "Not enough memory just now; the file was not taken",
        "请稍后重新发送；若再次失败请通知技术人员。",
        "Send it again later; if it fails again call the technician.",
    ),
    "ingest.unsupported_image": Reason(
        "图片无法读取，或格式不受支持",
        "The picture cannot be read or is of an unsupported kind",
        "请使用 PNG 或 JPEG。",
        "Use PNG or JPEG.",
    ),
    "ingest.interrupted": Reason(
        "上传中断",
        "The upload was interrupted",
        "重新选择同一文件即可从断点继续。",
        "Choose the same file again to continue where it stopped.",
    ),
    "ingest.skipped": Reason("不是影像文件，已跳过", "Not an image file; skipped", "无需处理。", "Nothing to do."),
    "pixel.corrupt": Reason(
        "像素数据损坏，无法可靠解码",
        "The pixel data is damaged and cannot be decoded reliably",
        "影像文件已原样保存，未作分析。请从原设备重新发送。",
        "The file is kept as it came but was not analysed. Send it again from its source.",
    ),
    "pixel.undecodable": Reason(
        "像素数据无法解码",
        "The pixel data cannot be decoded",
        "影像文件已原样保存，未作分析。请以其他格式重新发送。",
        "The file is kept as it came but was not analysed. Send it again in another format.",
    ),
    "quality.blank": Reason("影像为空白，未作分析", "The image is blank and was not analysed", _RETAKE_ZH, _RETAKE_EN),
    "quality.saturated": Reason("影像过曝或饱和，未作分析", "The image is saturated and was not analysed", _RETAKE_ZH, _RETAKE_EN),
    "quality.shape": Reason("影像长宽比异常，未作分析", "The image is of an odd shape and was not analysed", _RETAKE_ZH, _RETAKE_EN),
    "quality.too_small": Reason("影像过小，未作分析", "The image is too small and was not analysed", _RETAKE_ZH, _RETAKE_EN),
    "scope.modality": Reason("检查类型不在模型适用范围内", "This modality is outside the model's scope", _OTHER_MODEL_ZH, _OTHER_MODEL_EN),
    "scope.sop_class": Reason(
        "影像类别不在模型适用范围内", "This kind of object is outside the model's scope", _OTHER_MODEL_ZH, _OTHER_MODEL_EN
    ),
    "scope.body_part": Reason(
        "检查部位不在模型适用范围内", "This body part is outside the model's scope", _OTHER_MODEL_ZH, _OTHER_MODEL_EN
    ),
    "scope.view": Reason(
        "投照体位不在模型适用范围内（例如侧位）",
        "This view is outside the model's scope (for example lateral)",
        _OTHER_MODEL_ZH,
        _OTHER_MODEL_EN,
    ),
    "scope.age": Reason("患者年龄不在模型适用范围内", "The patient's age is outside the model's scope", _OTHER_MODEL_ZH, _OTHER_MODEL_EN),
    "scope.frames": Reason(
        "多帧影像不在模型适用范围内", "Multi-frame images are outside the model's scope", _OTHER_MODEL_ZH, _OTHER_MODEL_EN
    ),
    "scope.no_model": Reason(
        "本机没有启用的模型，未作分析",
        "No model is active on this box; not analysed",
        "影像已保存。请通知技术人员启用模型。",
        "The image is kept. Ask the technician to activate a model.",
    ),
    "job.deadline": Reason("分析超时，已中止", "The analysis took too long and was stopped", _RETRY_ZH, _RETRY_EN),
    "job.crashed": Reason("分析程序异常退出", "The analysis program stopped unexpectedly", _RETRY_ZH, _RETRY_EN),
    "job.memory": Reason("内存不足，分析中止", "Not enough memory; the analysis was stopped", _RETRY_ZH, _RETRY_EN),
    "job.memory_input": Reason(
        "内存不足，影像未能解码", "Not enough memory to decode or prepare the image; the model did not run", _RETRY_ZH, _RETRY_EN
    ),
    "job.error": Reason("分析失败", "The analysis failed", _RETRY_ZH, _RETRY_EN),
    "store.failed": Reason(
        "存储失败",
        "Storing failed",
        "未确认接收，请重新发送；若再次失败请通知技术人员。",
        "Nothing was acknowledged. Send again; if it fails again call the technician.",
    ),
    "store.missing": Reason("没有此记录", "There is no such record", "请刷新页面。", "Reload the page."),
    "store.tampered": Reason(
        "存储的文件校验失败",
        "A stored file failed its integrity check",
        "请停止使用该影像并通知技术人员。",
        "Do not use this image; call the technician.",
    ),
    **MODEL_REASONS,
    **TUNE_REASONS,
    **RUNTIME_REASONS,
    **VOLUME_REASONS,
    **SEQUENCE_REASONS,
    "settings.invalid": Reason(
        "设置无效",
        "The settings are invalid",
        "请改正所列设置项；各项说明见 `appliance settings`。",
        "Correct the settings named; `appliance settings` explains each.",
    ),
    "settings.missing": Reason(
        "没有这个文件夹或设置文件",
        "There is no such folder or settings file",
        "请检查 --data-dir；要新建一台设备，请先建立该文件夹。",
        "Check --data-dir; for a new box make the folder first.",
    ),
    "audit.broken": Reason(
        "审计记录链断裂：有记录被改动或删除",
        "The audit chain is broken: an entry was changed or removed",
        "请立即通知安全管理员，保留磁盘原状。",
        "Tell the security administrator at once and leave the disk as it is.",
    ),
    "box.busy": Reason(
        "另一个程序正在使用此数据目录",
        "Another program is using this data directory",
        "请先停止它，或换一个 --data-dir。",
        "Stop it first, or use another --data-dir.",
    ),
    "box.none": Reason(
        "此文件夹中没有设备数据",
        "There is no box in this folder",
        "请检查 --data-dir：其中应有 box.sqlite3。未写入任何内容。",
        "Check --data-dir: it should hold box.sqlite3. Nothing was written.",
    ),
    "account.wrong_password": Reason("原密码不正确", "The present password is wrong", "请重新输入。", "Type it again."),
    "account.weak_password": Reason(
        "新密码太弱：至少 8 个字符，且不同于原密码和用户名",
        "The new password is too weak: at least 8 characters, other than the old one and the user name",
        "请换一个密码。",
        "Choose another one.",
    ),
    "assume.body_part": Reason(
        "影像未注明部位，按胸部处理",
        "No body part is stated; taken for a chest",
        "请核对影像确为胸部。",
        "Check that the image shows a chest.",
    ),
    "assume.view": Reason(
        "影像未注明体位，按正位处理",
        "No view is stated; taken for frontal",
        "请核对影像确为正位。",
        "Check that the image is a frontal view.",
    ),
    "caution.age_unknown": Reason(
        "患者年龄未知，无法判断是否在模型的训练范围内",
        "The patient's age is unknown, so it cannot be told whether the model was trained for it",
        "请谨慎参考。",
        "Take the score with care.",
    ),
    "caution.age_outside": Reason(
        "患者年龄超出模型的主要训练范围，准确度可能较低",
        "The patient's age is outside the range most of the training pictures came from; accuracy may be lower",
        "请谨慎参考。",
        "Take the score with care.",
    ),
    "caution.photograph": Reason(
        "影像为翻拍或普通图片，准确度可能较低",
        "The image is a photographed film or plain picture; accuracy may be lower",
        "如有原始 DICOM 影像，请改用原始影像。",
        "Use the original DICOM image where there is one.",
    ),
    "caution.view_from_form": Reason("体位由上传者填写", "The view was stated by the person who uploaded it", "请核对。", "Check it."),
    "caution.missing_uid": Reason(
        "影像缺少检查或序列 UID，已单独成一次检查",
        "The image lacks its study or series UID; it stands as a study of its own",
        "请核对患者和检查。",
        "Check patient and study.",
    ),
    "caution.patient_mismatch": Reason(
        "同一检查号下出现不同的患者信息，已分开保存",
        "The same study UID came with other patient data; kept apart",
        "请核对患者身份。",
        "Check the patient's identity.",
    ),
}


def text(code: str, language: Language) -> str:
    """The reason's text in one language; an unknown code is a programming error (KeyError)."""
    reason = REASONS[code]
    return reason.zh if language == "zh" else reason.en


def hint(code: str, language: Language) -> str:
    """What the person should do, in one language."""
    reason = REASONS[code]
    return reason.hint_zh if language == "zh" else reason.hint_en
