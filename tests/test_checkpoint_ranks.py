"""Checkpoints of several ranks: saved on 2, loaded on 1 and on 4, plain and sharded. What fails on one rank fails on
all. Run as a program, it records the fixture of the current format version: `python -m tests.test_checkpoint_ranks`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from raytrainer.checkpoint import Checkpointer, checkpoint_files
from raytrainer.errors import CheckpointCorrupt, CheckpointError, RaytrainerError, StorageFull
from raytrainer.storage import Storage
from tests import ranks

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint-v1"


def launch(world_size: int, work: Callable[[int, int, Any, Path], None], root: Path) -> None:
    """Call `work(rank, world_size, group, root)` in `world_size` processes, with gloo."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "rendezvous").unlink(missing_ok=True)
    context = ranks.new_processes()
    processes = [context.Process(target=_rank, args=(rank, world_size, work, root)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world_size, codes


def _rank(rank: int, world_size: int, work: Callable[[int, int, Any, Path], None], root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=world_size)
    work(rank, world_size, dist.new_group(backend="gloo"), root)
    dist.destroy_process_group()


def checkpointer(rank: int, world_size: int, group: Any, root: Path, **options: Any) -> Checkpointer:
    return Checkpointer(Storage(root / "run"), rank=rank, world_size=world_size, group=group, **options)


def shared_state(world_size: int) -> dict[str, Any]:
    """Return plain tensors, and DTensors: sharded unevenly, along the second dimension, replicated, and in two
    dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    flat = init_device_mesh("cpu", (world_size,))
    square = init_device_mesh("cpu", (2, world_size // 2))
    values = torch.arange(35.0).reshape(7, 5)
    return {
        "plain": torch.arange(6.0),
        "rows": distribute_tensor(values, flat, [Shard(0)]),
        "columns": distribute_tensor(values, flat, [Shard(1)]),
        "copied": distribute_tensor(values, flat, [Replicate()]),
        "both": distribute_tensor(values, square, [Shard(0), Shard(1)]),
        "half": distribute_tensor(values, square, [Replicate(), Shard(0)]),
        "few": distribute_tensor(torch.ones(1, 2, dtype=torch.float64), flat, [Shard(0)]),
        "scalar": distribute_tensor(torch.tensor(3), flat, [Replicate()]),
        "epoch": 4,
    }


def plain_state() -> dict[str, Any]:
    """Return the values of `shared_state` as whole tensors."""
    values = torch.arange(35.0).reshape(7, 5)
    whole = dict.fromkeys(("rows", "columns", "copied", "both", "half"), values)
    few, scalar = torch.ones(1, 2, dtype=torch.float64), torch.tensor(3)
    return {"plain": torch.arange(6.0), **whole, "few": few, "scalar": scalar, "epoch": 4}


def full(value: Any) -> Any:
    """Return the whole of a DTensor, and anything else unchanged."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach() if isinstance(whole, torch.Tensor) else whole


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value, key


def save_shared(rank: int, world_size: int, group: Any, root: Path) -> None:
    made = checkpointer(rank, world_size, group, root)
    local = {"rank": rank, "random": torch.arange(4) + 10 * rank, "position": [rank, 2.5]}
    made.save(120, shared_state(world_size), local, metric=0.5 + rank)
    made.close()


def load_shared(rank: int, world_size: int, group: Any, root: Path) -> None:
    made = checkpointer(rank, world_size, group, root)
    info = made.latest()
    assert info is not None
    assert (info.step, info.world_size, info.metric) == (120, 2, 0.5)
    shared, local = made.load(info)
    assert_same(shared, plain_state())
    assert (local is None) == (world_size != 2)
    if local is not None:
        assert local["rank"] == rank
        assert torch.equal(local["random"], torch.arange(4) + 10 * rank)
    # Load in place, into the sharding of this number of ranks.
    template = shared_state(world_size)
    for value in template.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    filled, _ = made.load(info, template)
    whole = {key: full(value) for key, value in filled.items()}
    assert filled["rows"] is template["rows"]
    assert_same(whole, plain_state())


@pytest.mark.slow
def test_saved_on_2_ranks_loaded_on_1_2_and_4(tmp_path: Path) -> None:
    launch(2, save_shared, tmp_path)
    assert sorted(path.name for path in (tmp_path / "run" / "step-000000120").iterdir()) == [
        "local-00000.json",
        "local-00000.safetensors",
        "local-00001.json",
        "local-00001.safetensors",
        "manifest.json",
        "shared-00000.safetensors",
        "shared-00001.safetensors",
        "shared.json",
    ]
    made = Checkpointer(Storage(tmp_path / "run"))
    info = made.latest()
    assert info is not None
    shared, local = made.load(info)
    assert_same(shared, plain_state())
    assert local is None
    launch(2, load_shared, tmp_path)
    launch(4, load_shared, tmp_path)
    # What both ranks hold is written once, so the sizes of the files add up to the size of the state.
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "step-000000120").glob("shared-*"))
    header = 2 * 1500
    assert written < 6 * 4 + 5 * 35 * 4 + 16 + 8 + header
    # If a shard is missing, the rest is not taken for the whole.
    (tmp_path / "run" / "step-000000120" / "shared-00001.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"shared-00001.safetensors is missing"):
        Checkpointer(Storage(tmp_path / "run")).load(info)


# -- FSDP2 -------------------------------------------------------------------------------------------------------


def sharded(world_size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if world_size > 1:
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 20).reshape(4, 5)).pow(2).mean().backward()
        optimizer.step()


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save_fsdp(rank: int, world_size: int, group: Any, root: Path) -> None:
    model, optimizer = sharded(world_size)
    train(model, optimizer, 3)
    made = checkpointer(rank, world_size, group, root)
    made.save(3, training_state(model, optimizer), {"rank": rank})
    made.wait()
    train(model, optimizer, 2)
    whole = {name: full(value) for name, value in model.named_parameters()}
    if rank == 0:
        torch.save(whole, root / "expected.pt")


