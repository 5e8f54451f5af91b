"""A real signed library in a folder, with keys in memory; a small valid bundle; a plain web server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
from securesystemslib.signer import CryptoSigner

from appliance.lifecycle.model_control import reference_bundle
from model_sync.library import publish, rollouts
from model_sync.library.library import Library
from model_sync.library.roles import RoleState
from model_sync.trust.documents import FailureBudget
from tests.support.binding_gate import write_gate

_CAM = 7
_SIZE = 224


@contextmanager
def older_publish() -> Iterator[None]:
    """Publish as the central software did before it compared the gate record and ran golden cases: boxes must find out for themselves."""
    before = publish._check_measured
    publish._check_measured = lambda *_: None
    try:
        yield
    finally:
        publish._check_measured = before


@dataclass
class Site:
    """A library whose every key is at hand, so that each operation is public at once; ``by_hand`` gives one without.

    ``holders`` maps a role to its signers; alice, bob and carol hold root and targets.
    """

    library: Library
    public: Path
    root: Path
    holders: dict[str, list[CryptoSigner]] = field(default_factory=dict)

    def publish(self, bundle: Path, *, deltas: bool = True, minimum_version: str | None = None) -> RoleState:
        """Publish a bundle; its line is added when it is new."""
        line = json.loads((bundle / "manifest.json").read_text("utf-8"))["name"]
        if line not in self.library.lines():
            self.add_line(line)
        return publish.publish(self.library, bundle, deltas=deltas, minimum_version=minimum_version)

    def add_line(self, line: str) -> RoleState:
        """Add a line with two keys of its own."""
        self._keys(line, 2)
        return self.library.add_line(line, [signer.public_key for signer in self.holders[line]], threshold=2)

    def rollout(
        self,
        ring: str,
        line: str,
        version: str,
        percent: float = 100.0,
        start: datetime | None = None,
        duration_h: float = 0.0,
        failure_budget: FailureBudget | None = None,
        paused: bool = False,
    ) -> RoleState:
        """Let a ring take a version."""
        return rollouts.rollout(self.library, ring, line, version, percent, start, duration_h, failure_budget, paused)

    def withdraw(self, line: str, version: str, reason: str = "reads too many healthy children as ill") -> RoleState:
        """Withdraw a version."""
        return publish.withdraw(self.library, line, version, reason)

    def sign_all(self) -> list[str]:
        """Give every waiting role the signatures of all its holders; returns the roles that still wait."""
        for role in self.library.staged_roles():
            for signer in self.holders.get(role, []):
                if role in self.library.staged_roles() and signer.public_key.keyid in self.library.keys(role):
                    self.library.sign(role, signer)
        return self.library.staged_roles()

    def by_hand(self) -> Library:
        """Return the same library with only its online keys at hand, as the central team's machine has it."""
        online = [*self.holders["snapshot"], *self.holders["timestamp"]]
        return Library(self.library.files.directory, online)

    def _keys(self, role: str, count: int) -> None:
        self.holders[role] = [CryptoSigner.generate_ed25519() for _ in range(count)]
        self.library.signers.update({signer.public_key.keyid: signer for signer in self.holders[role]})


def make_site(directory: Path, lines: Sequence[str] = ("cxr-pneumonia",), *, rollout: bool = True, **options: Any) -> Site:
    """Make a library in ``directory`` with root and targets 2-of-3, a rollout role, and lines without a version yet."""
    people = [CryptoSigner.generate_ed25519() for _ in range(3)]
    online = {role: CryptoSigner.generate_ed25519() for role in ("snapshot", "timestamp")}
    library = Library.init(
        directory,
        [signer.public_key for signer in people],
        [signer.public_key for signer in people],
        snapshot_key=online["snapshot"].public_key,
        timestamp_key=online["timestamp"].public_key,
        signers=[*people, *online.values()],
        holders=dict(zip((signer.public_key.keyid for signer in people), ("alice", "bob", "carol"), strict=True)),
        **options,
    )
    public = library.files.public
    site = Site(library, public, public / "metadata" / "1.root.json", {"root": people, "targets": people})
    site.holders.update({role: [signer] for role, signer in online.items()})
    if rollout:
        site._keys("rollout", 1)
        library.set_rollout_keys([site.holders["rollout"][0].public_key])
    for line in lines:
        site.add_line(line)
    return site


