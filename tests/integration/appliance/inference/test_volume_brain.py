"""A whole head and the models of brain tissue: one job per series, masks on the series' own pixels, millilitres in the order known."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pydicom
import pytest

from appliance.core.domain import ScanState, Source
from appliance.core.errors import VolumeError
from appliance.core.settings import Settings
from appliance.imaging.dicom_files import accept_invalid_values
from appliance.imaging.volumes.acquisition import acquisitions, applies_to_sequence
from appliance.imaging.volumes.resampling import resample_nearest
from appliance.imaging.volumes.segmentation import dice, segment
from appliance.imaging.volumes.volume import Series, prepare, read_series
from appliance.inference.worker import Worker
from appliance.ingest.ingest import Ingest
from appliance.store.store import Store
from appliance.store.volume_results import VolumeResults
from appliance.store.worklist import Worklist
from model_sync.bundle import ModelBundle
from tests.support import volume_bundle
from tests.support.activated import activate
from tests.support.paths import SHARED

HEAD = SHARED / "data" / "series" / "mr_t1_uih"
MODELS = SHARED / "models"
pytestmark = [
    pytest.mark.skipif(not HEAD.is_dir(), reason="the shared series and models are not here"),
    pytest.mark.timeout(900),
]

accept_invalid_values()

# Two windows side by side hold the head, 256 x 256 x 160 mm, and meet between its halves: a golden case costs half of the work.
WINDOW = (80, 256, 240)
GREY = [
    {"step": "clip_quantile", "low": 0.0, "high": 0.998},
    {"step": "min_max", "low": 0.0, "high": 255.0, "round": True},
    {"step": "min_max", "low": 0.0, "high": 1.0, "round": False},
]


def brain_bundle(directory: Path, channels: int = 5, window: tuple[int, int, int] = WINDOW) -> ModelBundle:
    """A bundle around one of the test models; its golden case is a blurred ball, answered by the model itself."""
    weights = MODELS / f"brain_t1_meshnet{channels}_gwm.onnx"
    steps = volume_bundle.volume_input(window, scale=GREY, overlap=0.0)
    values, affine = ball(), np.diag([1.0, 1.0, 1.0, 1.0])
    changes = {"input": steps, "applies_to": volume_bundle.manifest_of({})["applies_to"] | {"sequence": volume_bundle.T1_SEQUENCE}}
    volume_bundle.write(
        directory, weights.read_bytes(), volume_bundle.golden_npz(values, affine, np.zeros(values.shape, np.uint8)), **changes
    )
    manifest = ModelBundle.load(directory).manifest
    session = ort.InferenceSession(str(weights))
    series = Series(values, 1.0, 0.0, _grid(values.shape, affine), ())
    found = segment(prepare(series, manifest.volume_input), series.grid, manifest, lambda given: {"logits": session.run(None, given)[0]})
    volume_bundle.write(directory, weights.read_bytes(), volume_bundle.golden_npz(values, affine, found.mask), **changes)
    return ModelBundle.load(directory)


def _grid(shape: tuple[int, ...], affine: Any) -> Any:
    from appliance.imaging.volumes.geometry import Grid

    return Grid((shape[0], shape[1], shape[2]), affine)


def ball() -> np.ndarray[Any, Any]:
    """Shells of three brightnesses, float32."""
    at = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(64) - 31.5] * 3, indexing="ij")), axis=0)
    return np.select([at < 14, at < 20, at < 26], [900.0, 600.0, 150.0], 0.0).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return brain_bundle(tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="module")
def box(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A box that has read the head, its images brought in shuffled."""
    store = Store(Settings(data_dir=tmp_path_factory.mktemp("box"), tune_at_activation=False, job_deadline_s=300))
    activate(store, bundle.directory, "test")
    files = sorted(HEAD.iterdir())
    random.Random(7).shuffle(files)
    take(store, files)
    worker = Worker(store, set_deadline=lambda _: None)
    while worker.run_once():
        pass
    return store


