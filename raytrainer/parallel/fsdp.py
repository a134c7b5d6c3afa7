"""`trainer.strategy=fsdp`: parameters, gradients and optimizer state sharded over the ranks by torch's FSDP2.

Every rank but the first builds the model without memory (on the meta device) and gets its shards from the first.
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

# The types of gathered parameters and of the sums of gradients, where they are not the parameters' own.
_MIXED = {"bf16-mixed": ("bfloat16", "float32"), "16-mixed": ("float16", "float32")}


def build_on_first_rank(make: Callable[[], nn.Module], world: World, *, meta: bool = True) -> nn.Module:
    """A model with its values on rank 0, and on the others with shapes alone; random states then are rank 0's on all.

    Args:
        make: Builds it, seeded.
        world: This process's place.
        meta: False: all ranks build it whole. So do those whose model cannot be built without values.
    """
    model = make() if world.rank == 0 or not meta else _without_values(make)
    # What is built next draws as it would after a model with values.
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
    except Exception as error:  # noqa: BLE001  a constructor that looks at values fails in its own way
        reason = f"{type(error).__name__}: {error}"
    _log.warning("the model cannot be built on the meta device, and is built whole on every worker: %s", reason)
    return make()


def make_mesh(world: World, replicas: int) -> DeviceMesh:
    """All ranks in a row, or `replicas` rows of them: shards are within a row, whose ranks are neighbours."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if world.size % replicas:
        raise ConfigError(
            f"does not divide the number of workers, which is {world.size}", key="fsdp.replicas", value=replicas
        )
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def precision_policy(precision: str, options: FSDPConfig, own: torch.dtype) -> MixedPrecisionPolicy:
    """The types of gathered parameters and of the sums of gradients, of `trainer.precision` unless `fsdp` has them.

    Args:
        precision: `trainer.precision`.
        options: The section `fsdp`.
        own: The parameters' type, which is that of the shards.
    """
    param, reduce = _MIXED.get(precision, (None, None))

    def other(name: str | None) -> torch.dtype | None:
        # Where nothing changes FSDP is told nothing: it would still pass over the inputs of each unit.
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
    """Shards `model` in place, with the values that it has on rank 0. Every rank calls it.

    One unit after the other gets its values whole, on the device, and keeps its shards: there is never more than one
    whole unit in a device's memory, as in the forward pass.

    Args:
        model: Built alike on all ranks, but for values.
        units: Modules that are gathered as one; what is in none of them is one more.
        world: This process's place.
        mesh: Of `make_mesh`.
        policy: Of `precision_policy`.
        reshard_after_forward: Of `fully_shard`.
        find_unused_parameters: Some get no gradient in some steps, not the same ones on every rank.

    Raises:
        ConfigError: Two units share a parameter, or FSDP refuses one.
    """
    # The running statistics of batch norms are no parameters, and all of a batch norm must be of one type.
    norms = {m for m in model.modules() if isinstance(m, _BatchNorm)} if policy.param_dtype is not None else set()
    units = {*units, *norms, model}
    # Inner ones before those around them.
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
    """Puts real tensors into a model, with rank 0's values, module by module. Tied parameters stay tied."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        # Every place of a parameter or buffer; the tensor is kept, or its number would be given to another.
        self._places: dict[int, tuple[Tensor, list[tuple[dict[str, Any], str]]]] = {}
        for module in model.modules():
            for slots in (module._parameters, module._buffers):
                for name, tensor in slots.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), (tensor, []))[1].append((slots, name))

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """All of `module` that is not there yet."""
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) not in self._places:  # made here before, or sharded already
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
    """FSDP gathers a parameter with one unit, so no other can have it too."""
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
    """For what is read: gives a tensor sharded as `reference` where its shape is the same, else a whole one (CPU)."""
    assert is_sharded(reference)

    def allocate(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if tuple(reference.shape) == shape:
            return torch.empty_like(reference, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    return allocate
