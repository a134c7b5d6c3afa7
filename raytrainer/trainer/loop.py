"""The training loop: `Trainer` trains step by step, with evaluation, checkpoints and exact resume.

It imports neither Ray nor MLflow. It takes a `World` and listeners, and reports events to them (events.py).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raytrainer import parallel, seeds
from raytrainer.checkpoint import Checkpointer, CheckpointInfo, find_weights, unread
from raytrainer.config import Experiment, InitFrom
from raytrainer.data import Batch
from raytrainer.errors import ConfigError, NonFiniteLoss
from raytrainer.events import Artifact, CheckpointSaved, EvalEnd, FitEnd, FitStart, Logged
from raytrainer.metrics import OWN_NAMES, summarised
from raytrainer.optim.protocols import evaluation_weights
from raytrainer.parallel import World
from raytrainer.state import restore_module
from raytrainer.trainer import evaluation, snapshot
from raytrainer.trainer.components import Components
from raytrainer.trainer.model import take_weights
from raytrainer.trainer.profile import recorded
from raytrainer.trainer.train_state import FitResult, Objective
from raytrainer.trainer.train_step import TrainStep
from raytrainer.trainer.utilisation import Utilisation
from raytrainer.trainer.verify import verify

_log = logging.getLogger("raytrainer.trainer")


class Trainer(Components):
    """The training of one experiment in one process of `world`.

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

    Attributes:
        checkpointer: As given.
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
        super().__init__(experiment, world, listeners, objective)
        self.checkpointer, self._should_stop, self._report = checkpointer, should_stop, report
        self._train_step = TrainStep(self)
        self._utilisation = Utilisation(self)
        self._writes_best_at_once = objective is not None and objective.at_once
        early = experiment.trainer.early_stopping
        self._patience = max(early.patience, 1) if early else math.inf
        self._own_names = {"epoch", "checkpoint/stall_seconds"}  # names of metrics that do not belong to a callback
        self._saved_when = time.monotonic()
        self._verified = False  # whether the first save of this process has been checked
        self.state.start_clock()

    # --- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Train to the end, from the checkpoint that `restore` loaded or from the beginning.

        Raises:
            NonFiniteLoss: The loss of a logged window is not finite (`trainer.nonfinite=stop`).
            DataError: A sample cannot be read.
            CheckpointError, StorageError: A checkpoint could not be written; earlier ones stay valid.
        """
        reason = self._begin()
        batches = self.train_loader.batches(self.step, self.step if reason else self.total_steps)
        self.throughput.rate()  # its clock starts here
        try:
            with recorded(self) as profile:
                for number, batch in enumerate(batches):
                    if number == 0:
                        self._train_step.warm_up(batch)
                    with self._recording():
                        self.train_step(batch)
                    profile()
                    self.events.step_end(self, self.state.step, batch.epoch)
                    if reason := self._after_step(batch):
                        break
        finally:
            batches.close()
        return self._finish("finished" if reason is None or self.step == self.total_steps else reason)

    def train_step(self, batch: Batch) -> None:
        """Do one optimizer step over this rank's part of a global batch (train_step.py)."""
        self._train_step(batch)

    def _begin(self) -> str | None:
        """Report the start. Return the reason if a training that is resumed has nothing left to do."""
        if self.step == 0:
            seeds.seed_everything("train", self.experiment.seed, self.world.rank)
        parameters, trainable = self.system.parameters(), self.gradients.parameters
        size, trained = (sum(p.numel() for p in tensors) for tensors in (parameters, trainable))
        per_epoch = self.train_loader.steps_per_epoch
        self.events.send(self, FitStart(self.step, self.total_steps, per_epoch, self.world.size, size, trained))
        reason = self._out_of_patience()
        if self.step and self.state.is_evaluated:
            # The process may have been killed after the checkpoint was written and before the report was received.
            self._report(self, self.step == self.total_steps or reason is not None)
        self.state.start_clock()
        return reason

    def _after_step(self, batch: Batch) -> str | None:
        """Log, evaluate, save and report what is due. Return the reason if training ends with this step."""
        state, options = self.state, self.experiment.trainer
        last, reason = state.step == self.total_steps, None
        if last or state.step % options.log_every_n_steps == 0:
            timed_out = options.max_time is not None and state.seconds() >= options.max_time
            reason = self._log(batch, timed_out)
        # A stop request leaves time for a checkpoint, but not for another evaluation.
        if self._evaluation_due(batch.ends_epoch, last or reason == "max_time"):
            self._evaluate_and_record(batch.epoch)
            reason = self._out_of_patience() or reason
        if last:
            reason = reason or "finished"
        if self._checkpoint_due(batch.ends_epoch, reason is not None):
            self.save()
        elif state.is_best:  # checkpoint.min_interval_s is not over, so it stays in memory until then
            self.save(hold=True)
        if reason or state.is_evaluated:
            self._report(self, reason is not None)
        return reason

    def _finish(self, reason: str) -> FitResult:
        state = self.state
        if state.callback_metrics:  # given after the last log
            self._publish(self.epoch, {})
        if self.checkpointer is not None:
            self.checkpointer.write_held()
            self.checkpointer.wait()
        value, step = state.best.value, state.best.step
        best = (value, step) if value is not None and step is not None else None
        result = FitResult(state.step, self.epoch, reason, dict(state.metrics), best)
        self.events.send(self, FitEnd(state.step, result.epoch, reason, result.metrics))
        return result

    def _recording(self) -> contextlib.AbstractContextManager[None]:
        """Record a call of the model in training, if there is no evaluation to record it in."""
        if self.evaluates or self.example.example is not None:
            return contextlib.nullcontext()
        return self.example.watching(self.raw_model)

    # --- metrics --------------------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log figures of a callback with the next log, under their own names. Call it on every rank.

        A name that raytrainer uses itself (`train/lr`, `val/loss`, `epoch`) is logged as `callback/NAME`.

        Raises:
            ConfigError: A value is not a number.
        """
        for name, value in metrics.items():
            try:
                self.state.callback_metrics[str(name)] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"Trainer.log: {name!r} is not a number, but {value!r:.80}: {error}") from error

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        """Add a callback's file or folder to the run's artifacts. Only rank 0's is kept."""
        self.events.send(self, Artifact(path, folder))

    def _log(self, batch: Batch, timed_out: bool) -> str | None:
        """Reduce the window over all ranks and log it. Return the reason to end, if any rank has one."""
        window = self.window
        means, (stop, over) = window.reduce(float(self._should_stop()), float(timed_out))
        # If no sample had any weight, there is no mean, and no NaN to stop for.
        of_loss = {} if window.empty else summarised(self.loss, means)
        metrics = {f"train/{k}": v for k, v in self.names.apart(of_loss, OWN_NAMES, "loss_", "train/").items()}
        metrics["train/lr"] = float(self._train_step.lr)
        metrics["train/samples_per_second"] = rate = self.throughput.rate()
        if self._train_step.counts_tokens:
            metrics["train/tokens_per_second"] = window.weight / self.throughput.seconds
        metrics.update(self._utilisation.metrics(batch, rate))
        metrics["epoch"] = float(batch.epoch)
        self._publish(batch.epoch, metrics)
        if not window.empty and not math.isfinite(means["loss"]):
            if self.experiment.trainer.nonfinite == "stop":
                raise self._nonfinite(f"loss became {means['loss']}")
            if self.world.rank == 0:
                _log.warning(
                    "the loss is %s at step %d; the run continues (trainer.nonfinite=warn)", means["loss"], self.step
                )
        self.state.logged_at = self.step
        return "stopped" if stop else "max_time" if over else None

    def _publish(self, epoch: int, metrics: dict[str, float]) -> None:
        """Report the metrics, and those that callbacks gave to `log`, to all listeners."""
        state = self.state
        self._own_names.update(metrics)
        # The figures of the machine, which a callback may give, have these names.
        system = {name for name in state.callback_metrics if name.startswith("system/")}
        metrics.update(self.names.apart(state.callback_metrics, self._own_names | system, "callback/"))
        state.callback_metrics.clear()
        state.metrics.update(metrics)
        self.events.send(self, Logged(state.step, epoch, metrics))

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of all validation sets (evaluation.py). The training is not changed."""
        return evaluation.evaluate(self)

    def _evaluate_and_record(self, epoch: int) -> None:
        self.throughput.pause()
        metrics = self.evaluate()
        self.throughput.go_on()
        self._own_names.update(metrics)
        self._check_monitors(metrics)
        self.state.update_monitors(metrics)
        self.events.send(self, EvalEnd(self.step, epoch, metrics))

    def _check_monitors(self, metrics: Mapping[str, float]) -> None:
        """Check that an evaluation has the monitored metrics; else the run would silently have no best checkpoint."""
        for key, monitor in (
            ("checkpoint.monitor", self.state.best),
            ("trainer.early_stopping.monitor", self.state.early_stopping),
        ):
            if monitor.metric not in metrics:
                raise ConfigError(
                    "is not a metric of the evaluation", key=key, value=monitor.metric, choices=list(metrics)
                )

    def _evaluation_due(self, ends_epoch: bool, last: bool) -> bool:
        if not self.evaluates:
            return False
        every = self.experiment.trainer.eval_every_n_steps
        return last or (self.step % every == 0 if every else ends_epoch)

    def _out_of_patience(self) -> str | None:
        return "early_stopping" if self.state.early_stopping.without_gain >= self._patience else None

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, *, hold: bool = False) -> None:
        """Hand the whole state to the checkpointer. Return once it is copied, before it is written.

        Args:
            hold: Whether to write it later: with the next checkpoint, unless a better state comes before that.

        Raises:
            NonFiniteLoss: A loss since the last log, or a weight, is not finite on some rank, and
                `trainer.nonfinite=stop`: such a state must not become the newest checkpoint.
            CheckpointError: An object's state cannot be saved, or (after this process's first save) cannot be restored.
        """
        state = self.state
        if self.checkpointer is None or state.step == state.saved_at or not self._is_finite():
            return
        metric = state.metrics.get(state.objective.metric) if state.is_evaluated else None
        if state.is_best:
            self.checkpointer.drop_held()
        self.throughput.pause()
        shared = snapshot.shared(self)
        if hold:
            self.checkpointer.hold(state.step, shared, snapshot.local(self), metric=metric)
            self.throughput.go_on()
            return
        state.saved_at, self._saved_when = state.step, time.monotonic()
        stall = self.checkpointer.save(state.step, shared, snapshot.local(self), metric=metric)
        if not self._verified:
            verify(self, shared)
            self._verified = True
        self.throughput.go_on()
        self.events.send(self, CheckpointSaved(state.step, metric, stall))

    def _is_finite(self) -> bool:
        """Return whether the state may be saved. Every rank calls it.

        Raises:
            NonFiniteLoss: As for `save`.
        """
        # Weights are checked too: a gradient may overflow under a finite loss, and the loss shows it only a step later.
        # A rank's shards may all be empty, if only a new head with fewer classes than ranks is trained.
        weights = [part for part in parallel.local_parts(self.gradients.parameters) if part.numel()]
        finite = [norm.isfinite() for norm in torch._foreach_norm(weights, math.inf)] if weights else []
        bad = ~torch.stack(finite).all() if finite else torch.zeros((), dtype=torch.bool, device=self.world.device)
        flags = torch.stack([self.window.nonfinite(), bad]).double()
        bad_loss, bad_weights = self.world.all_reduce(flags).tolist()
        if (bad_loss or bad_weights) and self.experiment.trainer.nonfinite == "stop":
            raise self._nonfinite("loss became nan or infinite" if bad_loss else "weights became nan or infinite")
        if bad_weights:
            _log.warning("no checkpoint after step %d: the weights are not finite", self.step)
        return not bad_weights

    def _nonfinite(self, event: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"the {event} after step {self.state.logged_at}, by step {self.step}; the checkpoints before it are "
            "valid. A lower optimizer.lr, trainer.max_grad_norm or another trainer.precision may help; "
            "trainer.nonfinite=warn continues the run"
        )

    def _checkpoint_due(self, ends_epoch: bool, last: bool) -> bool:
        state = self.state
        if last or (self._writes_best_at_once and state.is_best):
            return True
        if every := self.experiment.checkpoint.every_n_steps:
            due = state.step % every == 0 or state.is_best  # the best one is kept too
        else:
            due = state.is_evaluated if self.evaluates else ends_epoch
        return due and not self._saved_lately()

    def _saved_lately(self) -> bool:
        """Return whether the last checkpoint is younger than `checkpoint.min_interval_s`, by rank 0's clock."""
        interval = self.experiment.checkpoint.min_interval_s
        if not interval:
            return False
        late = self.world.rank == 0 and time.monotonic() - self._saved_when >= interval
        return not bool(self.world.all_reduce(torch.tensor(float(late), device=self.world.device)))

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
        shared, local = self.checkpointer.load(info, snapshot.template(self))
        snapshot.restore(self, shared, local, source=str(info.path), changed=changed)

    # --- weights --------------------------------------------------------------------------------------------------

    def init_from(self, init: InitFrom | str, look_up: Callable[[str], str | None] = lambda _: None) -> str:
        """Load only the weights from a run, a checkpoint, a file or a folder. Return a line that says what was loaded.

        Every rank calls it, and the first one reads.

        Args:
            init: As the key `init_from`.
            look_up: As in `checkpoint.find_weights`.

        Raises:
            CheckpointError: There are no weights, they cannot be read, or they do not match the request.
        """
        options = InitFrom(source=init) if isinstance(init, str) else init
        source, storage = options.source or "", self.experiment.storage_path or "runs"
        line = take_weights(self.raw_model, self.world, lambda: find_weights(source, storage, look_up), options)
        if self.ema_model is not None:
            restore_module(self.ema_model, self.raw_model.state_dict(), "the model")
        return line

    def best_weights(self) -> tuple[int, dict[str, Any]]:
        """Return the step and the weights of the best committed checkpoint, or the current ones if there is none.

        They are a state dict on the CPU, with the modules' extra state; the EMA's if there is one.

        A checkpoint has the mean of the batch statistics over ranks, which this process alone cannot compute.
        """
        if self.checkpointer is not None and (checkpoints := self.checkpointer.list()):
            info = self.checkpointer.best() or checkpoints[-1]
            wanted, other = ("model", "ema") if self.ema_model is None else ("ema", "model")
            shared, _ = self.checkpointer.load(info, dict.fromkeys(("optimizer", "loss", "training", other), unread))
            return info.step, shared[wanted]
        model = self.raw_model if self.ema_model is None else self.ema_model
        with evaluation_weights(self.optimizer):
            state = model.state_dict()
            for name, value in state.items():
                state[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        return self.step, state

    def example_batches(self) -> Iterator[Batch]:
        """Return batches of the first validation set, or without one of the training set, from the first on."""
        return next(iter(self.val_loaders.values()), self.train_loader).batches(0, 1, alone=True)
