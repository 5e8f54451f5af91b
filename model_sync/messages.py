"""One text per code: what happened and what to do, in English and Chinese, for every program of the product.

A package registers its codes once, in its ``messages.py``. The English text is the key of the translation; the Chinese text is in the
package's ``locale/zh_CN/LC_MESSAGES/messages.po``, which is read at the first Chinese text and needs no compilation (docs/adr: one
text per code). Texts never contain patient data.

The codes of this module are those that the box, its sync agent and the central library share, because reports carry them;
those of the agent's commands are in :mod:`model_sync.messages_agent`, and :mod:`model_sync.messages_central` has those that only the central
programs use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeAlias

from model_sync.messages_agent import WORDS

Language: TypeAlias = Literal["zh", "en"]
LANGUAGES: Final[tuple[Language, ...]] = ("zh", "en")
Audience: TypeAlias = Literal["technician"]
_LOCALE: Final = ("LC_ALL", "LC_MESSAGES", "LANG")


class Message(NamedTuple):
    """What happened, and what the reader should do; ``hints`` replaces the hint for an audience."""

    text: str
    hint: str = ""
    hints: Mapping[Audience, str] = MappingProxyType({})


_MESSAGES: Final[dict[str, Message]] = {}
_PACKAGES: Final[dict[str, str]] = {}


def register(package: str, messages: Mapping[str, Message]) -> None:
    """Add the codes of a package.

    Args:
        package: name of the package whose ``locale`` folder has the translations.
        messages: code to English message.

    Raises:
        ValueError: a code has a message already.
    """
    if twice := sorted(messages.keys() & _MESSAGES.keys()):
        raise ValueError(f"a code has one message: {', '.join(twice)}")
    _MESSAGES.update(messages)
    _PACKAGES.update(dict.fromkeys(messages, package))


def codes(package: str | None = None) -> frozenset[str]:
    """Return the registered codes, of all packages or of one."""
    return frozenset(code for code, owner in _PACKAGES.items() if package in (None, owner))


def is_known(code: str) -> bool:
    """Return whether a code has a message; one of a newer version has none."""
    return code in _MESSAGES


def find(code: str) -> Message:
    """Return the English message of a code; raises KeyError for an unknown code."""
    return _MESSAGES[code]


def text(code: str, language: Language, /, **values: object) -> str:
    """Return the text of a code, with its placeholders filled in; raises KeyError for an unknown code."""
    template = translate(_PACKAGES[code], _MESSAGES[code].text, language)
    return template.format(**values) if values else template


def hint(code: str, language: Language, audience: Audience | None = None) -> str:
    """Return what the reader should do; raises KeyError for an unknown code."""
    message = _MESSAGES[code]
    return translate(_PACKAGES[code], message.hints.get(audience, message.hint) if audience else message.hint, language)


def translate(package: str, english: str, language: Language) -> str:
    """Return an English text of a package in a language; raises KeyError when its catalogue lacks it."""
    return _catalogue(package)[english] if language == "zh" and english else english


@cache
def _catalogue(package: str) -> Mapping[str, str]:
    from babel.messages.pofile import read_po  # takes a fifth of a second, which English commands save

    with files(package).joinpath("locale/zh_CN/LC_MESSAGES/messages.po").open("rb") as file:
        return {str(entry.id): str(entry.string) for entry in read_po(file, locale="zh_CN") if entry.id}


def choose_language(environ: Mapping[str, str] | None = None) -> Language:
    """Return the language of a command, by the first of LC_ALL, LC_MESSAGES and LANG that is not empty (POSIX.1-2017, 8.2)."""
    asked = os.environ if environ is None else environ
    return "zh" if next(filter(None, map(asked.get, _LOCALE)), "").lower().startswith("zh") else "en"


def error_lines(what: str, hint: str, language: Language) -> str:
    """Return an error as every command prints it: what happened, and in the next line what to do."""
    return f"{text('word.error', language, what=what)}\n{text('word.hint', language, hint=hint)}"


def describe(code: str, message: str, own_hint: str, language: Language) -> str:
    """Return a coded error for a person: in English as it was raised, in Chinese by its code, with the particulars behind it."""
    if language == "en" or not is_known(code):
        return error_lines(message, own_hint, language)
    return error_lines(f"{text(code, language)} [{code}]（{message}）", hint(code, language) or own_hint, language)


# Codes that had two meanings until one meaning got a new code; by the program that wrote the stored value.
_SPLIT: Final[Mapping[str, Mapping[str, str]]] = {
    "agent": {"trust.revoked": "trust.line_ended"},
    "box": {"sync.state": "trust.unreadable"},
}


def current_code(code: str, writer: Literal["agent", "box"]) -> str:
    """Return today's code for one that an older version wrote: the sync agent's status, or the box's activations and alarms."""
    return _SPLIT[writer].get(code, code)


