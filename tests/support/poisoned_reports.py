"""Box reports with a patient's data in every place, and what must not be found in what leaves the box."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from tests.support.fleet_site import box_report

CANARY = "张三ZhangSan19900307"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document, containers included."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, (*path, number))


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return the document with ``value`` at ``path``."""
    if not path:
        return value
    fresh = copy.deepcopy(document)
    inner = fresh
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return fresh


NAMES = (
    CANARY, "Zhang^San", "zhangsan", "zhang.san", "1.0.0-zhangsan", "onnxruntime zhangsan", "1990-03-07T00:00:00Z", 110101199003071234,
    {"PatientName": "zhangsan"}, ["zhangsan"], "zhangsan" * 8,
)  # fmt: skip
TRACES = re.compile(rb"zhang|1990-?03-?07|110101199|\\u5f20", re.IGNORECASE)


def poisoned() -> Iterator[bytes]:
    """A box report with a patient in every place: each value replaced, each object with a key more."""
    good = box_report("0.1.0", "failed", "trust.digest")
    for path in places(good):
        for name in NAMES:
            yield json.dumps(put(good, path, name)).encode()
        inner: Any = good
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict):
            yield json.dumps(put(good, (*path, "patient"), "zhangsan")).encode()
            yield json.dumps(put(good, (*path, "zhangsan"), 1)).encode()
        elif isinstance(inner, list):
            yield json.dumps(put(good, path, [*inner, "zhangsan"])).encode()
