"""The states of models, activations and measurements; those of images and jobs are in :mod:`appliance.core.domain`.

Their values are stored in the database and must not change.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class _StoredState(str, Enum):
    """A state that is stored, logged and sent as its value."""

    __str__ = str.__str__  # the same text in every supported Python: formatting of str enums changed in 3.12


class ActivationState(_StoredState):
    """States of an activation (column ``activations.state``)."""

    STAGED = "staged"
    BUILDING = "building"
    SELF_TEST = "self-test"
    TRIAL = "trial"
    GOOD = "good"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"
    WITHDRAWN = "withdrawn"


PENDING_STATES: Final = (ActivationState.STAGED, ActivationState.BUILDING, ActivationState.SELF_TEST)
"""States before the switch, in their order; they are also the phases that a self-test process reports."""

IN_USE_STATES: Final = (ActivationState.TRIAL, ActivationState.GOOD)
"""States of an activation whose model was activated and was neither rolled back nor withdrawn."""


class ModelState(_StoredState):
    """States of an installed model (column ``models.state``)."""

    ACTIVE = "active"
    PREVIOUS = "previous"
    RETIRED = "retired"


class TuningState(_StoredState):
    """States of a measurement of a model that is active (``meta`` entries ``tuning:<digest>``)."""

    REQUESTED = "asked"
    MEASURING = "measuring"
    DONE = "done"
    FAILED = "failed"


class CandidateState(_StoredState):
    """What became of a candidate that was measured.

    CHOSEN runs the model; CORRECT is within the tolerance of the golden cases but was not chosen; WRONG is outside it; FAILED did not
    load or run; UNAVAILABLE cannot run on this box or was not reached in the time limit.
    """

    CHOSEN = "chosen"
    CORRECT = "right"
    WRONG = "wrong"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
