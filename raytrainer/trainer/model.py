"""The model of a `Trainer`: built from the seed, in its precision, on its device or sharded over those of all ranks; and
the weights of another in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer import parallel, seeds
from raytrainer.checkpoint import Weights, take
from raytrainer.config import Experiment, InitFrom, build
from raytrainer.errors import ConfigError, RaytrainerError
from raytrainer.optim import freeze
from raytrainer.parallel import Precision, World
from raytrainer.sharding import placed_as


def build_model(e: Experiment, world: World, precision: Precision) -> tuple[nn.Module, nn.Module | None]:
    """The model, and with `trainer.ema_decay` its copy for the average. Every rank calls it.

    Raises:
        ConfigError: A constructor refuses a value, or a class that `fsdp.wrap` or `trainer.activation_checkpointing`
            names is not in the model.
    """
    options, sharded = e.trainer, e.trainer.strategy == "fsdp" and world.distributed

    def make() -> nn.Module:
        # Every rank draws the same initial weights; from the first step on each has random states of its own.
        seeds.seed_everything("model", e.seed)
        assert e.model is not None  # the configuration's own check
        made: nn.Module = build(e.model)
        return made

    if sharded:
        from raytrainer.parallel import fsdp

        model = precision.convert(fsdp.build_on_first_rank(make, world, meta=e.fsdp.meta_init))
    else:
        model = precision.convert(make()).to(world.device)
    freeze(model, options.freeze)
    if options.channels_last and not sharded:  # FSDP wants its parameters contiguous: there it is the inputs alone
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model).requires_grad_(False) if options.ema_decay else None
    units = parallel.find_units(model, e.fsdp.wrap, "fsdp.wrap") if sharded else []
    # What is recomputed is inside of what is compiled, and that inside of what is sharded.
    _checkpoint_activations(model, options.activation_checkpointing)
    if options.compile:
        # FSDP's hooks are not to be compiled: they are around each unit, and in between is little to gain.
        for part in units or [model]:
            part.compile(mode="default" if options.compile is True else options.compile)
    if sharded:
        shard = functools.partial(
            fsdp.shard,
            world=world,
            mesh=fsdp.make_mesh(world, e.fsdp.replicas),
            policy=fsdp.precision_policy(options.precision, e.fsdp, precision.dtype),
            reshard_after_forward=e.fsdp.reshard_after_forward,
            find_unused_parameters=options.find_unused_parameters,
        )
        shard(model, units)
        if average is not None:
            shard(average, parallel.find_units(average, e.fsdp.wrap, "fsdp.wrap"))
    return model, average


def take_weights(model: nn.Module, world: World, find: Callable[[], Weights], options: InitFrom) -> str:
    """The weights that `find` finds, into `model`; returns what was taken, in a line. Every rank calls it.

    The first rank alone reads them, and sends them tensor by tensor: on the others there is never more than one whole.

    Raises:
        CheckpointError, StorageError, ConfigError: As `checkpoint.take`; on all ranks.
    """
    taken: dict[str, Tensor] = {}
    told: list[Any] = [None]
    if world.rank == 0:
        try:
            taken, words = take(model, find(), options)
            told = [(words, list(taken))]
        except RaytrainerError as error:
            told = [error]
    if world.distributed:
        dist.broadcast_object_list(told, src=0, device=world.device)
    if isinstance(told[0], RaytrainerError):
        raise told[0]
    line, names = told[0]
    state = model.state_dict()
    with torch.no_grad():
        for name in names:
            own: Tensor = state[name]
            if world.rank == 0:
                value = taken.pop(name).to(own.device, own.dtype).contiguous()
            else:
                value = torch.empty(own.shape, dtype=own.dtype, device=own.device)
            if world.distributed:
                dist.broadcast(value, src=0)
            own.copy_(placed_as(own, value))
    return str(line)


def _checkpoint_activations(model: nn.Module, wanted: bool | list[str]) -> None:
    if wanted is False:
        return
    key = "trainer.activation_checkpointing"
    blocks = parallel.find_units(model, None if wanted is True else wanted, key)
    if not blocks:
        raise ConfigError(
            "finds no blocks in the model, neither by _no_split_modules nor repeated ones; name their classes",
            key=key,
            value=True,
            choices=sorted({type(m).__name__ for m in model.modules() if m is not model}),
        )
    parallel.checkpoint_activations(blocks)
