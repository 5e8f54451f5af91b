"""Every real scan decodes to its recorded values or is refused with its reason; decoders, frames, memory."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from appliance.core.errors import IngestError, PixelError
from appliance.imaging import decoders, pixels
from appliance.imaging.pixels import PixelCaps, check_structure, decode_frame, frame_count, iter_frames
from tests.support.scans import dataset

GOOD = [
    "CR_1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819", "CR_RG1_J2KI", "MG_GH133", "MR_emri_small",
    "CR_gdcm-CR-MONO1-10-chest", "US_examples_ybr_color", "OT_SC_rgb_rle", "OT_image_dfl", "US_examples_palette",
    "MR_MR-SIEMENS-DICOM-WithOverlays", "SEG_seg_image_ct_binary_single_frame", "CT_CT2_JLSN", "RTDOSE_rtdose_expb_1frame",
    "SM_sm_image_jpegls_nobot", "NM_NM1_J2KR", "CT_CT0012.fragmented_no_bot_jpeg_baseline.51", "PT_GH184", "RTIMAGE_RTImageStorage",
    "US_YBR_FULL-RLE", "SC_OsirixFake16BitsStoredFakeSpacing", "US_examples_jpeg2k", "CT_JPEGLossless_1s_1f_i_16_16_bad",
    "XA_HasFragmentSequence", "SEG_tumor_User1_Manual_Trial1", "MR_MR_small_jpeg_ls_lossless", "OT_VL6_J2KI", "XX_HTJ2K_08_RGB",
    "OT_SC_rgb_expb_32bit_2frame", "OT_GH538-jpeg1", "MR_jpeg_ls", "US_US-RGB-8-esopecho", "XX_HTJ2KLossless_08_RGB", "PT_1",
    "OT_GH195", "SM_file", "OT_SC_rgb_jpeg_dcmd", "US_JPEGLosslessP14SV1_3s_2f_u_08_08", "CT_693_J2KI", "OT_signed-raw-9bit",
    "RTDOSE_rtdose_rle", "US_US-YBR_FULL_422-EVRLE", "MR_N2D_0117", "US_no-pixel-spacing", "OT_parametric_map_float",
    "ok_hostile_strings",
]  # fmt: skip
PARSER = "refused by the parser, before anything of ours looks at it"
BAD = {
    "bad_CT_IM000017": "ingest.no_pixel_data",
    "bad_RTPLAN_rtplan_truncated": "ingest.no_pixel_data",
    "bad_XX_meta_missing_tsyntax": "ingest.unsupported_syntax",
    "bad_CR_chrJapMulti": "ingest.no_pixel_data",
    "bad_NM_JPEG2000-embedded-sequence-delimiter": "pixel.corrupt",
    "bad_SR_reportsi_with_empty_number_tags": "ingest.no_pixel_data",
    "bad_NM_JPEG-lossy": "pixel.corrupt",
    "bad_RTSTRUCT_rtstruct": PARSER,
    "bad_XX_nested_priv_SQ": "ingest.pixel_attributes",
    "bad_RTDOSE_badVR": "ingest.pixel_attributes",
    "bad_ECG_waveform_ecg": "ingest.no_pixel_data",
    "bad_MR_MR_truncated": "ingest.truncated",
    "bad_US_no-meta-length-test": "ingest.no_pixel_data",
    "bad_XX_GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length": PARSER,
    "bad_empty": PARSER,
    "bad_trunc60": "ingest.truncated",
    "bad_notdicom_png": PARSER,
    "bad_rows65535": "ingest.absurd_dimensions",
    "bad_frames1e6": "ingest.absurd_dimensions",
    "bad_codestream": "pixel.corrupt",
}
# The recorded values are those of pylibjpeg-libjpeg (GPL). DCT decoders may round differently by one grey level (ITU-T T.83).
DCT_ROUNDING = {"CR_1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819": 1.0}


def read(path: Path) -> pydicom.FileDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom on values that break the rules; the door switches that off for the box
        return pydicom.dcmread(path)


@pytest.fixture(scope="session")
def manifest(shared: Path) -> dict[str, dict[str, str]]:
    with (shared / "data" / "dicom_manifest.csv").open(encoding="utf-8") as file:
        return {Path(row["file"]).name.removesuffix(".dcm"): row for row in csv.DictReader(file)}


def test_lists_are_the_manifest(manifest: dict[str, dict[str, str]]) -> None:
    assert sorted(GOOD) == sorted(name for name, row in manifest.items() if row["expectation"] == "ok")
    assert sorted(BAD) == sorted(name for name, row in manifest.items() if row["expectation"] == "reject")
    assert (len(GOOD), len(BAD)) == (45, 20)


@pytest.mark.parametrize("name", GOOD)
def test_good_file_decodes_to_its_recorded_values(name: str, shared: Path, manifest: dict[str, dict[str, str]]) -> None:
    row = manifest[name]
    ds = read(shared / "data" / row["file"])
    check_structure(ds)
    low, high, count = np.inf, -np.inf, 0
    for frame in iter_frames(ds):
        assert frame.shape[:2] == (int(row["rows"]), int(row["cols"]))
        assert frame.dtype.isnative
        low, high, count = min(low, frame.min()), max(high, frame.max()), count + 1
    assert count == int(row["frames"]) == frame_count(ds)
    if row["pixel_min"]:
        allowed = DCT_ROUNDING.get(name, 0.0)
        assert abs(low - float(row["pixel_min"])) <= allowed
        assert abs(high - float(row["pixel_max"])) <= allowed


@pytest.mark.parametrize(("name", "code"), BAD.items())
def test_bad_file_is_refused(name: str, code: str, shared: Path) -> None:
    path = shared / "data" / "dicom" / f"{name}.dcm"
    if code is PARSER:
        with pytest.raises((InvalidDicomError, OSError)):
            read(path)
        return
    with pytest.raises(IngestError) as caught:
        check_structure(read(path))
    assert caught.value.code == code


def cuts(size: int) -> list[int]:
    return sorted({int(size * share) for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999)} | {size - 1, size - 9, size - 200})


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("XA_HasFragmentSequence", "CR_RG1_J2KI", "MG_GH133")])
def test_cut_file_is_refused_or_complete(name: str, shared: Path, tmp_path: Path) -> None:
    """Wherever a file is cut: either it is refused, or what was cut off was no part of the pixels."""
    source = shared / "data" / "dicom" / f"{name}.dcm"
    whole = source.read_bytes()
    pixels = list(iter_frames(read(source)))
    for cut in cuts(len(whole)):
        path = tmp_path / "cut.dcm"
        path.write_bytes(whole[:cut])
        try:
            ds = read(path)
            check_structure(ds)
            left = list(iter_frames(ds))
        except (IngestError, InvalidDicomError, EOFError, OSError, ValueError, NotImplementedError, zlib.error):
            continue
        assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(pixels, left, strict=True)), cut


SAMPLES = (np.add.outer(np.arange(40), np.arange(56)) * 38 + np.random.default_rng(2).integers(0, 200, (2, 40, 56))).astype(np.uint16)


def coded(syntax: UID, frame: np.ndarray[Any, Any]) -> bytes:
    import imagecodecs

    if syntax == RLELossless:
        header = {"rows": 40, "columns": 56, "samples_per_pixel": 1, "photometric_interpretation": "MONOCHROME2", "number_of_frames": 1}
        bits = {"bits_allocated": 16, "bits_stored": 16, "pixel_representation": 0}
        return bytes(get_encoder(RLELossless).encode(frame, **header, **bits))
    if syntax in (JPEG2000Lossless, HTJ2KLossless):
        made: bytes = imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k", reversible=True)
    elif syntax == JPEGLSLossless:
        made = imagecodecs.jpegls_encode(frame)
    elif syntax == JPEGLosslessSV1:
        made = imagecodecs.ljpeg_encode(frame, bitspersample=12)
    elif syntax == JPEGExtended12Bit:
        made = imagecodecs.jpeg8_encode(frame, level=100, bitspersample=12)
    else:
        made = imagecodecs.jpeg8_encode((frame >> 4).astype(np.uint8), level=100)
    return made


SYNTAXES = [RLELossless, JPEG2000Lossless, HTJ2KLossless, JPEGLSLossless, JPEGLosslessSV1, JPEGExtended12Bit, JPEGBaseline8Bit]
NAMES = [UID(syntax).keyword for syntax in SYNTAXES]
LOSSLESS = SYNTAXES[:5]


def compressed(syntax: UID, frames: list[bytes], **changes: Any) -> pydicom.FileDataset:
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} if syntax == JPEGBaseline8Bit else {}
    values = {"Rows": 40, "Columns": 56, "NumberOfFrames": len(frames), "PixelData": encapsulate(frames)} | eight | changes
    ds = dataset(transfer_syntax_uid=syntax, **values)
    ds["PixelData"].is_undefined_length = True
    return ds


@pytest.fixture(params=SYNTAXES, ids=NAMES)
def syntax(request: pytest.FixtureRequest) -> UID:
    return UID(request.param)


def test_compressed_frames_come_one_by_one(syntax: UID) -> None:
    ds = compressed(syntax, [coded(syntax, frame) for frame in SAMPLES])
    check_structure(ds)
    frames = list(iter_frames(ds))
    assert len(frames) == 2
    assert np.array_equal(frames[1], decode_frame(ds, 1))
    if syntax in LOSSLESS:
        assert np.array_equal(np.stack(frames), SAMPLES)
    else:
        assert np.abs(frames[1].astype(int) - (SAMPLES[1] >> (0 if syntax == JPEGExtended12Bit else 4))).mean() < 20


def test_damaged_code_is_an_error(syntax: UID) -> None:
    """Half a frame is never a picture; 200 bytes of garbage are none where the code can show it."""
    frame = coded(syntax, SAMPLES[0])
    garbage = np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8).tobytes()
    middle = len(frame) // 2
    damaged = [frame[:middle]]
    if syntax not in (RLELossless, JPEG2000Lossless, HTJ2KLossless):
        damaged.append(frame[:middle] + garbage + frame[middle + 200 :])
    for data in damaged:
        with pytest.raises(PixelError) as caught:
            decode_frame(compressed(syntax, [data]))
        assert caught.value.code == "pixel.corrupt"


def test_frame_of_another_size_is_refused(syntax: UID) -> None:
    ds = compressed(syntax, [coded(syntax, SAMPLES[0])], Rows=41)
    with pytest.raises(IngestError):
        check_structure(ds)
        decode_frame(ds)


def test_second_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    ds = compressed(JPEGLSLossless, [coded(JPEGLSLossless, SAMPLES[0]), coded(JPEGLSLossless, SAMPLES[0][:, :32].copy())])
    check_structure(ds)
    frames = iter_frames(ds)
    next(frames)
    with pytest.raises(PixelError) as caught:
        next(frames)
    assert caught.value.code == "ingest.absurd_dimensions"


@pytest.fixture
def decodes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders that are changed by a test run in its own process."""
    monkeypatch.setattr(pixels, "decode_coded_frame", decoders.decode_coded_frame)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=NAMES)
