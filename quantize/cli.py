"""The command ``quantize``: from float weights to a gated bundle. So far it makes the reference bundle and its phantoms."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 usage)."""
    parser = argparse.ArgumentParser(prog="quantize", description="Make model bundles.")
    parser.add_argument("command", choices=("build-reference", "draw-phantoms"), help="what to make")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments; -h explains them")
    arguments = parser.parse_args(argv)
    return _command(arguments.command)(arguments.arguments)


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name == "build-reference":
        from quantize.reference.build import main as build

        return build
    from quantize.reference.phantom import main as draw

    return draw
