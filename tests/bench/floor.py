"""The floor: decode, resize, infer, one durable write, one commit, in a plain loop with the same decoders and runtime."""

from __future__ import annotations

import json
import os
import sqlite3
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pydicom
from PIL import Image

from appliance.imaging import decoders, pixels
from appliance.lifecycle.model_control import reference_bundle


class Floor:
    """The least a program must do to turn a scan into a stored finding."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._database = sqlite3.connect(directory / "floor.sqlite3", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("CREATE TABLE findings (name TEXT, score REAL)")
        weights = next(reference_bundle().glob("cxr_*.onnx"))
        self._session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
        self._number = 0

    def run(self, data: bytes) -> float:
        """One scan; returns its score."""
        self._number += 1
        path = self._directory / f"{self._number}.dcm"  # a new file each time, as every scan is
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with patch.object(pixels, "decode_coded_frame", decoders.decode_coded_frame):  # in this process
            values = pixels.decode_frame(pydicom.dcmread(BytesIO(data)), 0)
        grey = (values >> 8).astype(np.uint8) if values.dtype.itemsize == 2 else values
        tensor = np.asarray(Image.fromarray(grey).resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32)[None, None] / 255
        score = float(self._session.run(["probability"], {"image": tensor})[0][0, 0])
        self._database.execute("INSERT INTO findings VALUES (?, ?)", (json.dumps(path.name), score))
        return score

    def close(self) -> None:
        """Close the database."""
        self._database.close()
