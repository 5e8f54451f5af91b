"""Which boxes of a device class run a model otherwise than the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model_sync.fleet.device_classes import RunningModel, find_differing


def model(
    box_id: str, precision: str, runtime: str = "onnxruntime 1.23.0", device_class: str = "a" * 16, digest: str = "d"
) -> RunningModel:
    return RunningModel(box_id, device_class, "cxr", digest, runtime, precision)


def test_two_boxes_that_differ_and_two_that_do_not() -> None:
    assert find_differing([model("one", "int8"), model("two", "fp16")]) == {"one": {"cxr"}, "two": {"cxr"}}
    assert find_differing([model("one", "int8"), model("two", "int8", "onnxruntime 1.20.1")]) == {}


def test_the_minority_differs() -> None:
    assert find_differing([model("one", "int8"), model("two", "int8"), model("three", "int8", "openvino 2026.1")]) == {"three": {"cxr"}}


def test_other_classes_other_models_and_boxes_without_a_class_are_not_compared() -> None:
    others = [model("two", "fp32", device_class="b" * 16), model("three", "fp16", digest="e"), model("four", "fp32", device_class="")]
    assert find_differing([model("one", "int8"), *others, model("five", "fp16", device_class="")]) == {}


@given(st.lists(st.sampled_from(["int8", "fp16", "fp32"]), max_size=12))
def test_the_boxes_that_do_not_differ_agree_and_are_more_than_half(precisions: list[str]) -> None:
    differing = find_differing(model(str(number), precision) for number, precision in enumerate(precisions))
    agreed = [precision for number, precision in enumerate(precisions) if str(number) not in differing]
    assert len(set(agreed)) <= 1
    assert 2 * len(agreed) > len(precisions) or not agreed
    assert bool(differing) == (len(set(precisions)) > 1)
