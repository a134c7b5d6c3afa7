"""The model of a `Trainer`: built from the seed, converted, and placed or sharded; and loading weights into it."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from raytrainer import parallel, seeds
from raytrainer.checkpoint import Weights, take
from raytrainer.config import Experiment, InitFrom, build
from raytrainer.errors import ConfigError, RaytrainerError
from raytrainer.names import is_extra_state
from raytrainer.optim import freeze
from raytrainer.parallel import Precision, World
from raytrainer.sharding import placed_as
from raytrainer.state import loads_by_name, restore_module
from raytrainer.trainer.system import together


def build_model(
    e: Experiment, world: World, precision: Precision, loss: nn.Module | None = None
) -> tuple[nn.Module, nn.Module | None]:
    """Build the model and, with `trainer.ema_decay`, its copy for the average. Every rank calls it.

    Args:
        e: The experiment.
        world: This process among all.
        precision: The precision from `trainer.precision`.
        loss: The module with the loss's state, for `trainer.freeze`.

    Raises:
        ConfigError: A constructor refuses a value; a class in `fsdp.wrap` or `trainer.activation_checkpointing` is not
            in the model; or the model is not an `nn.Module`, is lazy, or cannot be copied for the average.
    """
    options, sharded = e.trainer, e.trainer.strategy == "fsdp" and world.distributed

    def make() -> nn.Module:
        # Every rank draws the same initial weights. From the first step on, each rank has its own random states.
        seeds.seed_everything("model", e.seed)
        assert e.model is not None  # the configuration check ensures it
        made = build(e.model)
        check_module(made, "model", str(e.model.get("_target_")))
        return cast("nn.Module", made)

    def placed() -> nn.Module:
        if not sharded:
            return precision.convert(make()).to(world.device)
        return precision.convert(fsdp.build_on_first_rank(make, world, meta=e.fsdp.meta_init))

    if sharded:
        from raytrainer.parallel import fsdp
    model = placed()
    freeze(together(model, loss), options.freeze)
    if options.channels_last and not sharded:  # FSDP needs contiguous parameters; with it only the inputs change
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = _copied(model, placed) if options.ema_decay else None
    units = parallel.find_units(model, e.fsdp.wrap, "fsdp.wrap") if sharded else []
    # The order is: recomputed parts inside compiled ones, and those inside sharded ones.
    _checkpoint_activations(model, options.activation_checkpointing)
    if options.compile:
        # FSDP's hooks must not be compiled. They surround each unit, and little is gained between units.
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


def check_module(made: Any, key: str, target: str) -> None:
    """Check the module that a `_target_` has built.

    Args:
        made: The object.
        key: The key of the node, for errors.
        target: Its `_target_`.

    Raises:
        ConfigError: It is not an `nn.Module`, or has shapes that only a first batch decides.
    """
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"gives a {type(made).__name__}, and must give a torch.nn.Module", key=f"{key}._target_", value=target
        )
    lazy = [
        name
        for name, t in (*made.named_parameters(), *made.named_buffers())
        if isinstance(t, UninitializedParameter | UninitializedBuffer)
    ]
    if lazy:
        module = made.get_submodule(lazy[0].rpartition(".")[0])
        raise ConfigError(
            f"has a lazy module: {lazy[0]} ({type(module).__name__}) has no shape before its first batch, and the optimizer "
            "and checkpoints need it. Give the sizes (nn.Linear(in_features, …) instead of nn.LazyLinear), or call the "
            "module once with an example batch at the end of the constructor",
            key=key,
            value=target,
        )


def _copied(model: nn.Module, build_again: Callable[[], nn.Module]) -> nn.Module:
    """Return a second model with the same values, for the average: a copy, or if it cannot be copied, a new one.

    Raises:
        ConfigError: Neither is possible.
    """
    try:
        return copy.deepcopy(model).requires_grad_(False)
    except Exception as error:  # noqa: BLE001  an attribute may hold a lock, a generator or a tensor of a graph
        reason = f"{type(error).__name__}: {error}"
    try:
        average = build_again()
        average.load_state_dict(model.state_dict())
        return average.requires_grad_(False)
    except Exception as error:
        raise ConfigError(
            f"needs a second copy of the model, and {type(model).__name__} cannot be copied ({reason}) or built again "
            f"({type(error).__name__}: {error}). Give it a __deepcopy__, or set trainer.ema_decay=null",
            key="trainer.ema_decay",
        ) from error


def take_weights(model: nn.Module, world: World, find: Callable[[], Weights], options: InitFrom) -> str:
    """Load the weights that `find` returns into `model`. Return a line that says what was loaded. Every rank calls it.

    Only the first rank reads them, and sends them tensor by tensor. The others never hold more than one whole tensor,
    unless the model has hooks or extra state and thus loads all of them at once through its `load_state_dict`.

    Args:
        model: The model, on every rank.
        world: This process among all.
        find: Returns the weights. Only the first rank calls it.
        options: The section `init_from`.

    Raises:
        CheckpointError, StorageError, ConfigError: As `checkpoint.take`; on all ranks.
    """
    taken, line, shapes, others = _read_on_first_rank(model, world, find, options)
    own_state, by_name = model.state_dict(), loads_by_name(model)
    state: Any = own_state
    if not by_name and not own_state.keys() >= shapes.keys():
        # Names of another version, which the model's hooks translate. They must not see its own names, which they would
        # take for loaded ones.
        state = OrderedDict((name, value) for name, value in own_state.items() if is_extra_state(name))
        state._metadata = OrderedDict()
    with torch.no_grad():
        for name, (shape, dtype) in shapes.items():
            own = own_state.get(name)
            device = own.device if isinstance(own, Tensor) else world.device
            if isinstance(own, Tensor) and not is_extra_state(name):
                shape, dtype = own.shape, own.dtype
            if world.rank == 0:
                value = taken.pop(name).to(device, dtype).contiguous()
            else:
                value = torch.empty(shape, dtype=dtype, device=device)
            if world.distributed:
                dist.broadcast(value, src=0)
            if own is not None and by_name:  # the state dict holds the model's own tensors
                own.copy_(placed_as(own, value))
            else:
                state[name] = placed_as(own, value)
    if not by_name:
        state.update(others)
        restore_module(model, state, line)
    return line


def _read_on_first_rank(
    model: nn.Module, world: World, find: Callable[[], Weights], options: InitFrom
) -> tuple[dict[str, Any], str, dict[str, tuple[torch.Size, torch.dtype]], dict[str, Any]]:
    """Return the weights on rank 0 (elsewhere nothing), and on all ranks the line, their shapes and the extra state.

    Raises:
        CheckpointError, StorageError, ConfigError: On all ranks.
    """
    taken: dict[str, Any] = {}
    answer: list[Any] = [None]
    if world.rank == 0:
        try:
            taken, line = take(model, find(), options)
            # Extra state that is not a tensor is sent with the names.
            others = {name: value for name, value in taken.items() if not isinstance(value, Tensor)}
            shapes = {name: (v.shape, v.dtype) for name, v in taken.items() if name not in others}
            answer = [(line, shapes, others)]
        except RaytrainerError as error:
            answer = [error]
    if world.distributed:
        dist.broadcast_object_list(answer, src=0, device=world.device)
    if isinstance(answer[0], RaytrainerError):
        raise answer[0]
    return taken, *answer[0]


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
