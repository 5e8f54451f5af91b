"""Every coded reason that may leave a box, with what it means for the people who watch the fleet.

What is not listed here is reported as ``unlisted``: a code is a text that somebody wrote, and no text leaves a box unlisted.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Words(NamedTuple):
    """One text in both languages."""

    zh: str
    en: str


REASONS: Final[dict[str, Words]] = {
    "ok": Words("", ""),
    "unlisted": Words("原因不在上报清单中：请到设备上查看", "the reason is not on the list of reports: look at the box itself"),
    "activation.by_hand": Words("已由人工退回上一版本", "taken back by hand"),
    "activation.crash_loop": Words("新模型在自检中一再崩溃", "the new model crashed again and again while it was proven"),
    "activation.deadline": Words("新模型的构建或自检超时", "building or proving the new model took too long"),
    "activation.drift": Words("新模型的分数分布偏离参考过多", "the scores of the new model strayed too far from its reference"),
    "activation.ended": Words("此启用过程已经结束", "this activation has ended already"),
    "activation.failed_before": Words("此模型在本机上曾经失败", "this model failed on this box before"),
    "activation.failures": Words("新模型试运行时失败过多", "too many readings of the new model failed while it was on trial"),
    "activation.latency": Words("新模型试运行时过慢", "the new model was too slow while it was on trial"),
    "activation.memory": Words("新模型所需内存超过限制", "the new model needs more memory than it may have"),
    "activation.reboot_loop": Words(
        "新模型试运行时分析程序一再退出，已退回", "the analysis program kept dying with the new model on trial; it was taken back"
    ),
    "activation.rolled_back": Words("作出此结果的模型版本已被退回", "the model version that made this finding was taken back"),
    "activation.superseded": Words("被另一版本取代", "another version took its place"),
    "box_report.invalid": Words("设备自身的报告不合规，未发送", "the box's own report was refused and not sent"),
    "box_report.unreadable": Words("设备自身的报告无法读取", "the box's own report cannot be read"),
    "bundle.digest_mismatch": Words("模型包中的文件与清单不符", "a file of the bundle is not the one that its manifest names"),
    "bundle.file_missing": Words("模型包缺少文件", "the bundle lacks a file"),
    "bundle.file_unlisted": Words("模型包中有清单外的文件", "the bundle has a file that its manifest does not list"),
    "bundle.golden_invalid": Words("模型包的验证病例无效", "a golden case of the bundle is not valid"),
    "bundle.manifest_invalid": Words("模型包的清单无效", "the bundle's manifest is not valid"),
    "bundle.no_manifest": Words("模型包没有清单", "the bundle has no manifest"),
    "bundle.no_variant": Words("模型包没有可用的精度", "the bundle has no such variant"),
    "bundle.too_large": Words("模型包过大", "the bundle is too large"),
    "bundle.unreadable": Words("模型包无法读取", "the bundle cannot be read"),
    "bundle.unsafe_path": Words("模型包含不安全的路径", "the bundle has an unsafe path"),
    "model.absent": Words("要启用的模型不在交换目录中", "the model that is wanted is not in the exchange directory"),
    "model.below_minimum": Words("此版本低于模型库规定的最低版本", "this version is older than the oldest that the library still allows"),
    "model.disk_full": Words("磁盘空间不足，无法存放新模型", "the disk has no room for the new model"),
    "model.invalid": Words("模型包无效", "the model bundle is invalid"),
    "model.mismatch": Words(
        "得到的模型与签名索引或指令所指的不同", "the model that came is another than the one that was signed or asked for"
    ),
    "model.no_previous": Words("没有可以退回的模型版本", "there is no earlier version to go back to"),
    "model.not_signed": Words("模型库的签名索引中没有这个模型", "the signed index of the model library does not list this model"),
    "model.precision": Words("模型包中没有这种精度", "the model bundle does not have this precision"),
    "model.self_test": Words("模型自检未通过", "the model failed its self-test"),
    "model.too_new": Words("模型需要更新版本的设备软件", "the model needs a newer appliance version"),
    "model.unknown": Words("本机没有这个模型", "there is no such model on this box"),
    "model.withdrawn": Words("此模型版本已被中心撤回", "the central team has withdrawn this version of the model"),
    "exchange.invalid": Words("交换目录中的文件无法理解", "a file of the exchange directory cannot be understood"),
    "runtime.build": Words("推理引擎无法编译此模型", "the runtime could not build this model"),
    "runtime.crashed": Words("推理引擎在加载或运行此模型时崩溃", "the runtime crashed while it loaded or ran this model"),
    "runtime.deadline": Words("推理引擎加载或运行此模型超时", "the runtime took too long to load or run this model"),
    "runtime.memory": Words("推理引擎内存不足", "the runtime ran out of memory"),
    "runtime.precision": Words("实际运行的精度不是此模型文件的精度", "what ran is not the precision of the model's file"),
    "runtime.unavailable": Words("设备上不能使用此推理引擎", "the runtime cannot be used on the box"),
    "store.failed": Words("设备的磁盘或数据库出错", "the box's disk or database failed"),
    "sync.budget": Words("当日流量已用完", "the day's data budget is used up"),
    "sync.busy": Words("另一个同步程序正在运行", "another agent is at work on this box"),
    "sync.downloading": Words("正在下载", "downloading"),
    "sync.disk": Words("设备磁盘出错", "the box's disk failed"),
    "sync.disk_full": Words("磁盘空间不足", "not enough disk space"),
    "sync.error": Words("同步代理出错", "the agent failed"),
    "sync.incomplete": Words("模型库服务器缺少已签名的文件", "the library's server lacks a file that was signed"),
    "sync.no_rollout": Words("该环没有推送", "the library has no rollout for its ring"),
    "sync.no_url": Words("没有设置模型库地址", "no address of the library is set"),
    "sync.not_the_library": Words(
        "应答者不是模型库（可能是上网登录页）", "something else than the library answers, such as a network's login page"
    ),
    "sync.ok": Words("", ""),
    "sync.range": Words("服务器给错了文件片段", "the server sent another piece of a file than was asked for"),
    "sync.refused": Words("模型库拒绝了请求", "the library refused a request"),
    "sync.report": Words("中心暂时不能接收报告", "the centre could not take a report"),
    "sync.settings": Words("代理设置有误", "the agent's settings are wrong"),
    "sync.slow": Words("线路过慢", "the line is too slow"),
    "sync.state": Words("代理的状态目录无法写入", "the agent's state directory cannot be written"),
    "sync.stopped": Words("代理已停止", "the agent was stopped"),
    "sync.tls": Words("无法建立安全连接（时钟或证书）", "no secure connection: clock or certificate"),
    "sync.too_long": Words("文件比签名的长", "a file is longer than it may be"),
    "sync.unreachable": Words("模型库没有应答", "the library does not answer"),
    "sync.url": Words("模型库地址无效", "the library's address is not valid"),
    "sync.usb": Words("U 盘无法读取", "the USB stick cannot be read"),
    "sync.window": Words("等待下载时间段", "waits for its download window"),
    "trust.ambiguous": Words("同一模型有两个签名者，无法判断以谁为准", "two signers speak for one model; it cannot be told which counts"),
    "trust.below_minimum": Words("推送的版本低于最低版本", "the rollout names a version below the minimum"),
    "trust.digest": Words("收到的文件与签名的摘要不符", "A file is not the one that was signed"),
    "trust.document": Words("签名的文件内容无法读懂", "A signed document cannot be understood"),
    "trust.expired": Words("模型库的元数据已过期，不能启用新模型", "the library's metadata has expired; no new model is put to work"),
    "trust.foreign_root": Words("来自另一个模型库", "this comes from another library"),
    "trust.metadata": Words("模型库的元数据损坏或自相矛盾", "the library's metadata is damaged or contradicts itself"),
    "trust.missing": Words("还没有模型库的签名元数据", "there is no signed metadata of the library yet"),
    "trust.part_expired": Words("某个模型或推送的签名已过期", "what one line, or the rollout, has signed has expired"),
    "trust.revoked": Words("签名者的权限已被撤销", "whoever signed it may no longer sign"),
    "trust.rollback": Words("模型库的元数据比本机已知的旧", "the library's metadata is older than what this box knows"),
    "trust.root": Words(
        "缺少模型库的首个 root.json，无法核对签名", "the library's first root.json is missing: no signature can be checked"
    ),
    "trust.signature": Words("模型库的签名无效", "the library's signatures are not valid"),
    "trust.too_large": Words("签名的内容超过允许的大小", "signed metadata or a document is larger than it may be"),
    "trust.unchecked": Words("模型库的签名未能核对", "the library's signatures could not be checked"),
    "trust.unknown": Words("推送的版本未被签名", "the rollout names a version that is not signed"),
    "trust.version": Words("模型库的元数据版本不一致", "the versions of the library's metadata do not fit together"),
    "trust.withdrawn": Words("推送的版本已被撤回", "the rollout names a withdrawn version"),
    "usb.incomplete": Words("U 盘上缺少文件", "files are missing on the USB stick"),
}
