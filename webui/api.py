"""What the study page asks for: an image's description, its frames, the heat map of a finding and the key pictures of a volume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from flask import Blueprint, Response, abort, jsonify
from flask.typing import ResponseReturnValue

from appliance.store.volume_results import VolumeResults
from webui.box import Box, the_box
from webui.images import description
from webui.pages import record_look

blueprint: Final = Blueprint("api", __name__, url_prefix="/api")
# Sent piece by piece: the patience of the server is for each piece, not for the whole of a large image on a slow line.
_PIECE_BYTES: Final = 512 << 10


@blueprint.get("/instances/<int:instance_id>/pixels")
def pixels(instance_id: int) -> ResponseReturnValue:
    """How the frames of an image are to be drawn."""
    box = _looked(instance_id)
    image = box.worklist.instance(instance_id)
    return jsonify(description(box.images.frame(instance_id, 0), image.number_of_frames))


@blueprint.get("/instances/<int:instance_id>/frames/<int:number>")
def frame(instance_id: int, number: int) -> ResponseReturnValue:
    """One frame, from 0: raw pixels row by row, little endian, of the type and samples that the description names."""
    box = _looked(instance_id)
    try:
        shown = box.images.frame(instance_id, number)
    except IndexError:
        abort(404)
    values = shown.pixels
    data = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False).tobytes()
    response = Response(_pieces(data), content_type="application/octet-stream")
    response.content_length = len(data)
    return response


@blueprint.get("/findings/<int:finding_id>/heatmap.png")
def heatmap(finding_id: int) -> ResponseReturnValue:
    """The class activation map of a finding: 8-bit grey PNG over exactly the image's extent."""
    box = the_box()
    record_look(box, box.worklist.study_of_finding(finding_id))
    return Response(box.worklist.heatmap(finding_id), content_type="image/png")


@blueprint.get("/volumes/<int:job_id>/<plane>.png")
def key_picture(job_id: int, plane: str) -> ResponseReturnValue:
    """A plane through the middle of what a model drew in a series, with its outline: axial, coronal or sagittal."""
    box = the_box()
    volumes = VolumeResults(box.store)
    record_look(box, volumes.study_of(job_id))
    return Response(volumes.picture(job_id, plane), content_type="image/png")


def _looked(instance_id: int) -> Box:
    box = the_box()
    record_look(box, box.worklist.study_of(instance_id))
    return box


def _pieces(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(view), _PIECE_BYTES):
        yield bytes(view[start : start + _PIECE_BYTES])