@pytest.mark.usefixtures("decodes_here")
def test_without_imagecodecs_others_stand_in(syntax: UID, monkeypatch: pytest.MonkeyPatch) -> None:
    preference = [name for name in decoders._PREFERENCE if name != "imagecodecs"]
    monkeypatch.setattr(decoders, "_PREFERENCE", preference)
    ds = compressed(syntax, [coded(syntax, SAMPLES[0])])
    if decoders.best_plugin(syntax) and syntax in LOSSLESS:
        assert np.array_equal(decode_frame(ds), SAMPLES[0])
    monkeypatch.setattr(decoders, "_PREFERENCE", ())
    with pytest.raises(PixelError) as caught:
        decode_frame(ds)
    assert caught.value.code == "pixel.undecodable"


def test_plugin_is_unavailable_without_imagecodecs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoders.is_available(JPEGLSLossless)
    assert not decoders.is_available("1.2.3")
    monkeypatch.setattr(decoders, "find_spec", lambda _: None)
    assert not decoders.is_available(JPEGLSLossless)


@pytest.mark.parametrize("interleave", [0, 1, 2])
def test_jpeg_ls_colour_in_every_interleave(interleave: int) -> None:
    import jpeg_ls

    picture = np.add.outer(np.arange(40), np.arange(56))[:, :, None].repeat(3, axis=2) * np.array([1, 2, 1])
    picture = picture.astype(np.uint8)
    ordered = picture if interleave else np.ascontiguousarray(picture.transpose(2, 0, 1))
    data = bytes(jpeg_ls.encode_array(ordered, interleave_mode=interleave))
    ds = compressed(
        JPEGLSLossless, [data], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
        BitsAllocated=8, BitsStored=8, HighBit=7,
    )  # fmt: skip
    check_structure(ds)
    assert np.array_equal(decode_frame(ds), picture)


