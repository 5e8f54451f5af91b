"""The command ``quantize``: from a float model and pictures to a gated bundle, and each part of that on its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from quantize.errors import DONE, run_command
from quantize.recipes import modelopt

GATE_FAILED: Final = 3
_EPILOG: Final = "Exit codes: 0 done, 1 failed (the reason and what to do are printed), 2 wrong use, 3 a variant did not pass."
# These have parsers of their own, so that they can be started as modules too.
_MODULES: Final = {"build-reference": "quantize.reference.build", "draw-phantoms": "quantize.reference.phantom"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 usage, 3 the gate refused something."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _MODULES:
        return int(import_module(_MODULES[arguments[0]]).main(arguments[1:]))
    options = _parser().parse_args(arguments)
    return run_command(lambda: int(options.command(options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantize", description="Make, gate and measure model bundles (docs/quantize.md).", epilog=_EPILOG
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model, labelled, bundle = "the float ONNX file", "directory of pictures with labels.csv", "the bundle's directory"
    one = _command(
        commands, "run", _run, "make a gated bundle from a float model; an interrupted run is resumed",
        model=model, manifest="draft.toml; a MODEL_CARD.md beside it goes into the bundle",
        calibration="directory of DICOM, PNG, JPEG or npz pictures; no labels needed", evaluation=f"{labelled}, of other patients",
        out=f"{bundle}; beside it come OUT.report.html and OUT.report.json",
    )  # fmt: skip
    one.add_argument("--golden", type=Path, help="pictures without patients for the golden cases (phantoms); averages otherwise")
    one.add_argument("--one-int8", action="store_true", help="ship one int8 variant only, the best here: for a small bundle")
    one.add_argument("--calibration-limit", type=int, default=256, metavar="N", help="use at most so many calibration pictures (256)")
    one.add_argument("--replace", action="store_true", help="allow --out to exist already")
    one.add_argument("--keep-work", action="store_true", help="keep OUT.work, the finished steps, after success")
    modelopt.add_options(one)
    _limits(one)
    one = _command(
        commands, "calibrate", _calibrate, "write every fp16 and int8 candidate of a model; none of them is gated yet",
        model=model, manifest="draft.toml", calibration="directory of pictures to measure ranges on",
        out="directory to write the ONNX files into",
    )  # fmt: skip
    modelopt.add_options(one)
    one = _command(
        commands, "gate", _gate, "compare every variant of a bundle with its fp32 on a labelled set; exit code 3 if one fails",
        bundle=bundle, evaluation=labelled,
    )  # fmt: skip
    one.add_argument("--out", type=Path, help="file for the verdicts as JSON; standard output otherwise")
    _limits(one)
    one = _command(
        commands, "golden", _golden, "run every variant of a bundle on its golden cases; exit code 3 if one differs too much", bundle=bundle
    )
    one.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _command(
        commands, "report", _report, "draw the HTML report of a run again from its record",
        record="BUNDLE.report.json, as quantize run wrote it", out="the HTML file",
    )  # fmt: skip
    one = _command(commands, "bench", _bench, "time every variant of a bundle on every runtime here, in turns", bundle=bundle)
    one.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for name, words in (("build-reference", "build the reference bundle"), ("draw-phantoms", "draw the sample images")):
        commands.add_parser(name, help=f"{words}; -h explains its arguments", add_help=False)
    return parser


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], words: str, **paths: str) -> argparse.ArgumentParser:
    """Add a command; ``paths`` are its required options that name a file or a directory, with their help."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.", epilog=_EPILOG)
    for option, explanation in paths.items():
        parser.add_argument(f"--{option}", type=Path, required=True, help=explanation)
    parser.set_defaults(command=function)
    return parser


def _limits(parser: argparse.ArgumentParser) -> None:
    from quantize.gate.verdicts import Limits

    usual = Limits()
    parser.add_argument("--auc", type=float, default=usual.auc, help=f"largest difference of an AUC ({usual.auc:g})")
    parser.add_argument("--score", type=float, default=usual.score, help=f"largest change of a single score ({usual.score:g})")
    parser.add_argument("--dice", type=float, default=usual.dice, help=f"least Dice's coefficient against float ({usual.dice:g})")


def _given_limits(options: argparse.Namespace) -> Any:
    from quantize.gate.verdicts import Limits

    return Limits(auc=options.auc, score=options.score, dice=options.dice)


def _run(options: argparse.Namespace) -> int:
    from quantize.pipeline import BundleRecipe, run, write_report
    from quantize.report import plots

    plots.require()
    recipe = BundleRecipe(
        options.model, options.manifest, options.calibration, options.evaluation, options.out, golden=options.golden,
        limits=_given_limits(options), calibration_limit=options.calibration_limit, one_int8=options.one_int8, replace=options.replace,
        keep_work=options.keep_work, optimizer=modelopt.find_from_options(options),
    )  # fmt: skip
    write_report(run(recipe), options.out)
    return DONE


def _calibrate(options: argparse.Namespace) -> int:
    from quantize.standalone import calibrate

    optimizer = modelopt.find_from_options(options)
    for name, words in calibrate(options.model, options.manifest, options.calibration, options.out, optimizer):
        print(f"{name}: {words}")
    for words in modelopt.explain_absence(optimizer):
        print(words)
    return DONE


def _gate(options: argparse.Namespace) -> int:
    from quantize.standalone import gate

    verdicts, passed = gate(options.bundle, options.evaluation, _given_limits(options))
    text = json.dumps(verdicts, ensure_ascii=False, indent=2) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return DONE if passed else GATE_FAILED


def _golden(options: argparse.Namespace) -> int:
    from quantize.standalone import golden

    results, passed = golden(options.bundle)
    if options.json:
        print(json.dumps(results, indent=2))
        return DONE if passed else GATE_FAILED
    for file, result in results["variants"].items():
        for case in result["cases"]:
            difference = "no result" if case["difference"] is None else f"{case['difference']:.6f}"
            verdict = "passed" if case["passed"] else "FAILED"
            print(f"{file:40} {result['runtime']:12} {case['name']:24} {difference} of {case['tolerance']:g}  {verdict}")
        if result["error"]:
            print(f"{file:40} {result['error']['code']}: {result['error']['detail']}")
    return DONE if passed else GATE_FAILED


def _report(options: argparse.Namespace) -> int:
    from quantize.report import html_report

    html_report.write(html_report.load_record(options.record), options.out)
    print(options.out)
    return DONE


def _bench(options: argparse.Namespace) -> int:
    from quantize.standalone import bench

    rows = bench(options.bundle)
    if options.json:
        print(json.dumps(rows, indent=2))
        return DONE
    for row in rows:
        print(f"{row['file']:40} {row['place']:24} {row['median_ms']:9.2f} ms   load {row['load_ms']:7.0f} ms")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
