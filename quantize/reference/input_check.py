"""The network that looks at a picture before the reference model does: an upright frontal chest film, or turned, negative, something else.

``python -m quantize.reference.input_check --shared ../shared --train DIR`` trains it in minutes on one core and writes
``input_check.onnx`` and ``input_check.json``, the rest of the manifest's entry; the committed files beside this module are what it
wrote. ``--evaluate`` measures the committed network and prints the tables of docs/performance.md.

The network takes ``image`` (float32 [n, 1, 64, 64], the display image letterboxed, resized and divided by 255) and returns
``probabilities`` (float32 [n, 6], softmax) in the order of ``Class``. A picture passes where the probability of UPRIGHT is at least
``min_upright``; one that does not is stopped, for the reason that is the most probable of the other classes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import onnxruntime
import pydicom
from numpy.typing import NDArray
from PIL import Image

from appliance.imaging.preprocessing import from_display, to_tensor
from model_sync.bundle import InputCheck, InputClass, InputSpec, Interval, MeasuredShare, Resize
from quantize.draft import Draft
from quantize.errors import DONE, QuantizeError, run_command
from quantize.gate.roc_statistics import Flags, wilson
from quantize.reference import not_chest
from quantize.reference.phantom import Phantom, display
from quantize.reference.training_set import TrainingSet

SIDE: Final = 64
NETWORK: Final = Path(__file__).with_name("input_check.onnx")
RECORD: Final = Path(__file__).with_name("input_check.json")
MEASURED_ON: Final = "patient-disjoint tenth of cxr_train_224.npz, seed 7; films of other collections; pictures of other things"
VALIDATION_SEED: Final = 8
_VALIDATION_PART: Final = 0.1
# Other drawn pictures than those that train.
_TEST_SEED: Final = 12
_DRAWN_TEST: Final = 40
# At most this part of the upright films of the validation patients may be stopped.
_MAY_STOP: Final = 0.002

# Upright films among the DICOM files, and films whose header says how they are turned (those of turned_90 and turned_270 say the opposite).
_DICOM_FILMS: Final = (
    ("dicom", "CR_*.dcm"), ("field", "base_*.dcm"), ("field", "turned_180_*.dcm"), ("field", "mirrored_*.dcm"), ("field", "words_*.dcm"),
)  # fmt: skip

Picture = NDArray[np.uint8]
Probabilities = NDArray[np.float32]


class Class(IntEnum):
    """What a picture is, in the order of the network's output.

    TURNED_90: the content is turned by 90 degrees clockwise relative to upright, so that it must be turned counter-clockwise to be
    upright. NEGATIVE: dense is dark, turned or not. OTHER: no frontal chest film.
    """

    UPRIGHT = 0
    TURNED_90 = 1
    TURNED_180 = 2
    TURNED_270 = 3
    NEGATIVE = 4
    OTHER = 5


CLASSES: Final[tuple[InputClass, ...]] = get_args(InputClass)


def turned(picture: Picture, quarters: int) -> Picture:
    """Return a picture turned by quarters of a circle clockwise."""
    return np.ascontiguousarray(np.rot90(picture, -quarters))


def negative(picture: Picture) -> Picture:
    """Return a picture with dark and light exchanged."""
    return np.asarray(255 - picture, np.uint8)


# What is made of an upright film to measure the network; the first two must pass, all others be stopped.
VARIANTS: Final[dict[str, Callable[[Picture], Picture]]] = {
    "upright": lambda film: film,
    "mirrored": lambda film: np.ascontiguousarray(film[:, ::-1]),
    "turned_90": lambda film: turned(film, 1),
    "turned_180": lambda film: turned(film, 2),
    "turned_270": lambda film: turned(film, 3),
    "negative": negative,
    "negative, turned_90": lambda film: turned(negative(film), 1),
    "negative, turned_180": lambda film: turned(negative(film), 2),
    "negative, turned_270": lambda film: turned(negative(film), 3),
}


def input_spec(side: int = SIDE) -> InputSpec:
    """Return the input of the network: the pipeline of the reference model, at another size."""
    written = Draft.load(Path(__file__).with_name("draft.toml")).input
    pipeline = [step.model_copy(update={"height": side, "width": side}) if isinstance(step, Resize) else step for step in written.pipeline]
    return written.model_copy(update={"height": side, "width": side, "pipeline": pipeline})


@dataclass(frozen=True)
class Classifier:
    """The network in one ONNX Runtime session on the CPU."""

    session: Any
    spec: InputSpec

    @classmethod
    def open(cls, path: Path = NETWORK, threads: int = 1) -> Classifier:
        """Load the ONNX file.

        Raises:
            QuantizeError: the file does not exist.
        """
        if not path.is_file():
            raise QuantizeError(f"the network of the input check is not at {path}", hint="train it: quantize.reference.input_check --train")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        return cls(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), input_spec())

    def __call__(self, tensors: NDArray[np.float32]) -> Probabilities:
        """Return the probabilities [n, 6] of ``tensors`` [n, 1, 64, 64]."""
        probabilities: Probabilities = self.session.run(["probabilities"], {"image": tensors})[0]
        return probabilities

    def probabilities(self, pictures: Iterable[Picture]) -> Probabilities:
        """Return the probabilities [n, 6] of displayed pictures, uint8 [rows, columns] each, MONOCHROME2."""
        tensors = [from_display(picture, self.spec).tensor for picture in pictures]
        return np.concatenate([self(np.concatenate(tensors[start : start + 64])) for start in range(0, len(tensors), 64)])


def stopped(probabilities: Probabilities, min_upright: float) -> Flags:
    """Return which pictures are stopped: those whose probability of being upright is below ``min_upright``."""
    return np.asarray(probabilities[:, Class.UPRIGHT] < min_upright)


def reason(probabilities: Probabilities) -> NDArray[np.intp]:
    """Return for each picture the class, other than UPRIGHT, that a stop is reported with."""
    return np.asarray(1 + probabilities[:, 1:].argmax(1))


@dataclass(frozen=True)
class Films:
    """Upright frontal films with the source of each."""

    source: NDArray[np.str_]
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Row:
    """One line of figures: what was stopped of a source or a kind, and in how many the reason was the right one."""

    group: str
    variant: str
    n: int
    n_stopped: int
    n_right: int

    @property
    def part_stopped(self) -> Interval:
        """The stopped part with Wilson's 95 % interval."""
        return wilson(self.n_stopped, self.n)


