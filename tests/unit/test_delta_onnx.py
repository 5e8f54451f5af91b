"""The tensor codec on ONNX files: every change comes back bit for bit, and those it is made for come out small."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from model_sync.delta.codec import encode_with
from model_sync.delta.format import CODES, ESCAPES, FIRST_PLANE, HEADER, STREAM
from model_sync.delta.onnx_tensors import MIN_TENSOR_BYTES, tensors
from tests.unit.delta_parts import rebuilt

REFERENCE = Path(__file__).resolve().parents[2] / "appliance" / "bundles" / "cxr-pneumonia" / "cxr_pneumonia_fp32.onnx"
DTYPES = [number for number in TensorProto.DataType.values() if number not in (TensorProto.UNDEFINED, TensorProto.STRING)]
_WIDTH = {1: 4, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}


def _tensor(rng: random.Random, name: str, dtype: int = TensorProto.INT8, dims: tuple[int, ...] = (64, 128)) -> TensorProto:
    return TensorProto(name=name, data_type=dtype, dims=dims, raw_data=rng.randbytes(int(np.prod(dims)) * _WIDTH.get(dtype, 1)))


def _model(initializers: list[TensorProto], nodes: list[onnx.NodeProto] | None = None) -> ModelProto:
    graph = helper.make_graph(nodes or [helper.make_node("Relu", ["x"], ["y"])], "g", [], [], initializers)
    return helper.make_model(graph)


def _size(old: ModelProto | bytes, new: ModelProto | bytes) -> int:
    """Round trip; return the delta's length."""
    before, after = (data if isinstance(data, bytes) else data.SerializeToString() for data in (old, new))
    delta = encode_with("tensor", before, after)
    with tempfile.TemporaryDirectory() as directory:
        assert rebuilt(Path(directory), "tensor", before, delta, after) == after
    return len(delta)


def _nudge(data: bytes, rng: random.Random, width: int = 1) -> bytes:
    """Move every element by -1, 0 or 1 in its lowest byte."""
    values = np.frombuffer(data, np.uint8).copy()
    values[::width] += np.array(rng.choices((255, 0, 1), k=len(values[::width])), np.uint8)
    return values.tobytes()


# --- random models --------------------------------------------------------------------------------------------------------


def _perturb(model: ModelProto, rng: random.Random) -> None:
    for tensor in model.graph.initializer:
        tensor.raw_data = _nudge(tensor.raw_data, rng, _WIDTH.get(tensor.data_type, 1))


def _shuffle(model: ModelProto, rng: random.Random) -> None:
    changed = list(model.graph.initializer)
    rng.shuffle(changed)
    del model.graph.initializer[:]
    model.graph.initializer.extend(changed)


def _add(model: ModelProto, rng: random.Random) -> None:
    model.graph.initializer.insert(0, _tensor(rng, f"added{rng.random()}", rng.choice(DTYPES), (5, 7)))


def _remove(model: ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def _rename(model: ModelProto, rng: random.Random) -> None:
    for tensor in model.graph.initializer:
        tensor.name = f"renamed{rng.randrange(5)}"


def _reshape(model: ModelProto, rng: random.Random) -> None:
    for tensor in model.graph.initializer:
        tensor.dims[:] = [int(np.prod(list(tensor.dims))), 1][:: rng.choice((1, -1))]


def _resize(model: ModelProto, rng: random.Random) -> None:
    for tensor in model.graph.initializer:
        if len(tensor.dims) and tensor.dims[0]:
            row = len(tensor.raw_data) // tensor.dims[0]
            tensor.dims[0] += 1
            tensor.raw_data += rng.randbytes(row)


def _retype(model: ModelProto, rng: random.Random) -> None:
    for tensor in model.graph.initializer:
        tensor.data_type = rng.choice(DTYPES)


def _cut(model: ModelProto, rng: random.Random) -> None:
    """Fewer bytes than the shape says: no valid model, and no reason to fail."""
    for tensor in model.graph.initializer:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def _unpack(model: ModelProto, rng: random.Random) -> None:
    """Values in float_data and int32_data instead of raw_data."""
    for number, kind, field in ((TensorProto.FLOAT, np.float32, "float_data"), (TensorProto.INT32, np.int32, "int32_data")):
        for tensor in model.graph.initializer:
            if tensor.data_type == number:
                values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 4 * 4], kind)
                tensor.ClearField("raw_data")
                getattr(tensor, field).extend(values.tolist())


def _externalise(model: ModelProto, rng: random.Random) -> None:
    for tensor in model.graph.initializer:
        if rng.random() < 0.5:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="weights.bin")


_CHANGES = [_perturb, _shuffle, _add, _remove, _rename, _reshape, _resize, _retype, _cut, _unpack, _externalise]
_some_tensors = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", ""]), st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=6
)


