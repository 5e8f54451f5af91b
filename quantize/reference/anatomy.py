"""Draw a synthetic chest as an X-ray would show it: tissue adds to the attenuation, air takes it away.

No picture of a person is behind it, so its output may be shipped, shown and committed. The scene is one square of
side 1: ``x`` runs from the midline (0) to the right of the picture, ``y`` from the top (0) to the bottom (1); the
patient's left is on the right of the picture. Hand-written because no library draws one, and because samples
and golden cases must not depend on a download.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Plane: TypeAlias = NDArray[np.floating[Any]]

_RIBS = 10
# The scene is larger than the film, as in a clinic: the shoulders and the abdomen are cut.
_ZOOM, _TOP = 0.90, 0.045


@dataclass(frozen=True)
class Opacity:
    """A patch of consolidation.

    Attributes:
        x: Centre, -0.5..0.5; negative is the left of the picture, the patient's right.
        y: Centre, 0..1 from the top.
        size: Radius as a part of the picture's height.
        strength: 0 is invisible, 1 as dense as the heart.
    """

    x: float = -0.19
    y: float = 0.56
    size: float = 0.11
    strength: float = 0.8


@dataclass(frozen=True)
class Grid:
    """Coordinates of the pixel centres of a picture of ``rows`` x ``cols``."""

    rows: int
    cols: int
    x: Plane
    y: Plane

    @classmethod
    def of(cls, rows: int, cols: int) -> Grid:
        """Place the grid so that a picture narrower than high is cut at the sides and never squeezed."""
        x = _ZOOM * (np.arange(cols, dtype=np.float32) + 0.5 - cols / 2) / rows
        y = _TOP + _ZOOM * (np.arange(rows, dtype=np.float32) + 0.5) / rows
        return cls(rows, cols, x[None, :], y[:, None])

    def band(self, top: float, bottom: float) -> slice:
        """Return the rows between two heights of the scene, so that a small object is drawn in few rows only."""
        scale = self.rows / _ZOOM
        return slice(max(0, int((top - _TOP) * scale)), max(0, min(self.rows, int((bottom - _TOP) * scale))))


def frontal(rows: int, cols: int, rng: np.random.Generator, opacity: Opacity | None = None) -> Plane:
    """Return the attenuation of a frontal chest, float32 [rows, cols], about 0 in air to 1 in the abdomen."""
    return frontal_parts(rows, cols, rng, opacity)[0]


def frontal_parts(rows: int, cols: int, rng: np.random.Generator, opacity: Opacity | None = None) -> tuple[Plane, Plane]:
    """Return the attenuation of a frontal chest as ``frontal`` does, and the part of it that is the opacity's, 0 without one."""
    grid = Grid.of(rows, cols)
    lungs = lung_depth(grid)
    heart = _heart(grid)
    air = lungs * (1 - 0.8 * heart)
    vessels = _vessels(grid, rng) * air
    body = body_depth(grid)
    tau = 0.80 * body - 0.60 * air + 0.05 * heart
    tau += 0.11 * vessels
    tau += (0.012 * _noise(grid, rng, 9) + 0.010 * _noise(grid, rng, 40)) * air
    added = np.zeros((rows, cols), np.float32)
    if opacity is not None:
        added = _plane(0.50 * opacity.strength * patch(grid, opacity, rng) * air)
        tau += added
    tau += _bones(grid) * np.minimum(1, body * 4)
    tau += _midline(grid) - _stomach(grid)
    return _plane(tau + 0.007 * _noise(grid, rng, 12) * body), added


