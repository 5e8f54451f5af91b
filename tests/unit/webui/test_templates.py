"""Templates compute nothing: they loop, branch on ready values and print; the view models do the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import Environment, nodes

TEMPLATES = sorted((Path(__file__).resolve().parents[3] / "webui" / "templates").glob("*.html"))
FUNCTIONS = {"_", "asset", "csrf_token", "get_flashed_messages", "url_for"}
FILTERS = {"tojson", "forceescape"}  # they only encode a value for its place in the page


def macros(tree: nodes.Template) -> set[str]:
    """The macros that a template defines or imports."""
    imported = {name if isinstance(name, str) else name[1] for item in tree.find_all(nodes.FromImport) for name in item.names}
    return imported | {item.name for item in tree.find_all(nodes.Macro)}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.name))
def test_a_template_only_prints(template: Path) -> None:
    tree = Environment(autoescape=True).parse(template.read_text("utf-8"))
    allowed = FUNCTIONS | macros(tree) | {"icon"}  # which base.html imports for the pages that extend it
    called = [item.node.name if isinstance(item.node, nodes.Name) else type(item.node).__name__ for item in tree.find_all(nodes.Call)]
    assert set(called) <= allowed
    assert {item.name for item in tree.find_all(nodes.Filter)} <= FILTERS
    computed = (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Concat, nodes.Dict, nodes.List, nodes.Slice)
    assert [type(item).__name__ for item in tree.find_all(computed)] == [] or template.name == "icons.html"  # the table of its paths
