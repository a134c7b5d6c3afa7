"""The first-batch probe: one step of a run on the CPU in a separate process, with the real objects and data.

That process calls `try_step`. It uses the training loop itself, so it refuses exactly what the first step would refuse.
It writes checkpoints and metrics only to its private directory, and calls no callback.
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrainer import config, seeds
from raytrainer.batches import map_tensors
from raytrainer.checkpoint import Checkpointer
from raytrainer.config import Experiment, build, check_targets
from raytrainer.core import environment
from raytrainer.data import Batch, Loader
from raytrainer.errors import ConfigError, NonFiniteLoss, RaytrainerError
from raytrainer.flops import model_flops
from raytrainer.optim import freeze
from raytrainer.parallel import World
from raytrainer.preflight.objects import unbuilt_model
from raytrainer.preflight.resources import least_workers
from raytrainer.storage import Storage
from raytrainer.trainer import Trainer
from raytrainer.trainer.evaluation_metrics import too_few_samples
from raytrainer.trainer.system import stateful_part, together

# The size of the largest model that is tried. With its gradients and Adam's averages it takes 0.8 GB.
MAX_PARAMETERS = 50_000_000
_MAX_PARAMETERS_SAVED = 5_000_000  # the size of the largest model whose checkpoint is written and read again

# Errors that prove nothing about the run, which may have a GPU, a process group, a network and more memory.
_LOCAL_PROBLEMS = re.compile(
    r"not implemented for|not supported on cpu|cuda|cudnn|triton|nvidia|nccl|\bhip\b|xformers|flash.?att|bitsandbytes"
    r"|process group|torch\.distributed|ray\.(train|init)|offline|huggingface\.co"
    r"|out of memory|not enough memory|cannot allocate|can't allocate",
    re.IGNORECASE,
)
_HOW_TO_SKIP = "preflight.first_batch=false starts without this test"


class _Skipped(Exception):
    """The batch is not tried."""


class _Partial(Exception):
    """One batch of a validation set is not enough to decide."""


def try_step(text: str, *, gpu: bool, elsewhere: bool, most_tflop: float) -> dict[str, str]:
    """Take one training step and evaluate one batch of each validation set.

    Args:
        text: `Composition.text`.
        gpu: Whether the run will use GPUs.
        elsewhere: Whether it will run on other machines, which may have data that this one lacks.
        most_tflop: The limit for the step, in 10¹² floating-point operations.

    Returns:
        `verdict`: `passed`, `refused`, `unknown` or `skipped`; and `text`, a sentence.
    """
    began = time.monotonic()
    try:
        loss = _loss_of_step(text, gpu=gpu, elsewhere=elsewhere, most_tflop=most_tflop)
    except _Skipped as reason:
        return {"verdict": "skipped", "text": str(reason)}
    except BaseException as error:  # noqa: BLE001  user code may raise anything, SystemExit included
        traceback.print_exc()
        return verdict_of_error(error, elsewhere=elsewhere)
    return {"verdict": "passed", "text": f"loss {loss:.4g}, {time.monotonic() - began:.1f} s on this machine's CPU"}


def verdict_of_error(error: BaseException, *, elsewhere: bool = False) -> dict[str, str]:
    """Return what an exception of the probe means for the run: `refused` only if the run would surely raise it, too."""
    chain = list(_chain(error))
    root = chain[-1]
    words = f"{type(root).__name__}: {str(root).strip() or '(no message)'}".splitlines()[0][:500]
    data = elsewhere and any(isinstance(e, OSError | RaytrainerError) and _concerns_data(e) for e in chain)
    if data or any(_is_local_problem(e) for e in chain):
        return {"verdict": "unknown", "text": words}
    refusal = next((e for e in chain if isinstance(e, RaytrainerError)), None)
    if isinstance(refusal, ConfigError):
        return {"verdict": "refused", "text": str(refusal)}
    return {
        "verdict": "refused",
        "text": f"The first batch fails{_place(root)}: {words if refusal is None else refusal}; {_HOW_TO_SKIP}",
    }


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception, and those that caused it."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _is_local_problem(error: BaseException) -> bool:
    if isinstance(error, NotImplementedError | MemoryError | TimeoutError | ConnectionError | NonFiniteLoss | _Partial):
        return True
    if isinstance(error, OSError):  # only a missing file is certain, because the probe is on the machine of the run
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return not (missing and error.filename is not None)
    return _LOCAL_PROBLEMS.search(str(error)) is not None


def _concerns_data(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__name__ in ("DataError", "StorageError")


def _place(error: BaseException) -> str:
    """Return where the user's own code raised it, as ` in my_model.py:12`."""
    foreign = (sysconfig.get_path("stdlib"), str(Path(__file__).resolve().parent.parent))
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not f.filename.startswith(("<", *(f"{place}{os.sep}" for place in foreign)))
        and not {"site-packages", "dist-packages"} & set(Path(f.filename).parts)
    ]
    if not own:
        return ""
    path = os.path.relpath(own[-1].filename)
    return f" in {own[-1].filename if path.startswith('..') else path}:{own[-1].lineno}"


