"""Reading several images with one model at once, where the box measured that to be faster: each of them as safe as alone.

Before and after the model every image has its own deadline and its own faults; what is urgent goes first between any two steps. When
the model cannot answer to all of them, each is given to it alone, so that one that breaks it costs the others nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from appliance.core.domain import Job, JobResult
from appliance.core.errors import InferenceError
from appliance.inference.image_job import Film, Timer, conclude, prepare
from appliance.inference.model_session import Loaded
from appliance.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Guarded = Callable[[Job, Callable[[], Any]], Any]
"""Does one step of a job under its deadline; what goes wrong ends that job alone, and gives None."""


class Batch:
    """One reading of several jobs of one model.

    Args:
        store: the box's store.
        model: the model of all of them.
        guarded: does one step of one job.
        alone: does all of one job.
        urgent_first: called between two steps.
    """

    def __init__(
        self, store: Store, model: Loaded, guarded: Guarded, alone: Callable[[Job], None], urgent_first: Callable[[], None]
    ) -> None:
        self._store, self._model, self._guarded, self._alone, self._urgent_first = store, model, guarded, alone, urgent_first

    def read(self, jobs: Sequence[Job]) -> None:
        """Do these jobs, which are all leased to this worker."""
        waiting, films = list(jobs), list[Film]()
        while self._bring_forward(waiting, films):
            job = waiting.pop(0)
            film = self._guarded(job, partial(self._prepare, job))
            if isinstance(film, Film):
                films.append(film)
        if not films:
            return
        sent = self._model.goes_out
        answered = self._guarded(films[0].job, lambda: self._infer(films))
        left = [(film, None if answered is None else _of(answered[0], index)) for index, film in enumerate(films)]
        ran = {"leaves_box": True} if answered is None and sent else {} if answered is None else answered[1]
        together = len(films) if self._model.candidate.batch > 1 else 1  # what reads now may not be what reads in batches
        while left:
            self._urgent_first()
            urgent = self._store.urgent_among([film.job.id for film, _ in left])
            film, answer = left.pop(next((index for index, (item, _) in enumerate(left) if item.job.id in urgent), 0))
            self._guarded(film.job, partial(self._conclude, film, answer, ran, together))

    def _bring_forward(self, waiting: list[Job], films: list[Film]) -> bool:
        """Do what has become urgent, elsewhere and here, before anything else; returns whether any image still has to be prepared."""
        self._urgent_first()
        while urgent := self._store.urgent_among([job.id for job in waiting] + [film.job.id for film in films]):
            for job in [job for job in waiting if job.id in urgent]:
                waiting.remove(job)
                self._alone(job)
            for film in [film for film in films if film.job.id in urgent]:
                films.remove(film)
                self._guarded(film.job, partial(self._conclude, film, None, {}, 1))
            self._urgent_first()
        return bool(waiting)

    def _prepare(self, job: Job) -> Film | None:
        timer = Timer()
        film = prepare(self._store, job, self._model.manifest.image_input, timer)
        if isinstance(film, JobResult):
            self._finish(job, film, timer)
            return None
        return film

    def _infer(self, films: Sequence[Film]) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]] | None:
        """All of them at once, and what ran; None when that cannot be, which is not yet anybody's fault."""
        import numpy as np

        started = time.perf_counter()
        try:
            stacked = np.concatenate([film.prepared.tensor for film in films])
            answered = self._model.ask(stacked)
        except (InferenceError, MemoryError) as error:
            logger.warning("a batch is read one by one", extra={"code": getattr(error, "code", "job.memory"), "count": len(films)})
            return None
        for film in films:
            film.timer.ms["infer"] = (time.perf_counter() - started) * 1000 / len(films)
        return answered

    def _conclude(self, film: Film, answer: dict[str, NDArray[np.float32]] | None, ran: dict[str, Any], together: int) -> None:
        if answer is None:
            together = 1
            with film.timer.part("infer"):
                answer, now = self._model.ask(film.prepared.tensor)
            ran = now | ran  # where it was sent before, in the batch
        self._finish(film.job, conclude(self._model, film, answer, ran, together), film.timer)

    def _finish(self, job: Job, result: JobResult, timer: Timer) -> None:
        with timer.part("store"):
            kept = self._store.finish_job(job, result)
        if kept:
            timer.ms["total"] = sum(timer.ms.values())
            self._store.record_store_time(job, timer.ms)
            logger.info("job done", extra={"job": job.id, "state": result.state.value, "seconds": round(timer.ms["total"] / 1000, 3)})


def _of(answers: dict[str, NDArray[np.float32]], index: int) -> dict[str, NDArray[np.float32]]:
    """The answer to one image of several."""
    return {name: value[index : index + 1] for name, value in answers.items()}