def training_parts(pictures: TrainingSet) -> tuple[Flags, Flags]:
    """Return which pictures train and which validate: those of a tenth of the patients who are not held out."""
    held_out = pictures.held_out()
    patients = np.unique(pictures.patient[~held_out])
    drawn = np.random.default_rng(VALIDATION_SEED).choice(patients, int(_VALIDATION_PART * len(patients)), replace=False)
    validation = np.isin(pictures.patient, drawn) & ~held_out
    return ~held_out & ~validation, validation


def films_of(pictures: TrainingSet, chosen: Flags) -> Films:
    """Decode the chosen films of the training set."""
    return Films(pictures.source[chosen], [pictures.picture(int(index)) for index in np.flatnonzero(chosen)])


def independent(shared: Path, patients: set[str]) -> Films:
    """Load films outside the training set: ``cxr``, ``tasks/lungs`` without ``patients``, CR of ``dicom``, ``field``, phantoms."""
    data = shared / "data"
    named = [("", row) for row in _table(data / "cxr_labels.csv") if row["view"] != "L"]
    named += [("tasks/lungs", row) for row in _table(data / "tasks" / "lungs" / "lungs.csv") if row["patient"] not in patients]
    loaded: list[tuple[str, Picture]] = []
    for folder, row in named:
        with Image.open(data / folder / row["file"]) as picture:
            loaded.append((f"{folder or 'cxr'}: {row.get('source', 'ieee8023/covid-chestxray-dataset')}", np.asarray(picture.convert("L"))))
    spec = input_spec()
    for folder, pattern in _DICOM_FILMS:
        for path in sorted((data / folder).glob(pattern)):
            loaded.append((folder, to_tensor(pydicom.dcmread(path, force=True), spec).display))
    loaded += [("phantoms", display(Phantom(512, 420 + 20 * seed, seed=seed))) for seed in range(1, 10)]
    return Films(np.array([source for source, _ in loaded]), [picture for _, picture in loaded])


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def measure_films(network: Classifier, films: Films, min_upright: float) -> list[Row]:
    """Return what is stopped of each source, and of what is made of its films; the reason is right where it names turn or polarity."""
    rows = []
    for variant, make in VARIANTS.items():
        probabilities = network.probabilities(make(film) for film in films.pictures)
        stops = stopped(probabilities, min_upright)
        right = stops & (reason(probabilities) == CLASSES.index(variant.partition(",")[0]) if variant != "mirrored" else stops)
        for name in sorted(set(films.source.tolist())):
            chosen = films.source == name
            rows.append(Row(name, variant, int(chosen.sum()), int(stops[chosen].sum()), int(right[chosen].sum())))
    return rows