def _loss_of_step(text: str, *, gpu: bool, elsewhere: bool, most_tflop: float) -> float:
    """Try the step and return its loss, or the evaluation's."""
    e = config.experiment_of(text)
    if not elsewhere:
        environment.provide(e.cluster.forward_env, e.cluster.env_file)
    _importable(e)
    _simplify(e, gpu)
    if (model := unbuilt_model(e)) is not None:
        size = sum(p.numel() for p in model.parameters())
        if size > MAX_PARAMETERS:
            limit = f"{MAX_PARAMETERS / 1e6:g} million that are tried on a CPU"
            raise _Skipped(f"the model has {size / 1e6:,.0f} million parameters, more than the {limit}")
    with _group_of_one(e):
        trainer = _FirstRank(e)
        _check_samples(e, trainer)
        seeds.seed_everything("train", e.seed)
        if e.evaluate is None:
            _train(trainer, most_tflop)
        if trainer.val_loaders and e.trainer.eval_every_n_steps != 0:
            _evaluate(trainer)
        if e.evaluate is None and sum(p.numel() for p in trainer.raw_model.parameters()) <= _MAX_PARAMETERS_SAVED:
            _save_and_restore(trainer)
    key = "train/loss" if e.evaluate is None else next(k for k in trainer.metrics if k.endswith("loss"))
    return trainer.metrics[key]


def _importable(e: Experiment) -> None:
    """Check that every target can be imported in a new process, like a worker, which lacks changes of `sys.path`."""
    try:
        check_targets(e)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. The launching process can import it, but a new process such as a worker cannot: put its "
            "folder on PYTHONPATH, or install it"
        ) from error


def _simplify(e: Experiment, gpu: bool) -> None:
    """Remove what does not work in one process on a CPU, and what writes to other places."""
    e.callbacks, e.init_from = {}, None
    e.trainer.compile, e.trainer.strategy, e.trainer.profile, e.trainer.num_threads = False, "ddp", None, None
    e.data.num_workers, e.data.prefetch = min(e.data.num_workers, 1), min(e.data.prefetch, 1)
    if gpu and e.trainer.deterministic is None:
        e.trainer.deterministic = False


@contextlib.contextmanager
def _group_of_one(e: Experiment) -> Iterator[None]:
    """Create a process group within the context if the run has one on Ray, because the loss may use it."""
    if e.uses_ray and not dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _FirstRank(Trainer):
    """A trainer in a single process that reads the batches of rank 0 of many."""

    def _loader(self, dataset: Any, key: str, *, shuffle: bool = False, drop_last: bool = False) -> Loader:
        alone, self.world = self.world, World(0, least_workers(self.experiment))
        try:
            return super()._loader(dataset, key, shuffle=shuffle, drop_last=drop_last)
        finally:
            self.world = alone


class _OneBatch:
    """A validation loader that ends after its first batch."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def one_epoch(self) -> Generator[Batch, None, None]:
        batches = self._loader.one_epoch()
        try:
            yield from [next(batches)]
        finally:
            batches.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _check_samples(e: Experiment, trainer: Trainer) -> None:
    """Check that a validation set has a sample for each rank, which a metric needs."""
    workers = least_workers(e)
    for name, loader in trainer.val_loaders.items() if any(e.metrics.values()) else ():
        if loader.length is not None and loader.length < workers:
            raise too_few_samples(f"data.val.{name}".rstrip("."), loader.length, workers)


def _train(trainer: Trainer, most_tflop: float) -> None:
    e = trainer.experiment
    batch = next(trainer.train_loader.batches(0, 1))

    def make() -> tuple[nn.Module, Any]:
        model, loss = trainer.precision.convert(build(e.model or {})), build(e.loss or {})
        freeze(together(model, stateful_part(loss)), e.trainer.freeze)
        return model, loss

    data = map_tensors(trainer.prepare(batch.micro[0].data), lambda tensor: tensor.to("meta"))
    tflop = (model_flops(make, data) or 0.0) * len(batch.micro) / 1e12
    if tflop > most_tflop:
        raise _Skipped(
            f"a step of one worker takes {tflop:.2g}·10¹² floating-point operations, more than the {most_tflop:g}·10¹² "
            "that are tried on a CPU"
        )
    unused: list[str] = []
    if isinstance(trainer.optimizer, torch.optim.Optimizer):
        named = list(trainer.raw_model.named_parameters())
        trainer.optimizer.register_step_pre_hook(
            lambda *_: unused.extend(name for name, p in named if p.requires_grad and p.grad is None)
        )
    trainer.train_step(batch)
    trainer._log(batch, False)
    if unused and least_workers(e) > 1 and not e.trainer.find_unused_parameters:
        shown = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        raise ConfigError(
            f"and {len(unused)} parameters get no gradient from the loss ({shown}), for which several workers would wait: "
            "set it to true, or freeze them with trainer.freeze",
            key="trainer.find_unused_parameters",
            value=False,
        )


def _evaluate(trainer: Trainer) -> None:
    whole = all(loader.steps_per_epoch == 1 for loader in trainer.val_loaders.values())
    loaders = trainer.val_loaders
    trainer.val_loaders = {name: _OneBatch(loader) for name, loader in trainer.val_loaders.items()}  # type: ignore[misc]
    compute = trainer.val_metrics.compute

    def computed() -> dict[str, float]:
        try:
            return compute()
        except ConfigError:
            raise
        except Exception as error:
            if whole:
                raise
            raise _Partial(f"metrics over one batch: {type(error).__name__}: {error}") from None

    trainer.val_metrics.compute = computed  # type: ignore[method-assign]
    try:
        trainer._evaluate_and_record(0)
    finally:
        trainer.val_loaders, trainer.val_metrics.compute = loaders, compute  # type: ignore[method-assign]


def _save_and_restore(trainer: Trainer) -> None:
    """Save and restore a checkpoint, which finds state that cannot be saved or restored before the run's first save."""
    trainer.checkpointer = Checkpointer(Storage(Path(tempfile.gettempdir(), "checkpoints")), async_save=False)
    trainer.save()
    trainer.checkpointer.wait()
    if (info := trainer.checkpointer.latest()) is not None:
        trainer.restore(info)
    trainer.checkpointer.close()
