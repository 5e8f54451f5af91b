"""Coded reasons of the signed life of a model: part of the catalogue in :mod:`appliance.reasons`, which is where to look them up."""

from __future__ import annotations

from typing import Final, NamedTuple


class Reason(NamedTuple):
    """A coded reason: what happened, and the hint what to do, in both languages."""

    zh: str
    en: str
    hint_zh: str
    hint_en: str


MODEL_REASONS: Final[dict[str, Reason]] = {
    "model.invalid": Reason(
        "模型包无效",
        "The model bundle is invalid",
        "继续使用原有模型。请从模型库重新获取。",
        "The model before it stays in use. Fetch the bundle again from the library.",
    ),
    "model.self_test": Reason(
        "模型自检未通过",
        "The model failed its self-test",
        "继续使用原有模型。请把自检结果报告给中心。",
        "The model before it stays in use. Report the self-test to the central team.",
    ),
    "model.too_new": Reason(
        "模型需要更新版本的设备软件", "The model needs a newer appliance version", "请先升级设备软件。", "Update the appliance first."
    ),
    "model.unknown": Reason(
        "本机没有这个模型",
        "There is no such model on this box",
        "用 `appliance models list` 查看已有模型。",
        "See `appliance models list` for the models present.",
    ),
    "model.precision": Reason(
        "模型包中没有这种精度",
        "The model bundle does not have this precision",
        "请选择模型包中已有的精度，或用 any 测量全部精度。",
        "Choose one of the precisions it has, or any to measure all of them.",
    ),
    "model.mismatch": Reason(
        "得到的模型与签名索引或指令所指的不同",
        "The model that came is another than the one that was signed or asked for",
        "继续使用原有模型。请重新获取；若再次出现请通知中心。",
        "The model before it stays in use. Fetch it again; if it happens twice tell the central team.",
    ),
    "model.absent": Reason(
        "要启用的模型不在交换目录中",
        "The model that is wanted is not in the exchange directory",
        "继续使用原有模型。同步程序会再次获取；请查看 `model-sync status`。",
        "The model before it stays in use. The sync agent fetches it again; see `model-sync status`.",
    ),
    "model.not_signed": Reason(
        "模型库的签名索引中没有这个模型",
        "The signed index of the model library does not list this model",
        "只有签名的模型才能使用。请从模型库或其 U 盘获取。",
        "Only signed models may read patients here. Get it from the library or from its USB stick.",
    ),
    "model.below_minimum": Reason(
        "此版本低于模型库规定的最低版本",
        "This version is older than the oldest that the library still allows",
        "请使用更新的版本；继续使用原有模型。",
        "Use a newer version; the model at work stays.",
    ),
    "model.withdrawn": Reason(
        "此模型版本已被中心撤回",
        "The central team has withdrawn this version of the model",
        "请勿依赖此版本的结果，由医生重新阅片；需要时用新版本重新分析。",
        "Do not rely on this version's results: a doctor must read the image again.",
    ),
    "model.no_previous": Reason(
        "没有可以退回的模型版本",
        "There is no earlier version to go back to",
        "继续使用原有模型。用 `appliance models list` 查看已有模型。",
        "The model at work stays. `appliance models list` shows what this box has.",
    ),
    "model.disk_full": Reason(
        "磁盘空间不足，无法存放新模型",
        "The disk has no room for the new model",
        "继续使用原有模型。请通知技术人员清理或扩充磁盘，之后会自动重试。",
        "The model before it stays in use. Ask the technician to free disk space; it is tried again by itself.",
    ),
    "activation.crash_loop": Reason(
        "新模型在自检中一再崩溃",
        "The new model crashed again and again while it was proven",
        "继续使用原有模型。请报告给中心。",
        "The model before it stays in use. Report it to the central team.",
    ),
    "activation.reboot_loop": Reason(
        "新模型试运行时分析程序一再退出，已退回",
        "The analysis program kept dying with the new model on trial; it was taken back",
        "已退回原有模型。请报告给中心。",
        "The model before it reads again. Report it to the central team.",
    ),
    "activation.deadline": Reason(
        "新模型的构建或自检超时",
        "Building or proving the new model took too long",
        "继续使用原有模型。请报告给中心。",
        "The model before it stays in use. Report it to the central team.",
    ),
    "activation.memory": Reason(
        "新模型所需内存超过限制",
        "The new model needs more memory than it may have",
        "继续使用原有模型。请报告给中心。",
        "The model before it stays in use. Report it to the central team.",
    ),
    "activation.failures": Reason(
        "新模型试运行时失败过多",
        "Too many readings of the new model failed while it was on trial",
        "已退回原有模型（如有）。请报告给中心。",
        "The model before it reads again, where there is one. Report it to the central team.",
    ),
    "activation.latency": Reason(
        "新模型试运行时过慢",
        "The new model was too slow while it was on trial",
        "已退回原有模型（如有）。请报告给中心。",
        "The model before it reads again, where there is one. Report it to the central team.",
    ),
    "activation.drift": Reason(
        "新模型的分数分布偏离参考过多",
        "The scores of the new model strayed too far from its reference",
        "已退回原有模型（如有）。请报告给中心。",
        "The model before it reads again, where there is one. Report it to the central team.",
    ),
    "activation.by_hand": Reason(
        "已由人工退回上一版本",
        "Taken back by hand",
        "由医生重新阅片。需要时可用 `appliance models activate` 重新启用。",
        "A doctor must read the image again. `appliance models activate VERSION --again` puts the version to work again.",
    ),
    "activation.superseded": Reason("被另一版本取代", "Another version took its place", "无需处理。", "Nothing to do."),
    "activation.rolled_back": Reason(
        "作出此结果的模型版本已被退回",
        "The model version that made this finding was taken back",
        "请勿依赖此结果，由医生重新阅片。",
        "Do not rely on this finding: a doctor must read the image again.",
    ),
    "activation.failed_before": Reason(
        "此模型在本机上曾经失败",
        "This model failed on this box before",
        "继续使用原有模型。确需再试请加 --again。",
        "The model at work stays. Add --again to try it all the same.",
    ),
    "activation.ended": Reason(
        "此启用过程已经结束",
        "This activation has ended already",
        "用 `appliance models history` 查看经过。",
        "See `appliance models history` for what happened.",
    ),
    "exchange.invalid": Reason(
        "同步程序的文件无法读懂",
        "A file of the sync agent cannot be understood",
        "继续使用原有模型。请检查服务 model-sync。",
        "The model at work stays. Check the service model-sync.",
    ),
    "trust.signature": Reason(
        "模型库的签名无效",
        "The library's signatures are not valid",
        "没有采用任何内容，继续使用原有模型。请立即通知中心。",
        "Nothing of it was used; the model at work stays. Tell the central team at once.",
    ),
    "trust.expired": Reason(
        "模型库的元数据已过期，不能启用新模型",
        "The library's metadata has expired; no new model is put to work",
        "继续使用原有模型。请联网同步，或使用新的 U 盘；并检查本机时钟。",
        "The model at work stays. Let the box sync, or bring a fresh USB stick; check the box's clock.",
    ),
    "trust.rollback": Reason(
        "模型库的元数据比本机已知的旧",
        "The library's metadata is older than what this box knows",
        "没有采用任何内容，继续使用原有模型。请使用较新的 U 盘，或通知中心。",
        "Nothing of it was used; the model at work stays. Use a newer USB stick, or tell the central team.",
    ),
    "trust.digest": Reason(
        "收到的文件与签名的摘要不符",
        "A file is not the one that was signed",
        "没有采用，继续使用原有模型。将重新获取；若再次出现请通知中心。",
        "It was not used; the model at work stays. It is fetched again; if it happens twice tell the central team.",
    ),
    "trust.revoked": Reason(
        "签名者的权限已被撤销",
        "Whoever signed it may no longer sign",
        "没有采用，继续使用原有模型。请通知中心。",
        "It was not used; the model at work stays. Tell the central team.",
    ),
    "trust.document": Reason(
        "签名的文件内容无法读懂",
        "A signed document cannot be understood",
        "继续使用原有模型。请升级设备软件，或通知中心。",
        "The model at work stays. Update the box, or tell the central team.",
    ),
    "trust.unchecked": Reason(
        "模型库的签名未能核对",
        "The library's signatures could not be checked",
        "没有启用新模型，继续使用原有模型。将自动重试；若持续出现请通知技术人员。",
        "No new model was put to work; the one at work stays. It is tried again; if it lasts call the technician.",
    ),
    "trust.missing": Reason(
        "还没有模型库的签名元数据",
        "There is no signed metadata of the library yet",
        "请联网同步，或导入模型库的 U 盘。继续使用原有模型。",
        "Let the box sync, or import the library's USB stick. The model at work stays.",
    ),
    "trust.root": Reason(
        "缺少模型库的首个 root.json，无法核对签名",
        "The library's first root.json is missing: no signature can be checked",
        "请从中心的安装文件夹重新复制 root.json。继续使用原有模型。",
        "Copy root.json from the central team's installation folder again. The model at work stays.",
    ),
    "trust.foreign_root": Reason(
        "来自另一个模型库",
        "This comes from another library",
        "没有采用任何内容，继续使用原有模型。请使用本机所属模型库的 U 盘或地址。",
        "Nothing of it was used; the model at work stays. Use the stick or the address of the library this box belongs to.",
    ),
    "trust.version": Reason(
        "模型库的元数据版本不一致",
        "The versions of the library's metadata do not fit together",
        "没有采用任何内容，继续使用原有模型。请再次同步；若再次出现请通知中心。",
        "Nothing of it was used; the model at work stays. Sync again; if it happens twice tell the central team.",
    ),
    "trust.metadata": Reason(
        "模型库的元数据损坏或自相矛盾",
        "The library's metadata is damaged or contradicts itself",
        "没有采用任何内容，继续使用原有模型。请再次同步；若再次出现请通知中心。",
        "Nothing of it was used; the model at work stays. Sync again; if it happens twice tell the central team.",
    ),
    "trust.ambiguous": Reason(
        "同一模型有两个签名者，无法判断以谁为准",
        "Two signers speak for one model; it cannot be told which counts",
        "没有采用，继续使用原有模型。请通知中心。",
        "It was not used; the model at work stays. Tell the central team.",
    ),
    "sync.state": Reason(
        "模型库的元数据文件无法读取",
        "The files of the library's metadata cannot be read",
        "继续使用原有模型。请检查磁盘和交换目录的权限。",
        "The model at work stays. Check the disk and the permissions of the exchange directory.",
    ),
}
