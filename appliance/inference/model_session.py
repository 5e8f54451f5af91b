"""A model ready to read, run the way that was chosen for this box; the plain way only where that cannot be, and never silently."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from appliance.core import device_profile
from appliance.core.domain import Note
from appliance.core.errors import InferenceError
from appliance.core.settings import Settings
from appliance.inference.remote_runtime import ELSEWHERE, Away
from appliance.lifecycle import model_files
from appliance.runtime import Candidate, Runtime, baseline_candidate, open_runtime
from appliance.tuning.selection import Plan, baseline_variant
from model_sync.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model_sync.bundle import Manifest, ModelBundle, Variant

logger = logging.getLogger(__name__)

# These build an engine where none fits: minutes in which nothing would be read. That is for the measuring, in its own process.
_BUILDERS: Final = ("tensorrt",)
_DETAIL: Final = 400


class Loaded:
    """A model ready to read: verified on disk, session open, warmed up.

    A choice that was measured on another device than this has become, or on other runtimes, answers the golden cases here before it
    reads, alone and not in batches; so does, always, what runs on a machine that is not this box's.

    Args:
        settings: where the box's own copies are, how many threads an inference gets, and which hub may be sent anything.
        digest: which model.
        plan: what was chosen to run it.
        distrust: why the chosen way must not be tried now; None when it may.
        wait_s: how long what is not on this box may take before the plain way begins, and it is reached for beside the reading; None: as
            long as it takes, for nobody waits. Where the plain way must not take over it is waited for in any case.

    Attributes:
        reason: why it runs this way, a code of ``choice.*``.
        fallback: why the chosen way does not run; None when it does.
        away: what runs it, where that is not on this box: it may be there again by itself.

    Raises:
        ActivationError: the copy is damaged.
        InferenceError: neither the chosen nor the plain way can be loaded, or the plain one was wrong when it was measured.
    """

    def __init__(self, settings: Settings, digest: str, plan: Plan, distrust: Note | None = None, *, wait_s: float | None = None) -> None:
        self._settings, self._wait_s = settings, wait_s
        self._bundle: ModelBundle = model_files.load_copy(settings.data_dir, digest)
        self.manifest: Manifest = self._bundle.manifest
        self.digest = digest
        self.plan = plan
        self.fallback: Note | None = None
        self.away: Away | None = None
        self._other_device = plan.candidate is not None and plan.profile != device_profile.profile()
        by_hand = plan.precision if plan.candidate is None or plan.reason.code == "choice.by_hand" else None
        self._plain = baseline_candidate(_variant(self._bundle, by_hand), settings.worker_threads)
        self._chosen, self._why = self._as_chosen()
        self.candidate, self.reason = self._chosen, self._why
        self.runtime: Runtime = self._run(distrust)

    def _as_chosen(self) -> tuple[Candidate, Note]:
        """What runs it if all goes well, and why."""
        chosen, reason = self.plan.candidate or self._plain, self.plan.reason
        declared = [variant.precision for variant in self.manifest.variants if variant.file == chosen.file]
        chosen = replace(chosen, precision=declared[0] if declared else chosen.precision)
        if self._other_device and reason.code != "choice.untuned":
            return replace(chosen, batch=1), Note("choice.other_device", f"{reason.code}: {self.plan.profile}"[:_DETAIL])
        return chosen, reason

    def _run(self, distrust: Note | None) -> Runtime:
        chosen, plain = self._chosen, self._plain
        is_plain = (chosen.runtime, chosen.provider, chosen.file) == (plain.runtime, plain.provider, plain.file)
        if is_plain:
            return self._open(chosen)
        try:
            self._may_run(distrust)
            return self._open_away() if chosen.runtime in ELSEWHERE else self._open(chosen)
        except InferenceError as error:
            if self.away is not None:  # it has tried the plain way as well
                raise
            local = self._open_plain(error)
            self._fell(error)
            return local

    def _may_run(self, distrust: Note | None) -> None:
        """Whether the chosen way may be tried at all; nothing leaves this box but to the hub that is configured now."""
        chosen, hub = self._chosen, self._settings.triton_url
        if distrust is not None:
            raise InferenceError(distrust.code, distrust.detail)
        if chosen.runtime in ELSEWHERE and (not hub or chosen.provider != hub):
            raise InferenceError(
                "runtime.unavailable", "the hub is not configured any more" if not hub else "another hub is configured now"
            )
        if chosen.runtime in _BUILDERS and self._other_device:
            raise InferenceError("choice.other_device", "it was measured on another device than this has become")

    def _open_away(self) -> Runtime:
        self.away = Away(lambda: self._open(self._chosen), self._local, self._fell)
        self.away.reach()
        try:
            if not self.away.reached(self._wait_s):
                raise InferenceError("runtime.deadline", f"not there in {self._wait_s:g} s; reached for while images are read")
        except InferenceError as error:
            self._open_fallen(self.away, error)
        return self.away

    def _open_fallen(self, away: Away, error: InferenceError) -> None:
        try:
            away.fall(error)
        except InferenceError as barred:
            if not away.reaching:
                raise (error if self.plan.baseline_refusal is not None else barred) from error
            away.reached(None)  # nobody else can read

    def _open_plain(self, error: InferenceError) -> Runtime:
        if self.plan.baseline_refusal is not None:
            raise error
        return self._local()

    def _local(self) -> Runtime:
        """The plain way; raises InferenceError where it is known to be wrong, or is found to be now."""
        if self.plan.baseline_refusal is not None:
            raise InferenceError(self.plan.baseline_refusal.code, self.plan.baseline_refusal.detail)
        return self._open(self._plain)

    def _open(self, candidate: Candidate) -> Runtime:
        try:
            path, cache = self._bundle.path(candidate.file), model_files.engine_dir(self._settings.data_dir)
            runtime = open_runtime(path, self.manifest.input, candidate, cache=cache)
            try:
                if self._other_device or candidate.runtime in ELSEWHERE:
                    self._check(runtime, candidate.precision)
            except BaseException:
                runtime.close()
                raise
        except BundleError as error:
            raise InferenceError("job.error", error.message) from error
        return runtime

    def _check(self, runtime: Runtime, precision: str) -> None:
        """The golden cases, as when it was measured."""
        from appliance.imaging.golden_cases import cases

        for case in cases(self._bundle):
            difference = case.difference(lambda tensor: runtime.infer({self.manifest.input.name: tensor}))
            if not difference <= case.tolerance[precision]:  # also true for NaN
                raise InferenceError("tune.wrong", f"{case.name}: off by {difference:.4g}, allowed {case.tolerance[precision]:g}")

    def _fell(self, error: InferenceError) -> None:
        """The plain way runs it now."""
        self.fallback = Note("choice.fallback", f"{_way(self._chosen)}: {error.code}: {error.detail}"[:_DETAIL])
        logger.error("the model is run another way than chosen", extra={"code": error.code})
        self.reason, self.candidate = self.fallback, self._plain

    def reach_again(self) -> Loaded:
        """Reach for what was lost, as long as that takes; returns itself, ready. Raises what goes wrong, such as InferenceError."""
        assert self.away is not None
        self.away.reach()
        self.away.reached(None)
        return self

    def come_back(self) -> None:
        """What was chosen was reached again, and runs it from now on."""
        self.fallback, self.reason, self.candidate = None, self._why, self._chosen

    @property
    def goes_out(self) -> bool:
        """Whether the next tensor is put to what is not on this box."""
        return self.away is not None and self.away.elsewhere

    @property
    def turns(self) -> int:
        """Another number when something else has come to run it."""
        return self.away.turns if self.away is not None else 0

    def ask(self, tensor: NDArray[np.float32]) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
        """Run the model over one or several images [n, ...]; raises InferenceError.

        Returns:
            The outputs, and what ran and why, which belongs to them: something else may run the model before the result is written.
            ``leaves_box`` is there for whatever was put to a hub, also where that did not answer and this box did.
        """
        sent = self.goes_out
        outputs = self.runtime.infer({self.manifest.input.name: tensor})
        return outputs, self.describe() | ({"leaves_box": True} if sent else {})

    def describe(self) -> dict[str, Any]:
        """What runs it now and why."""
        return self.runtime.describe() | {"reason": self.reason.to_json()}


def _variant(bundle: ModelBundle, precision: str | None) -> Variant:
    try:
        return baseline_variant(bundle, precision)
    except BundleError as error:
        raise InferenceError("job.error", error.message) from error


def _way(candidate: Candidate) -> str:
    return f"{candidate.runtime} {candidate.provider} {candidate.precision}"
