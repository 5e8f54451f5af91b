"""No module of the box or its pages imports another that imports it, directly or not: imports for type checkers count too."""

from __future__ import annotations

import grimp
import pytest


@pytest.mark.parametrize(("package", "at_least"), [("appliance", 300), ("webui", 80)])
def test_no_module_is_in_a_circle_of_imports(package: str, at_least: int) -> None:
    graph = grimp.build_graph(package, cache_dir=None)
    arrows = [(module, taken) for module in graph.modules for taken in graph.find_modules_directly_imported_by(module)]
    assert len(arrows) > at_least  # it was analysed at all
    assert {arrow for arrow in arrows if graph.chain_exists(importer=arrow[1], imported=arrow[0])} == set()
