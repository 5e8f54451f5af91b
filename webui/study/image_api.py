"""Image data for the study page: an image's description, its frames, the heat map of a finding and the key pictures of a volume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from flask import Blueprint, Response, abort, jsonify, request
from flask.typing import ResponseReturnValue

from appliance import __version__
from appliance.store.store import Store
from appliance.store.volume_results import VolumeResults
from webui.context import current_box
from webui.server.access_log import record_access
from webui.study.frame_cache import current_frames, describe_frame

blueprint: Final = Blueprint("image_api", __name__, url_prefix="/api")
# The server's timeout applies to each chunk, so that a large image can be sent over a slow connection.
_CHUNK_BYTES: Final = 512 << 10


@blueprint.get("/instances/<int:instance_id>/pixels")
def description(instance_id: int) -> ResponseReturnValue:
    """How to draw the frames of an image."""
    worklist = current_box().worklist
    record_access(worklist.study_of(instance_id))
    return jsonify(describe_frame(current_frames().frame(instance_id, 0), worklist.instance(instance_id).number_of_frames))


@blueprint.get("/instances/<int:instance_id>/frames/<int:number>")
def frame(instance_id: int, number: int) -> ResponseReturnValue:
    """One frame, numbered from 0: raw pixels row by row, little endian; the description states their type and samples."""
    box = current_box()
    record_access(box.worklist.study_of(instance_id))
    tag = _entity_tag(box.store, instance_id, number)
    if request.if_none_match.contains(tag):
        return _with_tag(Response(status=304), tag)
    try:
        pixels = current_frames().frame(instance_id, number).pixels
    except IndexError:
        abort(404)
    data = pixels.astype(pixels.dtype.newbyteorder("<"), order="C", copy=False).tobytes()
    response = Response(_chunks(data), content_type="application/octet-stream")
    response.content_length = len(data)
    return _with_tag(response, tag)


def _entity_tag(store: Store, instance_id: int, number: int) -> str:
    """Names the pixels of a frame: the stored file, a person's correction, and the software that draws them."""
    parts = (store.content_digest(instance_id), number, store.correction_of(instance_id).to_text(), __version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _with_tag(response: Response, tag: str) -> Response:
    response.set_etag(tag)
    return response


@blueprint.get("/findings/<int:finding_id>/heatmap.png")
def heatmap(finding_id: int) -> ResponseReturnValue:
    """The class activation map of a finding: 8-bit grey PNG over exactly the image's extent."""
    worklist = current_box().worklist
    record_access(worklist.study_of_finding(finding_id))
    return Response(worklist.heatmap(finding_id), content_type="image/png")


@blueprint.get("/volumes/<int:job_id>/<plane>.png")
def key_picture(job_id: int, plane: str) -> ResponseReturnValue:
    """A plane (axial, coronal or sagittal) through the middle of a model's segmentation of a series, with its outline."""
    volumes = VolumeResults(current_box().store)
    record_access(volumes.study_of(job_id))
    return Response(volumes.picture(job_id, plane), content_type="image/png")


def _chunks(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(view), _CHUNK_BYTES):
        yield bytes(view[start : start + _CHUNK_BYTES])