def resume_fsdp(rank: int, world_size: int, group: Any, root: Path) -> None:
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = sharded(world_size)
    for parameter in model.parameters():
        parameter.data.zero_()
    train(model, optimizer, 1)  # the optimizer's state exists, and differs
    state = training_state(model, optimizer)
    made = checkpointer(rank, world_size, group, root)
    info = made.latest()
    assert info is not None
    shared, _ = made.load(info, state)
    set_state_dict(model, optimizer, model_state_dict=shared["model"], optim_state_dict=shared["optimizer"])
    train(model, optimizer, 2)
    expected = torch.load(root / "expected.pt", weights_only=True)
    for name, value in model.named_parameters():
        torch.testing.assert_close(full(value), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_fsdp_goes_on_after_2_ranks_on_2_and_on_1(tmp_path: Path) -> None:
    launch(2, save_fsdp, tmp_path)
    launch(2, resume_fsdp, tmp_path)
    launch(1, resume_fsdp, tmp_path)


# -- one rank fails ----------------------------------------------------------------------------------------------


def save_and_wait(made: Checkpointer, local: dict[str, Any]) -> None:
    made.save(4, {"weight": torch.ones(4)}, local)
    made.wait()


def fail_on_one(rank: int, world_size: int, group: Any, root: Path) -> None:
    told: list[int] = []
    made = checkpointer(rank, world_size, group, root, on_commit=lambda info: told.append(info.step))
    state = {"weight": torch.ones(4)}
    made.save(1, state, {"rank": rank})
    made.wait()
    assert told == [1]

    def no_space(storage: Storage, directory: str, contents: Any) -> Any:
        raise StorageFull("no space at HERE")

    write = checkpoint_files.write
    if rank == 1:
        checkpoint_files.write = no_space
    made.save(2, state, {"rank": rank})
    with pytest.raises(StorageFull, match=r"^no space at HERE" if rank == 1 else r"^rank 1: no space at HERE"):
        made.save(3, state, {"rank": rank})
    checkpoint_files.write = write

    # Only this rank has a value that cannot be saved. It raises at once, and the other rank at its next call.
    with pytest.raises(CheckpointError, match=r"the state at bad is a .*object|rank 0: the state at bad"):
        save_and_wait(made, {"bad": object() if rank == 0 else 0})

    made.save(5, state, {"rank": rank})
    info = made.latest()
    assert info is not None
    assert info.step == 5
    assert told == [1, 5]
    dist.barrier()
    assert sorted(path.name for path in (root / "run").iterdir()) == ["step-000000001", "step-000000005"]

    # A file that only one rank checks is corrupt for both ranks.
    if rank == 0:
        (root / "run" / "step-000000005" / "local-00001.json").write_text("{}")
    dist.barrier()
    info = checkpointer(rank, world_size, group, root).latest()
    assert info is not None
    assert info.step == 1
    dist.barrier()

    # All ranks refuse a format version that they cannot read.
    if rank == 0:
        place = root / "run" / "step-000000005" / "manifest.json"
        place.write_text(place.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(CheckpointCorrupt, match="format version 9"):
        checkpointer(rank, world_size, group, root).latest()


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    launch(2, fail_on_one, tmp_path)


def lose_one(rank: int, world_size: int, group: Any, root: Path) -> None:
    """Rank 1 dies in the middle of a save; what rank 0 has committed stays."""
    made = checkpointer(rank, world_size, group, root)
    made.save(1, {"weight": torch.ones(4)}, {"rank": rank})
    made.wait()
    if rank == 1:
        checkpoint_files.write = lambda *_: os._exit(0)
    made.save(2, {"weight": torch.ones(4)}, {"rank": rank})
    with pytest.raises(RaytrainerError, match="the other ranks cannot be reached"):
        made.wait()
    assert [info.step for info in made.list()] == [1]
    os._exit(0)  # its process group can no longer be destroyed cleanly


def test_a_lost_rank_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    launch(2, lose_one, tmp_path)


# -- the fixture -------------------------------------------------------------------------------------------------


def record() -> None:
    """Write the fixture with the current code: 2 ranks, sharded and plain."""
    root = FIXTURE.with_name("recording")
    launch(2, save_shared, root)
    shutil.rmtree(FIXTURE, ignore_errors=True)
    (root / "run").rename(FIXTURE)
    shutil.rmtree(root)


def test_format_version_1_stays_readable() -> None:
    made = Checkpointer(Storage(FIXTURE))
    info = made.latest()
    assert info is not None, f"record it again with `python -m {__name__}`, at a commit that writes version 1"
    assert (info.step, info.metric, info.world_size) == (120, 0.5, 2)
    shared, local = made.load(info)
    assert_same(shared, plain_state())
    assert local is None


if __name__ == "__main__":
    record()
