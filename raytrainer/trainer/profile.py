"""`trainer.profile`: a few steps under torch.profiler, as a Chrome trace among the run's artifacts."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator

from raytrainer.events import Artifact
from raytrainer.trainer.components import Components


@contextlib.contextmanager
def recorded(trainer: Components) -> Iterator[Callable[[], None]]:
    """Record `trainer.profile` on rank 0 as a Chrome trace in the run. Yield a function to call after each step."""
    options = trainer.experiment.trainer.profile
    # A run that resumes after the first step to record is not recorded.
    if options is None or trainer.world.rank or trainer.step >= options.start:
        yield lambda: None
        return
    from torch import profiler

    def keep(record: profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/trace-step-{options.start}.json"
            record.export_chrome_trace(path)
            trainer.events.send(trainer, Artifact(path, "profile"))

    first = options.start - 1 - trainer.step
    schedule = profiler.schedule(wait=max(first - 1, 0), warmup=min(first, 1), active=options.steps, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=keep) as record:
        yield record.step
