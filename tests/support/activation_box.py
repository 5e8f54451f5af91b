"""What the tests of activation need: small bundles that behave well or badly on this box, and a box to put them to work on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from appliance.core.domain import Finding, JobResult, Note, ScanState, Source
from appliance.core.settings import Settings
from appliance.core.states import PENDING_STATES
from appliance.ingest.ingest import Ingest
from appliance.lifecycle import model_files
from appliance.lifecycle.activation import Activator
from appliance.lifecycle.journal import ActivationRequest, Journal
from appliance.lifecycle.journal_queries import reason_code
from appliance.store.store import Store
from tests.support.activated import activate
from tests.support.library_site import tiny_bundle
from tests.support.processes import children_running
from tests.support.scans import scan_bytes

LINE = "cxr-pneumonia"
ENDLESS = 2**62


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a bundle's manifest in place."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")
    return bundle


def watched(bundle: Path, **watch: Any) -> Path:
    """Set bounds of the trial."""
    return change_manifest(bundle, lambda manifest: manifest.update(watch=watch))


def rewire(bundle: Path, nodes: Callable[[Any], list[Any]]) -> Path:
    """Lead the model's ``cam`` through more nodes: they get the mean of the picture as ``mean`` and give a number ``extra``."""
    import onnx
    from onnx import helper

    path = bundle / "model_fp32.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "cam":
                node.output[index] = "cam_plain"
    position = next(index for index, node in enumerate(model.graph.node) if "cam_plain" in node.output) + 1
    more = [
        helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
        *nodes(model.graph),
        helper.make_node("Add", ["cam_plain", "extra"], ["cam"]),
    ]
    for offset, node in enumerate(more):
        model.graph.node.insert(position + offset, node)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return change_manifest(bundle, lambda manifest: [variant.update(sha256=digest) for variant in manifest["variants"]])


def _constant(graph: Any, name: str, value: Any) -> str:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def nan_on_pictures(bundle: Path) -> Path:
    """A model that answers to an empty picture and gives NaN to every other: the root of a negative number."""
    from onnx import helper

    return rewire(bundle, lambda _graph: [helper.make_node("Neg", ["mean"], ["minus"]), helper.make_node("Sqrt", ["minus"], ["extra"])])


def looping(bundle: Path, *, empty: int = 0, picture: int = 0, dark: int = 0, dark_below: float = 0.0) -> Path:
    """A model that goes round and round, so often for an empty picture (as at the building), for a dark one and for any other."""
    from onnx import TensorProto, helper

    def nodes(graph: Any) -> list[Any]:
        times = {name: _constant(graph, f"times_{name}", np.int64(n)) for name, n in (("empty", empty), ("dark", dark), ("other", picture))}
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sin", ["value"], ["value_next"])],
            "round",
            [
                helper.make_tensor_value_info("number", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("value", TensorProto.FLOAT, []),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("value_next", TensorProto.FLOAT, []),
            ],
        )
        zero = _constant(graph, "zero_f", np.float32(0))
        return [
            helper.make_node("Equal", ["mean", zero], ["is_empty"]),
            helper.make_node("Less", ["mean", _constant(graph, "dark_below", np.float32(dark_below))], ["is_dark"]),
            helper.make_node("Where", ["is_dark", times["dark"], times["other"]], ["times_picture"]),
            helper.make_node("Where", ["is_empty", times["empty"], "times_picture"], ["times"]),
            helper.make_node("Loop", ["times", _constant(graph, "yes", np.bool_(True)), zero], ["extra"], body=body),
        ]

    return rewire(bundle, nodes)


def hungry(bundle: Path) -> Path:
    """A model that asks for 64 GB for every picture."""
    from onnx import helper

    def nodes(graph: Any) -> list[Any]:
        shape = _constant(graph, "side", np.array([128_000, 128_000], np.int64))
        return [
            helper.make_node("Expand", ["mean", shape], ["vast"]),
            helper.make_node("Relu", ["vast"], ["vast_too"]),
            helper.make_node("ReduceMin", ["vast_too"], ["least"], keepdims=0),
            helper.make_node("Sub", ["least", "least"], ["extra"]),
        ]

    return rewire(bundle, nodes)


def junk(bundle: Path) -> Path:
    """A file that is no model, correctly named."""
    (bundle / "model_fp32.onnx").write_bytes(b"junk")
    digest = hashlib.sha256(b"junk").hexdigest()
    return change_manifest(bundle, lambda manifest: [variant.update(sha256=digest) for variant in manifest["variants"]])


