"""``make bench``: this box against the floor, in one run on one machine. Prints ratios; writes ``var/bench.json``.

The floor is the least any program must do, in a plain loop without queue, audit, encryption or a second process: decode, resize,
infer, one durable write, one commit. Ours is the real way: through the door in one process, read by the worker in another.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pydicom
from pydicom.uid import JPEGLSLossless

from appliance.core.settings import Settings
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.store.store import Store
from quantize.reference.phantom import Phantom, dataset
from tests.bench import delta, drift, eight_bits, encryption, fleet, localisation, login, models, runtimes, truth
from tests.bench.floor import Floor
from tests.bench.page import measure_page

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.002


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description="Measure this box against the floor.")
    parser.add_argument("--scans", type=int, default=200, help="scans queued for the throughput (default 200)")
    parser.add_argument("--singles", type=int, default=15, help="single scans timed, each way (default 15)")
    parser.add_argument("--studies", type=int, default=10_000, help="studies stored for the worklist page (default 10000)")
    parser.add_argument(
        "--only",
        choices=("scans", "encryption", "models", "runtimes", "int8", "localisation", "truth", "drift", "login"),
        help="measure the analysis of images, what encryption and audit cost of it, the life of models, the runtimes, "
        "what int8 gains in processor time (not in a full run), "
        "where the reference model looks, or what enters, counted per kind (not in a full run); or simulate the alarm for shifted scores; "
        "or time logins while 20 threads guess passwords (not in a full run)",
    )
    parser.add_argument("--phantoms", type=int, default=200, help="phantoms analysed for the localisation (default 200)")
    parser.add_argument("--bundle", type=Path, help="bundle whose localisation is measured; the reference bundle by default")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="the real data of `truth` (default ../shared)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=_scratch()))
    try:
        if arguments.only in (None, "scans"):
            measure_scans(results, scratch, arguments)
        if arguments.only in (None, "encryption"):
            print("measuring what encryption and audit cost ...", file=sys.stderr)
            template = dataset(Phantom(rows=2048, cols=2048, seed=5), name="bench", bits=16)
            results["encryption"] = encryption.run(
                scratch / "encryption", arguments.studies, lambda number: _plain(number, template), arguments.singles
            )
        if arguments.only in (None, "models"):
            print("measuring what a new model costs the line, the boxes and the library (minutes) ...", file=sys.stderr)
            results["models"] = [*models.run(scratch / "models"), *delta.run(), *fleet.run()]
        if arguments.only in (None, "runtimes"):
            print("measuring what runs models fastest and is still right (minutes) ...", file=sys.stderr)
            results["runtimes"] = runtimes.run(scratch / "runtimes")
        if arguments.only == "int8":
            print("measuring what int8 gains in processor time (minutes) ...", file=sys.stderr)
            results["int8"] = eight_bits.run(scratch / "int8")
        if arguments.only in (None, "localisation"):
            print("measuring where the reference model looks (minutes) ...", file=sys.stderr)
            results["localisation"] = localisation.run(arguments.phantoms, arguments.bundle)
        if arguments.only == "truth":
            rows = truth.run(scratch / "truth", arguments.shared)
            results["truth"] = [vars(row) for row in rows]
            truth.print_rows(rows)
        if arguments.only == "login":
            results["login"] = login.run(scratch / "login")
            login.print_rows(results["login"])
        if arguments.only in (None, "drift"):
            print("simulating shifted scores (minutes) ...", file=sys.stderr)
            results["drift"] = drift.run()
    finally:
        shutil.rmtree(scratch)
    (ROOT / "var").mkdir(exist_ok=True)
    (ROOT / "var" / "bench.json").write_text(json.dumps(results, indent=1))
    print(f"\nMachine: {results['machine']}\n")
    if "box" in results:
        print_table(results, arguments.scans)
    if "encryption" in results:
        encryption.print_rows(results["encryption"])
    if "models" in results:
        print_rows(results["models"])
    if "runtimes" in results:
        print(f"\nInstructions: {runtimes.instructions()}")
        runtimes.print_rows(results["runtimes"])
    if "int8" in results:
        print(f"\nInstructions: {runtimes.instructions()}")
        runtimes.print_rows(results["int8"])
    if "localisation" in results:
        localisation.print_rows(results["localisation"])
    if "drift" in results:
        drift.print_rows(results["drift"])
    return 0


def measure_scans(results: dict[str, Any], scratch: Path, arguments: argparse.Namespace) -> None:
    """Scans in two transfer syntaxes, then the idle box and its worklist page."""
    for name, encode in (("uncompressed", _plain), ("JPEG-LS", _jpeg_ls)):
        print(f"measuring {name} ...", file=sys.stderr)
        results[name] = measure(scratch / name, encode, arguments.singles, arguments.scans)
    print("measuring the idle box and the worklist page ...", file=sys.stderr)
    results["box"] = measure_page(scratch / "page", arguments.studies)


def _scratch() -> Path:
    """Scratch room on the disk of the checkout, not in a /tmp that may be memory."""
    path = ROOT / "var" / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def machine() -> str:
    """The machine in words: processor, cores, memory, kernel."""
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{name}, {psutil.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"


def _plain(number: int, template: pydicom.Dataset) -> bytes:
    return _encoded(_renumbered(number, template))


def _jpeg_ls(number: int, template: pydicom.Dataset) -> bytes:
    made = _renumbered(number, template)
    if made.file_meta.TransferSyntaxUID != JPEGLSLossless:
        made.compress(JPEGLSLossless, generate_instance_uid=False)
    return _encoded(made)


def _renumbered(number: int, template: pydicom.Dataset) -> pydicom.Dataset:
    """The template as another image of another patient."""
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(template, name, f"2.25.{number + 1}{'123'[len(name) % 3]}")
    template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
    template.PatientID = f"BENCH-{number}"
    return template


def _encoded(made: pydicom.Dataset) -> bytes:
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def measure(directory: Path, encode: Callable[[int, pydicom.Dataset], bytes], singles: int, scans: int) -> dict[str, float]:
    """One transfer syntax: single scans floor against ours in turn, then the queue of many."""
    from appliance.core.domain import Source
    from appliance.ingest.ingest import Ingest

    directory.mkdir(parents=True)
    template = dataset(Phantom(rows=2048, cols=2048, seed=5), name="bench", bits=16)
    encode(0, template)
    settings = _box(directory / "box")
    store, floor = Store(settings), Floor(directory / "floor")
    ingest, source = Ingest(store), Source("cli", "bench")
    worker = _worker(settings)
    floor_ms, ours_ms = [], []
    for number in range(singles + 2):
        data = encode(number, template)
        started = time.perf_counter()
        floor.run(data)
        floor_ms.append((time.perf_counter() - started) * 1000)
        started = time.perf_counter()
        accepted = ingest.accept(data, source, started)
        store.planner.close_series([accepted.stored.series_id])
        _wake(settings)
        while store.queue.pending_jobs():
            time.sleep(_POLL_S)
        ours_ms.append((time.perf_counter() - started) * 1000)
    worker.terminate()
    worker.wait()
    many = [encode(1000 + number, template) for number in range(scans)]
    started = time.perf_counter()
    for data in many:
        floor.run(data)
    floor_s = time.perf_counter() - started
    worker = _worker(settings)
    started = time.perf_counter()
    for data in many:  # as on the box: the door takes in while the worker reads
        accepted = ingest.accept(data, source)
        store.planner.close_series([accepted.stored.series_id])
        _wake(settings)
    door_s = time.perf_counter() - started
    while store.queue.pending_jobs():
        time.sleep(_POLL_S)
    ours_s = time.perf_counter() - started
    worker.terminate()
    worker.wait()
    store.close()
    floor.close()
    one = statistics.median(floor_ms[2:]), statistics.median(ours_ms[2:])
    return {
        "floor_ms": one[0], "ours_ms": one[1], "ours_over_floor": one[1] / one[0], "floor_scans_per_s": scans / floor_s,
        "ours_scans_per_s": scans / ours_s, "throughput_ratio": floor_s / ours_s, "door_scans_per_s": scans / door_s,
        "scan_mib": len(many[0]) / 2**20,
    }  # fmt: skip


def _box(data_dir: Path) -> Settings:
    data_dir.mkdir(parents=True)
    (data_dir / "box.toml").write_text("web_port = 0\ndicom_port = 0\n")
    settings = Settings.load(data_dir)
    store = Store(settings)
    activate(store, reference_bundle(), "bench")
    store.close()
    return settings


def _command(settings: Settings, *more: str) -> list[str]:
    return [sys.executable, "-m", "appliance", "worker", "--data-dir", str(settings.data_dir), *more]


def _worker(settings: Settings) -> subprocess.Popen[str]:
    """A running worker, once it says that it is ready."""
    worker = subprocess.Popen(_command(settings), stderr=subprocess.PIPE, text=True)
    assert worker.stderr
    for line in worker.stderr:
        if "worker ready" in line:
            break
    import threading

    threading.Thread(target=worker.stderr.read, daemon=True).start()
    return worker


def _wake(settings: Settings) -> None:
    from appliance.core.wakeup import wake

    wake(settings)


def print_table(results: dict[str, Any], scans: int) -> None:
    """The results as a Markdown table, ready for the README."""
    print("| 2048 x 2048, 16 bit | uncompressed | JPEG-LS | target |\n|---|---|---|---|")
    plain, packed, box = results["uncompressed"], results["JPEG-LS"], results["box"]
    rows = (
        ("floor, one scan", "floor_ms", "{:.0f} ms", ""),
        ("ours, last byte received to finding stored", "ours_ms", "{:.0f} ms", ""),
        ("**ours / floor, one scan**", "ours_over_floor", "**{:.2f}**", "≤ 1.5"),
        (f"floor, {scans} scans", "floor_scans_per_s", "{:.1f} scans/s", ""),
        (f"ours, {scans} scans through the door", "door_scans_per_s", "{:.1f} scans/s", ""),
        (f"ours, {scans} scans to the last finding", "ours_scans_per_s", "{:.1f} scans/s", ""),
        ("**ours / floor, throughput**", "throughput_ratio", "**{:.2f}**", "≥ 0.8"),
    )
    for title, key, pattern, target in rows:
        print(f"| {title} | {pattern.format(plain[key])} | {pattern.format(packed[key])} | {target} |")
    print("\n| box | measured | target |\n|---|---|---|")
    print(f"| idle, all processes, resident | {box['idle_rss_mib']:.0f} MiB | ≤ 400 MB |")
    print(f"| worklist page with {box['studies']:,} studies stored, median | {box['page_ms']:.0f} ms | ≤ 50 ms |")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """What new models cost, as a Markdown table; a row without a target is there to compare with."""
    print("\n| models | measured | target |\n|---|---|---|")
    for row in rows:
        target = "" if row["target"] is None else f"≤ {row['target']:g} {row['unit']}".rstrip()
        print(f"| {row['name']} | {row['measured']:.3g} {row['unit']} | {target} |")


if __name__ == "__main__":
    raise SystemExit(main())