def measure_others(network: Classifier, shared: Path, min_upright: float) -> list[Row]:
    """Return what is stopped of the held-out pictures that are no frontal chest film, by kind."""
    pictures = list(_test_others(shared))
    probabilities = network.probabilities(picture.pixels for picture in pictures)
    kinds = np.array([picture.kind for picture in pictures])
    stops, right = stopped(probabilities, min_upright), reason(probabilities) == Class.OTHER
    return [
        Row(kind, "other", int((kinds == kind).sum()), int(stops[kinds == kind].sum()), int((stops & right)[kinds == kind].sum()))
        for kind in sorted(set(kinds.tolist()))
    ]


def _test_others(shared: Path) -> Iterator[not_chest.OtherPicture]:
    yield from not_chest.real(shared, input_spec(), held_out=True)
    yield from not_chest.drawn(_TEST_SEED, _DRAWN_TEST)
    yield from not_chest.lateral_phantoms(range(1, 21))


def choose_min_upright(network: Classifier, films: Films) -> float:
    """Return the highest threshold, in hundredths and at most 0.5, that stops at most 0.2 % of upright films and of their mirror images."""
    pictures = [VARIANTS[variant](film) for variant in ("upright", "mirrored") for film in films.pictures]
    upright = np.sort(network.probabilities(pictures)[:, Class.UPRIGHT])
    may_stop = int(_MAY_STOP * len(upright))
    return min(0.5, int(100 * float(upright[may_stop])) / 100)


def evaluate(network: Classifier, shared: Path, min_upright: float) -> dict[str, list[Row]]:
    """Measure on the held-out patients, on independent films, and on what is no frontal chest film."""
    pictures = TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    held_out = films_of(pictures, pictures.held_out())
    return {
        "held-out patients": measure_films(network, held_out, min_upright),
        "independent films": measure_films(network, independent(shared, set(pictures.patient.tolist())), min_upright),
        "no frontal chest film": measure_others(network, shared, min_upright),
    }


