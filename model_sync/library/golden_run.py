"""The golden cases of a bundle that is to be published, run in a child process by ``quantize golden``.

This package cannot prepare an image or run a model: the box's own code does both, and the library does not import it (docs/adr/0035). A
native runtime that crashes ends the child, not the command.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from model_sync.bundle import ModelBundle
from model_sync.errors import PublishError

_COMMAND: Final = ("-m", "quantize.cli", "golden", "--json", "--bundle")
_DONE: Final = 0
_DIFFERS: Final = 3
_LIMIT_S: Final = 1800.0
# Digests of the bundles that passed in this process.
_PASSED: Final[set[str]] = set()


def run_golden_cases(bundle: ModelBundle) -> None:
    """Run every variant on its golden cases; a bundle that passed in this process is not run again.

    Raises:
        PublishError: ``library.golden``: a result differs by more than its tolerance; ``library.golden_run``: a variant does not run.
    """
    if bundle.digest in _PASSED:
        return
    results = _run(bundle)
    for file in (variant.file for variant in bundle.manifest.variants):
        result = results[file]
        if result["error"]:
            raise PublishError(f"{file} does not run: {result['error']['code']}: {result['error']['detail']}", code="library.golden_run")
        if wrong := [_describe(case) for case in result["cases"] if not case["passed"]]:
            raise PublishError(f"{file} on {result['runtime']}: {'; '.join(wrong)}", code="library.golden")
        if len(result["cases"]) != len(bundle.manifest.golden):
            raise PublishError(f"{file}: {len(result['cases'])} of {len(bundle.manifest.golden)} cases were run", code="library.golden_run")
    _PASSED.add(bundle.digest)


def _run(bundle: ModelBundle) -> dict[str, Any]:
    """Return what ``quantize golden`` measured, by variant file."""
    try:
        child = subprocess.run([sys.executable, *_COMMAND, bundle.directory], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PublishError(f"`quantize golden` did not run: {error}", code="library.golden_run") from error
    if child.returncode not in (_DONE, _DIFFERS):
        said = child.stderr.strip().splitlines()
        last = f": {said[-1]}" if said else ""
        raise PublishError(f"`quantize golden` ended with {child.returncode}{last}", code="library.golden_run")
    try:
        results = json.loads(child.stdout)
        measured: dict[str, Any] = results["variants"]
        is_complete = results["digest"] == bundle.digest and measured.keys() == {variant.file for variant in bundle.manifest.variants}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError("`quantize golden` gave no results", code="library.golden_run") from error
    if not is_complete:
        raise PublishError("the bundle was changed while its golden cases were run", code="library.golden_run")
    return measured


def _describe(case: dict[str, Any]) -> str:
    if case["difference"] is None:
        return f"the golden case {case['name']} has no valid result"
    return f"the golden case {case['name']} is off by {case['difference']:g}, allowed {case['tolerance']:g}"
