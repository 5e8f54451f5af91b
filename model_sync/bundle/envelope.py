"""The envelope of a manifest: the two fields that any version of the software can read, whatever else the file contains.

``schema`` and ``min_appliance_version`` are read first and leniently, so that an older box says "update the appliance" and not "unknown
field" of a bundle that is newer than itself. Rules for every later schema are in ``docs/adr/0031-manifest-schema-2.md``.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from model_sync.errors import BundleError

LATEST_SCHEMA: Final = 2
# The first appliance that reads schema 2.
FIRST_OF_SCHEMA_2: Final = "0.2.0"
_VERSION: Final = re.compile(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?")


def require_readable(raw: bytes, appliance_version: str = "") -> None:
    """Check that this software is new enough for a manifest; a file that has no valid envelope is left to the strict parser.

    Args:
        raw: the bytes of ``manifest.json``.
        appliance_version: of the box that reads it; empty: only the schema is compared.

    Raises:
        BundleError: ``bundle.too_new``.
    """
    try:
        fields: Any = json.loads(raw)
    except (ValueError, RecursionError):
        return
    if not isinstance(fields, dict):
        return
    schema, least = fields.get("schema"), fields.get("min_appliance_version")
    needed = least if isinstance(least, str) and _VERSION.match(least) else ""
    is_newer_schema = type(schema) is int and schema > LATEST_SCHEMA
    if is_newer_schema or (needed and appliance_version and version_core(needed) > version_core(appliance_version)):
        needs = f"needs appliance {needed} or newer" if needed else "needs a newer appliance"
        this = f"this is {appliance_version}" if appliance_version else f"this software reads schema 1 to {LATEST_SCHEMA}"
        raise BundleError("bundle.too_new", f"the bundle (schema {schema}) {needs}, {this}")


def version_core(version: str) -> tuple[int, ...]:
    """Return major, minor and patch as numbers; a development or build suffix does not count.

    Raises:
        ValueError: it is not a version.
    """
    match = _VERSION.match(version)
    if match is None:
        raise ValueError(f"not a version: {version!r}")
    return tuple(int(part or 0) for part in match.groups())


def invalid_manifest(what: str) -> BundleError:
    """Return the error for a manifest that is not valid."""
    return BundleError("bundle.manifest_invalid", f"manifest.json is not valid: {what}")
