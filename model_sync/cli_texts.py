"""What ``model-sync status`` says, in Chinese and in English: for a technician at the end of a long day."""

from __future__ import annotations

import os
from typing import NamedTuple


class Said(NamedTuple):
    """A text in both languages."""

    zh: str
    en: str


class Advice(NamedTuple):
    """What is the matter, and what to do about it."""

    what: Said
    do: Said


LABELS = {
    "box": Said("设备", "Box"),
    "ring": Said("发布分组", "ring"),
    "state": Said("状态", "State"),
    "since": Said("自", "since"),
    "last_look": Said("上次检查", "Last look"),
    "last_success": Said("上次成功", "Last success"),
    "never": Said("从未", "never"),
    "received": Said("接收字节", "Bytes received"),
    "line": Said("模型", "Model"),
    "runs": Said("运行中", "runs"),
    "wanted": Said("目标版本", "wanted"),
    "nothing": Said("无", "nothing"),
    "unknown": Said("未知（设备尚未上报）", "unknown (the box has not said)"),
    "progress": Said("下载进度", "Download"),
    "wrong": Said("问题", "Wrong"),
    "detail": Said("细节", "Detail"),
    "do": Said("处理办法", "Do"),
    "clock": Said("时钟", "Clock"),
    "clock_floor": Said("至少为", "at least"),
    "clock_server": Said("服务器时间", "server"),
    "note": Said("备注", "Note"),
    "retry": Said("将重试", "Trying again"),
    "last_problem": Said("最近一次问题", "Last problem"),
    "working": Said("正在工作的进程", "At work: process"),
    "interrupted": Said("下载曾被中断，下次检查时继续", "a download was interrupted; the next look goes on with it"),
    "retrying": Said("线路无应答，正在重试（现用模型照常工作）", "the line does not answer; it is tried again (the model in use works on)"),
    "no_status": Said("尚未运行过：请执行 model-sync pull", "it has never run: run `model-sync pull`"),
}

STATES = {
    "ok": Said("正常", "well"),
    "unreachable": Said("无法连接模型库（现用模型照常工作）", "the library cannot be reached (the model in use works on)"),
    "untrusted": Said("模型库内容不可信（现用模型照常工作，请立即处理）", "the library cannot be trusted (the model works on; act now)"),
    "waiting": Said("等待中", "waiting"),
    "downloading": Said("正在下载", "downloading"),
    "error": Said("本机故障", "something is wrong with this box"),
}

DECISIONS = {
    "ready": Said("已就绪，由设备启用", "here; the box puts it to work"),
    "paused": Said("发布已暂停", "the rollout is paused"),
    "not_chosen": Said("本机不在此次发布范围内", "this box is not part of the rollout"),
    "not_yet": Said("尚未轮到本机", "this box's turn has not come"),
    "waiting": Said("等待下载时段或流量额度", "waits for its window or its budget"),
    "refused": Said("已拒绝", "refused"),
    "withdrawn": Said("该版本已被撤回，等待中心团队指定新版本", "withdrawn by the central team, which will name another version"),
    "below_minimum": Said(
        "该版本低于最低要求，等待中心团队指定新版本", "older than the oldest that may run; another version will be named"
    ),
    "expired": Said("签名已过期，等待中心团队重新签名", "its signatures have expired; the central team has to sign anew"),
    "ended": Said("模型库已终止此模型，现用模型照常工作", "ended by the library; the model in use works on"),
    "unknown": Said("模型库没有此模型", "not in the library"),
    "absent": Said("此 U 盘上没有", "not on this stick"),
    "unreachable": Said("未能下载完成，将自动继续", "not complete; it goes on by itself"),
    "error": Said("本机故障，未能完成", "stopped by a fault of this box"),
    "none": Said("没有针对它的发布", "no rollout names it"),
}

PULL = {
    "asking": Said("正在连接模型库：{hosts}", "asking the library at {hosts}"),
    "again": Said("{message} [{code}]；{pause:.1f} 秒后重试", "{message} [{code}]; trying again in {pause:.1f} s"),
    "unreachable": Said(
        "无法连接不等于不可信：现用模型照常工作，已下载的部分已保留。",
        "Unreachable is not untrusted: the model in use works on, and what has come is kept.",
    ),
    "then": Said(
        "后台服务 model-sync run 会继续尝试；也可稍后再次执行 model-sync pull。",
        "The service (`model-sync run`) goes on trying by itself; or run `model-sync pull` again.",
    ),
}

