"""`RowSource`: batches of a dataset that is read in Python, in the calling thread, another thread or in processes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from raytrainer.data.datasets import name_of
from raytrainer.data.fetch import Fetcher
from raytrainer.data.order import Indices
from raytrainer.data.pickling import CannotPickle
from raytrainer.data.pool import WorkerPool, prepare_start
from raytrainer.data.prefetch import Made, moved, on_device
from raytrainer.data.sample_plan import SamplePlan, Step

_log = logging.getLogger("raytrainer.data")


@dataclass(frozen=True)
class _MakeBatch:
    """Makes the micro-batches of a batch in a data process."""

    plan: SamplePlan
    fetcher: Fetcher

    def __call__(self, index: int) -> list[Any]:
        step = self.plan.step(index)
        return [self.fetcher.isolated(samples, step.epoch) for samples, _ in step.micro]


class RowSource:
    """Makes the batches of a map-style dataset.

    Args:
        plan: Which samples are in which batch.
        fetcher: Reads them.
        device: The device of the batches.
        keeps_state: Whether the dataset has a state of its own, which a checkpoint saves.
        num_workers, prefetch, start_method: As in `LoaderOptions`.

    Attributes:
        dataset_states: The states of the dataset after the batches that were prefetched, by step.
    """

    def __init__(
        self,
        plan: SamplePlan,
        fetcher: Fetcher,
        device: torch.device,
        *,
        keeps_state: bool,
        num_workers: int,
        prefetch: int,
        start_method: str,
    ) -> None:
        self._plan, self._fetcher, self._device = plan, fetcher, device
        self._num_workers, self._prefetch, self._start_method = num_workers, prefetch, start_method
        self._dataset = fetcher.dataset
        self._keeps_state = keeps_state
        self.dataset_states: dict[int, Any] = {}
        if num_workers:
            prepare_start(
                start_method, [type(self._dataset).__module__, getattr(fetcher.collate_fn, "__module__", __name__)]
            )
        if num_workers and self._keeps_state:
            _log.warning(
                "data.num_workers=%d: each process changes a copy of %s, and a checkpoint has the state of none of them; "
                "with data.num_workers=0 it is restored exactly",
                num_workers,
                name_of(self._dataset),
            )

    def batches(self, steps: Generator[Step, None, None], start: int, stop: int | None) -> Generator[Made, None, None]:
        """Yield the data of each step from `start` to `stop`."""
        if self._num_workers and (pool := self._pool()) is not None:
            # On the CPU, the processes already prefetch, so another thread would only pass batches on.
            return on_device(self._pooled(pool, start, stop), self._device, 1 if self._device.type == "cuda" else 0)
        return self._in_threads(steps)

    def _pool(self) -> WorkerPool | None:
        """Return new processes, or None if the dataset cannot be sent to them."""
        make, name = _MakeBatch(self._plan, self._fetcher), name_of(self._dataset)
        try:
            return WorkerPool(make, self._num_workers, self._prefetch, name, self._start_method)
        except CannotPickle as error:
            _log.warning(
                "data.start_method=%s: %s or data.collate_fn cannot be pickled for a data process (%s), so one thread reads "
                "it, as with data.num_workers=0. Define its classes and functions at the top level of a module, or set "
                "data.start_method=fork",
                self._start_method,
                name,
                error,
            )
            self._num_workers = 0
            return None

    def _pooled(self, pool: WorkerPool, start: int, stop: int | None) -> Generator[Made, None, None]:
        results = pool.run(start, stop)
        try:
            for index, micro in results:
                yield self._plan.step(index), micro
        finally:
            results.close()

    def _in_threads(self, steps: Generator[Step, None, None]) -> Generator[Made, None, None]:
        fetcher = self._fetcher

        def read(step: Step, fetch: Callable[[Indices, int], Any]) -> Made:
            made = step, [fetch(samples, step.epoch) for samples, _ in step.micro]
            if self._keeps_state:
                self.dataset_states[step.index] = copy.deepcopy(self._dataset.state_dict())
            return made

        def plain() -> Generator[Made, None, None]:
            for step in steps:
                yield read(step, fetcher)

        # Read the first batch in this thread to detect whether the dataset draws from the global generators. Such a
        # dataset cannot be read in another thread, because its draws would mix with the model's.
        for step in steps:
            yield moved(read(step, fetcher.isolated), self._device)
            if self._prefetch and not fetcher.draws:
                break
        yield from on_device(plain(), self._device, self._prefetch)
