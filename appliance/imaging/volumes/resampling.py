"""Resample values (trilinear) and masks (nearest neighbour) from one grid of voxels to another, in numpy.

SciPy's ``affine_transform`` would do the same and need 35 MB more on every box. Between grids with parallel axes, which is the usual
case, trilinear interpolation is three linear ones and faster; a sheared stack (tilted gantry) takes the general algorithm. Both work
slab by slab, so that memory holds little more than the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from appliance.imaging.volumes.geometry import Grid, closest_axes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values: TypeAlias = NDArray[np.float32]

# A voxel extends half its size beyond its centre; positions farther out are outside, apart from rounding.
_EDGE: Final = 0.5 + 1e-6
_PARALLEL: Final = 1e-6


def rectangular_grid(grid: Grid, spacing_mm: tuple[float, float, float]) -> Grid:
    """A grid with right angles and the given spacing that covers ``grid`` around the same centre.

    Its axes are those of ``grid``. Of a sheared grid the two axes within the slices stay, and the third becomes normal to them.
    """
    directions = grid.steps / grid.spacing
    # The angles do not show which axis is sheared: a tilted gantry leaves two right angles, and rounding would decide.
    third = grid.through
    first, second = (axis for axis in range(3) if axis != third)
    normal = np.cross(directions[:, first], directions[:, second])
    directions = directions.copy()
    directions[:, third] = normal / np.linalg.norm(normal) * np.sign(normal @ directions[:, third])
    # The extent of the box of voxels along each direction: the sum of the projections of its edges.
    extent = np.abs(directions.T @ (grid.steps * np.array(grid.shape))).sum(axis=1)
    shape = np.maximum(1, np.rint(extent / np.array(spacing_mm))).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing_mm)
    middle = grid.to_patient((np.array(grid.shape) - 1) / 2)
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine, third)


def resample_linear(values: NDArray[Any], source: Grid, target: Grid, fill: float) -> Values:
    """Interpolate values [source.shape] of any number type trilinearly; parallel axes have the same order in both grids.

    Returns:
        float32 [target.shape], ``fill`` outside the source; up to half a voxel outside it the values at its edge are repeated.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    diagonal = np.diag(np.diag(matrix[:3, :3]))
    if np.abs((matrix[:3, :3] - diagonal) @ np.diag(target.shape)).max() < _PARALLEL * max(target.shape):
        return _separable(values, np.diag(matrix[:3, :3]), matrix[:3, 3], target.shape, fill)
    return _general(values, matrix, target.shape, fill)


def _taps(count: int, scale: float, offset: float, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Values, NDArray[np.bool_]]:
    """For ``count`` positions on an axis of ``size`` voxels: the two neighbours, the weight of the second, and whether it is inside."""
    at = np.arange(count) * scale + offset
    inside = (at >= -_EDGE) & (at <= size - 1 + _EDGE)
    at = np.clip(at, 0, size - 1)
    low = np.minimum(at.astype(np.intp), max(size - 2, 0))
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32), inside


def _separable(values: NDArray[Any], scale: Any, offset: Any, shape: tuple[int, int, int], fill: float) -> Values:
    taps = [_taps(shape[axis], float(scale[axis]), float(offset[axis]), values.shape[axis]) for axis in range(3)]
    result = np.full(shape, fill, np.float32)
    (low_d, high_d, part_d, in_d), (low_h, high_h, part_h, in_h), (low_w, high_w, part_w, in_w) = taps
    inside = np.ix_(in_h, in_w)

    cached: dict[int, Values] = {}

    def plane(index: int) -> Values:
        """One plane of the source, interpolated in its two axes; two neighbouring planes are needed at a time."""
        if index not in cached:
            source = np.ascontiguousarray(values[index], np.float32)
            rows = source[low_h] * (1 - part_h)[:, None] + source[high_h] * part_h[:, None]
            cached[index] = np.asarray(rows[:, low_w] * (1 - part_w) + rows[:, high_w] * part_w, np.float32)
            for old in [key for key in cached if abs(key - index) > 1]:
                del cached[old]
        return cached[index]

    for d in np.flatnonzero(in_d):
        mixed = plane(int(low_d[d])) * (1 - part_d[d])
        if part_d[d]:
            mixed = mixed + plane(int(high_d[d])) * part_d[d]
        result[d][inside] = mixed[inside]
    return result


