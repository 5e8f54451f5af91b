"""Both languages say everything: catalogue against sources, placeholders, and no bare text in a template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po
from jinja2 import Environment, nodes

ROOT = Path(__file__).resolve().parents[3] / "webui"
TEMPLATES = sorted((ROOT / "templates").glob("*.html"))
# The languages' own names, and the classes of the body that stand in blocks.
UNTRANSLATED = {"English", "中文", "narrow", "wide"}
PLACEHOLDER = re.compile(r"%\(\w+\)s|%%|\{\w+\}")


def used() -> set[str]:
    """Every text that the sources ask for."""
    found = extract_from_dir(
        ROOT, method_map=[("**.py", "python"), ("templates/**.html", "jinja2")], keywords=dict.fromkeys(("gettext", "lazy_gettext", "_")),
        options_map={"templates/**.html": {"trim_blocks": "true", "lstrip_blocks": "true"}},
    )  # fmt: skip
    return {text for _, _, text, _, _ in found if isinstance(text, str)}


@pytest.fixture(scope="module")
def chinese() -> Catalog:
    with open(ROOT / "translations" / "zh" / "LC_MESSAGES" / "messages.po", "rb") as file:
        return read_po(file, locale="zh")


def test_r39_every_text_has_a_chinese_one(chinese: Catalog) -> None:
    known = {message.id for message in chinese if message.id}
    assert used() == known
    for message in chinese:
        if message.id:
            assert not message.fuzzy, message.id
            assert message.string, message.id
            assert sorted(PLACEHOLDER.findall(str(message.id))) == sorted(PLACEHOLDER.findall(str(message.string))), message.id


def test_the_chinese_is_chinese(chinese: Catalog) -> None:
    for message in chinese:
        text = PLACEHOLDER.sub("", str(message.string))
        if message.id and re.search(r"[A-Za-z]{2}", str(message.id)):
            assert re.search(r"[一-鿿]", text), message.id
        assert not re.search(r"[一-鿿][,;:?!]|[,;:?!][一-鿿]", text), f"ASCII punctuation in {text}"


class _Bare(HTMLParser):
    """Collects what a person would read or hear."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        self.found += [value or "" for name, value in attrs if name in ("alt", "title", "placeholder", "aria-label", "aria-description")]


def bare(template: Path) -> Iterator[str]:
    """Text that stands in a template without translation."""
    tree = Environment(autoescape=True, extensions=[]).parse(template.read_text("utf-8"))
    text = "".join(
        "\0" if not isinstance(node, nodes.TemplateData) else node.data
        for node in tree.find_all((nodes.TemplateData, nodes.Call, nodes.Name))
    )
    parser = _Bare()
    parser.feed(text)
    for piece in parser.found:
        for word in re.findall(r"[A-Za-z一-鿿][A-Za-z0-9一-鿿]*", piece):
            if word not in UNTRANSLATED:
                yield word


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.name))
def test_r39_templates_hold_no_bare_text(template: Path) -> None:
    assert list(bare(template)) == []


def test_the_scripts_hold_no_bare_text() -> None:
    scripts = list((ROOT / "viewer" / "src").rglob("*.ts"))
    assert len(scripts) > 30
    for script in scripts:
        code = re.sub(r"/\*.*?\*/|//[^\n]*", "", script.read_text("utf-8"), flags=re.DOTALL)
        assert not re.search(r"textContent = [\"'][A-Za-z一-鿿]", code), script.name
        assert not re.search(r"[一-鿿]", code), script.name
