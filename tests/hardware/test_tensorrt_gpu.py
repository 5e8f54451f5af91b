"""The checks of ``gpu_check``, by pytest (``make test-gpu``); skipped where there is no GPU with TensorRT."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from appliance.core.errors import InferenceError
from appliance.runtime.trt_compat import find
from tests.hardware.gpu_check import CHECKS, Bench

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    try:
        made = Bench(tmp_path_factory.mktemp("gpu"))
        find()
    except InferenceError as error:
        pytest.skip(error.detail)
    yield made
    for row in made.rows:
        print(row)


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(bench: Bench, name: str) -> None:
    print(name, CHECKS[name](bench))