@pytest.mark.usefixtures("decodes_here")
def test_decoder_that_returns_another_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check, should a codestream say one thing in its header and another inside."""
    monkeypatch.setattr(decoders, "_decode", lambda *_: np.zeros((40, 55), np.uint16))
    with pytest.raises(PixelError, match="the header says"):
        decode_frame(compressed(JPEGLSLossless, [coded(JPEGLSLossless, SAMPLES[0])]))
    short = coded(RLELossless, SAMPLES[0])
    import imagecodecs

    monkeypatch.setattr(imagecodecs, "dicomrle_decode", lambda *_, **__: b"short")
    with pytest.raises(PixelError, match="do not fill"):
        decode_frame(compressed(RLELossless, [short]))


def test_extended_offset_table() -> None:
    from pydicom.encaps import encapsulate_extended

    data, offsets, lengths = encapsulate_extended([coded(RLELossless, frame) for frame in SAMPLES])
    ds = compressed(
        RLELossless, [b"any"], NumberOfFrames=2, PixelData=data, ExtendedOffsetTable=offsets, ExtendedOffsetTableLengths=lengths
    )
    check_structure(ds)
    assert np.array_equal(np.stack(list(iter_frames(ds))), SAMPLES)
    ds.ExtendedOffsetTable = offsets[:8] + (2**60).to_bytes(8, "little")
    with pytest.raises(PixelError):
        check_structure(ds)
    ds.ExtendedOffsetTable = offsets[:8]
    with pytest.raises(PixelError):
        check_structure(ds)


def test_native_frames_one_by_one() -> None:
    ds = dataset(Rows=40, Columns=56, NumberOfFrames=2, PixelData=SAMPLES.tobytes())
    check_structure(ds)
    assert np.array_equal(np.stack(list(iter_frames(ds))), SAMPLES)
    with pytest.raises(IndexError):
        decode_frame(ds, 2)


def test_big_endian_comes_in_native_order() -> None:
    ds = dataset(transfer_syntax_uid=ExplicitVRBigEndian, Rows=40, Columns=56, PixelData=SAMPLES[0].astype(">u2").tobytes())
    ds["PixelData"].VR = "OW"
    frame = decode_frame(ds)
    assert frame.dtype == np.uint16
    assert np.array_equal(frame, SAMPLES[0])


def test_bits_above_bits_stored_are_no_pixels() -> None:
    ds = dataset(Rows=40, Columns=56, PixelData=(SAMPLES[0] | 0xA000).tobytes())
    assert np.array_equal(decode_frame(ds), SAMPLES[0])


def test_signed_values() -> None:
    values = SAMPLES[0].astype(np.int16) - 2048
    assert values.min() < 0
    ds = dataset(Rows=40, Columns=56, PixelRepresentation=1, PixelData=values.tobytes())
    check_structure(ds)
    assert np.array_equal(decode_frame(ds), values)
    ds.PixelData = (values & 0x0FFF | 0x5000).tobytes()  # the sign is in bit 11, above it is something else
    assert np.array_equal(decode_frame(ds), values)


def test_plain_grey_pixels_are_not_copied() -> None:
    ds = dataset(Rows=40, Columns=56, PixelData=SAMPLES[0].tobytes())
    assert np.shares_memory(decode_frame(ds), np.frombuffer(ds.PixelData, np.uint8))


def test_missing_frames_are_an_error() -> None:
    ds = compressed(RLELossless, [coded(RLELossless, SAMPLES[0])])
    ds.NumberOfFrames = 2  # as in a file that passed another version's door
    with pytest.raises(PixelError):
        list(iter_frames(ds))
    with pytest.raises(PixelError):
        decode_frame(ds, 1)
    ds.PixelData = encapsulate([coded(RLELossless, SAMPLES[0])], has_bot=True)
    frames = iter_frames(ds)
    next(frames)
    with pytest.raises(PixelError, match="1 of 2 frames"):
        next(frames)
    del ds.PixelData
    with pytest.raises(PixelError) as caught:
        decode_frame(ds)
    assert caught.value.code == "ingest.no_pixel_data"


def test_attributes_are_checked_again_before_decoding() -> None:
    ds = dataset(PixelRepresentation=7)
    with pytest.raises(PixelError) as caught:
        decode_frame(ds)
    assert caught.value.code == "ingest.pixel_representation"


def test_threads_do_not_disturb_each_other() -> None:
    ds = compressed(JPEGLSLossless, [coded(JPEGLSLossless, frame) for frame in SAMPLES])
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not np.array_equal(decode_frame(ds, index), SAMPLES[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index % 2,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pydicom_itself_decodes_the_same(shared: Path) -> None:
    """The plugin gives what pydicom's pixel_array gives, sign correction and colour included."""
    for name in ("CT_693_J2KI", "US_YBR_FULL-RLE", "OT_VL6_J2KI", "MR_MR_small_jpeg_ls_lossless", "RTDOSE_rtdose_rle"):
        ds = read(shared / "data" / "dicom" / f"{name}.dcm")
        other = next(plugin for plugin in get_decoder(ds.file_meta.TransferSyntaxUID).available_plugins if plugin != "imagecodecs")
        expected, _ = get_decoder(ds.file_meta.TransferSyntaxUID).as_array(ds, index=0, decoding_plugin=other)
        assert np.array_equal(decode_frame(ds), expected), name


