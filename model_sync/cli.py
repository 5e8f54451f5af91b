"""The commands ``model-sync`` (on the box) and ``model-library`` (in the centre).

Both can verify a bundle as the box does before it runs it. Errors are caught once, in ``main``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_sync.bundle import ModelBundle
from model_sync.errors import ModelSyncError


def main(argv: list[str] | None = None, prog: str = "model-sync") -> int:
    """Run one command; returns the exit code (0 done, 1 refused, 2 usage)."""
    parser = argparse.ArgumentParser(prog=prog, description="Signed models for the box.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "Check a bundle: schema, every file's digest, operating points, golden cases."
    verify = commands.add_parser("verify", help=text, description=text)
    verify.add_argument("bundle", type=Path, help="bundle directory")
    arguments = parser.parse_args(argv)
    try:
        bundle = ModelBundle.load(arguments.bundle)
    except ModelSyncError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    manifest = bundle.manifest
    print(f"{manifest.name} {manifest.version} ({bundle.digest[:12]}): whole")
    for point in manifest.operating_points:
        print(f"  {point.label}: threshold {point.threshold:.4f},", end=" ")
        print(f"sensitivity {point.sensitivity.value:.3f}, specificity {point.specificity.value:.3f}")
    print(f"  variants: {', '.join(variant.precision for variant in manifest.variants)}; golden cases: {len(manifest.golden)}")
    return 0


def library_main(argv: list[str] | None = None) -> int:
    """The central team's command."""
    return main(argv, prog="model-library")