NOT_SENT = {
    "no_server": Said(
        "未发送：sync.toml 未设置 report_url。如中心团队提供了地址，请填入，然后执行 model-sync enrol。",
        "nothing was sent: no report_url is set in sync.toml. If the central team gave you its address, set it and run `model-sync enrol`.",
    ),
    "not_enrolled": Said(
        "未发送：本机尚未登记。请向中心团队索取令牌，然后执行 model-sync enrol --token-file FILE。",
        "nothing was sent: this box is not enrolled. Get a token from the central team, and run `model-sync enrol --token-file FILE`.",
    ),
}

STICK = {
    "taken": Said("已从 U 盘取得，待设备启用：{what}", "taken from the stick and laid ready for the box: {what}"),
    "same": Said("U 盘上没有更新的版本：{what} 已在本机", "nothing newer is on the stick: {what} is here already"),
    "no_rollout": Said(
        "未取得任何内容：U 盘上没有针对分组 {what} 的发布；请核对 sync.toml 中的 ring",
        "nothing was taken: no rollout on the stick names a model for the ring {what}; compare `ring` in sync.toml with the central team's",
    ),
    "nothing": Said("未从 U 盘取得任何内容，原因见上", "nothing was taken from the stick; why is said above"),
}

_WAIT = Said("无需处理，会自动继续。", "Nothing: it goes on by itself.")
_CENTRAL = Said("请联系中心团队，并告知上面的代码。", "Tell the central team, with the code above.")
_LINE = Said("请检查网线、路由器和网络登录。", "Check the cable, the router and the network's login.")
_DISK = Said("请清理磁盘空间，更新会自动继续。", "Free disk space; the update goes on by itself.")
_OWNER = Said("请检查磁盘以及目录的所有者和权限。", "Check the disk, and who owns the directories.")
_PULL = Said("请执行 model-sync pull。", "Run `model-sync pull`.")
_STICK = Said("请用新制作的 U 盘重试。", "Try again with a newly made stick.")

