"""Analyse several images in one inference, where tuning measured that to be faster; a failure of one image does not affect the others.

Before and after the inference every image has its own deadline and its own errors, and urgent jobs go first between any two steps. When
the inference of the batch fails, each image is inferred alone, so that one bad image does not cost the others an attempt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from appliance.core.domain import Job, JobResult
from appliance.core.errors import InferenceError
from appliance.inference.image_job import PreparedImage, Timer, build_result, prepare_image
from appliance.inference.job_runner import JobRunner, commit
from appliance.inference.model_session import ModelSession
from appliance.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


class BatchJob:
    """Several jobs of one model whose images are inferred together.

    Args:
        jobs: of this model, all leased to this worker.
    """

    def __init__(self, store: Store, model: ModelSession, runner: JobRunner, jobs: Sequence[Job]) -> None:
        self._store, self._model, self._runner, self._jobs = store, model, runner, jobs

    def run(self) -> None:
        """Run the jobs; raises InterruptedJobError, see :meth:`appliance.inference.job_runner.JobRunner.run_urgent`."""
        images = self._prepare_all()
        if not images:
            return
        was_sent = self._model.sends_to_remote
        answer = self._runner.guard(images[0].job, lambda: self._infer(images))
        outputs, run = answer if answer is not None else (None, {"leaves_box": True} if was_sent else {})
        batch_size = len(images) if self._model.candidate.batch > 1 else 1  # a fallback takes one image at a time
        pending = [(image, None if outputs is None else _select(outputs, index)) for index, image in enumerate(images)]
        while pending:
            self._runner.run_urgent(self._jobs[0])
            urgent = self._store.queue.urgent_among([image.job.id for image, _ in pending])
            image, one = pending.pop(next((index for index, (item, _) in enumerate(pending) if item.job.id in urgent), 0))
            self._runner.guard(image.job, partial(self._finish, image, one, run, batch_size))

    def _prepare_all(self) -> list[PreparedImage]:
        """Prepare the images one by one; jobs that end before the inference, or become urgent, are not among those returned."""
        waiting, images = list(self._jobs), list[PreparedImage]()
        while self._run_urgent_first(waiting, images):
            job = waiting.pop(0)
            image = self._runner.guard(job, partial(self._prepare, job))
            if isinstance(image, PreparedImage):
                images.append(image)
        return images

    def _run_urgent_first(self, waiting: list[Job], images: list[PreparedImage]) -> bool:
        """Run urgent jobs of the queue, then those of this batch; returns whether any image still has to be prepared."""
        self._runner.run_urgent(self._jobs[0])
        while urgent := self._store.queue.urgent_among([job.id for job in waiting] + [image.job.id for image in images]):
            for job in [job for job in waiting if job.id in urgent]:
                waiting.remove(job)
                self._runner.run(job)
            for image in [image for image in images if image.job.id in urgent]:
                images.remove(image)
                self._runner.guard(image.job, partial(self._finish, image, None, {}, 1))
            self._runner.run_urgent(self._jobs[0])
        return bool(waiting)

    def _prepare(self, job: Job) -> PreparedImage | None:
        timer = Timer()
        image = prepare_image(self._store, job, self._model.manifest.image_input, timer, self._model.input_checker)
        if isinstance(image, JobResult):
            commit(self._store, job, image, timer)
            return None
        return image

    def _infer(self, images: Sequence[PreparedImage]) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]] | None:
        """Infer all images at once; None when that fails, which does not count as an attempt of any image."""
        import numpy as np

        started = time.perf_counter()
        try:
            answer = self._model.infer(np.concatenate([image.prepared.tensor for image in images]))
        except (InferenceError, MemoryError) as error:
            logger.warning("a batch is inferred one by one", extra={"code": getattr(error, "code", "job.memory"), "count": len(images)})
            return None
        for image in images:
            image.timer.ms["infer"] = (time.perf_counter() - started) * 1000 / len(images)
        return answer

    def _finish(self, image: PreparedImage, outputs: dict[str, NDArray[np.float32]] | None, run: dict[str, Any], batch_size: int) -> None:
        """Commit the result of one image, which is inferred alone where the batch gave no outputs."""
        if outputs is None:
            batch_size = 1
            with image.timer.part("infer"):
                outputs, own_run = self._model.infer(image.prepared.tensor)
            run = own_run | run  # keep `leaves_box` of the batch
        commit(self._store, image.job, build_result(self._model, image, outputs, run, batch_size), image.timer)


def _select(outputs: dict[str, NDArray[np.float32]], index: int) -> dict[str, NDArray[np.float32]]:
    """The outputs for one image of the batch, with a batch axis of 1."""
    return {name: value[index : index + 1] for name, value in outputs.items()}
