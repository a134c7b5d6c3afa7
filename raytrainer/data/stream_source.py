"""`StreamSource`: batches of an iterable, on which all ranks agree, with the position after each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

import torch

from raytrainer.data.agreement import Agreement, Progress
from raytrainer.data.fetch import Collate, collate, uncollated
from raytrainer.data.order import Indices
from raytrainer.data.prefetch import Made, on_device
from raytrainer.data.sample_plan import Step
from raytrainer.data.stream import State, Stream

B = TypeVar("B")
_log = logging.getLogger("raytrainer.data")


class StreamSource(Generic[B]):
    """Makes the batches of an iterable.

    Args:
        stream: The iterable, cut into batches.
        collate_fn: As in `LoaderOptions`.
        device: The device of the batches.
        prefetch: Batches to prefetch.
        world_size: The size of the process group whose ranks compare their batches; None without one.
        finish: Makes a batch of a step and its data.
    """

    def __init__(
        self,
        stream: Stream,
        collate_fn: Collate | None,
        device: torch.device,
        prefetch: int,
        world_size: int | None,
        finish: Callable[[Step, list[Any]], B],
    ) -> None:
        self._stream, self._collate_fn, self._device, self._prefetch = stream, collate_fn, device, prefetch
        self._finish = finish
        self._agreement = None if world_size is None else Agreement(stream.name, stream.sharded, world_size)
        self.announced = stream.announced  # the number of batches in an epoch, if its __len__ says so
        self._length_is_checked = False

    def batches(
        self, start: int, stop: int | None, position: State, *, one_epoch: bool = False, alone: bool = False
    ) -> Generator[tuple[B, State], None, None]:
        """Yield each batch, and the position after it.

        Args:
            start, stop: The first batch, and the one after the last; None for no end.
            position: What was yielded with batch `start - 1`; empty if it is unknown.
            one_epoch: Whether to end after the first epoch, without reading on.
            alone: Whether the other ranks do not take these batches.
        """
        states: dict[int, tuple[State, int]] = {}  # by step: the position, and the samples read
        source = self._stream.run(start, position)

        def collated() -> Generator[Made, None, None]:
            try:
                for step, micro, state, samples_read in source:
                    if stop is not None and step.index >= stop:
                        return
                    states[step.index] = state, samples_read
                    yield (
                        step,
                        [self._collated(rows, samples) for rows, (samples, _) in zip(micro, step.micro, strict=True)],
                    )
                    if (one_epoch and step.ends_epoch) or (stop is not None and step.index + 1 >= stop):
                        return
            finally:
                source.close()

        ready = on_device(collated(), self._device, self._prefetch)
        agreement = None if alone else self._agreement
        try:
            while (batch := self._next(ready, states, agreement)) is not None:
                yield batch
        finally:
            ready.close()

    def _next(
        self, ready: Generator[Made, None, None], states: dict[int, tuple[State, int]], agreement: Agreement | None
    ) -> tuple[B, State] | None:
        """Return the next batch if all ranks have it; None after the last one, on which they have already agreed."""
        progress, result = None, None
        try:
            if (made := next(ready, None)) is None:
                return None
            step = made[0]
            batch = self._finish(*made)
            self._check_announced(step)
            state, samples = states.pop(step.index)
            progress = Progress(step.epoch, step.global_size, step.ends_epoch, samples)
            result = batch, state
        except Exception as error:
            if agreement is None:
                raise
            agreement.check(None, error)  # raises it after the other ranks know of it
        if agreement is not None:
            agreement.check(progress, None)
        return result

    def _check_announced(self, step: Step) -> None:
        """Log once if an epoch's length differs from the iterable's `__len__`."""
        if step.ends_epoch and self.announced and step.epoch == 0 and not self._length_is_checked:
            self._length_is_checked = True
            if step.index + 1 != self.announced:
                _log.warning(
                    "%s: __len__ announces %d batches in an epoch, and the first one had %d. trainer.max_epochs and learning-"
                    "rate curves go by __len__; trainer.max_steps does not.",
                    self._stream.name,
                    self.announced,
                    step.index + 1,
                )

    def _collated(self, rows: list[Any], samples: Indices) -> Any:
        try:
            return collate(rows, self._collate_fn)
        except Exception as error:
            raise uncollated(self._stream.whole, rows, samples, error, self._collate_fn) from error