def digest_of(bundle: Path) -> str:
    """The digest that names a bundle."""
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def wanted(bundle: Path, **changes: Any) -> ActivationRequest:
    """A wish for a bundle, by hand unless said otherwise."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    values = {
        "name": manifest["name"], "version": manifest["version"], "digest": digest_of(bundle), "source": "hand", "origin": bundle,
        "actor": "test",
    }  # fmt: skip
    return ActivationRequest(**(values | changes))


class Box:
    """A box with one good model, and what a test looks at."""

    def __init__(self, directory: Path, store: Store) -> None:
        self.bundles = directory / "bundles"
        self.bundles.mkdir(exist_ok=True)
        self.store = store
        self.journal = Journal(store)

    def bundle(self, version: str, **options: Any) -> Path:
        """A small bundle that behaves well."""
        return tiny_bundle(self.bundles, version, **options)

    def first(self, version: str = "1.0.0") -> str:
        """The model that is there before the one under test."""
        return activate(self.store, self.bundle(version), "test")

    def active(self, line: str = LINE) -> str | None:
        """The digest of the line's active model; asserts that its copy is whole and that nothing forbids it."""
        row = self.journal.active(line)
        if row is None:
            return None
        assert model_files.is_intact(self.store.settings.data_dir, row["digest"])
        assert self.journal.find_restriction(line, row["version"]) is None
        return str(row["digest"])

    def active_digest_is(self, digest: str) -> bool:
        """Whether a model is at work, forbidden or not."""
        row = self.journal.active(LINE)
        return row is not None and row["digest"] == digest

    def last(self) -> tuple[str, str]:
        """State and code of the last activation."""
        row = self.journal.history(1)[0]
        return row["state"], reason_code(row)

    def scan(self, series: str = "1") -> int:
        """A scan at the door, planned; the image's number."""
        accepted = Ingest(self.store).accept(scan_bytes(), Source("upload", "test", series))
        self.store.planner.close_series([accepted.stored.series_id])
        return accepted.stored.instance_id

    def work(self, score: float = 0.5, ms: float = 1.0) -> str:
        """Do the next job as a worker would, with this score after so many milliseconds; the digest of the model it was for."""
        job = self.store.queue.claim_job("test", 60)
        assert job is not None
        model = self.store.model(job.model_digest)
        finding = Finding(
            label="pneumonia", code="SCT:233604007", title_zh="肺炎", title_en="Pneumonia", score=score, threshold=0.4,
            positive=score >= 0.4, sensitivity=(0.9, 0.8, 1.0), specificity=(0.9, 0.8, 1.0), measured_on="x", model=model["name"],
            model_version=model["version"], model_digest=job.model_digest, precision="fp32", runtime="onnxruntime",
        )  # fmt: skip
        assert self.store.queue.finish_job(job, JobResult(ScanState.AI_READY, None, (finding,), (), {"infer": ms}))
        return job.model_digest

    def fail(self) -> None:
        """Fail the next job for good."""
        for _ in range(self.store.settings.job_max_attempts):
            job = self.store.queue.claim_job("test", 60)
            assert job is not None
            self.store.queue.fail_job(job, Note("job.error"))

    def activator(self, **options: Any) -> Activator:
        """The state machine in this process, for a test that steps it."""
        data_dir = self.store.settings.data_dir
        return Activator(self.store, lambda digest, _plan: model_files.load_copy(data_dir, digest), **options)

    def step_until(self, activator: Activator, reached: Callable[[], object], timeout_s: float = 60.0) -> None:
        """Step the machine until something is true."""
        limit = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < limit, f"never reached; {self.journal.history(1)[0]['state'] if self.journal.history(1) else '-'}"
            activator.tick()
            time.sleep(0.005)

    def settle(self, activator: Activator) -> None:
        """Step the machine until nothing is to be done any more."""
        activator.tick()
        self.step_until(activator, lambda: not activator.is_busy)

    def state(self, number: int) -> str:
        """The state of one activation."""
        return str(self.journal.row(number)["state"])

    def under_way(self, number: int) -> bool:
        """Whether an activation is before its switch."""
        return self.state(number) in PENDING_STATES


def write_settings(settings: Settings, **changes: Any) -> Settings:
    """Write the box's settings down for processes of their own."""
    values = {"web_port": 0, "dicom_port": 0, "disk_reserve_bytes": 0, "tune_at_activation": False, "tune_idle_wait_s": 0} | changes
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name} = {json.dumps(str(value) if isinstance(value, Path) else value)}\n" for name, value in values.items())
    (settings.data_dir / "box.toml").write_text(text)
    return Settings.load(settings.data_dir)


_workers: list[subprocess.Popen[bytes]] = []


def worker(settings: Settings, *arguments: str) -> subprocess.Popen[bytes]:
    """A worker of the box, in a process of its own; see :func:`end_workers`."""
    command = [sys.executable, "-m", "appliance", "worker", *arguments, "--data-dir", str(settings.data_dir)]
    _workers.append(subprocess.Popen(command, env=os.environ | {"APPLIANCE_LOG_LEVEL": "ERROR"}))
    return _workers[-1]


def finish_with(settings: Settings) -> int:
    """A worker that does everything there is to do; its exit code."""
    return worker(settings, "--until-idle").wait(120)


def end_workers() -> None:
    """End what a test that failed left running."""
    while _workers:
        process = _workers.pop()
        process.kill()
        process.wait()


def self_tests(process: subprocess.Popen[bytes] | None = None) -> list[psutil.Process]:
    """The proofs that a process (this one when None) has under way."""
    return [child for child in children_running("self-test", process.pid if process else None) if "self-test" in child.cmdline()]


def command(settings: Settings, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``appliance models ...`` on a box."""
    line = [sys.executable, "-m", "appliance", "models", *map(str, arguments), "--data-dir", str(settings.data_dir)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C.UTF-8"})
