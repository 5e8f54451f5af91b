"""A model ready to read, run the way that was chosen for this box; the plain way only where that cannot be, and never silently."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from appliance import copies, device
from appliance.domain import Note
from appliance.errors import InferenceError
from appliance.runtime import Candidate, Runtime, open_runtime, plain_candidate
from appliance.runtime.choice import Plan, plain_variant
from appliance.settings import Settings
from model_sync.errors import BundleError

if TYPE_CHECKING:
    from model_sync.bundle import Manifest, ModelBundle, Variant

logger = logging.getLogger(__name__)

# These build an engine where none fits: minutes in which nothing would be read. That is for the measuring, in its own process.
_BUILDERS: Final = ("tensorrt",)
_DETAIL: Final = 400


class Loaded:
    """A model ready to read: verified on disk, session open, warmed up.

    Args:
        settings: where the box's own copies are, and how many threads an inference gets.
        digest: which model.
        plan: what was chosen to run it.
        distrust: why the chosen way must not be tried now; None when it may.

    Attributes:
        reason: why it runs this way, a code of ``choice.*``.
        fallback: why the chosen way does not run; None when it does.

    Raises:
        ActivationError: the copy is damaged.
        InferenceError: neither the chosen nor the plain way can be loaded, or the plain one was wrong when it was measured.
    """

    def __init__(self, settings: Settings, digest: str, plan: Plan, distrust: Note | None = None) -> None:
        bundle: ModelBundle = copies.own_copy(settings.data_dir, digest)
        self.manifest: Manifest = bundle.manifest
        self.digest = digest
        self.plan = plan
        self.reason = plan.reason
        self.fallback: Note | None = None
        by_hand = plan.precision if plan.candidate is None or plan.reason.code == "choice.by_hand" else None
        plain = plain_candidate(_variant(bundle, by_hand), settings.worker_threads)
        self.candidate: Candidate = plan.candidate or plain
        is_plain = (self.candidate.runtime, self.candidate.provider, self.candidate.file) == (plain.runtime, plain.provider, plain.file)
        try:
            self.runtime: Runtime = self._open(settings, bundle, None if is_plain else distrust)
        except (InferenceError, BundleError) as error:
            detail = error.message if isinstance(error, BundleError) else error.detail
            if is_plain or plan.plain_barred is not None:
                raise InferenceError("job.error" if isinstance(error, BundleError) else error.code, detail) from error
            self.fallback = Note("choice.fallback", f"{_way(self.candidate)}: {error.code}: {detail}"[:_DETAIL])
            logger.error("the model is run another way than chosen", extra={"code": error.code})
            self.reason, self.candidate = self.fallback, plain
            self.runtime = open_runtime(bundle.path(plain.file), self.manifest.input, plain)

    def _open(self, settings: Settings, bundle: ModelBundle, distrust: Note | None) -> Runtime:
        chosen = self.candidate
        if distrust is not None:
            raise InferenceError(distrust.code, distrust.detail)
        if chosen.runtime in _BUILDERS and self.plan.profile != device.profile():
            raise InferenceError("choice.other_device", "it was measured on another device than this has become")
        return open_runtime(bundle.path(chosen.file), self.manifest.input, chosen, cache=copies.engines(settings.data_dir))

    def describe(self) -> dict[str, Any]:
        """What ran and why, for the result."""
        return self.runtime.describe() | {"reason": self.reason.to_json()}


def _variant(bundle: ModelBundle, precision: str | None) -> Variant:
    try:
        return plain_variant(bundle, precision)
    except BundleError as error:
        raise InferenceError("job.error", error.message) from error


def _way(candidate: Candidate) -> str:
    return f"{candidate.runtime} {candidate.provider} {candidate.precision}"
