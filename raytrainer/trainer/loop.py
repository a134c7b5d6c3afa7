"""The training loop: batch → forward → loss → backward → clip → step, with evaluation, checkpoints and exact resume.

It imports neither Ray nor MLflow. It takes a `World` and listeners, and reports events to them (events.py).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raytrainer import parallel, seeds
from raytrainer.batches import map_tensors
from raytrainer.checkpoint import Checkpointer, CheckpointInfo, find_weights, unread
from raytrainer.config import Experiment, InitFrom, build, checkpoint_mode, early_stopping_mode, factory
from raytrainer.data import Batch, Loader
from raytrainer.errors import ConfigError, NonFiniteLoss
from raytrainer.events import (
    Artifact,
    CheckpointSaved,
    EvalEnd,
    Events,
    FitEnd,
    FitStart,
    Logged,
    check_hooks,
)
from raytrainer.metrics import OWN_NAMES, Monitor, Names, Throughput, WeightedMeans, summarised
from raytrainer.optim import build_optimizer, build_scheduler
from raytrainer.optim.protocols import enter_training, evaluation_weights
from raytrainer.parallel import Precision, World
from raytrainer.state import restore_module, unchanged
from raytrainer.trainer import evaluation, outputs, snapshot
from raytrainer.trainer.example import ExampleRecorder
from raytrainer.trainer.explained import explained
from raytrainer.trainer.gradients import Gradients
from raytrainer.trainer.model import build_model, take_weights
from raytrainer.trainer.profile import recorded
from raytrainer.trainer.system import build_loss, check_apart, stateful_part, together, with_state_dict
from raytrainer.trainer.utilisation import Utilisation
from raytrainer.trainer.verify import verify

_log = logging.getLogger("raytrainer.trainer")


@dataclass(frozen=True)
class FitResult:
    """How training ended.

    Attributes:
        step: Optimizer steps done since the beginning of the run.
        epoch: The epoch that the next step would belong to.
        reason: `finished`, `early_stopping`, `max_time` or `stopped`.
        metrics: The last train and validation metrics.
        best: The best value of `checkpoint.monitor`, and its step.
    """

    step: int
    epoch: int
    reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: tuple[float, int] | None = None


@dataclass(frozen=True)
class Objective:
    """The metric of the best checkpoint if it is not `checkpoint.monitor`; for a trial, the sweep's metric.

    Attributes:
        metric: A metric of the evaluation, or `train/…` as last logged before it.
        mode: `max` or `min`.
        at_once: Whether the best is written as soon as it is evaluated, because this process may be killed at any time.
    """

    metric: str
    mode: str
    at_once: bool = False


class Trainer:
    """Trains one experiment in one process of `world`.

    Args:
        experiment: What to train. In a notebook: `Trainer(compose(["experiment=mlp"]).experiment).fit()`.
        world: The place of this process among all.
        checkpointer: Writes and reads checkpoints; None: none are written.
        listeners: Objects with hooks of events.py, called before the experiment's own callbacks.
        should_stop: Called at every log. Once it returns True on any rank, all ranks end after the same step, with a
            checkpoint.
        report: Called with this trainer and whether training ends, after each evaluation and at the end. It is the last
            action of a step, after the checkpoint was handed over, and is repeated at the start of a run that resumes
            from that step. An exception from it ends training.
        objective: The metric of the best checkpoint; None: `checkpoint.monitor`.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        world: World | None = None,
        checkpointer: Checkpointer | None = None,
        listeners: Iterable[Any] = (),
        should_stop: Callable[[], bool] = lambda: False,
        report: Callable[[Trainer, bool], None] = lambda trainer, ends: None,
        objective: Objective | None = None,
    ) -> None:
        self.experiment, self.world, self.checkpointer = experiment, world or World(), checkpointer
        self._should_stop, self._report = should_stop, report
        e, options, device = experiment, experiment.trainer, self.world.device

        deterministic = device.type == "cpu" if options.deterministic is None else options.deterministic
        parallel.set_determinism(deterministic, device, options.num_threads)
        self.precision = Precision(options.precision, device)
        self.loss = build_loss(e)
        self.loss_state = stateful_part(self.loss)  # the module with the loss's parameters and buffers, if it has any
        self.loss_object = with_state_dict(self.loss, self.loss_state)
        if self.loss_state is not None:
            self.precision.convert(self.loss_state).to(device)
        # EMA: a second copy of the model's weights, moved a little towards the trained ones at every step.
        self.raw_model, self.ema_model = build_model(e, self.world, self.precision, self.loss_state)
        self.system = together(self.raw_model, self.loss_state)
        if self.loss_state is not None:
            parallel.broadcast_state(self.loss_state, self.world)
        self.callbacks: dict[str, Any] = {k: build(v) for k, v in e.callbacks.items() if v}
        for name, callback in self.callbacks.items():
            check_hooks(callback, f"callbacks.{name}")
        self.events = Events([*listeners, *self.callbacks.values()])

        self.names = Names(_log.warning if self.world.rank == 0 else lambda sentence: None)
        self.train_loader = self._loader(
            build(_node(e.data.train)), "data.train", shuffle=e.data.shuffle, drop_last=e.data.drop_last
        )
        self.val_loaders = {
            name: self._loader(build(node), f"data.val.{name}".rstrip(".")) for name, node in e.data.val_sets.items()
        }
        self.val_metrics = evaluation.Metrics(e.metrics, self.val_loaders, self.world, self.names)
        self.total_steps = self._total_steps()

        self.optimizer = build_optimizer(factory(_node(e.optimizer)), self.raw_model, self.system)
        enter_training(self.optimizer)
        self.scheduler = (
            build_scheduler(factory(e.lr_scheduler), self.optimizer, self.total_steps) if e.lr_scheduler else None
        )
        self.model = self.raw_model
        if options.strategy == "ddp":
            self.model = parallel.replicate(
                self.raw_model, self.world, find_unused_parameters=options.find_unused_parameters
            )
        self._gradients = Gradients(self.model, self.raw_model, self.system, self.world, self.precision.scaler, options)
        self._parameters = self._gradients.parameters
        self._averages = bool(self.ema_model) and all(
            p.is_floating_point() or p.is_complex() for p in self.raw_model.parameters()
        )
        self._graphs = device.type == "cuda" and options.compile in ("reduce-overhead", "max-autotune")

        self.step = 0  # optimizer steps done = batches consumed = the position in the data
        self.evaluations = 0  # done since the beginning of the run
        self.metrics: dict[str, float] = {}
        self.best = Monitor(e.checkpoint.monitor, checkpoint_mode(e))
        self._objective, self._at_once = self.best, objective is not None and objective.at_once
        if objective is not None and (objective.metric, objective.mode) != (e.checkpoint.monitor, checkpoint_mode(e)):
            self._objective = Monitor(objective.metric, objective.mode)
        early = options.early_stopping
        self._patience = max(early.patience, 1) if early else math.inf
        self._progress = Monitor(
            (early and early.monitor) or e.checkpoint.monitor,
            early_stopping_mode(e),
            early.min_delta if early else 0.0,
        )
        self._evaluated_at = self._saved_at = self._logged_at = 0
        self._saved_when = self._began = time.monotonic()
        self._elapsed = 0.0  # seconds of training before this process
        self._verified = False  # whether the first save of this process has been checked
        self._lr: Any = 0.0
        self._extra: dict[str, float] = {}
        self._own_names = {"epoch", "checkpoint/stall_seconds"}  # names of metrics that do not belong to a callback
        self.example = ExampleRecorder()  # the same on all ranks, for the export after training
        self.window = WeightedMeans(device, self.world.all_reduce)
        self.throughput = Throughput()
        self._utilisation = Utilisation(self)
        self._counts_tokens = False  # whether the loss returns a weight
        self._checked = False  # whether the checks after the first call of the loss are done

    # --- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Train to the end, from the checkpoint that `restore` loaded or from the beginning.

        Raises:
            NonFiniteLoss: The loss of a logged window is not finite (`trainer.nonfinite=stop`).
            DataError: A sample cannot be read.
            CheckpointError, StorageError: A checkpoint could not be written; earlier ones stay valid.
        """
        options = self.experiment.trainer
        if self.step == 0:
            seeds.seed_everything("train", self.experiment.seed, self.world.rank)
        size, trained = (sum(p.numel() for p in several) for several in (self.system.parameters(), self._parameters))
        per_epoch = self.train_loader.steps_per_epoch
        self.events.fit_start(self, FitStart(self.step, self.total_steps, per_epoch, self.world.size, size, trained))
        reason = self._out_of_patience() or "finished"
        if self.step and self._evaluated_at == self.step:
            # The process may have been killed after the checkpoint was written and before the report was received.
            self._report(self, self.step == self.total_steps or reason != "finished")
        self._began = time.monotonic() - self._elapsed
        batches = self.train_loader.batches(self.step, self.step if reason != "finished" else self.total_steps)
        self.throughput.rate()  # its clock starts here
        try:
            with recorded(self) as profile:
                for batch in self._warmed_up(batches):
                    with self._recording():
                        self.train_step(batch)
                    profile()
                    self.events.step_end(self, self.step, batch.epoch)
                    last = self.step == self.total_steps
                    if last or self.step % options.log_every_n_steps == 0:
                        over = options.max_time is not None and time.monotonic() - self._began >= options.max_time
                        reason = self._log(batch, over) or reason
                    # A stop request leaves time for a checkpoint, but not for another evaluation.
                    if self._evaluation_due(batch.ends_epoch, last or reason == "max_time"):
                        self._evaluate_and_note(batch.epoch)
                        reason = self._out_of_patience() or reason
                    ends = last or reason != "finished"
                    if self._checkpoint_due(batch.ends_epoch, ends):
                        self.save()
                    elif self._is_best():  # checkpoint.min_interval_s is not over, so it stays in memory until then
                        self.save(hold=True)
                    if ends or self._evaluated_at == self.step:
                        self._report(self, ends)
                    if ends:
                        break
        finally:
            batches.close()
        if self.step == self.total_steps:
            reason = "finished"
        if self._extra:  # from callbacks, after the last log
            self._tell(self._epoch(), {})
        if self.checkpointer is not None:
            self.checkpointer.write_held()
            self.checkpointer.wait()
        best = (self.best.value, self.best.step) if self.best.value is not None and self.best.step is not None else None
        result = FitResult(self.step, self._epoch(), reason, dict(self.metrics), best)
        self.events.fit_end(self, FitEnd(self.step, result.epoch, reason, result.metrics))
        return result

    def train_step(self, batch: Batch) -> None:
        """Do one optimizer step over this rank's part of the global batch `batch`.

        The gradient is that of the mean over the *global* weight: micro-batches and ranks of uneven sizes add up to the
        gradient of one process on the whole batch, and those of weight 0 add nothing. Nothing here waits for the
        device.

        Raises:
            ConfigError: The loss, the model or the optimizer cannot be trained.
        """
        self.optimizer.zero_grad(set_to_none=True)
        last, counted = len(batch.micro) - 1, []
        if self._graphs and last:
            # A CUDA graph leaves gradients in memory that its next replay overwrites (torch#169545), so they are added
            # to separate tensors.
            for p in self._parameters:
                p.grad = torch.zeros_like(p)
        for i, micro in enumerate(batch.micro):
            with parallel.synchronise(self.model, last=i == last):
                with self.precision.autocast():
                    values = outputs.entries(self.loss(self.model, self.prepare(micro.data)), self.world.device)
                evaluation.predictions(values)  # dropped at once, because logits may be the largest tensor
                weight: Tensor | float = micro.size
                if "weight" in values:
                    given = outputs.weight_of(values.pop("weight"))
                    weight = given if micro.size else 0.0
                    counted.append(weight)
                self._gradients.add(values["loss"], weight, batch.global_size)
            self.window.add(values, weight)
        self._counts_tokens = bool(counted)
        if not self._checked:
            check_apart(self.raw_model, self.loss_state)
            self._checked = True
        try:
            self._gradients.finish(self.optimizer, counted, batch.global_size)
            if self.precision.scaler is not None:
                self.precision.scaler.step(self.optimizer)
                self.precision.scaler.update()
            else:
                self.optimizer.step()
        except RuntimeError as error:
            raise explained(error, self.optimizer) from error
        self._lr = self.optimizer.param_groups[0].get("lr", math.nan)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.ema_model is not None:
            decay = self.experiment.trainer.ema_decay or 0.0
            with torch.no_grad():
                averages, weights = map(
                    parallel.local_parts, (self.ema_model.parameters(), self.raw_model.parameters())
                )
                if not self._averages:  # integers have no mean; they are never trained and stay unchanged
                    floating = [a.is_floating_point() or a.is_complex() for a in averages]
                    averages, weights = (
                        [t for t, is_ in zip(ts, floating, strict=True) if is_] for ts in (averages, weights)
                    )
                torch._foreach_lerp_(averages, weights, 1 - decay)
        self.step += 1
        self.throughput.add(batch.global_size)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of all validation sets (evaluation.py). The training is not changed."""
        return evaluation.evaluate(self)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log figures of a callback with the next log, under their own names. Call it on every rank.

        A name that raytrainer uses itself (`train/lr`, `val/loss`, `epoch`) is logged as `callback/NAME`.

        Raises:
            ConfigError: A value is not a number.
        """
        for name, value in metrics.items():
            try:
                self._extra[str(name)] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"Trainer.log: {name!r} is not a number, but {value!r:.80}: {error}") from error

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        """Add a callback's file or folder to the run's artifacts. Only rank 0's is kept."""
        self.events.artifact(self, Artifact(path, folder))

    # --- state ----------------------------------------------------------------------------------------------------

    def save(self, *, hold: bool = False) -> None:
        """Hand the whole state to the checkpointer. Return once it is copied, before it is written.

        Args:
            hold: Whether to write it later: with the next checkpoint, unless a better state comes before that.

        Raises:
            NonFiniteLoss: A loss since the last log, or a weight, is not finite on some rank, and
                `trainer.nonfinite=stop`: such a state must not become the newest checkpoint.
            CheckpointError: An object's state cannot be saved, or (after this process's first save) cannot be restored.
        """
        if self.checkpointer is None or self.step == self._saved_at:
            return
        bad_loss, bad_weights = self._nonfinite_state()
        if (bad_loss or bad_weights) and self.experiment.trainer.nonfinite == "stop":
            raise self._nonfinite("loss became nan or infinite" if bad_loss else "weights became nan or infinite")
        if bad_weights:
            _log.warning("no checkpoint after step %d: the weights are not finite", self.step)
            return
        evaluated = self._evaluated_at == self.step
        metric = self.metrics.get(self._objective.metric) if evaluated else None
        if self._is_best():
            self.checkpointer.drop_held()
        self.throughput.pause()
        state = snapshot.shared(self)
        if hold:
            self.checkpointer.hold(self.step, state, snapshot.local(self), metric=metric)
            self.throughput.go_on()
            return
        self._saved_at, self._saved_when = self.step, time.monotonic()
        stall = self.checkpointer.save(self.step, state, snapshot.local(self), metric=metric)
        if not self._verified:
            verify(self, state)
            self._verified = True
        self.throughput.go_on()
        self.events.checkpoint(self, CheckpointSaved(self.step, metric, stall))

    def restore(self, info: CheckpointInfo, changed: Iterable[str] = ()) -> None:
        """Restore the state at `info`. The next step is the one that followed it.

        Args:
            info: A checkpoint from the checkpointer.
            changed: Settings of the optimizer (`lr`, `weight_decay`) for which the experiment's values replace the
                checkpoint's.

        Raises:
            CheckpointCorrupt: It does not verify, or belongs to another model.
        """
        assert self.checkpointer is not None
        state = self.checkpointer.load(info, snapshot.template(self))
        snapshot.restore(self, *state, source=str(info.path), changed=changed)

    def init_from(self, given: InitFrom | str, look_up: Callable[[str], str | None] = lambda _: None) -> str:
        """Load only the weights from a run, a checkpoint, a file or a folder. Return a line that says what was loaded.

        Every rank calls it, and the first one reads.

        Args:
            given: As the key `init_from`.
            look_up: As in `checkpoint.find_weights`.

        Raises:
            CheckpointError: There are no weights, they cannot be read, or they do not match the request.
        """
        options = InitFrom(source=given) if isinstance(given, str) else given
        source, storage = options.source or "", self.experiment.storage_path or "runs"
        words = take_weights(self.raw_model, self.world, lambda: find_weights(source, storage, look_up), options)
        if self.ema_model is not None:
            restore_module(self.ema_model, self.raw_model.state_dict(), "the model")
        return words

    def best_weights(self) -> tuple[int, dict[str, Any]]:
        """Return the step and the weights of the best committed checkpoint, or the current ones if there is none.

        They are a state dict on the CPU, with the modules' extra state; the EMA's if there is one.

        A checkpoint has the mean of the batch statistics over ranks, which this process alone cannot compute.
        """
        if self.checkpointer is not None and (found := self.checkpointer.list()):
            info = self.checkpointer.best() or found[-1]
            kept, other = ("model", "ema") if self.ema_model is None else ("ema", "model")
            unwanted = dict.fromkeys(("optimizer", "loss", "training", other), unread)
            shared, _ = self.checkpointer.load(info, unwanted)
            return info.step, shared[kept]
        model = self.raw_model if self.ema_model is None else self.ema_model
        with evaluation_weights(self.optimizer):
            state = model.state_dict()
            for name, value in state.items():
                state[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        return self.step, state

    def example_batches(self) -> Iterator[Batch]:
        """Return batches of the first validation set, or without one of the training set, from the first on."""
        return next(iter(self.val_loaders.values()), self.train_loader).batches(0, 1, alone=True)

    # --- parts of the loop ----------------------------------------------------------------------------------------

    def _log(self, batch: Batch, over: bool) -> str | None:
        """Reduce the window over all ranks and log it. Return the reason to end, if any rank has one."""
        means, (stop, timed_out) = self.window.reduce(float(self._should_stop()), float(over))
        # If no sample had any weight, there is no mean, and no NaN to stop for.
        own = {} if self.window.empty else summarised(self.loss, means)
        metrics = {f"train/{k}": v for k, v in self.names.apart(own, OWN_NAMES, "loss_", "train/").items()}
        metrics["train/lr"] = float(self._lr)
        metrics["train/samples_per_second"] = rate = self.throughput.rate()
        if self._counts_tokens:
            metrics["train/tokens_per_second"] = self.window.weight / self.throughput.seconds
        metrics.update(self._utilisation.metrics(batch, rate))
        metrics["epoch"] = float(batch.epoch)
        self._tell(batch.epoch, metrics)
        if not self.window.empty and not math.isfinite(means["loss"]):
            if self.experiment.trainer.nonfinite == "stop":
                raise self._nonfinite(f"loss became {means['loss']}")
            if self.world.rank == 0:
                _log.warning(
                    "the loss is %s at step %d; the run continues (trainer.nonfinite=warn)", means["loss"], self.step
                )
        self._logged_at = self.step
        return "stopped" if stop else "max_time" if timed_out else None

    def _tell(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report the metrics, and those that callbacks gave to `log`, to all listeners."""
        self._own_names.update(metrics)
        system = {name for name in self._extra if name.startswith("system/")}  # the machine's figures have these names
        metrics.update(self.names.apart(self._extra, self._own_names | system, "callback/"))
        self._extra.clear()
        self.metrics.update(metrics)
        self.events.log(self, Logged(self.step, epoch, metrics))

    def _nonfinite(self, what: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"the {what} after step {self._logged_at}, by step {self.step}; the checkpoints before it are "
            "valid. A lower optimizer.lr, trainer.max_grad_norm or another trainer.precision may help; "
            "trainer.nonfinite=warn continues the run"
        )

    def _nonfinite_state(self) -> tuple[bool, bool]:
        """Return whether a loss since the last log, and whether a weight, is NaN or infinite on any rank."""
        # Weights are checked too: a gradient may overflow under a finite loss, and the loss shows it only a step later.
        # A rank's shards may all be empty, if only a new head with fewer classes than ranks is trained.
        weights = [part for part in parallel.local_parts(self._parameters) if part.numel()]
        finite = [norm.isfinite() for norm in torch._foreach_norm(weights, math.inf)] if weights else []
        bad = ~torch.stack(finite).all() if finite else torch.zeros((), dtype=torch.bool, device=self.world.device)
        flags = torch.stack([self.window.nonfinite(), bad]).double()
        loss, weights = self.world.all_reduce(flags).tolist()
        return loss > 0, weights > 0

    def _out_of_patience(self) -> str | None:
        return "early_stopping" if self._progress.without_gain >= self._patience else None

    def _evaluate_and_note(self, epoch: int) -> None:
        self.throughput.pause()
        metrics = self.evaluate()
        self.throughput.go_on()
        self.metrics.update(metrics)
        self._own_names.update(metrics)
        self._evaluated_at = self.step
        self.evaluations += 1
        self._check_monitors(metrics)
        self.best.update(metrics, self.step)
        if self._objective is not self.best:
            self._objective.update(self.metrics, self.step)
        self._progress.update(metrics, self.step)
        self.events.eval_end(self, EvalEnd(self.step, epoch, metrics))

    def _check_monitors(self, metrics: Mapping[str, float]) -> None:
        """Check that an evaluation has the monitored metrics; else the run would silently have no best checkpoint."""
        for key, monitor in (("checkpoint.monitor", self.best), ("trainer.early_stopping.monitor", self._progress)):
            if monitor.metric not in metrics:
                raise ConfigError(
                    "is not a metric of the evaluation", key=key, value=monitor.metric, choices=list(metrics)
                )

    def _evaluation_due(self, ends_epoch: bool, last: bool) -> bool:
        every = self.experiment.trainer.eval_every_n_steps
        if not self.val_loaders or every == 0:
            return False
        return last or (self.step % every == 0 if every else ends_epoch)

    def _checkpoint_due(self, ends_epoch: bool, last: bool) -> bool:
        if last:
            return True
        every = self.experiment.checkpoint.every_n_steps
        never_evaluates = not self.val_loaders or self.experiment.trainer.eval_every_n_steps == 0
        if every:
            due = self.step % every == 0 or self._is_best()  # the best one is kept too
        else:
            due = ends_epoch if never_evaluates else self._evaluated_at == self.step
        if self._at_once and self._is_best():
            return True
        return due and not self._saved_lately()

    def _is_best(self) -> bool:
        """Return whether the evaluation after this step is the best so far."""
        return self._evaluated_at == self.step and self._objective.step == self.step

    def _saved_lately(self) -> bool:
        """Return whether the last checkpoint is younger than `checkpoint.min_interval_s`, by rank 0's clock."""
        interval = self.experiment.checkpoint.min_interval_s
        if not interval:
            return False
        late = self.world.rank == 0 and time.monotonic() - self._saved_when >= interval
        return not bool(self.world.all_reduce(torch.tensor(float(late), device=self.world.device)))

    def prepare(self, data: Any) -> Any:
        """Return a batch in the model's type and memory format."""
        data = self.precision.cast(data)
        if self.experiment.trainer.channels_last:
            data = map_tensors(data, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
        return data

    def _warmed_up(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches, after one forward and backward of the first that is then undone.

        DDP rebuilds its gradient buckets after its first backward, which changes the order of sums. Without this, a
        resumed run is not bit-equal on 3 or more ranks (gloo; conv net with batch norm and dropout).
        """
        for number, batch in enumerate(batches):
            if number == 0 and self.model is not self.raw_model:
                random = seeds.random_state()
                with unchanged(self.raw_model, self.loss_state, other=self.loss_object):
                    with self.precision.autocast():
                        returned = self.loss(self.model, self.prepare(batch.micro[-1].data))
                        loss = outputs.entries(returned, self.world.device)["loss"]
                    outputs.check_gradient(loss)
                    loss.backward()
                    parallel.check_reduced(self.model)
                self.optimizer.zero_grad(set_to_none=True)
                seeds.set_random_state(random)
            yield batch

    def _loader(self, dataset: Any, key: str, *, shuffle: bool = False, drop_last: bool = False) -> Loader:
        d = self.experiment.data
        collate_fn = build(d.collate_fn) if d.collate_fn else None
        if d.collate_fn and not callable(collate_fn):
            raise ConfigError(
                f"builds a {type(collate_fn).__name__}, which cannot be called: it must be a function from a list of samples "
                "to a batch (with _partial_: true, the _target_ itself)",
                key="data.collate_fn",
            )
        return Loader(
            dataset,
            global_batch_size=d.global_batch_size,
            micro_batch_size=d.micro_batch_size,
            seed=self.experiment.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            shuffle=shuffle,
            drop_last=drop_last,
            collate_fn=collate_fn,
            num_workers=d.num_workers,
            prefetch=d.prefetch,
            device=self.world.device,
            resident=d.resident,
            key=key,
        )

    def _total_steps(self) -> int | None:
        """Return the smaller of `trainer.max_steps` and `max_epochs`, in steps; None if only time ends the run."""
        t, per_epoch = self.experiment.trainer, self.train_loader.steps_per_epoch
        if t.max_epochs is None:
            return t.max_steps
        if per_epoch is None:
            raise ConfigError(
                "needs a dataset with a length; use trainer.max_steps, or give the iterable a __len__: its samples in an epoch",
                key="trainer.max_epochs",
                value=t.max_epochs,
            )
        steps = t.max_epochs * per_epoch
        return steps if t.max_steps is None else min(t.max_steps, steps)

    def _recording(self) -> contextlib.AbstractContextManager[None]:
        """Record a call of the model in training, if there is no evaluation to record it in."""
        evaluates = self.val_loaders and self.experiment.trainer.eval_every_n_steps != 0
        if evaluates or self.example.example is not None:
            return contextlib.nullcontext()
        return self.example.watching(self.raw_model)

    def _epoch(self) -> int:
        per_epoch = self.train_loader.steps_per_epoch
        return self.step // per_epoch if per_epoch else 0


def _node(node: Mapping[str, Any] | None) -> Mapping[str, Any]:
    assert node is not None  # the configuration check ensures it
    return node
