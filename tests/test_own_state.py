"""State that user objects keep in their own way is restored bit for bit: 4 + 4 steps equal 8 steps. State that cannot
be restored is refused at the first save, with the object and the key."""

from __future__ import annotations

import random
import shutil
from collections import Counter as CountOf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from raytrainer.config import Experiment
from raytrainer.errors import CheckpointCorrupt, CheckpointError
from raytrainer.parallel import World
from raytrainer.state import restore_module, tensors_of
from raytrainer.trainer import Trainer, evaluation, snapshot, verify
from tests import ranks, training
from tests.training import Recorder, checkpointer, differences, experiment, fitted, node

# -- models -----------------------------------------------------------------------------------------------------------


def _hook(module: Any, kind: str, function: Any) -> None:
    """Register one of torch's hooks, which have no types."""
    getattr(module, f"register_{kind}_hook")(function)


class Body(nn.Module):
    """Two layers, and batch statistics that differ by rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.b(self.norm(self.a(image.flatten(1))).relu())
        return logits


class Clones(Body):
    """A model that saves copies. Torch's own state dict has the tensors themselves."""

    def __init__(self) -> None:
        super().__init__()
        _hook(self, "state_dict_post", self._cloned)

    @staticmethod
    def _cloned(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = state[key].detach().clone()


class Renames(Body):
    """A model that saves weights and buffers under their old names."""

    def __init__(self) -> None:
        super().__init__()
        _hook(self, "state_dict_post", self._renamed)
        _hook(self, "load_state_dict_pre", self._named)

    @staticmethod
    def _renamed(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}old_{key[len(prefix) :]}"] = state.pop(key)

    @staticmethod
    def _named(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old_")]:
            state[prefix + key[len(prefix) + 4 :]] = state.pop(key)


class Adds(Body):
    """A model that saves one more tensor, which it takes out again on loading, and one weight in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(())  # neither a parameter nor a buffer
        _hook(self, "state_dict_post", self._added)
        _hook(self, "load_state_dict_pre", self._taken)

    @staticmethod
    def _added(module: Any, state: dict[str, Any], prefix: str, meta: Any) -> None:
        state[f"{prefix}scale"] = module.scale
        first, second = state.pop(f"{prefix}a.weight").chunk(2)
        state |= {f"{prefix}first": first, f"{prefix}second": second}

    @staticmethod
    def _taken(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        module.scale = state.pop(f"{prefix}scale")
        state[f"{prefix}a.weight"] = torch.cat([state.pop(f"{prefix}first"), state.pop(f"{prefix}second")])

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            self.scale = self.scale * 0.9
        return super().forward(image) * self.scale


class Extra(Body):
    """A model that counts its batches in an attribute that its output depends on. The number differs by rank."""

    form: Any = staticmethod(lambda seen: {"seen": seen, "words": ["a", ("b", None)]})
    read: Any = staticmethod(lambda state: state["seen"])

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def get_extra_state(self) -> Any:
        return self.form(self.seen)

    def set_extra_state(self, state: Any) -> None:
        self.seen = self.read(state)

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            self.seen += float(image[0].abs().sum())
        return super().forward(image) * (1 + 0.001 * self.seen)


class ExtraTensor(Extra):
    form = staticmethod(lambda seen: torch.tensor(seen, dtype=torch.float64))
    read = staticmethod(float)


class ExtraBytes(Extra):
    form = staticmethod(lambda seen: seen.hex().encode())
    read = staticmethod(lambda state: float.fromhex(state.decode()))


class Parametrized(Body):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.a)
        parametrizations.spectral_norm(self.b)


class Orthogonal(Body):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.b)


class OldSpectralNorm(Body):
    """A model with a hook that assumes a very old version, unless the state dict's metadata says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.b)


class Tied(Body):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)
        self.d.weight = self.c.weight
        self.e = self.d

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.b(self.e(self.c(self.norm(self.a(image.flatten(1))))))
        return logits


class Wrapped(nn.Module):
    """A model whose state dict is that of the inner module, as if it had never been wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Body()

    def forward(self, image: Tensor) -> Any:
        return self.module(image)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.module.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.module.load_state_dict(state_dict, strict, assign)


def compiled() -> Any:
    """Return a model by `torch.compile`: all names begin with `_orig_mod.`."""
    return torch.compile(Body(), backend="eager")


class Nested(nn.Module):
    """A model whose state dict is not flat."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, image: Tensor) -> Any:
        return self.body(image)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {"body": self.body.state_dict(), "version": (2, 1)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        assert state_dict["version"] == (2, 1)
        return self.body.load_state_dict(state_dict["body"])


# -- other objects ----------------------------------------------------------------------------------------------------


class Rows:
    """A map-style dataset whose images depend on the number of rows read so far."""

    def __init__(self, rows: int) -> None:
        self.rows, self.given = rows, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        self.given += 1
        generator = torch.Generator().manual_seed(row)
        image = torch.randn(1, 4, 4, generator=generator) + 0.01 * self.given
        return {"image": image, "label": torch.tensor(row % 4)}

    def state_dict(self) -> dict[str, Any]:
        return {"given": np.int64(self.given)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = int(state["given"])


class Highest:
    """A metric that remembers the best accuracy of all evaluations."""

    def __init__(self) -> None:
        self.best = 0.0
        self.reset()

    def reset(self) -> None:
        self.right = self.all = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.right += int((preds.argmax(1) == target).sum())
        self.all += len(target)

    def compute(self) -> float:
        self.best = max(self.best, self.right / self.all)
        return self.best

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


class Keeps:
    """A callback whose state has every type that a checkpoint supports besides tensors and JSON types."""

    def __init__(self) -> None:
        self.counts, self.seen, self.array = CountOf[int](), set[int](), np.zeros(3, dtype=np.float32)
        self.random, self.raw = random.Random(1), b""

    def on_step_end(self, trainer: Any, event: Any) -> None:
        draw = self.random.randrange(10)
        self.counts[draw] += 1
        self.seen.add(draw)
        self.array[draw % 3] += draw
        self.raw += bytes([draw])
        trainer.log({"mine/kinds": len(self.seen), "mine/sum": float(self.array.sum()), "mine/none": self.counts[77]})

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("counts", "seen", "array", "raw")}
        return {**kept, "random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert (type(state["counts"]), type(state["seen"])) == (CountOf, set)
        self.counts, self.seen, self.array, self.raw = (state[k] for k in ("counts", "seen", "array", "raw"))
        self.random.setstate(state["random"])


class Momentum(torch.optim.SGD):
    """An optimizer with state besides that of parameters, in other types than the parameters', and under other keys."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.turns = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.turns += 1
        whole: Any = self.state
        shared = whole.setdefault("shared", {"sum": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                sign = state.get("sign", torch.zeros_like(p, dtype=torch.int8))
                mean = state.get("mean", torch.zeros_like(p, dtype=torch.float64))
                assert (sign.dtype, mean.dtype) == (torch.int8, torch.float64)
                state["mean"] = mean * 0.9 + p.grad.double()
                state["sign"] = p.grad.sign().to(torch.int8)
                shared["sum"] += float(state["mean"].sum())
                step = state["mean"].float() + 0.1 * sign.float() + 1e-4 * shared["sum"] + 1e-3 * self.turns
                p.sub_(group["lr"] * step)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "turns": self.turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns = state["turns"]
        super().load_state_dict({k: v for k, v in state.items() if k != "turns"})


class Warming:
    """A loss that is not a module, and is scaled by its number of calls in training."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, batch: Any) -> dict[str, Tensor]:
        self.calls += int(torch.is_grad_enabled())
        logits = model(batch["image"])
        return {"loss": nn.functional.cross_entropy(logits, batch["label"]) * (1 + 0.1 * self.calls)}

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class WarmingModule(nn.Module):
    """The same loss as a module without tensors, but with extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Warming()

    def get_extra_state(self) -> Any:
        return self.inner.state_dict()

    def set_extra_state(self, state: Any) -> None:
        self.inner.load_state_dict(state)

    def forward(self, model: Any, batch: Any) -> dict[str, Tensor]:
        return self.inner(model, batch)


# -- 4 + 4 steps equal 8 ----------------------------------------------------------------------------------------------


def case(model: Any = Body, **sections: Any) -> Experiment:
    e = experiment(
        model=node(model),
        optimizer=node("torch.optim.AdamW", lr=0.01),
        trainer={"max_steps": 8, "eval_every_n_steps": 4, "log_every_n_steps": 3},
        checkpoint={"every_n_steps": 4, "monitor": "val/loss"},
    )
    for name, value in sections.items():
        section, _, key = name.partition("__")
        setattr(getattr(e, section), key, value) if key else setattr(e, section, value)
    return e


def halves(world: World, e: Experiment, folder: Path) -> list[str]:
    """Return what differs between 8 steps, and 4 steps from the checkpoint of the first 4."""
    saved = checkpointer(world, folder)
    whole, told = fitted(e, world, checkpointer=saved)
    middle = next(info for info in saved.list() if info.step == 4)
    recorder = Recorder()
    again = Trainer(e, world=world, checkpointer=checkpointer(world, folder / "again"), listeners=[recorder])
    again.checkpointer, other = saved, again.checkpointer
    again.restore(middle)
    again.checkpointer = other
    again.fit()
    names = {name for _, event in told.told if hasattr(event, "metrics") for name in event.metrics}
    found = differences(
        [snapshot.shared(whole), snapshot.local(whole)], [snapshot.shared(again), snapshot.local(again)]
    )
    for name in names:
        series = {step: value for step, value in told.series(name).items() if step > 4}
        found += [] if "_per_second" in name else differences(series, recorder.series(name), name)
    assert told.series("train/loss")[8] != told.series("train/loss")[3]
    return found


MODELS = [
    *(Clones, Renames, Adds, Extra, ExtraTensor, ExtraBytes, Parametrized, Orthogonal, OldSpectralNorm, Tied, Wrapped),
    *(compiled, Nested),
]


@pytest.mark.parametrize("model", MODELS)
def test_of_models(model: Any, tmp_path: Path) -> None:
    assert halves(World(), case(model), tmp_path) == []


@pytest.mark.parametrize("model", [Clones, Renames, Adds, ExtraBytes, Parametrized])
def test_of_averaged_models(model: Any, tmp_path: Path) -> None:
    assert halves(World(), case(model, trainer__ema_decay=0.9), tmp_path) == []


def test_of_a_model_compiled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: whole(self, backend="eager"))
    assert halves(World(), case(Renames, trainer__compile=True), tmp_path) == []


def all_halves(world: World, cases: list[Experiment], folder: Path) -> list[list[str]]:
    return [halves(world, e, folder / str(number)) for number, e in enumerate(cases)]


def test_on_two_ranks(tmp_path: Path) -> None:
    cases = [case(model) for model in (Clones, Adds, Extra, Parametrized, Wrapped)]
    cases += [case(model, trainer__ema_decay=0.9) for model in (Renames, ExtraTensor)]
    cases += [case(loss=node(Warming)), case(Wrapped, loss=node(WarmingModule))]
    for found in ranks.run(2, all_halves, cases, tmp_path):
        assert found == [[]] * len(cases)


class Units(nn.Module):
    """A model with units that FSDP shards individually, and that rename their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), Renames()

    def forward(self, image: Tensor) -> Any:
        return self.second(self.first(image.flatten(1)))


def test_sharded_over_two_ranks(tmp_path: Path) -> None:
    cases = [case(model, trainer__strategy="fsdp") for model in (Clones, Renames, Extra, ExtraBytes, Units)]
    cases[-1].fsdp.wrap = ["Renames"]
    cases += [case(Renames, trainer__strategy="fsdp", trainer__ema_decay=0.9)]
    for found in ranks.run(2, all_halves, cases, tmp_path):
        assert found == [[]] * len(cases)


def test_of_other_objects(tmp_path: Path) -> None:
    e = case(Body, optimizer=node(Momentum, lr=0.05), callbacks={"keeps": node(Keeps)})
    e.data.train, e.metrics = node(Rows, rows=40), {"highest": node(Highest)}
    assert halves(World(), e, tmp_path) == []


@pytest.mark.parametrize("loss", [Warming, WarmingModule])
def test_of_a_loss(loss: Any, tmp_path: Path) -> None:
    assert halves(World(), case(loss=node(loss)), tmp_path) == []


# -- the mean over ranks ----------------------------------------------------------------------------------------------


def statistics(world: World, model: Any, folder: Path) -> Tensor:
    trainer, _ = fitted(case(model), world, checkpointer=checkpointer(world, folder))
    return trainer.raw_model.get_buffer("norm.running_mean").clone()


@pytest.mark.parametrize(("model", "name"), [(Renames, "old_norm.running_mean"), (Clones, "norm.running_mean")])
def test_a_renamed_statistic_is_saved_as_the_mean(model: Any, name: str, tmp_path: Path) -> None:
    first, second = ranks.run(2, statistics, model, tmp_path)
    assert not torch.equal(first, second)
    saved = checkpointer(World(), tmp_path)
    shared, _ = saved.load(saved.list()[-1])
    torch.testing.assert_close(shared["model"][name], (first + second) / 2)


# -- state that cannot be restored is refused at the first save ---------------------------------------------------------


class Halves(Body):
    """A model that saves one of its weights in half precision."""

    def __init__(self) -> None:
        super().__init__()
        _hook(self, "state_dict_post", self._halved)

    @staticmethod
    def _halved(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        for key in [key for key in state if key.endswith("a.weight")]:
            state[key] = state[key].half()


class Drops(Body):
    """A model that saves less than it has, and accepts that on loading."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {k: v for k, v in super().state_dict(*args, **options).items() if k != "b.weight"}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False)


class OnlyGets(Body):
    def get_extra_state(self) -> Any:
        return {"seen": 1}


class Fails(Extra):
    read = staticmethod(lambda state: state["other"])


class Holds(Extra):
    form = staticmethod(lambda seen: {"thing": object()})


REFUSED = [
    (Halves, r"model \(Halves\): load_state_dict\(\) does not restore a.weight"),
    (Drops, r"model \(Drops\): load_state_dict\(\) does not restore b.weight"),
    (OnlyGets, r"model \(OnlyGets\): load_state_dict\(\) fails .*_extra_state"),
    (Fails, r"model \(Fails\): load_state_dict\(\) fails .*KeyError: 'other'"),
    (Holds, r"the state at model/_extra_state/thing is a builtins.object"),
]


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(("model", "message"), REFUSED)
def test_a_model_that_is_not_restored(
    model: Any, message: str, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_COPIED", 1 << 20 if copied else 0)
    recorder = Recorder()
    trainer = Trainer(case(model), checkpointer=checkpointer(World(), tmp_path), listeners=[recorder])
    with pytest.raises(CheckpointError, match=message):
        trainer.fit()
    assert trainer.step == 4


def refused(world: World, e: Experiment, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        fitted(e, world, checkpointer=checkpointer(world, folder))
    return str(caught.value)


def test_a_sharded_model_that_is_not_restored(tmp_path: Path) -> None:
    for said in ranks.run(2, refused, case(Halves, trainer__strategy="fsdp"), tmp_path):
        assert "does not restore a.weight" in said


class OnRankOne(Fails):
    def set_extra_state(self, state: Any) -> None:
        if torch.distributed.get_rank() == 1:
            super().set_extra_state(state)


def test_one_rank_fails_for_all(tmp_path: Path) -> None:
    first, second = ranks.run(2, refused, case(OnRankOne), tmp_path)
    assert "another rank" in first
    assert "KeyError: 'other'" in second


class Saves:
    """A callback that saves a state and cannot load one."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"a": 1}

    def on_step_end(self, trainer: Any, event: Any) -> None:
        pass

    def state_dict(self) -> Any:
        return self.state


class Misreads(Saves):
    def load_state_dict(self, state: Any) -> None:
        self.a = state["b"]


class Rounds(Saves):
    def __init__(self) -> None:
        self.state = {"rate": 0.123, "at": 3}

    def load_state_dict(self, state: Any) -> None:
        self.state = {k: round(v, 1) for k, v in state.items()}


class Wild(Saves):
    def __init__(self) -> None:
        self.state = {"path": Path("x")}

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Loses(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "turns": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for values in self.state.values():
            values.pop("momentum_buffer")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Saves, r"callbacks.mine \(Saves\) has state_dict\(\) but no load_state_dict\(\)"),
        (Misreads, r"callbacks.mine \(Misreads\): load_state_dict\(\) fails .*KeyError: 'b'"),
        (Rounds, r"callbacks.mine \(Rounds\): load_state_dict\(\) does not restore rate"),
        (Wild, r"callbacks/mine/path is a pathlib"),
    ],
)
def test_a_callback_that_is_not_restored(callback: Any, message: str, tmp_path: Path) -> None:
    said = refused(World(), case(callbacks={"mine": node(callback)}), tmp_path)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_an_optimizer_that_is_not_restored(tmp_path: Path) -> None:
    e = case(optimizer=node(Loses, lr=0.1, momentum=0.9))
    said = refused(World(), e, tmp_path)
    assert "optimizer (Loses): load_state_dict() does not restore state." in said
    assert ".momentum_buffer" in said


class Ticks(Saves):
    """A callback with a value in its state that changes by itself, and with a reference to the trainer."""

    def __init__(self) -> None:
        self.clock = 0

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        self.trainer = trainer

    def state_dict(self) -> Any:
        self.clock += 1
        return {"clock": self.clock, "same": 1}

    def load_state_dict(self, state: Any) -> None:
        assert state["same"] == 1


def test_what_changes_by_itself_is_no_fault_and_a_check_changes_nothing(tmp_path: Path) -> None:
    e = case(Extra, callbacks={"mine": node(Ticks)})
    with_check, _ = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    without, _ = fitted(e)
    assert differences(tensors_of(with_check.raw_model.state_dict()), tensors_of(without.raw_model.state_dict())) == []


# -- an older checkpoint ------------------------------------------------------------------------------------------------

RECORDED = Path(__file__).parent / "fixtures" / "run-v1"


def recorded() -> Experiment:
    """Return the experiment whose checkpoint after 4 steps is `fixtures/run-v1`, written before states had metadata."""
    return experiment(
        model=node(training.Net),
        optimizer=node("torch.optim.AdamW", lr=0.01, fused=True),
        lr_scheduler=node("raytrainer.optim.Cosine", warmup_steps=3),
        callbacks={"counter": node(training.Counter, every=3)},
        data={"global_batch_size": 16},
        trainer={"max_steps": 8, "ema_decay": 0.9, "eval_every_n_steps": 4},
        checkpoint={"every_n_steps": 4},
    )


def test_a_checkpoint_of_before_goes_on(tmp_path: Path) -> None:
    shutil.copytree(RECORDED, tmp_path / "run")
    saved, recorder = checkpointer(World(), tmp_path / "run"), Recorder()
    trainer = Trainer(recorded(), checkpointer=saved, listeners=[recorder])
    trainer.restore(saved.list()[0])
    assert [step for step, _ in recorder.series("train/loss").items()] == []
    trainer.fit()
    # The losses with which the original run continued, on another machine.
    losses = {5: 1.2732301950454712, 6: 1.0880601406097412, 7: 1.1493088006973267, 8: 0.963189959526062}
    assert recorder.series("train/loss") == pytest.approx(losses, rel=1e-3)
    assert recorder.series("val/loss") == pytest.approx({8: 1.3884042852065142}, rel=1e-3)


# -- weights of another run, and exported weights -------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Extra, ExtraTensor, ExtraBytes, Renames, Clones, Wrapped, OldSpectralNorm])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_weights_of_a_run_begin_another(model: Any, ema: float | None, tmp_path: Path) -> None:
    e = case(model, trainer__ema_decay=ema)
    first, _ = fitted(e, checkpointer=checkpointer(World(), tmp_path / "checkpoints"))
    e.seed += 1
    second = Trainer(e)
    second.init_from(str(tmp_path))
    # The averaged weights are taken if they exist.
    source = first.raw_model if first.ema_model is None else first.ema_model
    assert differences(dict(second.raw_model.state_dict()), dict(source.state_dict())) == []
    if second.ema_model is not None:
        assert differences(dict(second.ema_model.state_dict()), dict(source.state_dict())) == []


class Plain(nn.Module):
    """The older version of `Renames` and `Normed`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)


class Normed(Body):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.a)


@pytest.mark.parametrize("model", [Renames, Normed])
def test_weights_under_the_names_of_an_older_version(model: Any, tmp_path: Path) -> None:
    older = Plain()
    if model is Normed:
        nn.utils.weight_norm(older.a)
    save_file(older.state_dict(), tmp_path / "model.safetensors")
    trainer = Trainer(case(model))
    assert "tensors taken" in trainer.init_from(str(tmp_path / "model.safetensors"))
    own: Any = trainer.raw_model
    assert differences([own.a.weight, own.b.bias], [older.a.weight, older.b.bias]) == []
    del (broken := older.state_dict())["b.bias"]
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointCorrupt, match="lacks"):
        trainer.init_from(str(tmp_path / "broken.safetensors"))


def begun(world: World, folder: Path) -> tuple[float, Any]:
    e = case(Extra)
    e.seed += 1 + world.rank
    trainer = Trainer(e, world=world)
    trainer.init_from(str(folder))
    return trainer.raw_model.get_extra_state()["seen"], trainer.raw_model.get_parameter("a.weight").detach()


def test_weights_of_a_run_begin_another_on_each_rank(tmp_path: Path) -> None:
    first, _ = fitted(case(Extra), checkpointer=checkpointer(World(), tmp_path / "checkpoints"))
    for seen, weight in ranks.run(2, begun, tmp_path):
        assert seen == first.raw_model.get_extra_state()["seen"] > 0
        assert torch.equal(weight, first.raw_model.get_parameter("a.weight"))


@pytest.mark.parametrize("model", [Extra, ExtraTensor, ExtraBytes, Renames])
def test_evaluation_of_a_checkpoint_is_that_of_training(model: Any, tmp_path: Path) -> None:
    e = case(model, trainer__ema_decay=0.9)
    first, _ = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    saved = checkpointer(World(), tmp_path)
    result = evaluation.of_checkpoint(Trainer(e, checkpointer=saved), saved, "last")
    assert result["metrics"]["val/loss"] == first.metrics["val/loss"]


def test_best_weights_have_the_extra_state(tmp_path: Path) -> None:
    for saved in (None, checkpointer(World(), tmp_path)):
        trainer, _ = fitted(case(Extra), checkpointer=saved)
        _, state = trainer.best_weights()
        twin = Extra()
        restore_module(twin, state, "here")
        assert twin.seen > 0