def tiny_bundle(
    directory: Path,
    version: str = "0.1.0",
    seed: int = 0,
    line: str = "cxr-pneumonia",
    *,
    hidden: int = 8,
    drift: float = 0.0,
    good: bool = True,
) -> Path:
    """Write a small valid bundle into ``directory/<line>-<version>`` and return that folder.

    Args:
        directory: where.
        version: its version.
        seed: another seed, other weights.
        line: its name.
        hidden: width of the layer that carries the weights; 2,000 make about 4 MB.
        drift: moves every weight of ``seed`` by this many standard deviations, as a fine-tuning does.
        good: False writes golden cases that the model does not meet, for a self-test that fails; such a bundle cannot be published.
    """
    bundle = directory / f"{line}-{version}"
    (bundle / "golden").mkdir(parents=True)
    onnx_bytes = _tiny_onnx(seed, hidden, drift)
    manifest = json.loads((reference_bundle() / "manifest.json").read_text("utf-8"))
    manifest.pop("input_check", None)  # its film would not pass that of the reference model
    cases = _golden(onnx_bytes, seed, 0.0 if good else 0.5)
    files = {
        "model_fp32.onnx": onnx_bytes,
        "MODEL_CARD.md": f"# {line} {version}\n\nA test model.\n".encode(),
        **{name: data for name, (data, _) in cases.items()},
    }
    for name, data in files.items():
        (bundle / name).write_bytes(data)
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    variant = {"precision": "fp32", "file": "model_fp32.onnx", "sha256": sha256["model_fp32.onnx"], "recipe": "tests", "gate": "gate.json"}
    manifest.update(
        name=line,
        version=version,
        variants=[variant],
        golden=[
            {"input": name, "sha256": sha256[name], "expected": {"pneumonia": score}, "tolerance": {"fp32": 0.002}}
            for name, (_, score) in cases.items()
        ],
        documents=[{"file": "MODEL_CARD.md", "sha256": sha256["MODEL_CARD.md"]}],
    )
    (bundle / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=2), "utf-8")
    write_gate(bundle)
    return bundle


def _tiny_onnx(seed: int, hidden: int, drift: float) -> bytes:
    """A network of one hidden layer on 7 x 7 mean brightnesses: cam [n, 1, 7, 7] and its mean's sigmoid."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = {
        "lift": (rng.standard_normal((hidden, 1, 1, 1)) * 4).astype(np.float32),
        "mix": (rng.standard_normal((1, hidden, 1, 1)) / hidden**0.5 * 4).astype(np.float32),
        "ballast": rng.standard_normal((hidden, hidden)).astype(np.float32),
    }
    moved = np.random.default_rng(seed + 1000)
    for name, value in weights.items():
        weights[name] = (value + drift * value.std() * moved.standard_normal(value.shape)).astype(np.float32)
    # The ballast makes the file as large as asked for and takes part with a weight of next to nothing.
    nodes = [
        helper.make_node("AveragePool", ["image"], ["means"], kernel_shape=[_SIZE // _CAM] * 2, strides=[_SIZE // _CAM] * 2),
        helper.make_node("Conv", ["means", "lift"], ["lifted"]),
        helper.make_node("Tanh", ["lifted"], ["features"]),
        helper.make_node("Conv", ["features", "mix"], ["raw"]),
        helper.make_node("ReduceMean", ["ballast"], ["offset"], keepdims=0),
        helper.make_node("Add", ["raw", "offset"], ["cam"]),
        helper.make_node("ReduceMean", ["cam"], ["logit"], axes=[2, 3], keepdims=0),
        helper.make_node("Sigmoid", ["logit"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, _SIZE, _SIZE])],
        [
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["n", 1]),
            helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["n", 1, _CAM, _CAM]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())


def _golden(onnx_bytes: bytes, seed: int, lie: float) -> dict[str, tuple[bytes, float]]:
    """Two pictures with the answers of the model itself; ``lie`` is added to the probability, modulo 1."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed + 1)
    cases = {}
    for name in ("golden/a.npz", "golden/b.npz"):
        # Blocks of one brightness, already of the model's size: whatever resizes it, it stays what it is.
        pixels = np.kron(rng.integers(0, 256, (_CAM, _CAM), dtype=np.uint8), np.ones((_SIZE // _CAM,) * 2, np.uint8))
        probability, cam = session.run(["probability", "cam"], {"image": pixels[None, None].astype(np.float32) / 255.0})
        probability = ((probability + lie) % 1.0).astype(np.float32)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, pixels=pixels, probability=probability, cam=cam)
        cases[name] = (buffer.getvalue(), float(probability[0, 0]))
    return cases


class _Handler(SimpleHTTPRequestHandler):
    """Static files over HTTP/1.1 with byte ranges and strong entity tags, as any web server serves the library."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        """Keep the tests' output quiet."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        begin, end = 0, len(data)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.headers.get("If-Range", tag) == tag:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            if begin >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.write(data[begin:end])


@contextmanager
def serve(public: Path) -> Iterator[str]:
    """Serve a library's public tree on 127.0.0.1; yields its base URL without a slash at the end."""

    def handler(*arguments: Any) -> _Handler:
        return _Handler(*arguments, directory=str(public))

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
