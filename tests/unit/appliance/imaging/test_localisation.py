"""Where the reference model looks on a few dozen phantoms; `make bench ARGS="--only localisation"` measures hundreds and real pictures."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from appliance.lifecycle.model_control import reference_bundle
from quantize.reference.phantom import Opacity, Phantom, display, drawn_opacity
from tests.bench.localisation import Analyser, enclosed_share, locate_phantoms, phantoms


def test_the_peak_lies_in_the_drawn_opacity_and_the_outline_is_small_and_on_the_body() -> None:
    found = locate_phantoms(Analyser(reference_bundle()), 32)
    assert len(found) >= 16
    assert statistics.mean(bool(item.in_opacity) for item in found) >= 0.95
    assert not any(item.touches_background for item in found)
    assert statistics.median(item.area for item in found) <= 0.15


def test_the_drawn_opacity_is_what_a_phantom_has_more_than_a_normal_one() -> None:
    phantom = next(phantoms(1))
    with_it, without = (display(Phantom(phantom.rows, phantom.cols, phantom.seed, opacity=which)) for which in (phantom.opacity, None))
    added = drawn_opacity(phantom)
    inside = added > 0.5 * added.max()
    difference = with_it.astype(np.float64) - without
    assert difference[inside].mean() > 20
    assert abs(difference[added == 0].mean()) < 2
    assert not drawn_opacity(Phantom(300, 300)).any()


@pytest.mark.parametrize("phantom", [Phantom(view="LL"), Phantom(view="blank"), Phantom(rows=2048, opacity=Opacity())])
def test_no_opacity_is_invented_for_other_phantoms(phantom: Phantom) -> None:
    with pytest.raises(ValueError, match="no opacity"):
        drawn_opacity(phantom)


def test_a_polygon_inside_another_is_a_hole() -> None:
    square = ((0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0), (0.0, 0.0))
    hole = ((4.0, 4.0), (4.0, 6.0), (6.0, 6.0), (6.0, 4.0), (4.0, 4.0))
    assert enclosed_share((square,), (20, 20)) == pytest.approx(0.25)
    assert enclosed_share((square, hole), (20, 20)) == pytest.approx(0.24)
    assert enclosed_share((), (20, 20)) == 0
