"""The localisation head of the reference model: a map of 14 x 14 cells from which the probability is formed.

The trained weights end in a map of 7 x 7 whose cells see the whole picture, so that its peak is rarely where the opacity is
(docs/adr/0037-outline-and-map.md). Their features at 14 x 14, before the last four convolutions, do change there. The head takes these
features and ends in one logit for each cell; the logit of the picture is the logarithm of the mean of the cells' exponentials, so a few
cells decide it and a cell above zero is evidence for the label.

``python -m quantize.reference.localisation_head --shared ../shared --train DIR`` trains it with PyTorch on the CPU and writes
``localisation_head.onnx``; the committed file beside this module is what it wrote. :func:`compose` joins weights and head.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import compose as onnx_compose
from onnx.utils import Extractor

from quantize.errors import DONE, QuantizeError, run_command
from quantize.graph.onnx_graph import state_opsets_once

HEAD: Final = Path(__file__).with_name("localisation_head.onnx")
CELLS: Final = 14
CHANNELS: Final = 160
FEATURES: Final = "features"
# The tensor of the trained weights that the head takes, float32 [n, 160, 14, 14].
_TRUNK_OUTPUT: Final = "/n/f/f.7/Relu_output_0"
_PROBABILITY: Final = "probability"

Features = NDArray[np.float16]


def open_trunk(weights: Path) -> Any:
    """Open the trained weights with the features as an output beside the probability: an ONNX Runtime session on the CPU.

    Raises:
        QuantizeError: the file does not exist, or is another network.
    """
    model = _load(weights)
    model.graph.output.append(_trunk_output())
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_trunk(session: Any, pictures: NDArray[np.float32]) -> tuple[Features, NDArray[np.float32]]:
    """Return features [n, 160, 14, 14] and the logits [n] that the trained weights give ``pictures`` ([n, 1, 224, 224], 0 to 1)."""
    probability, features = session.run([_PROBABILITY, _TRUNK_OUTPUT], {"image": pictures})
    bounded = np.clip(probability[:, 0], 1e-6, 1 - 1e-6)
    return features.astype(np.float16), np.log(bounded / (1 - bounded))


def compose(weights: Path, out: Path, head: Path = HEAD) -> Path:
    """Write the reference model: the trained weights up to their features at 14 x 14, then the head.

    It takes ``image`` [n, 1, 224, 224] in 0..1 and returns ``probability`` [n, 1] and ``cam`` [n, 1, 14, 14]. Returns ``out``.

    Raises:
        QuantizeError: the weights do not exist, or are another network.
    """
    model = _load(weights)
    del model.graph.value_info[:]
    model.graph.value_info.append(_trunk_output())
    trunk = Extractor(model).extract_model(["image"], [_TRUNK_OUTPUT])
    joined = onnx_compose.merge_models(trunk, onnx.load(head), io_map=[(_TRUNK_OUTPUT, FEATURES)])
    state_opsets_once(joined)
    onnx.checker.check_model(joined, full_check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(joined, out)
    return out


def _trunk_output() -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(_TRUNK_OUTPUT, onnx.TensorProto.FLOAT, ["n", CHANNELS, CELLS, CELLS])


def _load(weights: Path) -> onnx.ModelProto:
    if not weights.is_file():
        raise QuantizeError(
            f"the trained weights are not at {weights}",
            hint="point --shared to the directory that holds models/cxr_pneumonia, or train: quantize.reference.train",
        )
    model = onnx.load(weights)
    if not any(_TRUNK_OUTPUT in node.output for node in model.graph.node):
        raise QuantizeError(f"{weights} has no tensor {_TRUNK_OUTPUT}", hint="export the network of quantize.reference.network")
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Train the localisation head, and print its figures on the held-out patients."""
    parser = argparse.ArgumentParser(prog="python -m quantize.reference.localisation_head", description=main.__doc__)
    parser.add_argument(
        "--shared", type=Path, required=True, help="directory with data/cxr_train_224.npz (pictures) and models/cxr_pneumonia/ (weights)"
    )
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="train with PyTorch; write the head into DIR")
    options = parser.parse_args(argv)
    return run_command(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    from quantize.reference import localisation_training

    options.train.mkdir(parents=True, exist_ok=True)
    for line in localisation_training.train(options.shared, options.train / HEAD.name):
        print(line, flush=True)
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
