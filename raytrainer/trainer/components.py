"""`Components`: what a training consists of, built from an experiment. The other modules of this package work on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from raytrainer import parallel
from raytrainer.batches import map_tensors
from raytrainer.config import Experiment, build, factory
from raytrainer.data import Loader, LoaderOptions
from raytrainer.errors import ConfigError
from raytrainer.events import Events, check_hooks
from raytrainer.metrics import Monitor, Names, Throughput, WeightedMeans
from raytrainer.optim import build_optimizer, build_scheduler
from raytrainer.optim.protocols import enter_training
from raytrainer.parallel import Precision, World
from raytrainer.trainer.evaluation_metrics import EvaluationMetrics
from raytrainer.trainer.example import ExampleRecorder
from raytrainer.trainer.gradients import Gradients
from raytrainer.trainer.model import build_model
from raytrainer.trainer.system import build_loss, stateful_part, together, with_state_dict
from raytrainer.trainer.train_state import Objective, TrainState

_log = logging.getLogger("raytrainer.trainer")


class Components:
    """The objects of a training in one process of many, and its state.

    Args:
        experiment: What to train.
        world: The place of this process among all; None for a single process.
        listeners: Objects with hooks, which are called before the experiment's callbacks.
        objective: The metric of the best checkpoint; None for `checkpoint.monitor`.

    Attributes:
        experiment, world: As given.
        state: What advances (train_state.py).
        raw_model: The model itself, or sharded by FSDP.
        model: The model as a step calls it: `raw_model`, or DDP around it.
        ema_model: The moving average of the weights, as a model; None without `trainer.ema_decay`.
        loss: The loss.
        loss_state: The module with the loss's parameters and buffers; None without any.
        loss_object: The loss, if it is an object with its own `state_dict`; else None.
        system: The model and `loss_state` under one set of names.
        optimizer, scheduler: The optimizer, and its learning-rate scheduler or None.
        gradients: The backward passes and the reduction of gradients.
        precision: The types of `trainer.precision`.
        callbacks: The experiment's callbacks by name.
        events: Calls the hooks of listeners and callbacks.
        train_loader: The loader of `data.train`.
        val_loaders: Loaders of `data.val` by name; a single set has an empty name.
        val_metrics: The objects of section `metrics`.
        total_steps: The step at which training ends; None if only time ends it.
        window: The means since the last log.
        throughput: Samples a second.
        names: Distinguishes metrics of one name.
        example: A call of the model, for the export after training.
    """

    def __init__(
        self, experiment: Experiment, world: World | None, listeners: Iterable[Any], objective: Objective | None
    ) -> None:
        self.experiment, self.world = experiment, world or World()
        options, device = experiment.trainer, self.world.device
        deterministic = device.type == "cpu" if options.deterministic is None else options.deterministic
        parallel.set_determinism(deterministic, device, options.num_threads)
        # In this order, because each constructor may draw from the global generators.
        self._build_model()
        self._build_callbacks(listeners)
        self._build_data()
        self._build_optimizer()
        self.state = TrainState.of(experiment, objective)
        self.example = ExampleRecorder()
        self.window = WeightedMeans(device, self.world.all_reduce)
        self.throughput = Throughput()

    def _build_model(self) -> None:
        e = self.experiment
        self.precision = Precision(e.trainer.precision, self.world.device)
        self.loss = build_loss(e)
        self.loss_state = stateful_part(self.loss)
        self.loss_object = with_state_dict(self.loss, self.loss_state)
        if self.loss_state is not None:
            self.precision.convert(self.loss_state).to(self.world.device)
        self.raw_model, self.ema_model = build_model(e, self.world, self.precision, self.loss_state)
        self.system = together(self.raw_model, self.loss_state)
        if self.loss_state is not None:
            parallel.broadcast_state(self.loss_state, self.world)

    def _build_callbacks(self, listeners: Iterable[Any]) -> None:
        self.callbacks: dict[str, Any] = {k: build(v) for k, v in self.experiment.callbacks.items() if v}
        for name, callback in self.callbacks.items():
            check_hooks(callback, f"callbacks.{name}")
        self.events = Events([*listeners, *self.callbacks.values()])
        self.names = Names(_log.warning if self.world.rank == 0 else lambda sentence: None)

    def _build_data(self) -> None:
        data = self.experiment.data
        self.train_loader = self._loader(
            build(configured(data.train)), "data.train", shuffle=data.shuffle, drop_last=data.drop_last
        )
        self.val_loaders = {
            name: self._loader(build(node), f"data.val.{name}".rstrip(".")) for name, node in data.val_sets.items()
        }
        self.val_metrics = EvaluationMetrics(self.experiment.metrics, self.val_loaders, self.world, self.names)
        self.total_steps = self._total_steps()

    def _build_optimizer(self) -> None:
        e, options = self.experiment, self.experiment.trainer
        self.optimizer = build_optimizer(factory(configured(e.optimizer)), self.raw_model, self.system)
        enter_training(self.optimizer)
        self.scheduler = (
            build_scheduler(factory(e.lr_scheduler), self.optimizer, self.total_steps) if e.lr_scheduler else None
        )
        self.model = self.raw_model
        if options.strategy == "ddp":
            self.model = parallel.replicate(
                self.raw_model, self.world, find_unused_parameters=options.find_unused_parameters
            )
        self.gradients = Gradients(self.model, self.raw_model, self.system, self.world, self.precision.scaler, options)

    def _loader(self, dataset: Any, key: str, *, shuffle: bool = False, drop_last: bool = False) -> Loader:
        d = self.experiment.data
        collate_fn = build(d.collate_fn) if d.collate_fn else None
        if d.collate_fn and not callable(collate_fn):
            raise ConfigError(
                f"builds a {type(collate_fn).__name__}, which cannot be called: it must be a function from a list of samples "
                "to a batch (with _partial_: true, the _target_ itself)",
                key="data.collate_fn",
            )
        options = LoaderOptions(
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
            start_method=d.start_method,
            device=self.world.device,
            resident=d.resident,
            key=key,
        )
        return Loader(dataset, options)

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

    def prepare(self, data: Any) -> Any:
        """Return a batch in the model's type and memory format."""
        data = self.precision.cast(data)
        if self.experiment.trainer.channels_last:
            data = map_tensors(data, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
        return data

    @property
    def step(self) -> int:
        """The optimizer steps done since the beginning of the run."""
        return self.state.step

    @property
    def evaluations(self) -> int:
        """The evaluations done since the beginning of the run."""
        return self.state.evaluations

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last value of each metric."""
        return self.state.metrics

    @property
    def best(self) -> Monitor:
        """The best value of `checkpoint.monitor` so far, as `value`, and its `step`."""
        return self.state.best

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to; 0 for an iterable without a length."""
        per_epoch = self.train_loader.steps_per_epoch
        return self.state.step // per_epoch if per_epoch else 0

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluations during training."""
        return bool(self.val_loaders) and self.experiment.trainer.eval_every_n_steps != 0


def configured(node: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a `_target_` node that the configuration check requires."""
    assert node is not None
    return node