def lateral(rows: int, cols: int, rng: np.random.Generator) -> Plane:
    """Return the attenuation of a chest seen from the side, spine to the right, in the same units."""
    grid = Grid.of(rows, cols)
    x, y = grid.x, grid.y
    front = -0.20 - 0.13 * np.sin(2.4 * (y - 0.12))
    back = 0.25 + 0.07 * np.sin(3.0 * (y - 0.05))
    body = np.minimum(1, np.clip((x - front + 0.085) / 0.09, 0, 1)) * np.clip((back + 0.10 - x) / 0.09, 0, 1)
    body = np.sqrt(np.clip(body, 0, 1)) * _curve(y, (0, 0.9), (0.2, 1.05), (0.35, 0.9), (0.75, 1.0), (1, 1.1))
    arm = np.sqrt(np.clip(1 - ((x - 0.02 - 0.5 * y) / 0.13) ** 2, 0, 1)) * _step((0.2 - y) / 0.1)
    dome = 0.78 + 0.9 * (x + 0.08) ** 2 + 9 * np.maximum(0, x - 0.05) ** 3
    apex = 0.15 + 2.2 * (x - 0.06) ** 2
    air = _step((x - front) / 0.012) * _step((back - x) / 0.016) * _step((dome - y) / 0.006) * _step((y - apex) / 0.03)
    u, v = x + 0.115, y - 0.615
    heart = _blob(0.85 * u + 0.53 * v, 0.85 * v - 0.53 * u, 0.125, 0.19, 0.02)
    tau = 0.80 * body + 0.10 * arm - 0.46 * air * (1 - 0.62 * heart)
    tau += 0.012 * _noise(grid, rng, 12) * air + 0.07 * _vessels(grid, rng) * air
    tau -= 0.07 * _step((0.016 - np.abs(x - 0.03 - 0.14 * y)) / 0.006) * _step((0.44 - y) / 0.02)
    discs = np.cos((y + 0.12 * x) * 2 * math.pi / 0.07)
    spine = _step((0.040 - np.abs(x - back + 0.035)) / 0.008)
    tau += spine * (0.055 + 0.035 * _step((discs + 0.6) * 3))
    breast_bone = _step((0.011 - np.abs(x - front + 0.012)) / 0.004)
    tau += 0.09 * breast_bone * _step((0.60 - y) / 0.02) * _step((y - 0.24) / 0.02)
    for rib in range(_RIBS):
        line = 0.15 + 0.062 * rib + 0.55 * (0.25 - x) - 0.9 * (x - 0.02) ** 2
        ends = _step((x - front - 0.015 * rib) / 0.02) * _step((back - x) / 0.02)
        tau += 0.55 * _tube(y - line, 0.009) * ends * np.minimum(1, body)
    return _plane((tau * np.minimum(1, body * 4)).astype(np.float32))


def _plane(value: Any) -> Plane:
    """Return ``value`` in single precision: half the memory traffic, which is what the drawing time is made of."""
    return np.asarray(value, dtype=np.float32)


def _step(value: Plane) -> Plane:
    """Return a smooth step: 0 below -1, 1 above 1."""
    t = np.clip(value * 0.5 + 0.5, 0, 1)
    return _plane(t * t * (3 - 2 * t))


def _blob(dx: Plane, dy: Plane, rx: float, ry: float, edge: float) -> Plane:
    """Return a filled ellipse of half axes ``rx`` and ``ry`` with an edge ``edge`` wide."""
    radius = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
    return _step((1 - radius) * min(rx, ry) / edge)


def _curve(at: Plane, *points: tuple[float, float]) -> Plane:
    """Return a smooth curve through ``points`` of (position, value), evaluated at ``at``."""
    position, value = np.array(points).T
    fine = np.linspace(position[0], position[-1], 257)
    rough = np.interp(fine, position, value)
    window = np.hanning(33)
    padded = np.pad(rough, 16, mode="reflect", reflect_type="odd")
    return _plane(np.interp(at, fine, np.convolve(padded, window / window.sum(), "valid")))


def _tube(distance: Plane, radius: float) -> Plane:
    """Return the path through a hollow bone as a part of 1: cortex at both borders, spongy bone between."""
    outer = np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))
    inner = np.sqrt(np.clip(0.64 - (distance / radius) ** 2, 0, 1))
    return _plane(0.185 * (outer - 0.70 * inner))


def _noise(grid: Grid, rng: np.random.Generator, cells: int) -> Plane:
    """Return smooth noise of unit spread with about ``cells`` grains along the height."""
    coarse = rng.standard_normal((cells, max(2, round(cells * grid.cols / grid.rows))), dtype=np.float32)
    return _resize(coarse, grid.rows, grid.cols)


def _resize(plane: Plane, rows: int, cols: int) -> Plane:
    picture = Image.fromarray(plane).resize((cols, rows), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.float32)


def body_depth(grid: Grid) -> Plane:
    """Neck, shoulders, trunk and upper arms; thickest in the middle and in the abdomen."""
    x, y = np.abs(grid.x), grid.y
    half = _curve(y, (0, 0.10), (0.07, 0.105), (0.12, 0.20), (0.17, 0.37), (0.22, 0.46), (0.34, 0.455), (0.5, 0.425),
                  (0.75, 0.425), (1, 0.44))  # fmt: skip
    trunk = np.sqrt(np.clip(1 - (x / half) ** 2, 0, 1))
    depth = _curve(y, (0, 0.80), (0.15, 0.86), (0.3, 0.95), (0.7, 1.02), (0.8, 1.14), (1, 1.17))
    arm = 0.475 + 0.10 * (y - 0.22)
    below = np.maximum(0, 0.25 - y) / 0.09
    arms = 0.68 * np.sqrt(np.clip(1 - ((x - arm) / 0.085) ** 2 - below**2, 0, 1))
    return _plane(np.maximum(trunk**0.55 * depth, arms))