def test_importing_loads_no_decoder_and_no_runtime() -> None:
    heavy = "('imagecodecs', 'simplejpeg', 'onnxruntime', 'contourpy')"
    check = f"import sys, appliance.imaging.pixels; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HOSTILE = """
import resource, struct, sys
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless, UID
from appliance.core.errors import PixelError
from appliance.imaging.pixels import check_structure, decode_frame
from tests.support.scans import dataset

def jpeg(sof, rows, columns, precision=8):
    frame = struct.pack(">BBHBHHB3B", 0xFF, sof, 11, precision, rows, columns, 1, 1, 0x11, 0)
    quantization = "ffdb0043" + "00" + "01" * 64
    tables = bytes.fromhex(quantization + "".join("ffc40014" + kind + "01" + "00" * 15 + "00" for kind in ("00", "10")))
    start = {0xC3: "010000", 0xF7: "000000"}.get(sof, "003f00")
    tables = b"" if sof == 0xF7 else tables
    return b"\\xff\\xd8" + tables + frame + bytes.fromhex("ffda0008010100" + start) + b"\\x00" * 300 + b"\\xff\\xd9"

def j2k(rows, columns, tile):
    siz = struct.pack(">HHIIIIIIIIH3B", 41, 0, columns, rows, 0, 0, tile, tile, 0, 0, 1, 15, 1, 1)
    cod = bytes.fromhex("ff52000c00000001000504040001ff5c00134040484850484850484850484850484850")
    sot = bytes.fromhex("ff90000a00000000000000 01".replace(" ", "")) + b"\\xff\\x93" + b"\\xcf\\xb4" * 200 + b"\\xff\\xd9"
    return b"\\xff\\x4f\\xff\\x51" + siz + cod + sot

