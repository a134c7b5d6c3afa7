"""One process among many: precision, determinism, DDP without needless synchronisation, and buffers that differ by
rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrainer import parallel
from raytrainer.parallel import Precision, World
from raytrainer.trainer import Trainer
from tests import ranks, training
from tests.training import experiment, fitted, node

CPU = torch.device("cpu")


def reduced(world: World) -> tuple[list[float], bool]:
    return world.all_reduce(torch.tensor([1.0, world.rank])).tolist(), world.distributed


def test_a_world_sums_over_its_ranks() -> None:
    assert reduced(World()) == ([1.0, 0.0], False)
    assert ranks.run(3, reduced) == [([3.0, 3.0], True)] * 3


# -- precision -------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: Tensor
    rest: Any


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
        ("bf16-mixed", torch.float32),
        ("16-mixed", torch.float32),
    ],
)
def test_inputs_and_weights_have_the_type_of_the_precision(name: str, dtype: torch.dtype) -> None:
    precision = Precision(name, CPU)
    data = Pair(
        torch.ones(1, dtype=torch.float64), {"ids": torch.ones(1, dtype=torch.int64), "more": [torch.ones(1), "a"]}
    )
    cast = precision.cast(data)
    assert type(cast) is Pair
    assert (cast.image.dtype, cast.rest["ids"].dtype, cast.rest["more"][0].dtype) == (dtype, torch.int64, dtype)
    assert cast.rest["more"][1] == "a"
    model = training.Net()
    tied = model.tied = nn.Linear(96, 4)
    tied.weight = model.head.weight
    converted = precision.convert(model)
    assert converted is model
    assert tied.weight is model.head.weight
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {dtype}
    assert dict(model.named_buffers())["norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(("name", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_mixed_precision_multiplies_in_half(name: str, dtype: torch.dtype) -> None:
    with Precision(name, CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    with Precision("32-true", CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def losses(world: World, precision: str) -> dict[int, float]:
    e = experiment(model=node(training.Net, dropout=0.0), trainer={"precision": precision, "max_steps": 30})
    return fitted(e, world)[1].series("train/loss")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_half_precision_trains_on_2_ranks(precision: str) -> None:
    first, second = ranks.run(2, losses, precision)
    assert first == second
    assert first[30] < 0.6 * first[1]


def test_threads_and_determinism_are_the_process_s() -> None:
    parallel.set_determinism(True, CPU, 2)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, True)
    parallel.set_determinism(False, CPU, None)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, False)


# -- DDP -------------------------------------------------------------------------------------------------------------


def reductions(world: World, micro_batch_size: int | None) -> tuple[int, int, bool]:
    """Return (micro-batches, gradient reductions) of one step, and whether all ranks then have the same weights."""
    trainer = Trainer(experiment(data={"micro_batch_size": micro_batch_size}), world=world)
    calls = []

    def count(state: Any, bucket: Any) -> Any:
        calls.append(bucket)
        torch.distributed.all_reduce(bucket.buffer().div_(world.size))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    count.__annotations__.clear()  # DDP accepts no annotation, or its own class
    assert isinstance(trainer.model, DistributedDataParallel)
    trainer.model.register_comm_hook(None, count)
    batch = next(trainer.train_loader.batches(0, 1))
    trainer.train_step(batch)
    vector = nn.utils.parameters_to_vector(trainer.raw_model.parameters()).detach()
    return len(batch.micro), len(calls), torch.equal(world.all_reduce(vector.clone()) / world.size, vector)


def test_gradients_are_reduced_once_a_step() -> None:
    assert ranks.run(2, reductions, None) == [(1, 1, True)] * 2
    assert ranks.run(2, reductions, 2) == [(3, 1, True)] * 2


class Forked(nn.Module):
    """A model whose second half is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.used(image.flatten(1))
        return logits


def with_unused(world: World, find: bool) -> int:
    e = experiment(model=node(Forked), trainer={"find_unused_parameters": find})
    return Trainer(e, world=world).fit().step


def test_unused_parameters_train_where_they_are_looked_for() -> None:
    assert ranks.run(2, with_unused, True) == [4, 4]
    assert with_unused(World(), False) == 4
    with pytest.raises(AssertionError, match=r"find_unused_parameters"):
        ranks.run(2, with_unused, False)


# -- buffers ---------------------------------------------------------------------------------------------------------


def buffers(world: World) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the buffers before, within and after `averaged_buffers`. They hold the rank's number (booleans: whether it
    is odd)."""
    model = training.Net()
    for b in model.buffers():
        b.fill_(world.rank % 2 if b.dtype == torch.bool else world.rank)

    def values() -> dict[str, Any]:
        return {name: b.flatten()[0].item() for name, b in model.named_buffers()}

    before = values()
    with parallel.averaged_buffers(model, world):
        within = values()
        model.get_buffer("norm.running_mean").fill_(100)
    return before, within, values()


def test_buffers_are_averaged_and_put_back() -> None:
    for rank, (before, within, after) in enumerate(ranks.run(3, buffers)):
        assert after == before
        assert before["norm.running_var"] == rank
        assert within == {
            "norm.running_mean": 1.0,
            "norm.running_var": 1.0,
            "norm.num_batches_tracked": 0,  # a buffer that has no mean is rank 0's
            "mask": False,
            "turn": 0,
        }
