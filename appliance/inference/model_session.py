"""A model that is ready for inference: the runtime that was chosen for this box, or the baseline as its recorded fallback."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from appliance.core import device_profile
from appliance.core.domain import Note
from appliance.core.errors import ApplianceError, InferenceError
from appliance.core.settings import Settings
from appliance.inference.remote_runtime import MIN_ANSWER_S, REMOTE_RUNTIMES, RemoteRuntime
from appliance.lifecycle import model_files
from appliance.runtime import Candidate, Runtime, baseline_candidate, open_runtime
from appliance.runtime.input_check import InputChecker
from appliance.runtime.tensors import run_in_pieces
from appliance.tuning.selection import Plan, baseline_variant
from model_sync.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model_sync.bundle import Manifest, ModelBundle, Variant

    Tensors = dict[str, NDArray[np.float32]]

logger = logging.getLogger(__name__)

# Time between two attempts to reach a remote runtime that did not answer.
RETRY_S: Final = 60.0
# These build an engine where none fits, which takes minutes. Only tuning does that, in its own process.
_ENGINE_BUILDERS: Final = ("tensorrt",)
_DETAIL: Final = 400


class ModelSession:
    """A model that is verified on disk, open and warmed up.

    A candidate that was measured on another device, or with other runtime versions, must answer the golden cases on this box before it
    is used, and then runs without batches. A remote runtime must do so for every new connection.

    A session with a remote runtime is in one of three states: the remote runtime answers (``fallback`` is None); the baseline answers
    and the remote runtime is tried again by :meth:`retry_remote`; nothing answers (``lost``), because the baseline is known to be wrong.

    Args:
        settings: location of the box's model files, number of threads, address of the remote runtime.
        plan: the candidate that was chosen.
        skip_reason: why the chosen candidate must not be tried; None when it may.
        wait_s: how long to wait for a remote runtime before the baseline takes over; None: without a limit. Where the baseline must not
            take over there is no limit either.

    Attributes:
        fallback: why the chosen candidate does not run; None when it does.
        lost: why nothing runs the model any more; None while something does.
        input_checker: the input check of the bundle, None where it has none; it runs on this box, wherever the model runs.
        has_verified_accuracy: whether the gate record matches the weights and thresholds, so that accuracy may be shown.

    Raises:
        ActivationError: the model files are damaged.
        InferenceError: neither the chosen candidate nor the baseline can be opened, or the baseline was wrong when it was measured.
    """

    def __init__(
        self, settings: Settings, digest: str, plan: Plan, skip_reason: Note | None = None, *, wait_s: float | None = None
    ) -> None:
        self._settings = settings
        self._bundle: ModelBundle = model_files.load_copy(settings.data_dir, digest)
        self.manifest: Manifest = self._bundle.manifest
        self.has_verified_accuracy = self._check_accuracy()
        self.digest, self.plan = digest, plan
        self._is_other_device = plan.candidate is not None and plan.profile != device_profile.profile()
        requested = plan.precision if plan.candidate is None or plan.reason.code == "choice.by_hand" else None
        self._baseline = baseline_candidate(_baseline_variant(self._bundle, requested), settings.worker_threads)
        self._chosen, self._chosen_reason = self._chosen_candidate()
        self._local: Runtime | None = None
        self._remote: RemoteRuntime | None = None
        self._fallback_at = self._retry_at = 0.0
        self.fallback: Note | None = None
        self.lost: InferenceError | None = None
        self.input_checker = self._open_checker()
        self._open_session(skip_reason, wait_s)

    def _open_checker(self) -> InputChecker | None:
        try:
            return InputChecker.open(self._bundle)
        except BundleError as error:
            raise InferenceError("job.error", error.message) from error

    def _check_accuracy(self) -> bool:
        problem = self._bundle.gate_problem()
        if problem is not None:
            logger.warning("the accuracy of the model is not verified", extra={"code": problem.code})
        return problem is None

    def _chosen_candidate(self) -> tuple[Candidate, Note]:
        """Return the candidate to run and the reason to record with each result."""
        chosen, reason = self.plan.candidate or self._baseline, self.plan.reason
        declared = [variant.precision for variant in self.manifest.variants if variant.file == chosen.file]
        chosen = replace(chosen, precision=declared[0] if declared else chosen.precision)
        if self._is_other_device and reason.code != "choice.untuned":
            return replace(chosen, batch=1), Note("choice.other_device", f"{reason.code}: {self.plan.profile}"[:_DETAIL])
        return chosen, reason

    @property
    def candidate(self) -> Candidate:
        """The candidate that runs now."""
        return self._chosen if self.fallback is None else self._baseline

    @property
    def runtime(self) -> Runtime | RemoteRuntime | None:
        """What answers now; another object after each change."""
        return self._local or self._remote

    @property
    def is_remote(self) -> bool:
        """Whether the chosen candidate runs on another machine, though the baseline may answer now."""
        return self._remote is not None

    @property
    def sends_to_remote(self) -> bool:
        """Whether the next tensor is sent to another machine."""
        return self._remote is not None and self._local is None

    def _open_session(self, skip_reason: Note | None, wait_s: float | None) -> None:
        chosen, baseline = self._chosen, self._baseline
        if (chosen.runtime, chosen.provider, chosen.file) == (baseline.runtime, baseline.provider, baseline.file):
            self._local = self._open(chosen)
            return
        try:
            self._check_allowed(skip_reason)
            if chosen.runtime not in REMOTE_RUNTIMES:
                self._local = self._open(chosen)
                return
        except InferenceError as error:
            self._fall_back(self._open_baseline(error), error)
            return
        self._open_remote(wait_s)

    def _check_allowed(self, skip_reason: Note | None) -> None:
        """Raise InferenceError where the chosen candidate must not be tried; a tensor is only sent to the server configured now."""
        chosen, configured = self._chosen, self._settings.triton_url
        if skip_reason is not None:
            raise InferenceError(skip_reason.code, skip_reason.detail)
        if chosen.runtime in REMOTE_RUNTIMES and (not configured or chosen.provider != configured):
            detail = "another remote runtime is configured now" if configured else "the remote runtime is not configured any more"
            raise InferenceError("runtime.unavailable", detail)
        if chosen.runtime in _ENGINE_BUILDERS and self._is_other_device:
            raise InferenceError("choice.other_device", "measured on another device, or before a change of this one")

    def _open_remote(self, wait_s: float | None) -> None:
        self._remote = RemoteRuntime(partial(self._open, self._chosen))
        try:
            if self._remote.wait_connected(wait_s):
                return
            error = InferenceError("runtime.deadline", f"no connection within {wait_s:g} s; it is tried again while images are analysed")
        except InferenceError as failed:
            error = failed
        try:
            self._fall_back(self._open_baseline(error), error)
        except InferenceError:
            if not self._remote.has_connection:
                raise
            self._remote.wait_connected(None)  # nothing else can run the model

    def _open_baseline(self, error: InferenceError) -> Runtime:
        """Open the baseline; raises ``error`` where the baseline is known to be wrong, InferenceError where it is wrong now."""
        if self.plan.baseline_refusal is not None:
            raise error
        return self._open(self._baseline)

    def _open(self, candidate: Candidate) -> Runtime:
        try:
            path, cache = self._bundle.path(candidate.file), model_files.engine_dir(self._settings.data_dir)
            runtime = open_runtime(path, self.manifest.input, candidate, cache=cache)
            try:
                if self._is_other_device or candidate.runtime in REMOTE_RUNTIMES:
                    self._check_golden_cases(runtime, candidate.precision)
            except BaseException:
                runtime.close()
                raise
        except BundleError as error:
            raise InferenceError("job.error", error.message) from error
        return runtime

    def _check_golden_cases(self, runtime: Runtime, precision: str) -> None:
        """Compare the runtime's answers with the golden cases; raises InferenceError ``tune.wrong``."""
        from appliance.imaging.golden_cases import cases

        for case in cases(self._bundle):
            difference = case.difference(lambda tensor: runtime.infer({self.manifest.input.name: tensor}))
            if not difference <= case.tolerance[precision]:  # also true for NaN
                raise InferenceError("tune.wrong", f"{case.name}: off by {difference:.4g}, allowed {case.tolerance[precision]:g}")

    def infer(self, tensor: NDArray[np.float32]) -> tuple[Tensors, dict[str, Any]]:
        """Run the model over one or several images [n, ...].

        Returns:
            The outputs, and a description of what computed them and why (``run``). It belongs to these outputs: something else may run
            the model before the result is stored. ``leaves_box`` is set when the tensor was sent to a remote runtime, also where that
            did not answer and the baseline did.

        Raises:
            InferenceError: nothing could compute an answer.
        """
        was_sent = self.sends_to_remote
        outputs = self._infer({self.manifest.input.name: tensor})
        return outputs, self.describe() | ({"leaves_box": True} if was_sent else {})

    def _infer(self, inputs: Tensors) -> Tensors:
        if self.lost is not None:
            raise InferenceError(self.lost.code, self.lost.detail)
        local = self._local
        if local is not None and self.fallback is not None:  # one image at a time, however many the remote runtime takes at once
            ((name, value),) = inputs.items()
            return run_in_pieces(value, 1, True, lambda piece: local.infer({name: piece}))
        if local is not None:
            return local.infer(inputs)
        if self._remote is None:
            raise InferenceError("job.error", "the runtime is closed")
        try:
            return self._remote.infer(inputs)
        except InferenceError as error:
            self._replace_remote(self._remote, error)
        return self._infer(inputs)  # at once, so that the scan loses no attempt

    def _replace_remote(self, remote: RemoteRuntime, error: InferenceError) -> None:
        """Fall back to the baseline; raises ``error`` where that must not take over."""
        try:
            baseline = self._open_baseline(error)
        except InferenceError:
            if error.code.startswith("runtime."):  # any other error may be the fault of this scan
                self.lost = error
            raise error from None
        self._fall_back(baseline, error)
        remote.disconnect()  # a server that was restarted must answer the golden cases before it is used again

    def _fall_back(self, baseline: Runtime, error: InferenceError) -> None:
        """Let the baseline answer from now on."""
        chosen = f"{self._chosen.runtime} {self._chosen.provider} {self._chosen.precision}"
        logger.error("the model falls back to the baseline", extra={"code": error.code})
        self._fallback_at = time.monotonic()
        self._retry_at = self._fallback_at + RETRY_S
        self.fallback = Note("choice.fallback", f"{chosen}: {error.code}: {error.detail}"[:_DETAIL])
        self._local = baseline

    @property
    def fallback_s(self) -> float:
        """For how many seconds the baseline has answered in place of a remote runtime; 0 where that answers."""
        return time.monotonic() - self._fallback_at if self.is_remote and self.fallback is not None else 0.0

    def retry_remote(self) -> None:
        """Between two jobs, without waiting: try the remote runtime again when it is time, and use it as soon as it is connected."""
        remote = self._remote
        if remote is None or self.fallback is None:
            return
        if not remote.has_connection:
            if time.monotonic() >= self._retry_at:
                remote.connect()
            return
        try:
            is_connected = remote.wait_connected(0.0)
        except (ApplianceError, OSError, MemoryError) as error:
            logger.info("the remote runtime still fails", extra={"code": getattr(error, "code", type(error).__name__)})
            self._retry_at = time.monotonic() + RETRY_S
            return
        if is_connected:
            baseline, self._local, self.fallback = self._local, None, None
            if baseline is not None:
                baseline.close()

    def describe(self) -> dict[str, Any]:
        """Describe what runs the model now, and why: ``Runtime.describe`` and ``reason``."""
        reason = self.fallback or self._chosen_reason
        return (self.runtime.describe() if self.runtime is not None else {}) | {"reason": reason.to_json()}

    def close(self, *, wait: bool = False) -> None:
        """Free the runtimes. With ``wait`` wait until a remote runtime is closed, else briefly, and only if it was answering."""
        local, remote = self._local, self._remote
        self._local = self._remote = None
        if self.input_checker is not None:
            self.input_checker.close()
        if local is not None:
            local.close()
        if remote is not None:
            answers = local is None and self.lost is None
            remote.disconnect(None if wait else MIN_ANSWER_S if answers else 0.0)


def _baseline_variant(bundle: ModelBundle, precision: str | None) -> Variant:
    try:
        return baseline_variant(bundle, precision)
    except BundleError as error:
        raise InferenceError("job.error", error.message) from error
