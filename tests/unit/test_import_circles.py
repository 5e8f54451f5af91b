"""No module of the box or its pages imports another that imports it (imports for type checkers count too); no test imports a test."""

from __future__ import annotations

import ast

import grimp
import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(("package", "at_least"), [("appliance", 300), ("webui", 80)])
def test_no_module_is_in_a_circle_of_imports(package: str, at_least: int) -> None:
    graph = grimp.build_graph(package, cache_dir=None)
    arrows = [(module, taken) for module in graph.modules for taken in graph.find_modules_directly_imported_by(module)]
    assert len(arrows) > at_least  # it was analysed at all
    assert {arrow for arrow in arrows if graph.chain_exists(importer=arrow[1], imported=arrow[0])} == set()


def test_no_file_imports_from_a_test_module() -> None:
    imports = {}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            if any(part.startswith("test_") for name in names for part in f"{module}{name}".split(".")):
                imports[str(path.relative_to(ROOT)), node.lineno] = module
    assert imports == {}
