"""What the viewer asks for: descriptions, raw frames, heat maps, and errors in the person's language."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
from werkzeug.exceptions import ServiceUnavailable

from appliance.core.correction import NOTHING_DECIDED
from appliance.core.roles import Role
from appliance.core.settings import Settings
from appliance.imaging import decoder_process
from appliance.imaging.decoder_process import DecoderProcess
from tests.support import hostile_images
from tests.support.scans import dataset, encode, scan_bytes
from tests.support.web_box import PASSWORD, Box, Person, in_process, result
from webui import create_app
from webui.server.access import ACCESS
from webui.study import frame_cache


@pytest.fixture
def box(settings: Settings) -> Iterator[Box]:
    with in_process(settings) as running:
        yield running


def test_description_and_pixels_of_a_plain_image(box: Box) -> None:
    made = dataset(
        PixelSpacing=[0.2, 0.1],
        WindowCenter=500,
        WindowWidth=900,
        RescaleSlope=2,
        RescaleIntercept=-10,
        PhotometricInterpretation="MONOCHROME1",
    )
    stored = box.take(encode(made))
    person = box.person()
    told = person.get(f"/api/instances/{stored.instance_id}/pixels").json()
    assert told == {
        "rows": 64, "columns": 48, "frames": 1, "samples": 1, "dtype": "uint16", "slope": 2.0, "intercept": -10.0,
        "windows": [[500.0, 900.0]],
        "voi_function": "LINEAR", "photometric": "MONOCHROME1", "spacing": [0.2, 0.1], "min": 0.0, "max": 3037.0,
        "orientation": [False, False, False],
    }  # fmt: skip
    answer = person.get(f"/api/instances/{stored.instance_id}/frames/0")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert np.array_equal(np.frombuffer(answer.content, "<u2").reshape(64, 48), made.pixel_array)


def test_a_film_is_revalidated_and_not_sent_again(box: Box) -> None:
    stored = box.take(scan_bytes())
    person, path = box.person(), f"/api/instances/{stored.instance_id}/frames/0"
    first = person.get(path)
    assert first.headers["Cache-Control"] == "private, no-cache"
    again = person.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert person.get(path, headers={"If-None-Match": '"another"'}).content == first.content
    box.store.database.connection().execute("UPDATE instances SET correction = 'turn_180'")
    corrected = person.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert corrected.status_code == 200
    assert corrected.headers["ETag"] != first.headers["ETag"]
    page = person.open("/")
    left = person.post("/logout", data={"csrf_token": page.split('name="csrf_token" value="')[1].split('"')[0]}, allow_redirects=False)
    assert left.headers["Clear-Site-Data"] == '"cache"'
    refused = person.get(path, headers={"If-None-Match": first.headers["ETag"]}, allow_redirects=False)
    assert refused.status_code in (302, 401)
    assert refused.headers["Cache-Control"] == "no-store"


def test_frames_of_a_run_and_colour(box: Box) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (3, 8, 10, 3), np.uint8)
    made = dataset(
        Rows=8, Columns=10, NumberOfFrames=3, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
        BitsStored=8, HighBit=7, PixelData=frames.tobytes(),
    )  # fmt: skip
    stored = box.take(encode(made))
    person = box.person()
    told = person.get(f"/api/instances/{stored.instance_id}/pixels").json()
    assert (told["frames"], told["samples"], told["dtype"], told["photometric"], told["spacing"]) == (3, 3, "uint8", "RGB", None)
    for number in (2, 0, 2):
        assert person.get(f"/api/instances/{stored.instance_id}/frames/{number}").content == frames[number].tobytes()
    assert person.get(f"/api/instances/{stored.instance_id}/frames/3").status_code == 404


def test_the_memory_for_frames_is_bounded(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_cache, "_MAX_PIXEL_BYTES", 64 * 48 * 2)
    monkeypatch.setattr(frame_cache, "_MAX_FILE_BYTES", 10_000)
    first, second = box.take(scan_bytes()), box.take(scan_bytes())
    cache = frame_cache.FrameCache(box.store)
    for stored in (first, second, first, first):
        cache.frame(stored.instance_id, 0)
    assert list(cache._frames) == [(first.instance_id, 0, NOTHING_DECIDED)]
    assert list(cache._files) == [first.instance_id]
    monkeypatch.setattr(frame_cache, "_MAX_PIXEL_BYTES", 1)
    cache.frame(second.instance_id, 0)
    assert list(cache._frames) == [(first.instance_id, 0, NOTHING_DECIDED)]


def test_too_many_waiting_for_frames_are_told_to_wait(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = box.take(scan_bytes())
    monkeypatch.setattr(frame_cache, "_WAIT_S", 0.01)
    cache = frame_cache.FrameCache(box.store)
    with cache._lock, pytest.raises(ServiceUnavailable):
        cache.frame(stored.instance_id, 0)


def test_a_heat_map_is_the_stored_png(box: Box) -> None:
    box.activate()
    stored = box.take(scan_bytes())
    box.work(result())
    finding = box.store.database.query("SELECT id FROM findings")[0]["id"]
    person = box.person()
    answer = person.get(f"/api/findings/{finding}/heatmap.png")
    assert (answer.headers["Content-Type"], answer.content) == ("image/png", b"\x89PNG\r\n\x1a\nheat")
    assert f"/api/findings/{finding}/heatmap.png" in person.open(f"/studies/{stored.study_id}")


def test_errors_come_as_problems_in_the_language_of_the_page(box: Box) -> None:
    person = box.person(language="zh")
    for path in ("/api/instances/9/pixels", "/api/instances/9/frames/0", "/api/findings/9/heatmap.png"):
        answer = person.get(path)
        assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")
        assert answer.json() == {
            "type": "about:blank",
            "status": 404,
            "title": "没有此记录",
            "detail": "请刷新页面。",
            "code": "store.missing",
        }
    stored = box.take(scan_bytes())
    for file in (box.settings.data_dir / "content").rglob("*"):
        if file.is_file():
            whole = file.read_bytes()
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tampered = person.get(f"/api/instances/{stored.instance_id}/pixels")
    assert (tampered.status_code, tampered.json()["code"]) == (500, "store.tampered")


def test_looking_is_written_to_the_audit_once(box: Box) -> None:
    stored = box.take(scan_bytes())
    person = box.person()

    def looks() -> int:
        return len(
            box.store.database.query("SELECT 1 FROM audit WHERE entry LIKE '%110103%' AND entry LIKE ?", f'%"study:{stored.study_id}"%')
        )

    person.get(f"/api/instances/{stored.instance_id}/pixels")
    person.get(f"/api/instances/{stored.instance_id}/frames/0")
    assert looks() == 1
    person.open(f"/studies/{stored.study_id}")
    person.get(f"/studies/{stored.study_id}", headers={"X-Fragment": "1"})
    person.get(f"/api/instances/{stored.instance_id}/pixels")
    assert looks() == 2
    box.person("other").get(f"/api/instances/{stored.instance_id}/pixels")
    assert looks() == 3


def test_heat_maps_and_refreshes_are_looks_too_once_in_a_while(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.activate()
    stored = box.take(scan_bytes())
    box.work(result())
    finding = box.store.database.query("SELECT id FROM findings")[0]["id"]

    def looks() -> int:
        return len(box.store.database.query("SELECT 1 FROM audit WHERE entry LIKE '%110103%'"))

    box.person("first").get(f"/api/findings/{finding}/heatmap.png")
    assert looks() == 1
    second = box.person("second")
    for _ in range(3):
        second.get(f"/studies/{stored.study_id}", headers={"X-Fragment": "1"})
        second.get(f"/api/findings/{finding}/heatmap.png")
    assert looks() == 2
    again = Person(box.base)
    assert again.log_in("second", PASSWORD).status_code == 302
    again.get(f"/api/findings/{finding}/heatmap.png")
    assert looks() == 2  # the same person
    monkeypatch.setattr("webui.server.access_log.REPEAT_AFTER_S", 0.0)
    second.get(f"/studies/{stored.study_id}", headers={"X-Fragment": "1"})
    assert looks() == 3
    assert second.get("/api/findings/999/heatmap.png").status_code == 404


def lists(box: Box) -> list[tuple[str, list[int], bool]]:
    rows = [json.loads(row["entry"]) for row in box.store.database.query("SELECT entry FROM audit WHERE entry LIKE '%\"110112\"%'")]
    return [(row["object"], row["detail"]["studies"], row["detail"]["search"]) for row in rows]


def test_r9_a_list_of_patients_is_an_event_once_per_visit_and_what_a_refresh_adds(box: Box) -> None:
    first = box.take(scan_bytes())
    person = box.person()
    person.open("/")
    for _ in range(3):
        person.get("/", headers={"X-Fragment": "1", "X-Background": "1"})
    assert lists(box) == [("worklist", [first.study_id], False)]
    second = box.take(scan_bytes(StudyInstanceUID="1.2.3.4", SeriesInstanceUID="1.2.3.5", SOPInstanceUID="1.2.3.6"))
    person.get("/", headers={"X-Fragment": "1", "X-Background": "1"})
    assert lists(box)[1:] == [("worklist", [second.study_id], False)]
    person.post("/", data={"q": "nobody of this name"})
    person.open("/rejected")
    assert lists(box)[2:] == [("worklist", [], True), ("rejections", [], False)]
    assert not box.store.database.query("SELECT 1 FROM audit WHERE entry LIKE '%nobody of this name%'")


# What each page and address that shows patient data leaves in the audit; the others show none.
SHOWN = {
    "worklist.show": "110112", "admin.rejected": "110112", "study.show": "110103", "image_api.description": "110103",
    "image_api.frame": "110103", "image_api.heatmap": "110103", "image_api.key_picture": "110103",
    "results_api.show": "110103",
}  # fmt: skip
SHOWS_NONE = {"worklist.revision", "upload.show", "tus.options", "tus.status", "tus.outcome"}


def test_r9_every_address_that_shows_patient_data_is_known(settings: Settings) -> None:
    app = create_app(settings)
    readable = {rule.endpoint for rule in app.url_map.iter_rules() if "GET" in (rule.methods or ())}
    for_clinicians = {endpoint for endpoint, roles in ACCESS.items() if Role.TECHNICIAN not in roles and Role.CLINICIAN in roles}
    assert SHOWN.keys() <= readable & for_clinicians <= SHOWN.keys() | SHOWS_NONE
    app.extensions["box"].stop()
    app.extensions["box"].store.close()


def test_image_that_crashes_its_decoder_does_so_once_and_not_with_every_load_of_the_page(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hostile_images.DECODERS), os.environ.get("PYTHONPATH", "")]))
    decoder = DecoderProcess()
    monkeypatch.setattr(decoder_process, "_decoder", decoder)
    crashing, killed, good = (box.take(hostile_images.jpeg_chest(1, action)).instance_id for action in ("segfault", "killed", ""))
    person = box.person()
    assert person.get(f"/api/instances/{crashing}/pixels").json()["code"] == "pixel.decoder_crashed"
    started_again = decoder.pid
    for _ in range(3):
        answer = person.get(f"/api/instances/{crashing}/frames/0")
        assert (answer.status_code, answer.json()["code"]) == (422, "pixel.decoder_crashed")
    assert person.get(f"/api/instances/{good}/pixels").json()["rows"] == 512
    assert decoder.pid == started_again
    monkeypatch.setattr(frame_cache, "_FAILURE_KEPT_S", 0.0)
    assert person.get(f"/api/instances/{crashing}/pixels").status_code == 422
    assert decoder.pid != started_again
    answer = person.get(f"/api/instances/{killed}/pixels")
    assert (answer.status_code, answer.json()["title"]) == (503, "The box is busy")
    decoder.close()