rle = struct.pack("<16I", 2, 64, 200, *[0] * 13) + b"\\x81\\x00" * 300
big, wide = (7000, 7000), (65535, 65535)
cases = []
for rows, columns in (big, wide):
    cases += [
        (JPEGBaseline8Bit, rows, columns, 8, jpeg(0xC0, rows, columns)),
        (JPEGLosslessSV1, rows, columns, 16, jpeg(0xC3, rows, columns, 16)),
        (JPEGLSLossless, rows, columns, 16, jpeg(0xF7, rows, columns, 16)),
        (RLELossless, rows, columns, 16, rle),
        (JPEG2000Lossless, rows, columns, 16, j2k(rows, columns, rows)),
        (JPEG2000Lossless, rows, columns, 16, j2k(rows, columns, 110)),
        (JPEG2000Lossless, rows, columns, 16, j2k(rows, columns, 1)),
    ]
cases += [(JPEGBaseline8Bit, 64, 64, 8, jpeg(0xC0, 65535, 65535)), (JPEG2000Lossless, 64, 64, 16, j2k(2**31, 2**31, 2**31))]
for syntax, rows, columns, bits, data in cases:
    ds = dataset(transfer_syntax_uid=UID(syntax), Rows=rows, Columns=columns, BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1,
                 PixelData=encapsulate([data]))
    try:
        check_structure(ds)
    except Exception as error:
        assert type(error).__name__ in ("IngestError", "PixelError"), error
    try:
        decode_frame(ds)
    except PixelError as error:
        print(syntax, rows, error, file=sys.stderr)
        continue
    raise SystemExit(f"{syntax} {rows}x{columns}: decoded")
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MB")
"""


def test_hostile_codestreams_stay_within_memory() -> None:
    """Streams of some hundred bytes that claim to be the largest picture there is, in an address space of 1.5 GB."""
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_real_bomb_is_refused_by_caps(shared: Path) -> None:
    ds = read(shared / "data" / "dicom" / "CR_RG1_J2KI.dcm")
    with pytest.raises(IngestError) as caught:
        check_structure(ds, PixelCaps(max_frame_bytes=1_000_000))
    assert caught.value.code == "ingest.absurd_dimensions"


@pytest.mark.parametrize("name", ["CR_1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819", "MG_GH133", "CT_CT2_JLSN"])
def test_overwritten_codestreams_of_real_scans_are_found(name: str, shared: Path) -> None:
    """340 bytes of garbage anywhere in real JPEG, lossless JPEG and JPEG-LS frames: at most 1 of 20 may slip through."""
    ds = read(shared / "data" / "dicom" / f"{name}.dcm")
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(20):
        at = int(rng.integers(len(frame) // 10, len(frame) - 400))
        ds.PixelData = encapsulate([frame[:at] + rng.integers(0, 256, 340, dtype=np.uint8).tobytes() + frame[at + 340 :]])
        try:
            decode_frame(ds)
        except PixelError:
            found += 1
    assert found >= 19