def table(rows: Sequence[Row]) -> str:
    """Return figures of films as a Markdown table: one line per source; what must pass as counts, what must be stopped as shares."""
    lines = [
        "| source | n | upright | mirrored | turned by 90 / 180 / 270 | turn named | negative | negative and turned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.group for row in rows):
        of = {row.variant: row for row in rows if row.group == name}
        good, named = of["upright"], [of[f"turned_{angle}"] for angle in (90, 180, 270)]
        both = [of[f"negative, turned_{angle}"] for angle in (90, 180, 270)]
        cells = [
            f"{good.n_stopped} (≤ {100 * good.part_stopped.high:.1f} %)",
            str(of["mirrored"].n_stopped),
            " / ".join(_percent(row.n_stopped, row.n) for row in named),
            _percent(sum(row.n_right for row in named), sum(row.n for row in named)),
            _percent(of["negative"].n_stopped, good.n),
            _percent(sum(row.n_stopped for row in both), sum(row.n for row in both)),
        ]
        lines.append(f"| {name} | {good.n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(hits: int, total: int) -> str:
    return f"{100 * hits / total:.1f} %" if hits < total else "100 %"


def other_table(rows: Sequence[Row]) -> str:
    """Return figures of other pictures as a Markdown table: one line per kind."""
    lines = ["| no frontal chest film | n | stopped | for this reason |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {row.group} | {row.n} | {row.n_stopped} | {row.n_right} |" for row in rows])


def measure_time(path: Path, runs: int = 300) -> dict[str, float]:
    """Return median times in ms: the network on one thread and on two, and the preparation of a display image of 2048 x 2048."""
    film = display(Phantom(2048, 2048, seed=1))
    prepared, times = from_display(film, input_spec()), {}

    def median(call: Callable[[], object], count: int) -> float:
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return round(1000 * statistics.median(taken), 2)

    for threads in (1, 2):
        network = Classifier.open(path, threads)
        times[f"network, threads: {threads}"] = median(lambda network=network: network(prepared.tensor), runs)  # type: ignore[misc]
    times["preparation of 2048 x 2048"] = median(lambda: from_display(film, input_spec()), 20)
    return times


def _report(figures: dict[str, list[Row]]) -> str:
    parts = [f"{name}\n\n{table(figures[name])}" for name in ("held-out patients", "independent films")]
    return "\n\n".join([*parts, other_table(figures["no frontal chest film"])])


def train(shared: Path, out: Path) -> dict[str, list[Row]]:
    """Train, choose the threshold on the validation patients, measure, and write network and record into ``out``."""
    from quantize.reference import input_check_training

    out.mkdir(parents=True, exist_ok=True)
    path = out / NETWORK.name
    input_check_training.export(input_check_training.train(shared), str(path))
    return measure(shared, path)


def measure(shared: Path, path: Path) -> dict[str, list[Row]]:
    """Choose the threshold of a trained network on the validation patients, measure it, and write its record beside it."""
    network = Classifier.open(path)
    pictures = TrainingSet.load(shared / "data" / "cxr_train_224.npz")
    min_upright = choose_min_upright(network, films_of(pictures, training_parts(pictures)[1]))
    figures = evaluate(network, shared, min_upright)
    entry = manifest_entry(path, min_upright, [row for rows in figures.values() for row in rows])
    written = entry.model_dump(mode="json", exclude={"file"})
    path.with_suffix(".json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def manifest_entry(path: Path, min_upright: float, rows: Sequence[Row]) -> InputCheck:
    """Return the manifest's ``input_check`` of a network: what was stopped of each source and kind; only UPRIGHT films should not be."""
    return InputCheck(
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        input=input_spec(),
        output="probabilities",
        classes=list(CLASSES),
        min_upright=min_upright,
        measured_on=MEASURED_ON,
        figures=[
            MeasuredShare(source=row.group, kind=row.variant, n=row.n, stopped=row.part_stopped) for row in rows if row.variant in CLASSES
        ],
    )


def stated_min_upright(path: Path = RECORD) -> float:
    """Return the threshold that was chosen on the validation patients."""
    return float(json.loads(path.read_text(encoding="utf-8"))["min_upright"])


def main(argv: Sequence[str] | None = None) -> int:
    """Train or measure the network of the input check, and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m quantize.reference.input_check", description=main.__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="directory with the pictures below data")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", type=Path, metavar="DIR", help="train with PyTorch; write input_check.onnx and input_check.json into DIR")
    what.add_argument("--evaluate", action="store_true", help="measure the committed network at its threshold")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.train:
        print(_report(train(options.shared, options.train)))
        return DONE
    print(f"min_upright {stated_min_upright()}, {NETWORK.stat().st_size} bytes")
    print(_report(evaluate(Classifier.open(), options.shared, stated_min_upright())))
    print("median ms: " + ", ".join(f"{name}: {taken}" for name, taken in measure_time(NETWORK).items()))
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
