"""`trainer.strategy=fsdp`: parameters, gradients and optimizer state sharded over the ranks by torch's FSDP2.

All ranks except the first build the model without memory (on the meta device) and receive their shards from the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from raytrainer import seeds
from raytrainer.config import FSDPConfig
from raytrainer.errors import ConfigError
from raytrainer.parallel.world import World
from raytrainer.sharding import is_sharded

_log = logging.getLogger("raytrainer.parallel")

# The types of gathered parameters and of summed gradients, if they differ from the parameters' own.
_MIXED = {"bf16-mixed": ("bfloat16", "float32"), "16-mixed": ("float16", "float32")}


def build_on_first_rank(make: Callable[[], nn.Module], world: World, *, meta: bool = True) -> nn.Module:
    """Return a model with values on rank 0, and with only shapes on the others.

    All ranks then have rank 0's random states.

    Args:
        make: Builds the model, with its seed.
        world: This process among all.
        meta: False: all ranks build it with values. They also do if it cannot be built without values.
    """
    model = make() if world.rank == 0 or not meta else _without_values(make)
    # What is built next draws the same random numbers as after a model with values.
    state: list[Any] = [seeds.random_state() if world.rank == 0 else None]
    dist.broadcast_object_list(state, src=0, device=torch.device("cpu") if world.device.type == "cpu" else world.device)
    seeds.set_random_state(state[0])
    return model


def _without_values(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            model = make()
        loose = [
            f"{name}.{attribute}".lstrip(".")
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, Tensor) and value.is_meta
        ]
        if not loose:
            return model
        reason = f"{loose[0]} is a tensor that is neither a parameter nor a buffer"
    except Exception as error:  # noqa: BLE001  a constructor that uses values may raise anything
        reason = f"{type(error).__name__}: {error}"
    _log.warning("the model cannot be built on the meta device, and is built whole on every worker: %s", reason)
    return make()


def make_mesh(world: World, replicas: int) -> DeviceMesh:
    """Return a mesh of all ranks in a row, or in `replicas` rows. Shards stay within a row of neighbouring ranks."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if world.size % replicas:
        raise ConfigError(
            f"does not divide the number of workers, which is {world.size}", key="fsdp.replicas", value=replicas
        )
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def precision_policy(precision: str, options: FSDPConfig, own: torch.dtype) -> MixedPrecisionPolicy:
    """Return the types of gathered parameters and summed gradients, from `trainer.precision` unless `fsdp` sets them.

    Args:
        precision: `trainer.precision`.
        options: The section `fsdp`.
        own: The parameters' own type, which the shards have.
    """
    param, reduce = _MIXED.get(precision, (None, None))

    def other(name: str | None) -> torch.dtype | None:
        # None if nothing changes, because FSDP would otherwise still traverse the inputs of each unit.
        dtype: torch.dtype = getattr(torch, name) if name else own
        return None if dtype == own else dtype

    return MixedPrecisionPolicy(
        param_dtype=other(options.param_dtype or param), reduce_dtype=other(options.reduce_dtype or reduce)
    )


def shard(
    model: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    *,
    reshard_after_forward: bool | int | None = None,
    find_unused_parameters: bool = False,
) -> None:
    """Shard `model` in place, with its values from rank 0. Every rank calls it.

    The units receive their whole values on the device one by one, and keep only their shards. So a device never holds
    more than one whole unit, as in the forward pass.

    Args:
        model: The model, equal on all ranks except for values.
        units: Modules that are each gathered as a whole; everything outside them is one more unit.
        world: This process among all.
        mesh: From `make_mesh`.
        policy: From `precision_policy`.
        reshard_after_forward: As in `fully_shard`.
        find_unused_parameters: Whether some parameters get no gradient in some steps, and different ones on each rank.

    Raises:
        ConfigError: Two units share a parameter, or FSDP refuses one.
    """
    # Running statistics are buffers, which FSDP does not convert, and all tensors of a batch norm must have one type.
    norms = {m for m in model.modules() if isinstance(m, _BatchNorm)} if policy.param_dtype is not None else set()
    units = {*units, *norms, model}
    # Inner units before those that contain them.
    order = [m for m in reversed(list(model.modules())) if m in units]
    _check_shared(model, order)
    send = _Sender(model, world)
    for module in order:
        send(module)
        try:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=MixedPrecisionPolicy() if module in norms else policy,
                reshard_after_forward=reshard_after_forward,
            )
        except ValueError as error:
            raise ConfigError(f"cannot shard this model: {error}", key="trainer.strategy", value="fsdp") from error
    if find_unused_parameters:
        root: Any = model
        root.set_reduce_scatter_unused_params(True)


class _Sender:
    """Fills a model with real tensors that have rank 0's values, module by module. Tied parameters stay tied."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        # Every place of a parameter or buffer. The tensor is kept, because its id could otherwise be reused.
        self._places: dict[int, tuple[Tensor, list[tuple[dict[str, Any], str]]]] = {}
        for module in model.modules():
            for slots in (module._parameters, module._buffers):
                for name, tensor in slots.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), (tensor, []))[1].append((slots, name))

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """Fill everything in `module` that is not filled yet."""
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) not in self._places:  # already filled here, or sharded
                continue
            value, places = self._places.pop(id(tensor))
            made: Tensor = torch.empty(value.shape, dtype=value.dtype, device=self._world.device)
            if self._world.rank == 0:
                made.copy_(value)
            dist.broadcast(made, src=0)
            if isinstance(value, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
            for slots, name in places:
                slots[name] = made


def _check_shared(model: nn.Module, order: Sequence[nn.Module]) -> None:
    """Check that no two units share a parameter, because FSDP gathers a parameter with one unit."""
    owner: dict[nn.Module, nn.Module] = {}
    for unit in order:
        for module in unit.modules():
            owner.setdefault(module, unit)
    first: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = owner[model.get_submodule(name.rpartition(".")[0])]
        other, its_unit = first.setdefault(parameter, (name, unit))
        if its_unit is not unit:
            raise ConfigError(
                f"puts {other} and {name}, which are one parameter, into different units: wrap a module that has both, "
                "or neither",
                key="fsdp.wrap",
            )


def like(reference: Tensor) -> Callable[[torch.dtype, tuple[int, ...]], Tensor]:
    """Return a function that allocates a tensor to read into: sharded as `reference` if the shape is equal, else whole.

    A whole tensor is on the CPU.
    """
    assert is_sharded(reference)

    def allocate(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if tuple(reference.shape) == shape:
            return torch.empty_like(reference, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    return allocate