# fmt: off  (a table reads best with one code in a line)
_CENTRAL: Final = "Tell the central team, with this code. The model in use stays."
_ALARM: Final = "Nothing of it was used; the model in use stays. Tell the central team at once."
_WAIT: Final = "Nothing to do: it continues by itself."
_NOTHING: Final = "Nothing to do."
_NETWORK: Final = "Check the cable, the router and the network's login. The model in use stays; the box tries again by itself."
_DISK: Final = "Check the disk, and which account owns the directories. The model in use stays."
_STICK: Final = "Nothing was taken; the model in use stays. Try again with a newly written USB stick."
_AGAIN: Final = "It was not used; the model in use stays. Sync again; if it happens twice tell the central team."
_PREVIOUS: Final = "The previous model stays in use. Report it to the central team."
_ROLLED: Final = "The previous model analyses again, where there is one. Report it to the central team."
_FETCH: Final = "The model in use stays. Fetch the bundle again; if it happens twice tell the central team."
_OTHER: Final = "The box runs the model another way; `appliance tune --show` lists each candidate with its reason."
_ENROL: Final = "The model in use stays. Ask the central team for a new token, and run `model-sync enrol --token-file FILE`."
# The codes that a status report may contain: other codes are not sent to the centre.
REPORTED: Final[Mapping[str, Message]] = {
    "ok": Message("All is well", _NOTHING),
    "unlisted": Message("The reason is not in the list of reported codes", "Look at the box itself: its page shows the reason."),
    "activation.by_hand": Message(
        "A person rolled it back",
        "A doctor must read the image again. `appliance models activate VERSION --again` activates the version again.",
    ),
    "activation.crash_loop": Message("The new model crashed again and again in its self-test", _PREVIOUS),
    "activation.deadline": Message("The build or the self-test of the new model took too long", _PREVIOUS),
    "activation.drift": Message("The scores of the new model differed too much from its reference", _ROLLED),
    "activation.ended": Message("This activation has ended already", "See `appliance models history` for what happened."),
    "activation.failed_before": Message("This model failed on this box before", "The model in use stays. Add --again to try it anyway."),
    "activation.failures": Message("Too many analyses of the new model failed in its trial", _ROLLED),
    "activation.interrupted": Message(
        "The box went down again and again during the self-test of the new model",
        "The model in use stays. Check the power supply of this box. If the power did not fail, tell the central team: the model may be the cause. It is tried again later, less and less often.",
    ),
    "activation.latency": Message("The new model was too slow in its trial", _ROLLED),
    "activation.memory": Message("The new model needs more memory than it may have", _PREVIOUS),
    "activation.reboot_loop": Message(
        "The worker crashed again and again in the new model's trial; the model was rolled back",
        "The previous model analyses again. Report it to the central team.",
    ),
    "activation.rolled_back": Message(
        "The model version that made this finding was rolled back", "Do not rely on this finding: a doctor must read the image again."
    ),
    "activation.superseded": Message("Another version replaced it", _NOTHING),
    "box_report.absent": Message(
        "The box has left no report here: the central team sees nothing of it",
        "Start the box, with exchange_dir set to this directory. If it runs, its account may not write here: packaging/make_accounts.sh sets the owners right.",
    ),
    "box_report.invalid": Message("The box's own report is invalid and was not sent", "Analyses continue. Report it to the central team."),
    "box_report.unreadable": Message(
        "The box's own report cannot be read",
        "Analyses continue. Check the disk, and that both accounts are in the group of the exchange directory: packaging/make_accounts.sh sets the owners right.",
    ),
    "bundle.digest_mismatch": Message("A file of the bundle is not the one that its manifest names", _FETCH),
    "bundle.file_missing": Message("The bundle lacks a file", _FETCH),
    "bundle.file_unlisted": Message("The bundle has a file that its manifest does not list", _FETCH),
    "bundle.golden_invalid": Message("A golden case of the bundle is not valid", _FETCH),
    "bundle.manifest_invalid": Message(
        "The bundle's manifest is not valid", "The model in use stays. Update the appliance; if it is new enough, tell the central team."
    ),
    "bundle.no_manifest": Message("The bundle has no manifest", "Give the directory of one model version: it contains manifest.json."),
    "bundle.no_variant": Message("The bundle has no variant of this precision", "Choose one of the precisions that the bundle has."),
    "bundle.too_large": Message("The bundle is too large", _FETCH),
    "bundle.too_new": Message(
        "The bundle needs a newer version of this software", "Update the software of the appliance and of the workbench first."
    ),
    "bundle.unreadable": Message("The bundle cannot be read", "Check the path, the disk, and that this account may read the bundle."),
    "bundle.unsafe_path": Message("The bundle has an unsafe path", _FETCH),
    "model.absent": Message(
        "The wanted model is not in the exchange directory",
        "The model in use stays. The sync agent fetches it again; see `model-sync status`.",
    ),
    "model.below_minimum": Message("This version is older than the library allows", "The model in use stays. Use a newer version."),
    "model.disk_full": Message(
        "The disk has no room for the new model",
        "The model in use stays. Ask the technician to free disk space; the box tries again by itself.",
    ),
    "model.invalid": Message("The model bundle is not valid", "The model in use stays. Fetch the bundle again from the library."),
    "model.mismatch": Message(
        "The received model is not the one that was signed or wanted",
        "The model in use stays. Fetch it again; if it happens twice tell the central team.",
    ),
    "model.no_previous": Message("There is no earlier version to roll back to", "The model in use stays. See `appliance models list`."),
    "model.not_signed": Message(
        "The signed index of the model library does not list this model",
        "Only signed models may analyse patients here. Get it from the library or from its USB stick.",
    ),
    "model.precision": Message("The model bundle lacks this precision", "Choose a precision that it has, or `any` to measure all."),
    "model.self_test": Message("The model failed its self-test", "The model in use stays. Report the self-test to the central team."),
    "model.too_new": Message("The model needs a newer appliance version", "The model in use stays. Update the appliance first."),
    "model.unknown": Message("There is no such model on this box", "See `appliance models list` for the models of this box."),
    "model.withdrawn": Message(
        "The central team has withdrawn this version of the model",
        "Do not rely on this version's results: a doctor must read the image again.",
    ),
    "runtime.build": Message("The runtime could not build this model", _OTHER),
    "runtime.crashed": Message("The runtime crashed while it loaded or ran this model", _OTHER),
    "runtime.deadline": Message("The runtime took too long to load or run this model", _OTHER),
    "runtime.memory": Message("The runtime ran out of memory while it loaded or ran this model", _OTHER),
    "runtime.precision": Message(
        "The precision that ran is not the precision of this file",
        "This candidate is not used, because it would run in another precision without saying so. `appliance tune --show` lists the others.",
    ),
    "runtime.unavailable": Message("This runtime cannot be used on this box", _OTHER),
    "scores.shifted": Message(
        "The scores of the model shifted: they are not what they were on this box, or not what its reference allows",
        "It goes on analysing. Look at new images: another device, other settings, other patients? Then an administrator acknowledges it, on this page or with `appliance models acknowledge`. If there is no reason for it, tell the central team.",
    ),
    "store.failed": Message(
        "Storing failed",
        "Nothing was acknowledged. Send again; if it fails again call the technician.",
        {
            "technician": "Check the path, its permissions and the space on the disk. Where the database is damaged (malformed), leave the disk as it is and call the central team."
        },
    ),
    "sync.budget": Message("Today's data budget is used up", "It continues tomorrow; or raise day_budget_bytes in sync.toml."),
    "sync.busy": Message("Another model-sync process runs on this box", "Wait until it has ended; `model-sync status` shows what it does."),
    "sync.denied": Message(
        "The library's server denies this box access",
        "Ask the central team, with this code, and whoever runs the network of the clinic. The model in use stays; the box tries again by itself.",
    ),
    "sync.disk": Message("The directory for downloads cannot be used", _DISK),
    "sync.disk_full": Message("The disk is full", "Free disk space; the update continues by itself. The model in use stays."),
    "sync.downloading": Message("A model is being downloaded", _WAIT),
    "sync.error": Message(
        "The sync agent failed: a fault of the program",
        "The model in use stays. Send its log (`journalctl -u model-sync`) to the central team.",
    ),
    "sync.incomplete": Message("The library's server lacks a file that was signed", _CENTRAL),
    "sync.no_rollout": Message("The library has no rollout for the ring of this box", "Check `ring` in sync.toml with the central team."),
    "sync.no_url": Message("No address of the library is set", "Set `urls` in sync.toml, or import from a USB stick."),
    "sync.not_the_library": Message(
        "Something other than the library answered, such as a login page of the network",
        "Open the library's address in a browser on this network, and log in. The model in use stays.",
    ),
    "sync.ok": Message("All is well", _NOTHING),
    "sync.range": Message("The server or a proxy sent another part of a file than was asked for", _CENTRAL),
    "sync.rate": Message(
        "The server answered 429: too many requests",
        "Nothing to do: the box waits as long as the server asks, and tries again. If it lasts tell the central team.",
    ),
    "sync.refused": Message("The server refused the request", _CENTRAL),
    "sync.report": Message("The centre did not take this box's report", "Nothing to do: it is sent again. Models are still fetched."),
    "sync.settings": Message("A setting of the sync agent is wrong", "Correct sync.toml; `model-sync settings` explains every key."),
    "sync.slow": Message("The network is too slow", _NETWORK),
    "sync.state": Message("A file of the sync agent cannot be read or written", _DISK),
    "sync.stopped": Message("The sync agent was stopped", "What was received is kept; it continues when the agent starts again."),
    "sync.tls": Message(
        "No secure connection: the server's certificate cannot be verified",
        "Check the box's clock, then `ca_certificate` in sync.toml. The model in use stays.",
    ),
    "sync.too_long": Message("The server sends more than it may", _CENTRAL),
    "sync.unreachable": Message("The library cannot be reached", _NETWORK),
    "sync.url": Message("The library's address is wrong", "Correct `urls` in sync.toml."),
    "sync.usb": Message("The USB stick cannot be read", _STICK),
    "sync.window": Message("It is outside the download window", "It continues in the next window; or widen `windows` in sync.toml."),
    "trust.ambiguous": Message("Two signers claim one model, so it is not clear who may sign it", _ALARM),
    "trust.below_minimum": Message(
        "The rollout names a version below the minimum",
        "Tell the central team, with this code. The model in use stays, also when it is below the minimum.",
    ),
    "trust.digest": Message("A file is not the one that was signed", _AGAIN),
    "trust.document": Message("A signed document is not valid", "The model in use stays. Update the appliance, or tell the central team."),
    "trust.expired": Message(
        "The library's signed metadata has expired, so no new model is activated",
        "The model in use stays. Check the box's clock; then sync, or use a newly written USB stick.",
    ),
    "trust.foreign_root": Message(
        "This comes from another library",
        "Nothing of it was used; the model in use stays. Use the USB stick or the address of the library that this box belongs to.",
    ),
    "trust.line_ended": Message("The library has ended this model line", "Nothing to do: the model in use stays; no new versions come."),
    "trust.metadata": Message("The library's signed metadata is damaged or contradicts itself", _AGAIN),
    "trust.missing": Message(
        "There is no signed metadata of the library yet",
        "The model in use stays. Let the box sync (`model-sync pull`), or import the library's USB stick.",
    ),
    "trust.part_expired": Message(
        "The signatures of one model line or of the rollout have expired",
        "Check the box's clock; if it is right, ask the central team to sign again. The model in use stays.",
    ),
    "trust.revoked": Message("The signer may no longer sign this model", "It was not used; the model in use stays. Tell the central team."),
    "trust.rollback": Message(
        "The library's metadata is older than what this box knows",
        "Nothing of it was used; the model in use stays. Use a newer USB stick, or tell the central team.",
    ),
    "trust.root": Message(
        "The library's first root.json is missing or damaged: no signature can be checked",
        "Copy root.json from the central team's installation folder again. The model in use stays.",
    ),
    "trust.signature": Message("A signature of the library is not valid: somebody may be forging models", _ALARM),
    "trust.too_large": Message("Signed metadata or a signed document is larger than allowed", _CENTRAL),
    "trust.unchecked": Message(
        "The library's signatures could not be checked",
        "No new model was activated; the model in use stays. The box tries again; if it lasts call the technician.",
    ),
    "trust.unknown": Message("The rollout names a version that was never signed", _CENTRAL),
    "trust.unreadable": Message(
        "The files of the library's signed metadata cannot be read",
        "The model in use stays. Check the disk and the permissions of the exchange directory.",
    ),
    "trust.version": Message("The versions of the library's signed metadata do not match", _AGAIN),
    "trust.withdrawn": Message(
        "The rollout names a withdrawn version",
        "Tell the central team, with this code. If this box runs it, it stops using it: an earlier version analyses, or images are not analysed.",
    ),
    "usb.incomplete": Message("The USB stick is incomplete", _STICK),
    "exchange.invalid": Message("A file of the sync agent is not valid", "The model in use stays. Check the service model-sync."),
}
_AGENT: Final[Mapping[str, Message]] = {
    "report.invalid": Message(
        "The report is not valid", "The central server discarded it. Update the appliance, or tell the central team."
    ),
    "report.signature": Message(
        "The report is not signed by this box", "The central server discarded it. Enrol the box again with a new token."
    ),
    "report.sequence": Message("The report's number is not above the last one", "Nothing to do: it is sent under the next number."),
    "report.rate": Message("The box reports too often", "Nothing to do: it is sent again later."),
    "device.none": Message("This box has no usable device certificate", _ENROL),
    "device.expired": Message("This box's device certificate has expired", _ENROL),
    "device.answer": Message(
        "The centre's answer is not for this box",
        "Nothing was kept; the model in use stays. Check `report_url` in sync.toml and ask the central team.",
    ),
    "device.refused": Message("The centre refused this box", "The model in use stays. Ask the central team."),
    "enrolment.token": Message("The token is unknown, used or expired", "Nothing was enrolled. Ask the central team for a new token."),
    "enrolment.csr": Message("The certificate request is not valid", "Nothing was enrolled. Run `model-sync enrol` again."),
    "enrolment.denied": Message("This box is denied", "The model in use stays. Ask the central team why it is denied."),
    "enrolment.certificate": Message("There is no valid certificate of this fleet", "Enrol the box with a token of the central team."),
    "enrolment.expired": Message("The device certificate has expired", "Enrol the box again with a new token of the central team."),
    "enrolment.too_early": Message("The device certificate is too new to be renewed", "Nothing to do: it is renewed when its time comes."),
    "delta.invalid": Message("A delta cannot be used", "Nothing was changed; the complete file is fetched instead."),
}
# Why the accuracy of a model is not verified: no such bundle can be published, and a box shows no accuracy of it.
_REMADE: Final = (
    "The model may keep running, but its accuracy is not shown, and it cannot be published. Make the bundle with `quantize run`."
)
_GATE: Final[Mapping[str, Message]] = {
    "gate.absent": Message("A variant has no gate record", _REMADE),
    "gate.invalid": Message("The gate record cannot be read", _REMADE),
    "gate.failed": Message(
        "A variant has not passed its gate",
        "Leave the variant out, or make it another way; its accuracy is not shown, and it cannot be published.",
    ),
    "gate.unbound": Message("The gate record does not name the digest of each file that was measured", _REMADE),
    "gate.evaluation": Message("The gate record does not name the digest of the evaluation set", _REMADE),
    "gate.weights": Message("The gate record was made with other weights", _REMADE),
    "gate.runtime": Message(
        "The manifest allows a variant on a runtime on which it did not pass its gate",
        "Name the runtime in not_on of the variant; until then its accuracy is not shown, and it cannot be published.",
    ),
    "gate.threshold": Message("The accuracy was not measured at the threshold in force", _REMADE),
    "gate.figures": Message("The manifest states another accuracy than the one that was measured", _REMADE),
    "gate.input": Message("The accuracy was measured with another input pipeline or other labels", _REMADE),
}
# fmt: on
register("model_sync", {**REPORTED, **_AGENT, **_GATE, **{code: Message(words) for code, words in WORDS.items()}})