@given(shapes=_some_tensors, changes=st.lists(st.sampled_from(_CHANGES), max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_any_change_of_any_model_comes_back(
    shapes: list[tuple[str, int, list[int]]], changes: list[Callable[[ModelProto, random.Random], None]], seed: int
) -> None:
    """Small tensors of every type, doubled names and empty shapes among them; moved, added, removed, reshaped, and so on."""
    rng = random.Random(seed)
    old = _model([_tensor(rng, name, dtype, tuple(dims)) for name, dtype, dims in shapes])
    new = ModelProto()
    new.CopyFrom(old)
    for change in changes:
        change(new, rng)
    _size(old, new)


@given(seed=st.integers(0, 2**32), flips=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_files_that_are_almost_onnx_come_back(seed: int, flips: int) -> None:
    rng = random.Random(seed)
    old = _model([_tensor(rng, "a", dims=(20, 20)), _tensor(rng, "b", TensorProto.FLOAT16, (99,))]).SerializeToString()
    new = bytearray(old)
    for _ in range(flips):
        new[rng.randrange(60 if rng.random() < 0.5 else len(new))] = rng.randrange(256)
    _size(old, bytes(new))
    _size(bytes(new), old)


# --- what it is made for --------------------------------------------------------------------------------------------------

RAW = 64 * 128


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_written_as_a_difference(dtype: int) -> None:
    """Each element moved by one at most: 1.6 bits an element. Only the lowest byte of an element is noise."""
    rng = random.Random(dtype)
    old = _model([_tensor(rng, "w", dtype)])
    new = ModelProto()
    new.CopyFrom(old)
    _perturb(new, rng)
    assert _size(old, new) < 0.45 * RAW + 300


def _changed(change: Callable[[ModelProto, random.Random], None], *, count: int = 6) -> int:
    rng = random.Random(9)
    old = _model([_tensor(rng, f"layer{number}.weight") for number in range(count)])
    new = ModelProto()
    new.CopyFrom(old)
    change(new, rng)
    return _size(old, new)


def test_moved_tensors_cost_nothing() -> None:
    assert _changed(_shuffle) < 350


def test_renamed_tensors_cost_their_names() -> None:
    assert _changed(_rename) < 400


def test_reshaped_tensors_cost_their_shapes() -> None:
    assert _changed(_reshape) < 400


def test_a_removed_tensor_costs_nothing() -> None:
    assert _changed(_remove) < 300


def test_an_added_tensor_costs_itself() -> None:
    assert _changed(_add) < 350 + 35 * 16


def test_rows_added_to_a_changed_tensor_cost_themselves() -> None:
    """A new label: every head grows by a row, and all weights move."""

    def change(model: ModelProto, rng: random.Random) -> None:
        _perturb(model, rng)
        _resize(model, rng)

    assert _changed(change) < 6 * (0.25 * RAW + 128) + 500


def test_moved_renamed_and_changed_at_once() -> None:
    """Equal shapes find each other in order where no name does."""

    def change(model: ModelProto, rng: random.Random) -> None:
        _perturb(model, rng)
        for number, tensor in enumerate(model.graph.initializer):
            tensor.name = f"onnx::Conv_{number + 400}"

    assert _changed(change) < 6 * 0.25 * RAW + 500


def test_moved_and_changed_tensors_find_each_other_by_name() -> None:
    def change(model: ModelProto, rng: random.Random) -> None:
        _perturb(model, rng)
        _shuffle(model, rng)

    assert _changed(change) < 6 * 0.25 * RAW + 500


def test_tensors_of_constant_nodes_and_of_inner_graphs() -> None:
    rng = random.Random(3)

    def model(values: list[bytes]) -> ModelProto:
        held = [TensorProto(data_type=TensorProto.INT8, dims=(RAW,), raw_data=data) for data in values]
        held[1].name = "inner.weight"
        inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "then", [], [], [held[1]])
        nodes = [helper.make_node("Constant", [], ["weight"], value=held[0]), helper.make_node("If", ["x"], ["y"], then_branch=inner)]
        made = _model([], nodes)
        sparse = onnx.SparseTensorProto(values=held[2], dims=[9])
        made.graph.sparse_initializer.append(sparse)
        body = [helper.make_node("Constant", [], ["other"], value=held[3])]
        made.functions.append(helper.make_function("d", "f", [], ["other"], body, [helper.make_opsetid("", 17)]))
        return made

    values = [rng.randbytes(RAW) for _ in range(4)]
    old, new = model(values), model([_nudge(data, rng) for data in values])
    assert len(tensors(old.SerializeToString())) == 4
    assert _size(old, new) < 4 * 0.25 * RAW + 600


def test_packed_float_data_is_written_as_a_difference_too() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=4000)
    old = _model([helper.make_tensor("w", TensorProto.FLOAT, [4000], values)])
    new = _model([helper.make_tensor("w", TensorProto.FLOAT, [4000], values * (1 + 1e-6))])
    assert not old.graph.initializer[0].raw_data
    assert _size(old, new) < 0.4 * 16_000


def test_int32_data_falls_through_as_bytes() -> None:
    """Numbers of varying length cannot be subtracted in place; the round trip holds, the bytes are sent or found."""
    values = list(range(-1000, 1000))
    old = _model([helper.make_tensor("w", TensorProto.INT32, [2000], values)])
    new = _model([helper.make_tensor("w", TensorProto.INT32, [2000], [*values[1:], 5])])
    assert not old.graph.initializer[0].raw_data
    assert _size(old, new) < 400


@pytest.mark.parametrize(("kind", "share"), [(np.float32, 0.72), (np.float16, 0.62), (np.int8, 0.4)])
def test_raw_weights_in_a_file_of_their_own(kind: type, share: float) -> None:
    """ONNX's external data and OpenVINO's .bin: no names, and still each weight lies where it lay."""
    rng = np.random.default_rng(2)
    weights = rng.normal(0, 0.03, 100_000)
    step = 0.03 * 3.3 / 127 if kind is np.int8 else 1.0
    old, new = (
        np.rint(w / step).astype(kind) if kind is np.int8 else w.astype(kind) for w in (weights, weights + rng.normal(0, 1e-3, 100_000))
    )
    assert _size(old.tobytes(), new.tobytes()) < share * old.nbytes


def test_floats_are_grouped_by_exponent_where_that_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    weights = rng.normal(0, 0.03, 100_000)
    old, new = (_model([numpy_helper.from_array(w.astype(np.float16), "w")]) for w in (weights, weights + rng.normal(0, 1e-3, 100_000)))
    grouped = _size(old, new)
    monkeypatch.setattr("model_sync.delta.onnx_tensors._EXPONENT_SHIFT", {})
    assert grouped < 0.97 * _size(old, new)


@pytest.mark.parametrize(("spread", "bits"), [(0.3, 2), (1.5, 4), (30.0, 8)])
def test_small_differences_are_packed_and_large_ones_among_them_survive(spread: float, bits: int) -> None:
    """An odd number of elements, so that the last byte of codes is not full."""
    rng = np.random.default_rng(6)
    before = rng.integers(-128, 128, 40_001).astype(np.int8)
    steps = np.rint(rng.normal(0, spread, before.size)).astype(np.int8)
    steps[[0, 77, 40_000]] = (127, -128, 100)
    old, new = (_model([numpy_helper.from_array(values, "w")]).SerializeToString() for values in (before, before + steps))
    _size(old, new)
    with_codes = _streams(encode_with("tensor", old, new))
    assert {CODES[4]: 4, CODES[2]: 2, FIRST_PLANE: 8}[next(number for number in with_codes if number > 1)] == bits
    assert (ESCAPES in with_codes) == (bits < 8)


def _streams(delta: bytes) -> list[int]:
    """The numbers of a tensor delta's streams."""
    table = delta[HEADER.size + 1 :][: delta[HEADER.size] * STREAM.size]
    return [number for number, _, _ in STREAM.iter_unpack(table)]


def test_a_tensor_of_many_blocks() -> None:
    """More than the decoder holds at once, and more than the encoder tries every level on."""
    rng = np.random.default_rng(8)
    before = rng.integers(-100, 100, 2**23 + 2**22 + 3).astype(np.int8)
    old, new = (
        _model([numpy_helper.from_array(values, "w")]) for values in (before, before + (rng.random(before.size) < 0.01).astype(np.int8))
    )
    assert _size(old, new) < 0.02 * before.size


def test_offsets_agree_with_onnx_itself() -> None:
    data = REFERENCE.read_bytes()
    model = onnx.load_from_string(data)
    found = {tensor.name: tensor for tensor in tensors(data)}
    wanted = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= MIN_TENSOR_BYTES]
    assert len(wanted) > 20
    for tensor in wanted:
        place = found[tensor.name]
        assert data[place.offset : place.offset + place.length] == tensor.raw_data
        assert (place.dtype, place.dims) == (tensor.data_type, tuple(tensor.dims))


@pytest.mark.parametrize(
    "data", [b"", b"PK\3\4", b"\0" * 200, b"\x3a\xff", b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", b"\x3b"], ids=repr
)
def test_what_is_not_onnx_has_no_tensors(data: bytes) -> None:
    assert tensors(data) == []


def test_graphs_within_graphs_without_end_are_not_followed() -> None:
    graph = b""
    for _ in range(200):  # graph { node { attribute { g { ... } } } }
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            graph = tag + _length(len(graph)) + graph
    assert tensors(b"\x3a" + _length(len(graph)) + graph) == []


def _length(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80, value >> 7]) if value >= 0x80 else bytes([value])
