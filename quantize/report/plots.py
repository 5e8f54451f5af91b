"""The plots of the report, drawn by matplotlib and embedded in the page as SVG.

Their text is figures and names in ASCII, drawn by the browser; sentences, Chinese ones above all, are in the HTML.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantize.errors import QuantizeError
from quantize.gate.roc_statistics import roc
from quantize.messages import Code

# Distinguishable for people who are blind to red or green (Okabe and Ito 2008).
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_FLOAT: Final = "#222222"
_GRID: Final = "#dddddd"
_MAX_PANELS: Final = 6
_MAX_LAYERS: Final = 25
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.grid": True, "grid.color": _GRID, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def require() -> None:
    """Check, before hours of work, that the report can be drawn at their end.

    Raises:
        QuantizeError: ``report.matplotlib``: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise QuantizeError("matplotlib is not installed: the report could not be drawn", code=Code.REPORT_MATPLOTLIB) from error


def roc_curves(
    positive: NDArray[np.bool_], float_score: NDArray[np.float64], variants: Sequence[tuple[str, NDArray[np.float64]]], name: str
) -> str:
    """Draw the ROC of the float model and of each variant, complete and with its upper left corner magnified.

    Args:
        positive: [n].
        float_score: [n].
        variants: name and scores [n].
        name: of the drawing, unique on the page.
    """
    with _Figure(9.0, 4.2, name) as figure:
        complete, magnified = figure.axes(1, 2)
        for axis in (complete, magnified):
            for number, (variant, score) in enumerate(variants):
                axis.plot(*roc(positive, score), color=_COLOURS[number % len(_COLOURS)], linewidth=1.4, label=variant)
            axis.plot(*roc(positive, float_score), color=_FLOAT, linewidth=1.2, linestyle=(0, (4, 2)), label="fp32")
            axis.set_xlabel("1 - specificity")
        complete.set_ylabel("sensitivity")
        magnified.set_xlim(0, 0.3)
        magnified.set_ylim(0.7, 1.002)
        magnified.legend(loc="lower right", frameon=False)
        return figure.svg()


def scatters(
    positive: NDArray[np.bool_],
    float_score: NDArray[np.float64],
    variants: Sequence[tuple[str, NDArray[np.float64]]],
    threshold: float,
    name: str,
) -> str:
    """Draw each variant's scores against the float model's: off the diagonal a score has changed."""
    chosen = variants[:_MAX_PANELS]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    with _Figure(3.1 * columns, 3.1 * rows, name) as figure:
        axes = figure.axes(rows, columns)
        for axis, (variant, score) in zip(axes, chosen, strict=False):
            axis.axline((0, 0), (1, 1), color=_FLOAT, linewidth=0.6)
            axis.axvline(threshold, color="#999999", linewidth=0.6, linestyle=":")
            axis.axhline(threshold, color="#999999", linewidth=0.6, linestyle=":")
            for flag, colour in ((False, _COLOURS[0]), (True, _COLOURS[1])):
                axis.scatter(float_score[positive == flag], score[positive == flag], s=5, color=colour, alpha=0.55, linewidths=0)
            axis.set_title(variant, fontsize=9)
            axis.set_xlim(-0.02, 1.02)
            axis.set_ylim(-0.02, 1.02)
            axis.set_aspect("equal")
        for axis in axes[len(chosen) :]:
            axis.set_visible(False)
        return figure.svg()


def layer_errors(layers: Sequence[tuple[str, float]], name: str) -> str:
    """Draw what each layer costs by itself, the costliest first."""
    chosen = sorted(layers, key=lambda layer: -layer[1])[:_MAX_LAYERS]
    with _Figure(9.0, 0.8 + 0.22 * len(chosen), name) as figure:
        label = "change of the outputs with this layer alone in int8 (rms, relative to their spread)"
        figure.bars([(_short(layer), error) for layer, error in chosen], _COLOURS[0], label)
        return figure.svg()


def speeds(rows: Sequence[tuple[str, float]]) -> str:
    """Draw median milliseconds per variant and runtime."""
    with _Figure(9.0, 0.8 + 0.26 * len(rows), "speed") as figure:
        axis, bars = figure.bars(rows, _COLOURS[2], "ms per picture (median)")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        return figure.svg()


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:20]}...{name[-25:]}"


class _Figure:
    """One drawing, without the global state of ``pyplot``."""

    def __init__(self, width: float, height: float, name: str) -> None:
        require()
        import matplotlib as mpl
        from matplotlib.figure import Figure

        # The salt makes identifiers that repeat from run to run and that no two drawings of a page share.
        self._context = mpl.rc_context(_STYLE | {"svg.hashsalt": name})
        self._size, self._new = (width, height), Figure
        self._name = name

    def __enter__(self) -> _Figure:
        self._context.__enter__()
        self._figure: Any = self._new(figsize=self._size, layout="constrained")
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def axes(self, rows: int, columns: int) -> list[Any]:
        """The panels, row by row."""
        return list(np.ravel(self._figure.subplots(rows, columns, squeeze=False)))

    def bars(self, rows: Sequence[tuple[str, float]], colour: str, label: str) -> tuple[Any, Any]:
        """Draw one horizontal bar per name and value, the first on top; returns the panel and the bars."""
        (axis,) = self.axes(1, 1)
        bars = axis.barh(range(len(rows)), [value for _, value in rows], color=colour, height=0.7)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        return axis, bars

    def svg(self) -> str:
        """Return the drawing for embedding in a page: no prologue, no external reference, identifiers of its own."""
        buffer = io.StringIO()
        self._figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Identifiers such as figure_1 and axes_1 are the same in every drawing.
        text = re.sub(r'\bid="', f'id="{self._name}-', text)
        return re.sub(r'(xlink:href="#|url\(#)', rf"\1{self._name}-", text)
