"""One text per code: every code that the sources raise has one entry, in both languages, and every entry is used."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from string import Formatter

import pytest
from babel.messages.pofile import read_po

from model_sync import messages, messages_central
from quantize.messages import WORDS, Code

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("appliance", "model_sync", "quantize")
CODE = re.compile(r"[a-z_]+\.[a-z_]+")
# What carries a code as its first argument: errors, reasons, and the functions of the pages that show one.
RAISING = re.compile(r"(Error|Reason|Note|Unreachable|Failure|Trouble|Refused|TrustError|reason_text|reason_hint|sync_text)$")
REPORT = ROOT / "quantize" / "report" / "templates" / "report.html"


def calls() -> list[ast.Call]:
    """Every call in the sources of the four packages."""
    paths = [path for package in (*PACKAGES, "webui") for path in (ROOT / package).rglob("*.py") if "node_modules" not in path.parts]
    return [node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]


def raised() -> set[str]:
    """Codes given as first argument or as ``code`` to what carries a reason."""
    found = set()
    for call in calls():
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        given = [item.value for item in call.keywords if item.arg == "code"] + (call.args[:1] if RAISING.search(name) else [])
        found |= {item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    return {code for code in found if CODE.fullmatch(code)}


def spoken_inline() -> set[str]:
    """English texts that the commands of the box give to ``say``."""
    said = [call.args[0] for call in calls() if isinstance(call.func, ast.Name) and call.func.id == "say"]
    return {str(item.value) for item in said if isinstance(item, ast.Constant)}


def sources(package: str) -> list[Path]:
    """The Python sources of a package, without its registry."""
    return [path for path in (ROOT / package).rglob("*.py") if path.name != "messages.py" and "node_modules" not in path.parts]


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_every_raised_code_has_its_message() -> None:
    assert len(raised()) > 150
    assert raised() - messages.codes() == set()


def test_every_code_of_quantize_is_raised_by_its_name() -> None:
    trees = [ast.parse(path.read_text("utf-8")) for path in sources("quantize")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Code"
    }
    assert named == {code.name for code in Code}
    literals = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert {code.value for code in Code} & literals == set()


def test_every_word_of_the_report_is_used_and_every_used_word_exists() -> None:
    template = REPORT.read_text("utf-8")
    used = set(re.findall(r"\bt\(\"([a-z_]+)\"|words\.([a-z_]+)|else \"([a-z_]+)\"\)", template))
    used = {word for match in used for word in match if word} | {"calibration", "evaluation"}  # the sets, in a loop
    assert {f"page.{word}" for word in used} == set(WORDS)


@pytest.mark.parametrize("code", sorted(messages.codes()))
def test_every_message_speaks_both_languages_with_the_same_placeholders(code: str) -> None:
    for said in (messages.text, messages.hint):
        chinese, english = said(code, "zh"), said(code, "en")
        assert bool(chinese) == bool(english)
        assert {name for _, name, _, _ in Formatter().parse(chinese) if name} == {
            name for _, name, _, _ in Formatter().parse(english) if name
        }
        assert not re.search(r"[\u4e00-\u9fff]", english)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_catalogue_has_what_is_said_and_nothing_else(package: str) -> None:
    path = ROOT / package / "locale" / "zh_CN" / "LC_MESSAGES" / "messages.po"
    with path.open("rb") as file:
        catalogue = read_po(file, locale="zh_CN")
    assert not catalogue.obsolete
    assert [entry.id for entry in catalogue if entry.id and (entry.fuzzy or not entry.string)] == []
    found = [messages.find(code) for code in messages.codes(package)]
    said = {text for message in found for text in (message.text, message.hint, *message.hints.values()) if text}
    said |= spoken_inline() if package == "appliance" else set()
    assert {str(entry.id) for entry in catalogue if entry.id} == said


def test_a_code_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"sync\.state"):
        messages.register("model_sync", {"sync.state": messages.Message("again")})


@pytest.mark.parametrize(
    ("environ", "language"),
    [
        ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_CN", "LANG": "C"}, "zh"),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": ""}, "en"),
        ({"LANG": "de_DE"}, "en"),
        ({}, "en"),
    ],
)
def test_the_language_is_chosen_in_the_order_of_posix(environ: dict[str, str], language: str) -> None:
    assert messages.choose_language(environ) == language


def test_codes_that_had_two_meanings_are_read_as_the_one_that_was_meant() -> None:
    assert messages.current_code("trust.revoked", "agent") == "trust.line_ended"
    assert messages.current_code("trust.revoked", "box") == "trust.revoked"
    assert messages.current_code("sync.state", "box") == "trust.unreadable"
    assert messages.current_code("sync.state", "agent") == "sync.state"


def test_the_words_of_the_fleet_page_are_of_the_central_programs() -> None:
    assert messages_central.WORDS.keys() <= messages.codes("model_sync")
    assert all(code.startswith("fleet.") for code in messages_central.WORDS)