def take(store: Store, files: list[Path]) -> None:
    ingest = Ingest(store)
    accepted = [ingest.accept(path.read_bytes(), Source("cli", "test", path.name)) for path in files]
    store.planner.close_series(sorted({item.stored.series_id for item in accepted}))


def test_a_series_is_one_job_and_all_its_images_share_the_result(box: Store) -> None:
    assert [row["kind"] for row in box.database.query("SELECT kind FROM jobs")] == ["volume"]
    study = Worklist(box).study(1)
    assert len(study.instances) == 160
    assert {item.state for item in study.instances} == {ScanState.AI_READY}
    assert all(item.measured and not item.findings for item in study.instances)
    assert box.queue.pending_jobs() == 0


def test_white_and_grey_matter_are_in_the_order_of_magnitude_known(box: Store) -> None:
    (result,) = VolumeResults(box).of_study(1)
    ml = {item.label: item.value for item in result.measurements}
    assert 400 < ml["white_matter"] < 700 and 400 < ml["grey_matter"] < 900
    assert (result.slices, result.precision, result.model_version) == (160, "fp32", "1.0.0")
    assert "onnxruntime" in result.runtime and set(result.planes) == {"axial", "coronal", "sagittal"}


def test_mask_lies_on_the_brain_and_is_brighter_where_it_says_white(box: Store) -> None:
    """Mean T1 signal: white above grey above the rest of the head; the white matter is wrapped in the grey."""
    (result,) = VolumeResults(box).of_study(1)
    mask, geometry = VolumeResults(box).mask(result.job_id)
    assert mask.shape == (160, 512, 460) and geometry["classes"] == ["background", "white_matter", "grey_matter"]
    where = {dataset.SOPInstanceUID: dataset for dataset in map(pydicom.dcmread, HEAD.iterdir())}
    values = np.stack([where[uid].pixel_array for uid, _frame in geometry["slices"]])
    inside = values[values > 60].mean()
    assert values[mask == 1].mean() > values[mask == 2].mean() > inside
    # The centre of the white matter in the patient: near the middle between the ears, above the nose and the neck.
    affine = np.array(geometry["affine"])
    index = np.argwhere(mask == 1)[::97]
    centre = (index @ affine[:3, :3].T + affine[:3, 3]).mean(axis=0)
    middle = (np.array(mask.shape) / 2) @ affine[:3, :3].T + affine[:3, 3]
    assert abs(centre[0] - middle[0]) < 15 and centre[2] > middle[2]
    head = np.argwhere(values[::4, ::8, ::8] > 100) * [4, 8, 8] @ affine[:3, :3].T + affine[:3, 3]
    assert (head.min(axis=0) < centre).all() and (centre < head.max(axis=0)).all()


def test_the_head_is_a_t1_as_the_model_wants_it_and_the_proton_density_series_is_none(box: Store, bundle: ModelBundle) -> None:
    rule = bundle.manifest.applies_to.sequence
    assert rule is not None
    for directory, code in ((HEAD, None), (HEAD.parent / "mr_pd_ge_bigendian", "scope.image_type")):
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in directory.iterdir()]
        refusal = applies_to_sequence(rule, [frame for header in headers for frame in acquisitions(header)]).refusal
        assert (refusal.code if refusal else None) == code
    assert "sequence" not in box.database.query("SELECT notes FROM jobs")[0]["notes"]


def test_each_slice_of_the_mask_names_its_image(box: Store) -> None:
    """Sorted by position, though the files came shuffled: the positions along the normal rise."""
    (result,) = VolumeResults(box).of_study(1)
    _mask, geometry = VolumeResults(box).mask(result.job_id)
    where = {dataset.SOPInstanceUID: dataset for dataset in (pydicom.dcmread(path, stop_before_pixels=True) for path in HEAD.iterdir())}
    affine = np.array(geometry["affine"])
    for number, (uid, frame) in enumerate(geometry["slices"]):
        assert frame == 0
        assert np.allclose(affine[:3, :3] @ [number, 0, 0] + affine[:3, 3], np.array(where[uid].ImagePositionPatient, float), atol=0.05)


