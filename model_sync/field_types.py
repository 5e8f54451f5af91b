"""Types of fields that manifests, signed documents and reports share: names, versions, paths and digests.

They are apart from :mod:`model_sync.bundle`, so that the offline check, which the box starts before every activation, does not build the
whole schema of a manifest that it never reads.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NonEmpty: TypeAlias = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Positive: TypeAlias = Annotated[int, Field(gt=0)]
Precision: TypeAlias = Literal["fp32", "fp16", "int8", "mixed"]
# Each segment starts with a letter or a digit, which excludes "..", hidden files and absolute paths.
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
RelativePath: TypeAlias = Annotated[str, StringConstraints(pattern=rf"^{_SEGMENT}(/{_SEGMENT})*$", max_length=200)]
Sha256: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Identifier: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
# Semantic Versioning 2.0, clauses 2, 9 and 10, as strict as the library that compares versions.
_NUMBER, _PRE, _BUILD = "(0|[1-9][0-9]*)", "(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", "[0-9A-Za-z-]+"
SemVer: TypeAlias = Annotated[
    str,
    StringConstraints(
        pattern=rf"^{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-{_PRE}(\.{_PRE})*)?(\+{_BUILD}(\.{_BUILD})*)?$",
        max_length=64,
    ),
]


class Strict(BaseModel):
    """Base of every part of a manifest and of a signed document: unknown fields and NaN are errors, and objects are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
