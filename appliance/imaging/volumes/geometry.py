"""The positions of slices in the patient, and whether they form one volume (PS3.3 C.7.6.2, C.7.6.16.2.3 and .4). Pure functions.

Coordinates are patient coordinates in mm (LPS: x to the left, y to posterior, z to the head). A volume is indexed (slice, row, column);
its affine maps indices of voxel centres to the patient. Slices are ordered by their position along the normal, because instance numbers
follow the protocol and not the position.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from appliance.core.errors import VolumeError
from appliance.imaging.greyscale import frame_type, frame_value, numbers, words

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    Vector: TypeAlias = NDArray[np.float64]
    Matrix: TypeAlias = NDArray[np.float64]

# Headers round positions to a tenth of a millimetre and cosines to six digits: values closer than this count as equal.
_SAME_COSINE: Final = 1e-3
_SAME_SPACING: Final = 1e-3
_EVEN_SHARE: Final = 0.05
_EVEN_MM: Final = 0.02
# A stack counts as straight where its slices drift sideways by less than this many pixels in total.
_STRAIGHT_PIXELS: Final = 0.1
# Gantries tilt by at most 30 degrees.
_MAX_TILT: Final = 35.0
_SAME_TILT: Final = 2.0
_SIDES: Final = (("L", "R"), ("P", "A"), ("S", "I"))
# The axes of the patient, rotated slightly, so that a direction at 45 degrees is closer to one of them, whatever the array layout.
_TIE_BREAK: Final = np.eye(3) + 1e-6 * np.array([[0.0, 1.0, -0.7], [-1.0, 0.0, 0.4], [0.7, -0.4, 0.0]])


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid of voxels in the patient: ``affine`` float64 [4, 4] maps indices of voxel centres to LPS coordinates in mm.

    ``through`` is the axis from slice to slice, the only one that may not be orthogonal to the others.
    """

    shape: tuple[int, int, int]
    affine: Matrix
    through: int = 0

    @property
    def steps(self) -> Matrix:
        """The vectors (columns, mm) from one voxel to the next along each axis."""
        return self.affine[:3, :3]

    @property
    def spacing(self) -> Vector:
        """The distance (mm) from one voxel to the next along each axis."""
        return np.asarray(np.linalg.norm(self.steps, axis=0))

    @property
    def voxel_ml(self) -> float:
        """The volume of one voxel in ml: the determinant, which a shear does not change."""
        return abs(float(np.linalg.det(self.steps))) / 1000.0

    @property
    def axes(self) -> str:
        """The side of the patient that each axis points to: ``LIA``."""
        order = closest_axes(self.steps)
        return "".join(_SIDES[world][int(self.steps[world, axis] < 0)] for axis, world in enumerate(order))

    def to_patient(self, index: Any) -> Vector:
        """Convert indices [..., 3] to LPS coordinates in mm."""
        return np.asarray(np.asarray(index, np.float64) @ self.steps.T + self.affine[:3, 3])

    def to_index(self, point: Any) -> Vector:
        """Convert LPS coordinates [..., 3] in mm to (fractional) indices."""
        return np.asarray((np.asarray(point, np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.steps).T)


def closest_axes(steps: Matrix) -> tuple[int, int, int]:
    """Assign each column of ``steps`` the closest axis of the patient (0: L, 1: P, 2: S), each axis once.

    The assignment does not depend on the order and sign of the columns, at 45 degrees too.
    """
    cosines = np.abs(_TIE_BREAK @ steps) / np.linalg.norm(steps, axis=0)
    best = max(permutations(range(3)), key=lambda order: float(sum(cosines[world, axis] for axis, world in enumerate(order))))
    return best[0], best[1], best[2]


def orientation_to(grid: Grid, axes: str) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """For each new axis of a volume that is oriented like ``axes``: the index of the old one, and whether that has to be reversed."""
    runs_along = closest_axes(grid.steps)
    order, flips = [], []
    for letter in axes:
        world = next(number for number, sides in enumerate(_SIDES) if letter in sides)
        axis = runs_along.index(world)
        order.append(axis)
        flips.append((grid.steps[world, axis] < 0) != (letter == _SIDES[world][1]))
    return (order[0], order[1], order[2]), (flips[0], flips[1], flips[2])


def reorient(array: NDArray[Any], grid: Grid, axes: str) -> tuple[NDArray[Any], Grid]:
    """Return a view of the volume oriented like ``axes``, and its grid; nothing is copied or interpolated."""
    order, flips = orientation_to(grid, axes)
    affine = grid.affine.copy()
    affine[:3, :3] = grid.steps[:, order]
    view = array.transpose(order)
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (view.shape[axis] - 1)
            affine[:3, axis] *= -1
            view = np.flip(view, axis)
    first, second, third = view.shape
    return view, Grid((first, second, third), affine, order.index(grid.through))


@dataclass(frozen=True)
class Plane:
    """The plane of one slice (Image Plane Module, PS3.3 C.7.6.2; in enhanced images from the functional groups).

    Attributes:
        position: Image Position (Patient): the centre of the first pixel.
        along_row: direction of increasing column index.
        along_column: direction of increasing row index.
        spacing: between rows and between columns, mm.
        shape: rows and columns.
        frame_of_reference: Frame of Reference UID.
        kind: the first three values of Image Type (or Frame Type): original or derived, primary or secondary, kind of image.
        tilt: Gantry/Detector Tilt in degrees; 0 where there is none.
    """

    position: tuple[float, float, float]
    along_row: tuple[float, float, float]
    along_column: tuple[float, float, float]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    frame_of_reference: str = ""
    kind: tuple[str, ...] = ()
    tilt: float = 0.0

    @property
    def normal(self) -> Vector:
        """The unit normal of the plane."""
        return np.asarray(np.cross(self.along_row, self.along_column))

    @property
    def is_localizer(self) -> bool:
        """Whether it is a scout view, which shows the planning of the others (PS3.3 C.8.2.1.1.1)."""
        return "LOCALIZER" in self.kind


def plane_of(ds: Dataset, frame: int = 0) -> Plane:
    """Read the plane of a frame.

    Raises:
        VolumeError: ``volume.no_position``: position, orientation or spacing are absent or invalid.
    """
    position = numbers(frame_value(ds, frame, "PlanePositionSequence", "ImagePositionPatient"))
    cosines = numbers(frame_value(ds, frame, "PlaneOrientationSequence", "ImageOrientationPatient"))
    spacing = numbers(frame_value(ds, frame, "PixelMeasuresSequence", "PixelSpacing"))
    for name, values, count in (("position", position, 3), ("orientation", cosines, 6), ("pixel spacing", spacing, 2)):
        if len(values) != count or not all(map(math.isfinite, values)):
            raise VolumeError("volume.no_position", f"a slice has no {name}")
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if any(abs(length - 1) > 0.01 for length in lengths) or abs(float(row @ column)) > 0.01:
        raise VolumeError("volume.no_position", "the directions of rows and columns are no right angle")
    if not all(1e-3 <= value <= 100 for value in spacing) or not all(abs(value) < 1e5 for value in position):
        raise VolumeError("volume.no_position", "pixel spacing or position is absurd")
    tilt = next(iter(numbers(ds.get("GantryDetectorTilt"))), 0.0)
    kind = (frame_type(ds, frame) or words(ds.get("ImageType")))[:3]
    row, column = row / lengths[0], column / lengths[1]
    return Plane(
        _triple(position), _triple(row), _triple(column), (spacing[0], spacing[1]), (int(ds.Rows), int(ds.Columns)),
        str(ds.get("FrameOfReferenceUID") or "").strip(), kind, tilt if math.isfinite(tilt) else 0.0,
    )  # fmt: skip


def _triple(values: Any) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


@dataclass(frozen=True, eq=False)
class Stack:
    """Sorted slices: ``order`` are their indices in the input, ``tilt`` is the shear angle of the stack in degrees."""

    order: tuple[int, ...]
    grid: Grid
    tilt: float


def stack(planes: Sequence[Plane], min_slices: int, max_spacing_mm: float) -> Stack:
    """Sort slices (without localizers) by position and compute their common affine.

    The affine of a stack from a tilted gantry contains the shear, which resampling removes.

    Raises:
        VolumeError: ``volume.too_few_slices``, ``volume.mixed_orientation``, ``volume.mixed_size``, ``volume.mixed_kind``,
            ``volume.duplicate_slice``, ``volume.missing_slices``, ``volume.uneven_spacing``, ``volume.scattered``,
            ``volume.too_coarse`` or ``volume.tilt``.
    """
    if len(planes) < min_slices:
        raise VolumeError("volume.too_few_slices", f"{len(planes)} slices, at least {min_slices} needed")
    _check_alike(planes)
    normal = planes[0].normal
    positions = np.array([plane.position for plane in planes])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    spacing = _check_spacing(along[order], max_spacing_mm)
    first, last = positions[order[0]], positions[order[-1]]
    step = (last - first) / (len(planes) - 1)
    expected = first + np.arange(len(planes))[:, None] * step
    if np.abs(positions[order] - expected).max() > max(_EVEN_SHARE * spacing, _EVEN_MM):
        raise VolumeError("volume.scattered", "the slices do not lie along one line")
    tilt = _tilt(planes[order[0]], step, normal)
    drift = np.linalg.norm(step - (step @ normal) * normal) * (len(planes) - 1)
    if drift < _STRAIGHT_PIXELS * min(planes[0].spacing):
        step, tilt = (step @ normal) * normal, 0.0
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = np.array(planes[0].along_column) * planes[0].spacing[0]
    affine[:3, 2] = np.array(planes[0].along_row) * planes[0].spacing[1]
    affine[:3, 3] = first
    return Stack(tuple(int(i) for i in order), Grid((len(planes), *planes[0].shape), affine), tilt)


def _check_alike(planes: Sequence[Plane]) -> None:
    """Check that all slices have the same frame of reference, orientation, size and kind of image."""
    reference = planes[0]
    for plane in planes:
        cosines = np.array([*plane.along_row, *plane.along_column]) - np.array([*reference.along_row, *reference.along_column])
        if np.abs(cosines).max() > _SAME_COSINE:
            raise VolumeError("volume.mixed_orientation", f"{len({_rounded(p) for p in planes})} orientations")
        if plane.frame_of_reference != reference.frame_of_reference:
            raise VolumeError("volume.mixed_orientation", "the slices have different frames of reference")
        if plane.shape != reference.shape:
            raise VolumeError("volume.mixed_size", f"slices of {_size(reference)} and of {_size(plane)} pixels")
        if max(abs(a - b) / b for a, b in zip(plane.spacing, reference.spacing, strict=True)) > _SAME_SPACING:
            raise VolumeError("volume.mixed_size", f"pixels of {reference.spacing[0]:g} and of {plane.spacing[0]:g} mm")
    kinds = Counter(plane.kind for plane in planes)
    if len(kinds) > 1:
        raise VolumeError("volume.mixed_kind", f"{len(kinds)} kinds of images in one series")


def _rounded(plane: Plane) -> tuple[float, ...]:
    return tuple(round(value, 2) + 0.0 for value in (*plane.along_row, *plane.along_column))


def _size(plane: Plane) -> str:
    return f"{plane.shape[1]} x {plane.shape[0]}"


def _check_spacing(along: Vector, max_spacing_mm: float) -> float:
    """Return the distance between slices (mm), which must be constant; ``along`` is sorted."""
    steps = np.diff(along)
    apart = steps[steps > _EVEN_MM]
    if not len(apart):
        raise VolumeError("volume.duplicate_slice", "all slices are at one place")
    spacing = float(np.median(apart))
    tolerance = max(_EVEN_SHARE * spacing, _EVEN_MM)
    if duplicates := int((steps <= tolerance).sum()):
        raise VolumeError("volume.duplicate_slice", f"{duplicates} of {len(along)} slices lie where another one is")
    multiples = np.rint(steps / spacing)
    if (np.abs(steps - multiples * spacing) > tolerance * multiples).any():
        raise VolumeError("volume.uneven_spacing", f"from {steps.min():.2f} to {steps.max():.2f} mm apart")
    if missing := int((multiples - 1).sum()):
        after = int(np.argmax(multiples > 1)) + 1
        raise VolumeError("volume.missing_slices", f"{missing} missing, first after slice {after} of {len(along)}")
    if spacing > max_spacing_mm * (1 + _EVEN_SHARE):
        raise VolumeError("volume.too_coarse", f"slices {spacing:.2f} mm apart, at most {max_spacing_mm:g} mm can be read")
    return spacing


def _tilt(plane: Plane, step: Vector, normal: Vector) -> float:
    """The shear angle of the stack in degrees; raises VolumeError where the tilt in the header contradicts the positions."""
    sheared = math.degrees(math.acos(min(1.0, abs(float(step @ normal)) / float(np.linalg.norm(step)))))
    if sheared > _MAX_TILT:
        raise VolumeError("volume.tilt", f"sheared by {sheared:.0f} degrees")
    header_tilt = abs(plane.tilt)
    # A reformatted stack still has the tilt of its source in the header (PS3.3 C.8.2.1, Image Type value 1).
    if "DERIVED" not in plane.kind[:1] and header_tilt > _SAME_TILT and abs(header_tilt - sheared) > _SAME_TILT:
        raise VolumeError("volume.tilt", f"the header says {header_tilt:g} degrees, the positions {sheared:.1f}")
    return sheared
