"""The format of a model bundle and its manifest: the one format that all four packages share.

Import these names from here; the modules below may change.
"""

# ruff: noqa: F401  (the names are re-exported)

from model_sync.bundle.applies_to import AgeRange, AppliesTo, Synonyms, Text
from model_sync.bundle.gate_record import GATE_SCHEMA, GateRecord, check_gate
from model_sync.bundle.input_check_spec import MAX_INPUT_CHECK_BYTES, UPRIGHT, InputCheck, InputClass, MeasuredShare
from model_sync.bundle.input_spec import (
    InputSpec,
    Letterbox,
    ModalityLut,
    Monochrome2,
    Normalise,
    Resize,
    Scale,
    Step,
    ToUint8,
    Voi,
)
from model_sync.bundle.manifest import (
    MANIFEST_NAME,
    Document,
    Label,
    Manifest,
    Registration,
    TrainingData,
    Variant,
    Watch,
)
from model_sync.bundle.model_bundle import GoldenCase, GoldenVolume, ModelBundle, sha256_of
from model_sync.bundle.output_spec import (
    BACKGROUND,
    Explain,
    Golden,
    Group,
    Interval,
    OperatingPoint,
    OutputSpec,
    ScoreHistogram,
    SourceMeasure,
)
from model_sync.bundle.sequence_spec import Milliseconds, SequenceRule
from model_sync.bundle.volume_spec import (
    Clip,
    ClipQuantile,
    CropPad,
    MinMax,
    Orient,
    QuantileScale,
    Resample,
    SlidingWindow,
    Stack,
    VolumeSpec,
    VolumeStep,
)
from model_sync.errors import BundleError
from model_sync.field_types import Identifier, NonEmpty, Precision, RelativePath, SemVer, Strict
