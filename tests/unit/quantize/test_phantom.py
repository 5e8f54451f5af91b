"""The phantoms: always the same, valid DICOM, and recognisable as what they are."""

from __future__ import annotations

import hashlib
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from quantize.reference import phantom
from quantize.reference.phantom import SAMPLES, Opacity, Phantom

SMALL = Phantom(256, 256, seed=1)


def test_the_same_phantom_is_drawn_the_same() -> None:
    assert np.array_equal(phantom.display(SMALL), phantom.display(SMALL))
    assert not np.array_equal(phantom.display(SMALL), phantom.display(Phantom(256, 256, seed=2)))


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (301, 200), (200, 301), (2049, 1023)])
def test_any_size_is_drawn(rows: int, cols: int) -> None:
    pixels = phantom.display(Phantom(rows, cols))
    assert pixels.shape == (rows, cols)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 20


def test_a_narrow_picture_is_cut_and_not_squeezed() -> None:
    square, narrow = (phantom.intensity(Phantom(400, cols, view="LL")) for cols in (400, 300))
    # The rows below the marker; what is left is the grain.
    assert np.abs(square[100:, 50:350] - narrow[100:]).mean() < 0.03


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_stored_values_use_their_bits(bits: int) -> None:
    pixels = phantom.stored(SMALL, bits)
    assert pixels.dtype == np.uint16
    assert 0.7 < pixels.max() / ((1 << bits) - 1) <= 1


def test_the_opacity_brightens_its_place_and_nothing_else() -> None:
    opacity = Opacity(x=-0.2, y=0.5, size=0.08)
    normal, ill = (phantom.intensity(Phantom(512, 512, opacity=given)) for given in (None, opacity))
    difference = Image.fromarray(ill - normal).resize((32, 32), Image.Resampling.BOX)
    brighter = np.asarray(difference)
    row, column = np.unravel_index(brighter.argmax(), brighter.shape)
    assert brighter.max() > 0.15
    assert column < 16
    assert abs(row / 32 - 0.5) < 0.15
    assert np.abs(brighter[:, 17:]).max() < 0.02


def test_lungs_are_darker_than_heart_and_abdomen() -> None:
    pixels = phantom.display(Phantom(512, 512)).astype(float)
    lung, heart, abdomen, air = pixels[280:330, 120:160], pixels[330:370, 280:320], pixels[450:500, 230:280], pixels[5:40, 100:130]
    assert air.mean() < lung.mean() < heart.mean() < abdomen.mean()


def test_a_blank_exposure_stays_blank_in_its_window() -> None:
    assert phantom.display(Phantom(128, 128, view="blank")).std() < 1


def test_a_dataset_is_complete_and_round_trips() -> None:
    buffer = BytesIO()
    phantom.dataset(SMALL, name="t", patient_name="演示^一", bits=14).save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    ds = pydicom.dcmread(buffer)
    assert np.array_equal(ds.pixel_array, phantom.stored(SMALL, 14))
    assert ds.PatientName == "演示^一"
    assert "演示^一".encode("gb18030") in buffer.getvalue()
    assert (ds.Modality, ds.BodyPartExamined, ds.ViewPosition, ds.PatientAge) == ("CR", "CHEST", "PA", "004Y")
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (16, 14, 13, 0)


def test_the_window_shows_what_was_drawn() -> None:
    ds = phantom.dataset(SMALL, name="t")
    low = ds.WindowCenter - 0.5 - (ds.WindowWidth - 1) / 2
    shown = np.clip((phantom.stored(SMALL).astype(float) - low) / (ds.WindowWidth - 1), 0, 1) * 255
    assert np.abs(shown - phantom.display(SMALL)).max() < 0.6


def test_monochrome1_is_the_same_picture_turned_over() -> None:
    plain, inverted = (phantom.dataset(SMALL, name="t", photometric=kind) for kind in ("MONOCHROME2", "MONOCHROME1"))
    sums = np.frombuffer(plain.PixelData, np.uint16) + np.frombuffer(inverted.PixelData, np.uint16)
    assert set(sums.tolist()) == {4095}


def test_uids_are_those_of_a_uuid_and_never_change() -> None:
    uid = phantom.uid("01-normal", "instance")
    assert uid == "2.25.292426611537192747377235028903221451278"
    assert uid.is_valid
    assert phantom.uid("01-normal", "study") != uid


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """The sample set, drawn once, and what the command printed."""
    out, printed = tmp_path_factory.mktemp("phantoms") / "new" / "samples", StringIO()
    with redirect_stdout(printed):
        assert phantom.main([str(out)]) == 0
    return sorted(out.iterdir()), printed.getvalue()


def test_the_sample_set(samples: tuple[list[Path], str]) -> None:
    written, printed = samples
    assert printed.split() == [str(path) for path in written]
    assert [path.name for path in written] == [sample.name for sample in SAMPLES]
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in written if path.suffix == ".dcm"]
    assert [ds.ViewPosition for ds in headers] == ["PA", "PA", "LL", "PA"]
    assert all(str(ds.PatientID).startswith("DEMO-") for ds in headers)
    assert len({ds.StudyInstanceUID for ds in headers}) == len(headers)
    with Image.open(written[-1]) as picture:
        assert picture.mode == "L"


def test_the_sample_set_is_the_same_bytes_each_time(samples: tuple[list[Path], str], tmp_path: Path) -> None:
    again = phantom.write_samples(tmp_path, tuple(sample for sample in SAMPLES if sample.name.startswith(("01", "05"))))
    first_time = {path.name: path for path in samples[0]}
    for second in again:
        first = first_time[second.name]
        assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