def _chest_width(y: Plane) -> Plane:
    """Half the inner width of the rib cage at the height ``y``."""
    return _curve(y, (0, 0.0), (0.12, 0.02), (0.17, 0.155), (0.25, 0.235), (0.4, 0.305), (0.6, 0.345), (0.8, 0.365),
                  (1, 0.37))  # fmt: skip


def _dome(x: Plane) -> Plane:
    """Height of the diaphragm: two domes, the patient's right one higher, down to the sharp angles at the ribs."""
    right = 0.745 + 0.9 * np.abs(x + 0.155) ** 2 + 30 * np.maximum(0, -x - 0.22) ** 3
    left = 0.765 + 0.9 * np.abs(x - 0.175) ** 2 + 30 * np.maximum(0, x - 0.23) ** 3
    return _plane(np.where(x < 0, right, left))


def lung_depth(grid: Grid) -> Plane:
    """Depth of air in the lungs, 0..1."""
    x, y = grid.x, grid.y
    width = _chest_width(y)
    side = np.abs(x)
    inner = _curve(y, (0, 0.05), (0.2, 0.048), (0.34, 0.062), (0.45, 0.07), (1, 0.06))
    lateral_edge = _step((width - side) / 0.006)
    medial_edge = _step((side - inner) / 0.012)
    base = _step((_dome(x) - y) / 0.005)
    middle, reach = (inner + width) / 2, np.maximum(0.02, (width - inner) / 2)
    depth = np.clip(1 - ((side - middle) / (reach * 1.06)) ** 2, 0, 1) ** 0.30
    apex = _curve(y, (0, 0.55), (0.15, 0.6), (0.35, 0.92), (0.6, 1.0), (1, 1.0))
    # Lung reaches down behind the dome of the diaphragm, which is why the abdomen is not uniformly white there.
    recess = 0.09 * _step((0.045 - np.abs(y - _dome(x) - 0.03)) / 0.04) * lateral_edge * medial_edge
    return np.maximum(lateral_edge * medial_edge * base * depth * apex, recess)


def _heart(grid: Grid) -> Plane:
    """Heart, great vessels and aortic knob as one silhouette, 0..1."""
    x, y = grid.x, grid.y
    angle = math.radians(32)
    u, v = x - 0.062, y - 0.655
    along, across = u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)
    ventricles = _blob(along, across, 0.168, 0.128, 0.011)
    atrium = _blob(x + 0.030, y - 0.65, 0.068, 0.13, 0.011)
    pulmonary = _blob(x - 0.040, y - 0.45, 0.056, 0.13, 0.014)
    knob = _blob(x - 0.045, y - 0.315, 0.040, 0.042, 0.008)
    cava = _blob(x + 0.030, y - 0.40, 0.042, 0.20, 0.012)
    apart = (1 - ventricles) * (1 - atrium) * (1 - pulmonary) * (1 - knob) * (1 - cava)
    return 1 - apart


def _bones(grid: Grid) -> Plane:
    """Ribs, collar bones, shoulder blades and the heads of the upper arms."""
    x, y = np.abs(grid.x), grid.y
    total = np.zeros((grid.rows, grid.cols), np.float32)
    for rib in range(_RIBS):
        top, drop = 0.128 + 0.0600 * rib, 0.125 + 0.016 * min(rib, 6)
        wide = float(_chest_width(np.array([top + drop * 0.55], np.float32))[0]) + 0.004
        rows = grid.band(top - 0.03, top + drop + 0.03)
        total[rows] += _rib(x, y[rows], top, wide, drop)
    collar = 0.205 - 0.16 * (x - 0.03) + 0.022 * np.sin((x - 0.03) * 2 * math.pi / 0.33)
    total += 1.15 * _tube(y - collar, 0.0125) * _step((x - 0.035) / 0.01) * _step((0.36 - x) / 0.02)
    blade = _step((x - 0.285 - 0.28 * np.abs(y - 0.30)) / 0.012) * _step((y - 0.19) / 0.02) * _step((0.46 - y) / 0.03)
    total += 0.045 * blade * _step((0.43 - x) / 0.03)
    shaft = 1.1 * _tube(x - 0.452 - 0.10 * (y - 0.25), 0.024) * _step((y - 0.265) / 0.02)
    return _plane(total + np.maximum(0.075 * _blob(x - 0.428, y - 0.232, 0.040, 0.044, 0.010), shaft))