def _general(values: NDArray[Any], matrix: NDArray[np.float64], shape: tuple[int, int, int], fill: float) -> Values:
    result = np.empty(shape, np.float32)
    size = np.array(values.shape)[:, None, None]
    plane = _plane_places(matrix, shape)
    for d in range(shape[0]):
        at = plane + (matrix[:3, 0] * d)[:, None, None]
        inside = ((at >= -_EDGE) & (at <= size - 1 + _EDGE)).all(axis=0)
        result[d] = fill
        if not inside.any():
            continue
        at = np.clip(at[:, inside], 0, size[:, 0] - 1)
        low = np.minimum(at.astype(np.intp), np.maximum(size[:, 0] - 2, 0))
        high = np.minimum(low + 1, size[:, 0] - 1)
        part = (at - low).astype(np.float32)
        total = np.zeros(at.shape[1], np.float32)
        for corner in range(8):
            picks = [(high if corner >> axis & 1 else low)[axis] for axis in range(3)]
            weight = np.prod([part[axis] if corner >> axis & 1 else 1 - part[axis] for axis in range(3)], axis=0)
            total += values[picks[0], picks[1], picks[2]].astype(np.float32) * weight
        result[d][inside] = total
    return result


def _plane_places(matrix: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """The voxels of the first plane of a grid in the indices of the other grid: [3, rows, columns]."""
    h, w = np.arange(shape[1])[:, None], np.arange(shape[2])[None, :]
    return np.stack([matrix[axis, 1] * h + matrix[axis, 2] * w + matrix[axis, 3] for axis in range(3)])


def resample_nearest(mask: NDArray[np.uint8], source: Grid, target: Grid) -> NDArray[np.uint8]:
    """Resample a mask, uint8 [source.shape]; the axes of the target may have any order and direction.

    Each voxel of the target gets the class of the source voxel that contains its centre, 0 outside.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    order = closest_axes(matrix[:3, :3])
    rest = matrix[:3, :3].copy()
    rest[order, range(3)] = 0
    if np.abs(rest @ np.diag(target.shape)).max() < _PARALLEL * max(target.shape):
        return _nearest_parallel(mask, matrix, order, target.shape)
    return _nearest_general(mask, matrix, target.shape)


def _nearest_parallel(
    mask: NDArray[np.uint8], matrix: NDArray[np.float64], order: tuple[int, int, int], shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Resample between grids with parallel axes: one index lookup per axis."""
    places, inside = [], []
    for axis, along in enumerate(order):
        at = np.floor(np.arange(shape[axis]) * matrix[along, axis] + matrix[along, 3] + 0.5).astype(np.intp)
        within = (at >= 0) & (at < mask.shape[along])
        places.append(at[within])
        inside.append(within)
    result = np.zeros(shape, np.uint8)
    result[np.ix_(*inside)] = mask.transpose(order)[np.ix_(*places)]
    return result


def _nearest_general(mask: NDArray[np.uint8], matrix: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    result = np.zeros(shape, np.uint8)
    size = np.array(mask.shape)[:, None, None]
    plane = _plane_places(matrix, shape)
    for d in range(shape[0]):
        at = np.floor(plane + (matrix[:3, 0] * d)[:, None, None] + 0.5).astype(np.int32)
        inside = ((at >= 0) & (at < size)).all(axis=0)
        at = at[:, inside]
        result[d][inside] = mask[at[0], at[1], at[2]]
    return result