def test_pictures_are_pngs_of_the_three_planes(box: Store) -> None:
    (result,) = VolumeResults(box).of_study(1)
    for plane in result.planes:
        assert VolumeResults(box).picture(result.job_id, plane).startswith(b"\x89PNG")
    row = box.database.one("SELECT length(mask) AS n FROM volumes")
    assert row is not None and row["n"] < 4 * 2**20
    assert len(zlib.decompress(box.database.query("SELECT mask FROM volumes")[0]["mask"])) == 160 * 512 * 460


def sources(paths: list[Path]) -> list[Any]:
    return [lambda path=path: pydicom.dcmread(path) for path in paths]


def test_a_mirrored_volume_is_told_from_the_real_one(bundle: ModelBundle) -> None:
    """Left stays left: a mark put into the left half comes back in the left half of the slices, whatever the model's orientation."""
    spec = bundle.manifest.volume_input
    series = read_series(sources(list(HEAD.iterdir())), spec)
    prepared = prepare(series, spec)
    index = np.stack(np.meshgrid(*map(np.arange, prepared.values.shape), indexing="ij"), axis=-1)
    left = prepared.grid.to_patient(index)[..., 0] > prepared.grid.to_patient((np.array(prepared.values.shape) - 1) / 2)[0] + 20
    back = resample_nearest(left.astype(np.uint8), prepared.grid, series.grid)
    marked = series.grid.to_patient(np.argwhere(back)[::1009])[:, 0]
    plain = series.grid.to_patient(np.argwhere(back == 0)[::1009])[:, 0]
    assert marked.min() > plain.min() + 50 and marked.mean() > plain.mean() + 50
    assert dice(back, np.flip(back, 0), 1) < 0.2


@pytest.mark.parametrize(
    ("name", "code"), [("ct_head_ge_jpegls", "volume.uneven_spacing"), ("mr_pd_ge_bigendian", "volume.duplicate_slice")]
)
def test_series_that_are_no_volume_are_refused_for_the_right_reason(bundle: ModelBundle, name: str, code: str) -> None:
    """The CT changes from 4 to 7 mm in the middle; the MR of 2001 has two slices at one place."""
    with pytest.raises(VolumeError) as caught:
        read_series(sources(list((HEAD.parent / name).iterdir())), bundle.manifest.volume_input)
    assert caught.value.code == code


def test_the_big_endian_mr_is_read_without_its_double(bundle: ModelBundle) -> None:
    spec = bundle.manifest.volume_input
    rule = spec.pipeline[0].model_copy(update={"max_slice_spacing_mm": 8.0})
    loose = spec.model_copy(update={"pipeline": [rule, *spec.pipeline[1:]]})
    places = {float(pydicom.dcmread(path).ImagePositionPatient[2]): path for path in (HEAD.parent / "mr_pd_ge_bigendian").iterdir()}
    series = read_series(sources(list(places.values())), loose)
    assert series.values.shape == (20, 256, 256) and series.grid.spacing[0] == pytest.approx(7.0, abs=0.01)
    assert prepare(series, loose).grid.axes == "LIA"
    with pytest.raises(VolumeError) as caught:
        read_series(sources(list(places.values())), spec)
    assert caught.value.code == "volume.too_coarse"


def test_the_evenly_spaced_half_of_the_tilted_ct_is_straightened(bundle: ModelBundle) -> None:
    spec = bundle.manifest.volume_input
    paths = sorted((HEAD.parent / "ct_head_ge_jpegls").iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    loose = spec.model_copy(
        update={"pipeline": [spec.pipeline[0].model_copy(update={"min_slices": 4, "max_slice_spacing_mm": 8.0}), *spec.pipeline[1:]]}
    )
    series = read_series(sources(paths[:14]), loose)
    assert series.tilt == pytest.approx(18.5, abs=0.1)
    assert [note.code for note in series.notes] == ["volume.straightened"]
    prepared = prepare(series, loose)
    assert np.allclose(prepared.grid.steps.T @ prepared.grid.steps, np.eye(3), atol=1e-6)