def _rib(x: Plane, y: Plane, top: float, wide: float, drop: float) -> Plane:
    """One pair of ribs: a tilted ring seen from the front, the half behind denser than the half before."""
    half = drop / 2
    u, v = x / wide, (y - top - half) / half
    radius = np.sqrt(u * u + v * v) + 1e-6
    slope = np.sqrt((u / wide) ** 2 + (v / half) ** 2) / radius + 1e-6
    bone = _tube((radius - 1) / slope, 0.0105)
    behind = _step((x - 0.03) / 0.008) * _step((0.35 - v) / 0.35)
    # Cartilage does not show: the half before ends at the middle of the collar bone.
    before = 0.62 * _step((u - 0.52) / 0.08) * _step((v - 0.1) / 0.35)
    return _plane(bone * np.maximum(behind, before))


def _midline(grid: Grid) -> Plane:
    """Spine with its discs, and the air of the windpipe and the main bronchi."""
    x, y = grid.x, grid.y
    period = 0.052 + 0.014 * y
    phase = np.cos(y * 2 * math.pi / period)
    column = _step((0.033 + 0.0016 * phase - np.abs(x)) / 0.006)
    spine = column * (0.040 + 0.016 * _step((phase + 0.6) * 3))
    spine += 0.022 * _blob(np.abs(x) - 0.020, (y / period - np.floor(y / period) - 0.5) * period, 0.007, 0.010, 0.004)
    pipe = _step((0.0155 - np.abs(x + 0.004)) / 0.006) * _step((0.345 - y) / 0.015)
    branch = np.abs(x + 0.004)
    bronchi = _step((0.010 - np.abs(y - 0.345 - 0.85 * branch)) / 0.006) * _step((0.075 - branch) / 0.02)
    return spine - 0.10 * np.maximum(pipe, 0.7 * bronchi)


def _stomach(grid: Grid) -> Plane:
    """The bubble of air below the left dome of the diaphragm."""
    bubble = _blob(grid.x - 0.165, grid.y - 0.855, 0.062, 0.042, 0.012)
    return 0.12 * bubble * _step((0.872 - grid.y) / 0.01)


def patch(grid: Grid, opacity: Opacity, rng: np.random.Generator) -> Plane:
    """A cloud with ragged borders around the opacity's centre, 0..1."""
    x, y = grid.x - opacity.x, grid.y - opacity.y
    cloud = np.zeros((grid.rows, grid.cols), np.float32)
    for _ in range(7):
        dx, dy = rng.normal(0, 0.42 * opacity.size, 2)
        radius = opacity.size * rng.uniform(0.45, 0.8)
        cloud += np.exp(-((x - dx) ** 2 + (y - dy) ** 2) / (2 * (radius * 0.62) ** 2)).astype(np.float32)
    ragged = 1 + 0.18 * _noise(grid, rng, 22) + 0.10 * _noise(grid, rng, 60)
    return _plane(np.clip(1 - np.exp(-1.5 * cloud * np.clip(ragged, 0.2, 2)), 0, 1).astype(np.float32))


def _vessels(grid: Grid, rng: np.random.Generator) -> Plane:
    """The vessels of the lungs: two trees that start at the hila and get finer outwards, 0..1."""
    picture = Image.new("L", (grid.cols, grid.rows))
    draw = ImageDraw.Draw(picture)
    for side in (-1, 1):
        for _ in range(9):
            root = (side * 0.075 + rng.normal(0, 0.008), 0.435 + rng.normal(0, 0.022))
            _branch(draw, grid, rng, root, rng.uniform(-1.25, 1.25), side, 0.0075, 5)
    hila = picture.filter(ImageFilter.GaussianBlur(grid.rows / 330))
    return np.asarray(hila, dtype=np.float32) / 255


def _branch(
    draw: ImageDraw.ImageDraw,
    grid: Grid,
    rng: np.random.Generator,
    start: tuple[float, float],
    angle: float,
    side: int,
    width: float,
    depth: int,
) -> None:
    """Draw one vessel and the two it parts into; ``angle`` is measured from the horizontal, outwards."""
    length = rng.uniform(0.035, 0.062)
    end = (start[0] + side * length * math.cos(angle), start[1] + length * math.sin(angle))
    scale = grid.rows / _ZOOM
    to_pixel = [(px * scale + grid.cols / 2, (py - _TOP) * scale) for px, py in (start, end)]
    shade = int(255 * min(1.0, 0.30 + width / 0.010))
    draw.line(to_pixel, fill=shade, width=max(1, round(width * grid.rows)))
    if depth:
        for turn in (rng.uniform(-0.45, 0.0), rng.uniform(0.0, 0.45)):
            _branch(draw, grid, rng, end, angle + turn, side, width * 0.72, depth - 1)
