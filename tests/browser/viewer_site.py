"""A page with the built viewer and synthetic pictures, served by the standard library under the box's own CSP.

It stands in for the Flask side, so that a failure of the bundle is seen as one: `ViewerSite.page(...)` gives the
address of a study page with the pictures named, and `PICTURES` says what they are.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VIEWER_DIR = Path(__file__).parents[2] / "webui" / "static" / "viewer"
CSP = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "worker-src 'self' blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
CONTENT_TYPES = {".js": "text/javascript", ".css": "text/css", ".md": "text/markdown"}


def chest(rows: int, columns: int) -> NDArray[np.float64]:
    """A rough chest, 0 to 1: bright body, two dark lungs, a bright spot in one of them."""
    y, x = np.mgrid[0:rows, 0:columns]
    u, v = (x + 0.5) / columns, (y + 0.5) / rows
    body = 0.75 * np.exp(-(((u - 0.5) / 0.42) ** 6)) + 0.05
    lungs = sum(np.exp(-((((u - c) / 0.15) ** 2 + ((v - 0.45) / 0.28) ** 2) ** 2)) for c in (0.3, 0.7))
    ribs = 0.05 * np.sin(v * 60) * (body > 0.4)
    spot = 0.3 * np.exp(-(((u - 0.7) / 0.06) ** 2 + ((v - 0.55) / 0.05) ** 2))
    return np.clip(body - 0.55 * lungs + ribs + spot, 0, 1)


@dataclass
class Picture:
    """One image: pixels [frames, rows, columns] or [frames, rows, columns, 3] and what the box says about them.

    The pixels are drawn when a page first asks for them: collecting the tests must cost nothing.
    """

    draw: Callable[[], NDArray[Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    findings: list[dict[str, Any]] = field(default_factory=list)
    heatmap: NDArray[np.uint8] | None = None
    meta_problem: tuple[int, dict[str, str]] | None = None
    frame_problem: tuple[int, dict[str, str]] | None = None
    cut_bytes: int = 0

    @cached_property
    def pixels(self) -> NDArray[Any]:
        return self.draw()

    @cached_property
    def description(self) -> dict[str, Any]:
        frames, rows, columns = self.pixels.shape[:3]
        colour = self.pixels.ndim == 4
        finite = self.pixels[np.isfinite(self.pixels)] if self.pixels.dtype.kind == "f" else self.pixels
        return {
            "rows": rows,
            "columns": columns,
            "frames": frames,
            "samples": 3 if colour else 1,
            "dtype": self.pixels.dtype.name,
            "slope": 1,
            "intercept": 0,
            "windows": [],
            "voi_function": "LINEAR",
            "photometric": "RGB" if colour else "MONOCHROME2",
            "spacing": [0.2, 0.2],
            "min": float(finite.min()),
            "max": float(finite.max()),
        } | self.meta


def _finding(number: int, label: str, score: float, box: tuple[float, float, float, float]) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "id": number,
        "label": label,
        "score": score,
        "threshold": 0.41,
        "positive": score >= 0.41,
        "heatmap_url": f"/api/findings/{number}/heatmap.png",
        "outline": [[[left, top], [right, top], [right, bottom], [left, bottom]]],
        "peak": [(left + right) / 2, (top + bottom) / 2],
    }


def _bump(rows: int, columns: int, at: tuple[float, float], spread: float) -> NDArray[np.uint8]:
    """A heat map with its maximum at the fraction `at` = (x, y) of the image."""
    y, x = np.mgrid[0:rows, 0:columns]
    distance = ((x + 0.5) / columns - at[0]) ** 2 + ((y + 0.5) / rows - at[1]) ** 2
    return (255 * np.exp(-distance / spread**2)).astype(np.uint8)


def _edge() -> NDArray[np.uint8]:
    """Black, with a white rectangle whose corners are known: columns 30 to 70, rows 40 to 60 of 100 x 100."""
    pixels = np.zeros((1, 100, 100), np.uint8)
    pixels[0, 40:60, 30:70] = 255
    return pixels


def _body(dtype: type, factor: float, offset: float = 0) -> Callable[[], NDArray[Any]]:
    """A chest of 880 x 1024 pixels with the values `offset` to `offset + factor`."""
    return lambda: (chest(1024, 880)[np.newaxis] * factor + offset).astype(dtype)


def _with_nan() -> NDArray[np.float32]:
    pixels = _body(np.float32, 3e-4, -1e-4)()
    pixels[0, :8, :8] = np.nan
    return pixels


def _colour() -> NDArray[np.uint8]:
    grey = chest(1024, 880)[np.newaxis, :, :, np.newaxis]
    return (grey * [255, 204, 153]).astype(np.uint8)


def _cine() -> NDArray[np.uint16]:
    return np.stack([chest(256, 256) * (4000 - 400 * i) for i in range(5)]).astype(np.uint16)


def _huge() -> NDArray[np.uint16]:
    return np.tile((chest(600, 600) * 60000).astype(np.uint16), (1, 10, 12))


def _tall() -> NDArray[np.uint16]:
    return (chest(2000, 500)[np.newaxis] * 65535).astype(np.uint16)


def _problem(status: int, title: str, detail: str) -> tuple[int, dict[str, str]]:
    return status, {"title": title, "detail": detail}


def _pictures() -> dict[int, Picture]:
    grey8 = _body(np.uint8, 255)
    pneumonia = _finding(5, "肺炎", 0.87, (528, 462, 704, 666))
    tall = _finding(8, "肺炎", 0.93, (300, 1000, 400, 1200))
    edge = _finding(9, "box", 0.9, (30, 40, 70, 60))
    two = [_finding(21, "肺炎", 0.72, (180, 400, 340, 600)), _finding(22, "胸腔积液", 0.22, (560, 700, 760, 860))]
    broken = _problem(422, "像素数据已损坏", "第 1 帧的 JPEG 码流被截断。")
    missing = _problem(404, "No such frame", "The image has 1 frame.")
    spot = _bump(64, 55, (0.7, 0.55), 0.08)
    return {
        1: Picture(grey8, {"windows": [[128, 256], [90, 80]]}, "胸部正位 PA", [pneumonia], spot),
        2: Picture(_body(np.int16, 3000, -1024), {"windows": [[400, 2000]]}, "int16"),
        3: Picture(_body(np.uint16, -4095, 4095), {"photometric": "MONOCHROME1"}, "MONOCHROME1"),
        4: Picture(_body(np.uint16, 1000), {"spacing": [0, 0]}, "spacing 0"),
        5: Picture(_colour, {"spacing": None}, "RGB"),
        6: Picture(_with_nan, {}, "float32"),
        7: Picture(_cine, {"spacing": None}, "multi-frame"),
        8: Picture(_tall, {}, "500 x 2000", [tall], _bump(256, 64, (0.7, 0.55), 0.05)),
        9: Picture(_edge, {"spacing": [0.2, 0.1]}, "edge", [edge], _bump(100, 100, (0.5, 0.5), 0.1)),
        10: Picture(_body(np.int32, 4e9, -2e9), {"slope": -1, "intercept": 5}, "int32"),
        11: Picture(_body(np.int8, 250, -125), {}, "int8"),
        12: Picture(_edge, {}, "refused", meta_problem=broken),
        13: Picture(grey8, {}, "cut", cut_bytes=1000),
        14: Picture(grey8, {}, "two findings", two, _bump(64, 55, (0.3, 0.5), 0.1)),
        15: Picture(_huge, {}, "43 megapixels"),
        16: Picture(grey8, {}, "frame refused", frame_problem=missing),
        17: Picture(lambda: np.full((1, 64, 64), 7, np.uint16), {"spacing": None}, "constant"),
        18: Picture(_body(np.uint32, 4e9), {}, "uint32"),
    }


PICTURES = _pictures()


class ViewerSite:
    """The running server; `tries` counts how often an address was asked for."""

    def __init__(self, url: str, tries: dict[str, int]) -> None:
        self.url = url
        self.tries = tries

    def page(self, *images: int, lang: str = "en", renderer: str = "webgl") -> str:
        """The address of a study page with these pictures; by default with WebGL where there is some, even if emulated."""
        return f"{self.url}/study?images={','.join(map(str, images))}&lang={lang}&renderer={renderer}"


def _config(query: dict[str, list[str]]) -> dict[str, Any]:
    lang = query["lang"][0]
    keys = json.loads((Path(__file__).parents[2] / "webui" / "viewer" / "TEXT_KEYS.json").read_text("utf-8"))
    numbers = [int(number) for number in query["images"][0].split(",") if number]
    return {
        "lang": lang,
        "renderer": query["renderer"][0],
        "text": {key: words[lang] for key, words in keys.items()},
        "images": [
            {
                "id": number,
                "meta_url": f"/api/instances/{number}/pixels",
                "frame_url": f"/api/instances/{number}/frames/{{frame}}",
                "title": PICTURES[number].title,
                "findings": PICTURES[number].findings,
            }
            for number in numbers
        ],
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tries: dict[str, int]
    files: dict[str, bytes]

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the test's output is for failures."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.tries[url.path] = self.tries.get(url.path, 0) + 1
        parts = url.path.strip("/").split("/")
        if url.path == "/study":
            self._study(parse_qs(url.query, keep_blank_values=True))
        elif url.path == "/page.css":
            self._send(200, "text/css", b"body { margin: 8px; background: #10151a; }")
        elif parts[:2] == ["static", "viewer"]:
            name = parts[2]
            self._send(200, CONTENT_TYPES[Path(name).suffix], self.files[name])
        elif parts[:2] == ["api", "instances"] and parts[3] == "pixels":
            self._meta(PICTURES[int(parts[2])])
        elif parts[:2] == ["api", "instances"]:
            self._frame(PICTURES[int(parts[2])], int(parts[4]))
        elif parts[:2] == ["api", "findings"]:
            self._heatmap(int(parts[2]))
        else:
            self._send(204, "image/x-icon", b"")

    def _study(self, query: dict[str, list[str]]) -> None:
        config = html.escape(json.dumps(_config(query), ensure_ascii=False), quote=True)
        lang = "zh-CN" if query["lang"][0] == "zh" else "en"
        body = (
            f'<!doctype html><html lang="{lang}"><meta charset="utf-8"><title>Study</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="stylesheet" href="/static/viewer/viewer.css"><link rel="stylesheet" href="/page.css">'
            f"<div id=\"viewer\" data-config='{config}'></div>"
            '<script type="module" src="/static/viewer/viewer.js"></script></html>'
        )
        self._send(200, "text/html; charset=utf-8", body.encode())

    def _meta(self, picture: Picture) -> None:
        if picture.meta_problem:
            self._refuse(*picture.meta_problem)
        else:
            self._send(200, "application/json", json.dumps(picture.description).encode())

    def _frame(self, picture: Picture, number: int) -> None:
        if picture.frame_problem:
            self._refuse(*picture.frame_problem)
            return
        frame = np.ascontiguousarray(picture.pixels[number])
        data = frame.astype(frame.dtype.newbyteorder("<")).tobytes()
        data = data[: len(data) - picture.cut_bytes]
        # Every other frame compressed: the viewer must measure progress by the size it expects.
        self._send(200, "application/octet-stream", data, compress=number % 2 == 0)

    def _heatmap(self, finding: int) -> None:
        for picture in PICTURES.values():
            if any(f["id"] == finding for f in picture.findings) and picture.heatmap is not None:
                out = io.BytesIO()
                Image.fromarray(picture.heatmap).save(out, "PNG")
                self._send(200, "image/png", out.getvalue())

    def _refuse(self, status: int, problem: dict[str, str]) -> None:
        self._send(status, "application/problem+json", json.dumps(problem).encode())

    def _send(self, status: int, content_type: str, body: bytes, *, compress: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if compress:
            body = gzip.compress(body, 1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve() -> Iterator[ViewerSite]:
    """Runs the site on a free port of the loopback interface."""
    tries: dict[str, int] = {}
    # Read once: a build that runs meanwhile must not take the page away.
    files = {path.name: path.read_bytes() for path in VIEWER_DIR.iterdir() if path.suffix in CONTENT_TYPES}
    handler = type("Handler", (_Handler,), {"tries": tries, "files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield ViewerSite(f"http://127.0.0.1:{server.server_address[1]}", tries)
        server.shutdown()
        thread.join()
