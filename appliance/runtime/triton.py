"""A Triton Inference Server, the remote runtime for the clinics of a county (KServe v2 with NVIDIA's ``tritonclient``).

**The tensor leaves the box.** Nothing is sent unless the clinic has configured the server (``triton_url``). The box sends the ONNX file of
the model, which contains no patient data, and for each inference the prepared tensor: pixels that are cropped, resized and scaled for
the model. No name, identifier, date, DICOM tag or job number is sent.

The server needs EXPLICIT model control: the model is loaded through the repository API, with the file in the request. Its name contains
the digest of the file, so that only this variant can answer. The box unloads what it loaded. A server that lost the model, after a
restart or because another box unloaded it, gets it again only with the next ``load``: the server could optimise the file differently, and
the golden cases run only after a load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import numpy as np

from appliance.core.errors import InferenceError
from appliance.runtime import Candidate, OnProgress, TensorSpec
from appliance.runtime.tensors import DIRECTORY, check_outputs, check_signature, checked_input, describe_adapter, run_in_pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_S: Final = 5.0
ANSWER_S: Final = 30.0
LOAD_S: Final = 300.0
_EXTENSIONS: Final = ("model_repository", "binary_tensor_data")
_DETAIL_CHARS: Final = 300
_PREAMBLE: Final = re.compile(
    r"^\[\w+\] |load failed for model '[^']*': (?:version \d+ is at UNAVAILABLE state: )?|(?<=: )\[ONNXRuntimeError\] : "
)
# ONNX element type -> its name in KServe v2 and, after ``TYPE_``, in the configuration of a model.
_TYPES: Final = {1: "FP32", 10: "FP16", 6: "INT32", 7: "INT64", 9: "BOOL", 2: "UINT8", 3: "INT8"}


class TritonRuntime:
    """A model on a Triton server; see ``appliance.runtime.Runtime``.

    Args:
        candidate: ``provider`` is the server's address: ``https://host:port``, ``http://host:port`` or ``host:port``.
        connect_s: time limit for a connection; ``answer_s`` for an inference, ``load_s`` for loading a model on the server.
    """

    name = "triton"

    def __init__(self, candidate: Candidate, *, connect_s: float = CONNECT_S, answer_s: float = ANSWER_S, load_s: float = LOAD_S) -> None:
        self.version = ""
        self.precision = candidate.precision
        self.provider = candidate.provider
        self._candidate = candidate
        self._connect_s, self._answer_s, self._load_s = connect_s, answer_s, load_s
        self._input = ""
        self._shape: tuple[int, ...] = ()
        self._path: Path | None = None
        self._model: _Model | None = None
        self._is_registered = False  # in _open_models
        self._extensions: list[str] = []
        self._clients = threading.local()  # tritonclient's connections belong to the thread that created them (gevent)

    def load(self, model_path: Path, input_spec: TensorSpec, *, cache: Path | None = None, on_progress: OnProgress | None = None) -> None:
        """Load the model on the server unless it is there; see ``Runtime.load``. The server builds: no cache, no progress."""
        del cache, on_progress
        self._input, self._shape, self._path = input_spec.name, tuple(input_spec.shape), model_path
        model = _Model(model_path, self._candidate.batch)
        model.check(self._input, self._shape, self._candidate.batch)
        server = self._request(lambda client: client.get_server_metadata(), "the server")
        self.version = f"{server.get('name', '')} {server.get('version', '')}".strip()[:_DETAIL_CHARS]
        self._extensions = [str(name) for name in server.get("extensions", [])]
        absent = [name for name in _EXTENSIONS if name not in self._extensions]
        if absent:
            raise InferenceError("runtime.unavailable", f"{self.version} at {self.provider} has no {', '.join(absent)}")
        self._model, self._is_registered = model, True
        _open_models.enter(self.provider, model.name)
        if not self._request(lambda client: client.is_model_ready(model.name), "the server"):
            files = {"file:1/model.onnx": model.content()}
            _open_models.loaded(self.provider, model.name)  # registered before the load, so that a failed load is unloaded as well
            self._request(lambda client: client.load_model(model.name, config=model.config(), files=files), "loading", self._load_s)
            if not self._request(lambda client: client.is_model_ready(model.name), "the server"):
                raise InferenceError("job.error", f"{self.version} does not have the model ready after loading it")
        model.check_server(self._request(lambda client: client.get_model_metadata(model.name), "the server"))

    def warm_up(self) -> None:
        """Run once; see ``Runtime.warm_up``."""
        self.infer({self._input: np.zeros((self._candidate.batch, *self._shape), np.float32)})

    def infer(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Send the tensor and return the outputs; see ``Runtime.infer``."""
        value = checked_input(inputs, self._input, self._shape)
        model = self._model
        if model is None:
            raise InferenceError("job.error", "the runtime is closed")
        try:
            return run_in_pieces(value, model.batch, model.dynamic, lambda piece: self._send(model, piece))
        except _ModelMissingError:
            _open_models.lost(self.provider, model.name)  # another box may load a model of this name from now on
            raise

    def _send(self, model: _Model, value: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        http = _tritonclient()
        tensor = http.InferInput(self._input, list(value.shape), "FP32")
        tensor.set_data_from_numpy(value, binary_data=True)
        requested = [http.InferRequestedOutput(name, binary_data=True) for name in model.outputs]
        answer = self._request(lambda client: _answer(client.infer(model.name, [tensor], outputs=requested), model), "inference")
        check_outputs(answer, len(value))
        return answer

    def _request(self, action: Callable[[Any], T], what: str, seconds: float | None = None) -> T:
        """Send a request to the server; raises InferenceError, ``_ModelMissingError`` if it does not have the model."""
        try:
            return action(self._client(seconds or self._answer_s))
        except InferenceError:
            raise
        except Exception as error:  # tritonclient does not wrap the exceptions of sockets, gevent and its parsers
            self._close_connections()
            raise self._failure(error, what, seconds or self._answer_s) from error

    def _failure(self, error: Exception, what: str, seconds: float) -> InferenceError:
        text = _shorten(error)
        if isinstance(error, TimeoutError):
            return InferenceError("runtime.deadline", f"{what}: no answer from {self.provider} in {seconds:g} s")
        if isinstance(error, OSError) or type(error).__name__ in ("HTTPConnectionClosed", "ConnectionClosed"):
            return InferenceError("runtime.unavailable", f"{what}: {self.provider} cannot be reached ({text or type(error).__name__})")
        if type(error).__name__ == "InferenceServerException":
            if "unknown model" in text or "is not ready" in text or "is not found" in text or "has no available versions" in text:
                return _ModelMissingError("runtime.unavailable", f"{what}: the server does not have the model ({text})")
            if "out of memory" in text.lower():
                return InferenceError("runtime.memory", f"{what}: {text}")
            return InferenceError("runtime.build" if what == "loading" else "job.error", f"{what}: the server says: {text}")
        return InferenceError("job.error", f"{what}: the server's answer cannot be read ({type(error).__name__}: {text})")

    def _client(self, seconds: float) -> Any:
        """Return the connection of this thread with a time limit."""
        clients = self._clients.__dict__.setdefault("by_limit", {})
        if seconds not in clients:
            address = urlsplit(self.provider if "://" in self.provider else f"http://{self.provider}")
            if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
                raise InferenceError("job.error", f"{self.provider!r} is no address of a server")
            clients[seconds] = _tritonclient().InferenceServerClient(
                address.netloc + address.path.rstrip("/"), ssl=address.scheme == "https",
                connection_timeout=self._connect_s, network_timeout=seconds,
            )  # fmt: skip
        return clients[seconds]

    def _close_connections(self) -> None:
        """Close the connections of this thread: after a failure they may contain part of a response."""
        for client in self._clients.__dict__.pop("by_limit", {}).values():
            with suppress(Exception):
                client.close()

    def describe(self) -> dict[str, Any]:
        """Describe what ran; see ``Runtime.describe``.

        ``version`` is name and version of the server, ``extensions`` its extensions, ``model`` the name of the model there;
        ``leaves_box``: the prepared tensor was sent there.
        """
        return describe_adapter(self, self._candidate.threads, self._model.batch if self._model else self._candidate.batch) | {
            "model": self._model.name if self._model else "", "extensions": list(self._extensions), "leaves_box": True,
            "sent": "the prepared tensor only, no identifiers",
        }  # fmt: skip

    def close(self) -> None:
        """Unload the model on the server if this process loaded it and nothing else here uses it."""
        model, self._model = self._model, None
        if model is not None and self._is_registered and _open_models.leave(self.provider, model.name):
            try:
                self._request(lambda client: client.unload_model(model.name), "unloading")
            except InferenceError as error:
                logger.warning("the Triton server may still hold the model: %s", error.detail)
        self._close_connections()


class _ModelMissingError(InferenceError):
    """The server does not have the model."""


class _OpenModels:
    """The models that this process uses on servers; what it loaded there stays until the last user is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: Counter[tuple[str, str]] = Counter()
        self._loaded_here: set[tuple[str, str]] = set()

    def enter(self, server: str, model: str) -> None:
        """Count a user of a model."""
        with self._lock:
            self._open[server, model] += 1

    def loaded(self, server: str, model: str) -> None:
        """Record that this process loads a model."""
        with self._lock:
            self._loaded_here.add((server, model))

    def lost(self, server: str, model: str) -> None:
        """Record that the server has lost a model."""
        with self._lock:
            self._loaded_here.discard((server, model))

    def leave(self, server: str, model: str) -> bool:
        """Count a user less; returns whether the model must be unloaded."""
        with self._lock:
            self._open[server, model] -= 1
            if self._open[server, model] > 0 or (server, model) not in self._loaded_here:
                return False
            self._loaded_here.discard((server, model))
            return True


_open_models = _OpenModels()


class _Model:
    """An ONNX file with its name and configuration on a server.

    Attributes:
        name: on the server; contains the digest of the file and the largest batch.
        batch: largest batch.
        dynamic: whether smaller batches are possible.
        outputs: names of the outputs.
    """

    def __init__(self, path: Path, batch: int) -> None:
        self._path = path
        data = self.content()
        self._inputs, self._outputs = _signature(data)
        first = self._inputs[0][2][0] if self._inputs and self._inputs[0][2] else None
        self.dynamic = first == -1
        self.batch = batch if self.dynamic else int(first or 1)
        self.name = f"edge-{hashlib.sha256(data).hexdigest()[:40]}-b{self.batch}"
        self.outputs = [name for name, _, _ in self._outputs]

    def content(self) -> bytes:
        """Read the file; it is not held in memory, because it is needed only for a load."""
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise InferenceError("job.error", f"the model cannot be read: {error.strerror}") from error

    def check(self, name: str, shape: tuple[int, ...], batch: int) -> None:
        """Compare the input of the file with the manifest; raises InferenceError ``job.error``."""
        names = ", ".join(item[0] for item in self._inputs)
        kind, dims = self._inputs[0][1:] if self._inputs else ("", [])
        check_signature(names, [None if n == -1 else n for n in dims], kind, name, shape, batch)

    def config(self) -> str:
        """Return the complete configuration (backend ONNX Runtime, inputs, outputs), so that the server guesses nothing."""
        drop = 1 if self.dynamic else 0  # with max_batch_size the dimensions do not include the batch

        def tensors(items: list[tuple[str, str, list[int]]]) -> list[dict[str, Any]]:
            return [{"name": name, "data_type": f"TYPE_{kind}", "dims": dims[drop:] or [1]} for name, kind, dims in items]

        config = {
            "name": self.name, "backend": "onnxruntime", "default_model_filename": "model.onnx",
            "max_batch_size": self.batch if self.dynamic else 0, "input": tensors(self._inputs), "output": tensors(self._outputs),
        }  # fmt: skip
        return json.dumps(config)

    def check_server(self, metadata: dict[str, Any]) -> None:
        """Compare the description of the model on the server with the file; raises InferenceError ``job.error``."""
        for kind, expected in (("inputs", self._inputs), ("outputs", self._outputs)):
            served_tensors = {item.get("name"): (item.get("datatype"), item.get("shape", [])) for item in metadata.get(kind, [])}
            for name, datatype, dims in expected:
                served, shape = served_tensors.get(name, ("", []))
                same = len(shape) == len(dims) and all(-1 in (int(n), m) or int(n) == m for n, m in zip(shape, dims, strict=True))
                if served != datatype or not same:
                    raise InferenceError("job.error", f"the server has {name!r} as {served} {shape}, the file {datatype} {dims}")
        if metadata.get("name") != self.name:
            raise InferenceError("job.error", f"the server describes the model {metadata.get('name')!r}")


def _signature(data: bytes) -> tuple[list[tuple[str, str, list[int]]], list[tuple[str, str, list[int]]]]:
    """Read inputs and outputs of an ONNX file: name, type, and dimensions, -1 for a dynamic one."""
    import onnx

    try:
        graph = onnx.load_model_from_string(data).graph
    except Exception as error:  # the decoding errors of protobuf have no public base class
        raise InferenceError("job.error", "the file is no ONNX model") from error
    constants = {item.name for item in graph.initializer}

    def read(items: Any) -> list[tuple[str, str, list[int]]]:
        tensors = []
        for item in items:
            tensor = item.type.tensor_type
            dims = [int(dim.dim_value) if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
            tensors.append((item.name, _TYPES.get(tensor.elem_type, f"type {tensor.elem_type}"), dims))
        return tensors

    return read(item for item in graph.input if item.name not in constants), read(graph.output)


def _answer(result: Any, model: _Model) -> dict[str, NDArray[Any]]:
    response = result.get_response()
    if response.get("model_name") != model.name:
        raise InferenceError("job.error", f"the server answered with the model {response.get('model_name')!r}")
    outputs = {}
    for name, kind, dims in model._outputs:
        value = result.as_numpy(name)
        fits = value is not None and value.ndim == len(dims) and all(m in (-1, n) for n, m in zip(value.shape, dims, strict=True))
        if value is None or not fits:
            raise InferenceError("job.error", f"the server answered {name!r} as {None if value is None else list(value.shape)}, not {dims}")
        outputs[name] = np.array(value, np.float32 if kind in ("FP32", "FP16") else value.dtype)
    return outputs


def _shorten(error: Exception) -> str:
    """Return the message of the server without its preamble and its directories."""
    text = _PREAMBLE.sub("", " ".join(str(error).split()))
    return DIRECTORY.sub("", text)[:_DETAIL_CHARS]


def _tritonclient() -> Any:
    try:
        import tritonclient.http
    except ImportError as error:
        raise InferenceError("runtime.unavailable", f"tritonclient: {error.name or error} is not installed") from error
    return tritonclient.http
