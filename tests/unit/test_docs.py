"""The docs name what exists: modules, tests, files and decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("appliance", "model_sync", "webui", "quantize", "packaging", "tests")


def names(page: Path, pattern: str) -> set[str]:
    """What a pattern finds on a page."""
    return set(re.findall(pattern, page.read_text("utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_module_and_folder_that_a_page_names_exists(page: Path) -> None:
    paths = names(page, rf"`((?:{'|'.join(PACKAGES)})/[\w./-]*)`")
    modules = {name.replace(".", "/") for name in names(page, rf"`((?:{'|'.join(PACKAGES[:4])})\.[a-z_.]+)`")}
    absent = {path for path in paths if not (ROOT / path).exists()}
    absent |= {path for path in modules if not ((ROOT / path).is_dir() or (ROOT / f"{path}.py").is_file())}
    assert absent == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    targets = {target.partition("#")[0] for target in names(page, r"\]\(([^)\s]+)\)") if "://" not in target}
    assert {target for target in targets if target and not (page.parent / target).exists()} == set()


def test_the_architecture_names_modules() -> None:
    assert len(names(ROOT / "docs" / "architecture.md", r"`([a-z_]+/[\w/]+\.py)`")) >= 30


def test_requirements_r1_to_r50_are_listed_and_their_tests_exist() -> None:
    page = ROOT / "docs" / "requirements.md"
    rows = re.findall(r"^\| R(\d+) \| [^|]+ \| (done|partly|open|exempt) \|(.*)\|$", page.read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 51))
    written = {name for path in (ROOT / "tests").rglob("test_*.py") for name in names(path, r"\ndef (test_\w+)")}
    assert names(page, r"`(test_r\d+_\w+)`") - written == set()
    assert [number for number, state, rest in rows if state == "done" and "test" not in rest] == []


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "adr"
    assert names(folder / "README.md", r"\((\d{4}-[\w-]+\.md)\)") == {path.name for path in folder.glob("0*.md")}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