CODES = {
    "sync.ok": Advice(Said("一切正常", "all is well"), Said("无需处理。", "Nothing.")),
    "sync.no_rollout": Advice(
        Said("模型库没有本分组的发布", "the library has no rollout for this ring"),
        Said("请核对 sync.toml 中的 ring。", "Compare `ring` in sync.toml with the central team's."),
    ),
    "sync.downloading": Advice(Said("正在下载模型", "a model is being downloaded"), _WAIT),
    "sync.error": Advice(
        Said("同步程序出错", "the sync agent itself failed"),
        Said("请把 journalctl -u model-sync 的日志发给中心团队。", "Send its log (`journalctl -u model-sync`) to the central team."),
    ),
    "sync.incomplete": Advice(Said("模型库服务器缺少文件", "the library's server lacks a file that was signed"), _CENTRAL),
    "sync.unreachable": Advice(Said("无法连接模型库", "the library cannot be reached"), _LINE),
    "sync.slow": Advice(Said("网络太慢", "the line is too slow"), _LINE),
    "sync.refused": Advice(Said("服务器拒绝了请求", "the server refused the request"), _CENTRAL),
    "sync.too_long": Advice(Said("服务器返回的内容过长", "the server sends more than it may"), _CENTRAL),
    "sync.not_the_library": Advice(
        Said("回应的不是模型库（可能是上网登录页）", "something else answers in the library's place (a login page?)"),
        Said("请在本网络中用浏览器打开模型库地址并登录。", "Open the library's address in a browser on this network, and log in."),
    ),
    "sync.range": Advice(Said("服务器或代理的断点续传有误", "a server or proxy gets ranges wrong"), _CENTRAL),
    "sync.budget": Advice(
        Said("今日流量额度已用完", "today's data budget is used up"),
        Said("明天自动继续，或调高 day_budget_bytes。", "It goes on tomorrow; or raise day_budget_bytes."),
    ),
    "sync.window": Advice(
        Said("不在下载时段内", "it is outside the download window"),
        Said("到时段自动继续，或放宽 windows。", "It goes on in the window; or widen `windows`."),
    ),
    "sync.busy": Advice(Said("另一个 model-sync 正在工作", "another model-sync is at work"), Said("请稍候。", "Wait until it is done.")),
    "sync.stopped": Advice(Said("同步服务已停止", "the agent was stopped"), Said("重新启动后自动继续。", "Start it: it goes on.")),
    "sync.disk_full": Advice(Said("磁盘空间不足", "the disk is full"), _DISK),
    "sync.disk": Advice(Said("无法读写下载目录", "the directory of downloads cannot be used"), _OWNER),
    "sync.state": Advice(Said("无法读写状态目录", "the agent's directory cannot be used"), _OWNER),
    "sync.no_url": Advice(
        Said("未设置模型库地址", "no library address is set"),
        Said("请在 sync.toml 设置 urls，或从 U 盘导入。", "Set `urls` in sync.toml, or import from a stick."),
    ),
    "sync.url": Advice(
        Said("模型库地址有误", "the library's address is wrong"), Said("请修改 sync.toml 中的 urls。", "Mend `urls` in sync.toml.")
    ),
    "sync.tls": Advice(
        Said("服务器证书无法验证", "the server's certificate cannot be verified"),
        Said("先核对本机时钟，再核对 ca_certificate。", "Check this box's clock, then `ca_certificate` in sync.toml."),
    ),
    "sync.report": Advice(Said("中心的上报序号与本机不同", "the centre counts this box's reports otherwise"), _WAIT),
    "sync.usb": Advice(Said("U 盘读取失败", "the stick cannot be read"), _STICK),
    "sync.settings": Advice(
        Said("设置有误", "a setting is wrong"),
        Said("请修改 sync.toml（见 model-sync settings）。", "Mend sync.toml; see `model-sync settings`."),
    ),
    "usb.incomplete": Advice(Said("U 盘内容不完整", "the stick is incomplete"), _STICK),
    "trust.signature": Advice(Said("签名无效：可能有人伪造模型", "a signature is wrong: somebody may be forging models"), _CENTRAL),
    "trust.expired": Advice(
        Said("签名信息已过期", "the signed metadata has expired"),
        Said("先核对本机时钟；若时钟正确，请联系中心团队。", "Check this box's clock first; if it is right, tell the central team."),
    ),
    "trust.rollback": Advice(Said("收到的是旧版本的模型库", "an older library is offered than this box has seen"), _CENTRAL),
    "trust.digest": Advice(Said("文件与签名不符", "a file is not the one that was signed"), _CENTRAL),
    "trust.part_expired": Advice(
        Said("某个模型或发布的签名已过期", "what one model line, or the rollout, has signed has expired"),
        Said(
            "先核对本机时钟；若时钟正确，请联系中心团队重新签名。",
            "Check this box's clock; if it is right, tell the central team to sign anew.",
        ),
    ),
    "trust.too_large": Advice(Said("签名信息超过允许的大小", "signed metadata or a document is larger than it may be"), _CENTRAL),
    "trust.revoked": Advice(Said("模型库已终止此模型", "the library has ended the line"), Said("无需处理。", "Nothing.")),
    "trust.document": Advice(Said("已签名的文件内容有误", "a signed document is not valid"), _CENTRAL),
    "trust.missing": Advice(Said("缺少签名信息", "signed metadata is missing"), _PULL),
    "trust.version": Advice(Said("签名信息版本不一致", "signed metadata does not fit together"), _PULL),
    "trust.metadata": Advice(Said("签名信息已损坏", "signed metadata is damaged"), _CENTRAL),
    "trust.ambiguous": Advice(Said("签名权归属不明确", "who may sign is not beyond doubt"), _CENTRAL),
    "trust.root": Advice(
        Said("缺少初始根证书 root.json", "the first root.json is missing or wrong"),
        Said("请从安装文件夹重新复制 root.json。", "Copy root.json from the installation folder again."),
    ),
    "trust.foreign_root": Advice(Said("该 U 盘属于另一个模型库", "the stick is of another library"), _STICK),
    "trust.unknown": Advice(Said("发布指定了未签名的版本", "the rollout names a version that was never signed"), _CENTRAL),
    "trust.withdrawn": Advice(Said("发布指定了已撤回的版本", "the rollout names a withdrawn version"), _CENTRAL),
    "trust.below_minimum": Advice(Said("发布指定的版本低于最低要求", "the rollout names a version below the minimum"), _CENTRAL),
}


def language() -> str:
    """Return ``zh`` or ``en``, by the locale that the terminal asks for."""
    asked = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "")
    return "zh" if asked.lower().startswith("zh") else "en"


def say(table: dict[str, Said], key: str, lang: str) -> str:
    """Return a text; a key that this version does not know stands for itself."""
    return getattr(table[key], lang) if key in table else key
