"""A small KServe v2 server over a real socket, backed by the real ONNX Runtime, that can be told to misbehave.

It speaks what the adapter uses: health, server and model metadata, Triton's repository API with a file in the request, and inference
with the binary tensor extension. ``fault`` makes it answer wrongly. The real server is ``triton_server``; this one is for what a
real one never does, and for machines that cannot run it.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import onnxruntime as ort

_LENGTH = "Inference-Header-Content-Length"


class KserveServer:
    """The server; ``address`` is where it answers.

    Args:
        port: where to listen; the kernel chooses when 0.

    Attributes:
        fault: what it does wrong; see ``_Handler``.
        slow_s: how long a "slow" answer takes, seconds.
        seen: every request: method, path, headers and body.
        silent: how many requests wait while the fault is "silent": the line is taken, and nothing is ever said until :meth:`speak`.
        inferences: how many were asked for.
        dies_at: the inference from which on its backend is dead; never when 0.
        models: what is loaded: name -> (session, configuration).
        extensions: what it says it can.
    """

    def __init__(self, port: int = 0) -> None:
        self.fault = ""
        self.slow_s = 3.0
        self.silent = 0
        self.inferences = 0
        self.dies_at = 0
        self._speaks = threading.Event()
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.models: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.connections: set[socket.socket] = set()
        self.extensions = ["model_repository", "binary_tensor_data"]
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"site": self}))
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def speak(self) -> None:
        """Answer all that waits, and what comes."""
        self.fault = ""
        self._speaks.set()

    def wait(self) -> None:
        """Say nothing as long as that is the fault."""
        if self.fault == "silent":
            self.silent += 1
            self._speaks.wait()
            self.silent -= 1

    def close(self) -> None:
        """Stop answering, on the lines that are open too."""
        self._speaks.set()
        self._server.shutdown()
        for connection in list(self.connections):
            with suppress(OSError):  # the other side was faster
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: KserveServer

    def setup(self) -> None:
        super().setup()
        self.site.connections.add(self.connection)

    def finish(self) -> None:
        self.site.connections.discard(self.connection)
        with suppress(OSError):  # cut on purpose
            super().finish()

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, body: bytes) -> None:
        self.site.seen.append((self.command, self.path, dict(self.headers), body))
        self.site.wait()
        parts = self.path.strip("/").split("/")
        if parts == ["v2"]:
            self._json({"name": "small", "version": "1", "extensions": self.site.extensions})
        elif parts[:3] == ["v2", "repository", "models"]:
            self._repository(parts[3], parts[4], body)
        elif parts[:2] == ["v2", "models"] and parts[2] not in self.site.models:
            self._json({"error": f"Request for unknown model: '{parts[2]}' is not found"}, 400)
        elif parts[-1] == "ready":
            self._send(200, b"", {})
        elif parts[-1] == "infer":
            self._infer(parts[2], body)
        else:
            self._metadata(parts[2])

    def _repository(self, name: str, verb: str, body: bytes) -> None:
        if verb == "unload":
            self.site.models.pop(name, None)
            return self._send(200, b"", {})
        if self.site.fault == "out of memory":
            return self._json({"error": f"load failed for model '{name}': CUDA out of memory"}, 400)
        given = json.loads(body)["parameters"]
        try:
            session = ort.InferenceSession(base64.b64decode(given["file:1/model.onnx"]))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions have no public base
            return self._json({"error": f"load failed for model '{name}': {error}"}, 400)
        if self.site.fault != "never ready":
            self.site.models[name] = (session, json.loads(given["config"]))
        return self._send(200, b"", {})

    def _metadata(self, name: str) -> None:
        session, _ = self.site.models[name]

        def tensors(items: Any) -> list[dict[str, Any]]:
            dims = [[n if isinstance(n, int) else -1 for n in item.shape] for item in items]
            return [{"name": item.name, "datatype": "FP32", "shape": shape} for item, shape in zip(items, dims, strict=True)]

        said = {"name": name, "versions": ["1"], "inputs": tensors(session.get_inputs()), "outputs": tensors(session.get_outputs())}
        if self.site.fault == "another model":
            said["name"] = "another"
        elif self.site.fault == "another type":
            said["outputs"][0]["datatype"] = "FP16"
        elif self.site.fault == "another input":
            said["inputs"][0]["shape"] = [-1, 3, 8, 8]
        elif self.site.fault == "no output":
            said["outputs"] = []
        self._json(said)

    def _infer(self, name: str, body: bytes) -> None:
        fault, session = self.site.fault, self.site.models[name][0]
        self.site.inferences += 1
        if fault == "500" or 0 < self.site.dies_at <= self.site.inferences:
            return self._json({"error": "the backend died"}, 500)
        if fault == "slow":
            time.sleep(self.site.slow_s)
        length = int(self.headers[_LENGTH])
        given = json.loads(body[:length])["inputs"][0]
        tensor = np.frombuffer(body[length:], np.float32).reshape(given["shape"])
        names = [item.name for item in session.get_outputs()]
        return self._answer(name, dict(zip(names, session.run(names, {given["name"]: tensor}), strict=True)))

    def _answer(self, name: str, outputs: dict[str, Any]) -> None:
        fault = self.site.fault
        first = next(iter(outputs))
        if fault == "wrong shape":
            outputs[first] = outputs[first].reshape(-1)
        elif fault == "wrong batch":
            outputs = {key: np.concatenate([value, value]) for key, value in outputs.items()}
        elif fault == "no number":
            outputs[first] = np.full_like(outputs[first], np.nan)
        elif fault == "missing output":
            del outputs[first]
        elif fault == "lies":
            outputs[first] = 1 - outputs[first]
        listed = [
            {"name": key, "datatype": "FP32", "shape": list(value.shape), "parameters": {"binary_data_size": value.nbytes}}
            for key, value in outputs.items()
        ]
        head = json.dumps({"model_name": "another" if fault == "answers for another" else name, "outputs": listed}).encode()
        data = b"".join(value.astype(np.float32).tobytes() for value in outputs.values())
        if fault == "short data":
            data = data[:-4]
        elif fault == "nonsense":
            head = b"<html>sorry</html>"
        self._send(200, head + data, {_LENGTH: str(len(head))}, cut=fault == "cut")

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        try:
            self._write(status, body, headers, cut)
        except ConnectionError:  # whoever asked has given up meanwhile
            self.close_connection = True

    def _write(self, status: int, body: bytes, headers: dict[str, str], cut: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if cut:  # half of it, then the line is dead
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)
