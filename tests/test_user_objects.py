"""User objects work, or are refused in a sentence that names the key, the object and the fix."""

from __future__ import annotations

import gc
import threading
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrainer.config import Experiment
from raytrainer.errors import ConfigError
from raytrainer.events import check_hooks
from raytrainer.parallel import World
from raytrainer.preflight import check_objects
from raytrainer.trainer import Trainer, snapshot
from tests import ranks
from tests.training import Net, checkpointer, differences, experiment, fitted, node

# -- what a loss returns ---------------------------------------------------------------------------------------------


def returning(model: nn.Module, batch: Any, what: str) -> Any:
    loss = F.cross_entropy(model(batch["image"]), batch["label"])
    value = loss.detach()
    found: dict[str, Any] = {
        "float": {"loss": loss, "mine": value.item()},
        "int": {"loss": loss, "mine": 3},
        "bool": {"loss": loss, "mine": True},
        "np.float32": {"loss": loss, "mine": np.float32(value.item())},
        "array": {"loss": loss, "mine": np.array([1.0])},
        "size 1": {"loss": loss.reshape(1), "mine": value.reshape(1, 1)},
        "whole numbers": {"loss": loss, "mine": (batch["label"] > 0).sum()},
        "truth": {"loss": loss, "mine": value < 100},
        "mapping": UserDict({"loss": loss, "mine": value}),
        "None": {"loss": loss, "mine": None},
        "vector": {"loss": model(batch["image"]).square().mean(1)},
        "metric vector": {"loss": loss, "logits": model(batch["image"])},
        "bare": loss,
        "tuple": (loss, {}),
        "no loss": {"mse": loss},
        "nothing": {},
        "detached": {"loss": value},
        "number": {"loss": value.item()},
        "text": {"loss": loss, "mine": "good"},
        "key": {"loss": loss, 3: value},
        "long": {"loss": (batch["label"] > 0).sum()},
        "complex": {"loss": torch.complex(loss, loss)},
        "nested": {"loss": loss, "parts": {"a": value}},
    }
    return found[what]


def case(what: str) -> Experiment:
    return experiment(loss=node(returning, _partial_=True, what=what), trainer={"max_steps": 2})


WORKS = ["float", "int", "bool", "np.float32", "array", "size 1", "whole numbers", "truth", "mapping"]


@pytest.mark.parametrize("what", WORKS)
def test_numbers_of_any_kind_are_metrics(what: str) -> None:
    _, recorder = fitted(case(what))
    assert sorted(recorder.series("train/mine")) == [1, 2]
    assert list(recorder.series("val/mine")) == [2]
    if what == "int":
        assert recorder.series("train/mine")[1] == 3


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("None", r"^loss returned None for 'mine'; .*leave the entry out"),
        ("vector", r"^loss returned a tensor of shape \[12\] for 'loss'; .*take its mean"),
        ("metric vector", r"a tensor of shape \[12, 4\] for 'logits'; .* belong under 'preds' and 'target'"),
        ("bare", r"^loss returned a tensor of shape \[\] instead of a dict: return \{'loss': loss\}"),
        ("tuple", r"^loss returned a tuple instead of a dict"),
        ("no loss", r"^loss returned no entry 'loss', only mse: return \{'loss': loss\}"),
        ("nothing", r"no entry 'loss', only nothing"),
        ("detached", r"^loss returned a 'loss' without a gradient.*detached.*Return the tensor itself"),
        ("number", r"^loss returned a 'loss' without a gradient"),
        ("text", r"returned a str for 'mine'"),
        ("key", r"an entry whose name is 3: names must be text"),
        ("long", r"a 'loss' of type torch.int64; it must be a real floating-point number"),
        ("complex", r"a 'loss' of type torch.complex64"),
        ("nested", r"returned a dict for 'parts'"),
    ],
)
def test_what_is_no_number_is_refused(what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(case(what))


def test_a_loss_that_cannot_be_called() -> None:
    with pytest.raises(ConfigError, match=r"^loss=builtins\.int .*cannot be called .*_partial_=true"):
        Trainer(experiment(loss={"_target_": "builtins.int"}))


# -- models ----------------------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LazyLinear(4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.body(image.flatten(1))
        return logits


class Empty(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1)[:, :4]


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Any:
        return self.body(image.flatten(1)), None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            node(Lazy),
            r"^model=tests.test_user_objects.Lazy has a lazy module: body.weight \(LazyLinear\).*Give the sizes",
        ),
        (
            {"_target_": "builtins.dict"},
            r"^model._target_=builtins.dict gives a dict, and must give a torch.nn.Module$",
        ),
        (node(Empty), r"^model has no trainable parameter: it has no parameters at all"),
        (node(Tuples), r"^model returned a tuple, and the loss needs a tensor, or an object .* `logits`"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(experiment(model=model))


class Locked(Net):
    """A model that cannot be copied: a lock is among its attributes."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.lock = threading.Lock()


class Graph(nn.Module):
    """A model that cannot be copied: one of its tensors is computed from another, as in torch's old weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(4, 16))
        self.weight = self.raw * 2

    def forward(self, image: Tensor) -> Tensor:
        return F.linear(image.flatten(1), self.raw * 2)


@pytest.mark.parametrize("model", [Locked, Graph])
def test_the_average_of_a_model_that_cannot_be_copied(model: type) -> None:
    trainer, _ = fitted(experiment(model=node(model), trainer={"ema_decay": 0.5}))
    assert trainer.ema_model is not None
    one, other = next(trainer.ema_model.parameters()), next(trainer.raw_model.parameters())
    assert one is not other
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=1, atol=0.2)


class Once(Graph):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        Once.made += 1
        if Once.made > 1:
            raise ValueError("only once")


def test_one_that_cannot_be_built_twice_either() -> None:
    Once.made = 0
    with pytest.raises(ConfigError, match=r"^trainer\.ema_decay .*Once cannot be copied .*only once"):
        Trainer(experiment(model=node(Once), trainer={"ema_decay": 0.5}))


class Numbers(nn.Module):
    """A model with parameters and buffers of unusual types."""

    def __init__(self) -> None:
        super().__init__()
        self.wave, self.body = nn.Parameter(torch.randn(3, dtype=torch.cfloat)), nn.Linear(4, 4)
        self.bins = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("i16", torch.zeros(2, dtype=torch.int16))
        self.register_buffer("flags", torch.ones(2, dtype=torch.bool))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.arange(2.0)))

    def forward(self, image: Tensor) -> Tensor:
        rows = torch.fft.rfft(image.flatten(1)[:, :4].to(self.wave.real.dtype)) * self.wave
        logits: Tensor = self.body(torch.fft.irfft(rows, n=4).to(self.body.weight.dtype))
        return logits


def again(world: World, folder: Path, e: Experiment) -> list[str]:
    """Return what differs between 8 steps, and 4 steps (an epoch) with 4 more in another trainer."""
    e.trainer.max_steps = 8
    straight, _ = fitted(e, world)
    e.trainer.max_steps = 4
    fitted(e, world, checkpointer=checkpointer(world, folder))
    e.trainer.max_steps = 8
    saved = checkpointer(world, folder)
    other = Trainer(e, world=world, checkpointer=saved)
    latest = saved.latest()
    assert latest is not None
    other.restore(latest)
    other.fit()
    assert all(
        bool(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all()) for p in other.raw_model.parameters()
    )
    return differences(snapshot.shared(other), snapshot.shared(straight))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_complex_and_whole_numbers_in_a_model(tmp_path: Path, precision: str) -> None:
    e = experiment(model=node(Numbers), trainer={"precision": precision, "ema_decay": 0.9, "max_grad_norm": 0.5})
    assert again(World(), tmp_path, e) == []


# -- optimizers and schedulers ---------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """An optimizer whose parameters differ between training and evaluation. Switching there and back causes rounding
    errors."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.mode = "eval"

    def train(self) -> None:
        self._shift("train", 1.0)

    def eval(self) -> None:
        self._shift("eval", -1.0)

    @torch.no_grad()
    def _shift(self, mode: str, sign: float) -> None:
        if self.mode != mode:
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(sign * self.state[p].get("away", 0.0))
        self.mode = mode

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.mode == "train", "train() was not called before step()"
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["away"] = p.detach() / 3


def test_a_schedule_free_optimizer_is_told_and_resumes_exactly(tmp_path: Path) -> None:
    def case(**trainer: Any) -> Experiment:
        return experiment(optimizer=node(ScheduleFree), model=node(Net), trainer=trainer)

    assert again(World(), tmp_path / "1", case()) == []
    assert ranks.run(2, again, tmp_path / "2", case()) == [[], []]
    # Evaluations do not change the training.
    often, seldom = (fitted(case(eval_every_n_steps=n))[0] for n in (1, 0))
    assert differences(often.raw_model.state_dict(), seldom.raw_model.state_dict()) == []
    # The weights of eval() are evaluated, exported and saved as the model's weights.
    trainer, recorder = fitted(case(), checkpointer=checkpointer(World(), tmp_path / "3"))
    trained = {k: v.clone() for k, v in trainer.raw_model.state_dict().items()}
    for weights in (trainer.best_weights()[1], fitted(case())[0].best_weights()[1]):
        torch.testing.assert_close(weights["head.weight"], trained["head.weight"] * 2 / 3)
    trainer.raw_model.load_state_dict(trainer.best_weights()[1])
    trainer.optimizer = torch.optim.SGD(trainer.raw_model.parameters(), lr=0.1)
    assert trainer.evaluate()["val/loss"] == recorder.series("val/loss")[4]


class NoOptimizer:
    def __init__(self, params: Any) -> None:
        self.params = list(params)


class Others(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__([nn.Parameter(torch.zeros(2))], lr=0.1)


class Duck:
    """An optimizer that is not a subclass of torch's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.inner = torch.optim.SGD(params, lr=lr)
        self.param_groups = self.inner.param_groups

    def __getattr__(self, name: str) -> Any:
        if name in ("step", "zero_grad", "state_dict", "load_state_dict"):
            return getattr(self.inner, name)
        raise AttributeError(name)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            node("torch.optim.LBFGS", lr=0.1),
            r"^optimizer=LBFGS cannot be used: LBFGS.step\(\) needs closure.*optimizer=adamw",
        ),
        (node(NoOptimizer), r"^optimizer._target_ gives a NoOptimizer, which has no step"),
        (node(Others), r"^optimizer=Others has parameters in its groups that are not trained parameters"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(experiment(optimizer=optimizer))


def test_an_optimizer_of_no_known_class_trains() -> None:
    trainer, recorder = fitted(experiment(optimizer=node(Duck)))
    assert recorder.series("train/lr")[4] == 0.1
    expected, _ = fitted(experiment(optimizer=node("torch.optim.SGD", lr=0.1)))
    assert differences(trainer.raw_model.state_dict(), expected.raw_model.state_dict()) == []


class NeedsMetric:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, metric: float) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Halving(NeedsMetric):
    """A scheduler that is not a subclass of torch's."""

    def step(self, metric: float = 0.0) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] /= 2


class Stateless:
    def __init__(self, optimizer: Any) -> None: ...

    def step(self) -> None: ...


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            node("torch.optim.lr_scheduler.ReduceLROnPlateau"),
            r"^lr_scheduler=ReduceLROnPlateau .*step\(\) needs metrics.*constant",
        ),
        (node(NeedsMetric), r"^lr_scheduler=NeedsMetric cannot be used: NeedsMetric.step\(\) needs metric"),
        (node(Stateless), r"^lr_scheduler._target_ gives a Stateless, which has no state_dict\(\)"),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_refused(scheduler: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(experiment(lr_scheduler=scheduler))


def test_a_scheduler_of_no_known_class_works() -> None:
    _, recorder = fitted(experiment(lr_scheduler=node(Halving)))
    assert [recorder.series("train/lr")[step] for step in (1, 2, 3)] == [0.1, 0.05, 0.025]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table((image.flatten(1)[:, :3] * 3).long().clamp(0, 19)).sum(1))
        return logits


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [True, False])
def test_sparse_gradients(clip: float | None, fused: bool) -> None:
    def case(sparse: bool) -> Experiment:
        e = experiment(model=node(Table), trainer={"max_grad_norm": clip})
        e.optimizer = node("torch.optim.SGD", lr=0.1, momentum=0.9, fused=fused)
        return e

    trainer, _ = fitted(case(True))
    dense = Trainer(case(True))
    dense.raw_model.get_submodule("table").sparse = False  # type: ignore[assignment]
    dense.fit()
    for got, expected in zip(trainer.raw_model.parameters(), dense.raw_model.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_optimizer_without_sparse_gradients_is_refused() -> None:
    for optimizer in (node("torch.optim.AdamW", lr=0.1), node("torch.optim.SGD", lr=0.1, weight_decay=0.1)):
        with pytest.raises(ConfigError, match=r"^optimizer=\w+ .*sparse gradients .*sparse=False"):
            fitted(experiment(model=node(Table), optimizer=optimizer))


# -- parameters that are not used on every rank ----------------------------------------------------------------------


class Unused(nn.Module):
    """A model that does not use `spare`: on any rank, on rank 0, or after the first step."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.body, self.spare, self.when, self.calls = nn.Linear(16, 4), nn.Linear(16, 4), when, 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.body(image.flatten(1))
        used = {"never": False, "rank 1": torch.distributed.get_rank() == 1, "at first": self.calls < 4}[self.when]
        return logits + self.spare(image.flatten(1)) if used else logits


def refusal(world: World, when: str, find: bool) -> str:
    e = experiment(model=node(Unused, when=when), trainer={"find_unused_parameters": find}, data={"val": None})
    said = "trained"
    try:
        Trainer(e, world=world).fit()
    except Exception as error:  # noqa: BLE001  the other rank may fail in any way after this one is gone
        said = f"{type(error).__name__}: {error}"
    gc.collect()  # a process group that DDP still holds would keep the other rank waiting
    return said


@pytest.mark.parametrize("when", ["never", "rank 1", "at first"])
def test_parameters_without_a_gradient_are_named(when: str) -> None:
    said = ranks.run(2, refusal, when, False)
    expected = (
        "ConfigError: trainer.find_unused_parameters=false is not enough for this model. The loss of this rank did not"
    )
    assert said[0].startswith(f"{expected} use spare.weight, spare.bias, ")
    assert "Set trainer.find_unused_parameters=true" in said[0]
    if when == "rank 1":
        assert not said[1].startswith("trained")
    else:
        assert said[1] == said[0]
    assert ranks.run(2, refusal, when, True) == ["trained", "trained"]


# -- callbacks and metrics -------------------------------------------------------------------------------------------


class Misspelt:
    def on_fit_start(self, trainer: Any, event: Any) -> None: ...

    def on_step_ends(self, trainer: Any, event: Any) -> None: ...


class Short:
    def on_log(self, trainer: Any) -> None: ...


class Further:
    """A callback that also belongs to another framework, whose hooks have other names."""

    def on_log(self, trainer: Any, event: Any, more: Any = None) -> None: ...

    def on_train_batch_start(self, *args: Any) -> None: ...


class Nothing: ...


def make(what: str) -> Any:
    return {"misspelt": Misspelt, "short": Short, "nothing": Nothing}[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("misspelt", r"^callbacks.mine=Misspelt has a method on_step_ends, .* Did you mean on_step_end\?"),
        ("short", r"^callbacks.mine=Short has a hook on_log that cannot be called as on_log\(trainer, event\)"),
        ("nothing", r"^callbacks.mine(=Nothing has| builds a Nothing, which has) none of the hooks; valid: on_"),
    ],
)
def test_a_hook_that_would_not_be_called_is_refused(what: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):  # an object whose class is known only after it is built
        Trainer(experiment(callbacks={"mine": node(make, what=what)}))
    with pytest.raises(ConfigError, match=message):
        check_objects(experiment(callbacks={"mine": node(type(make(what)))}))


def test_further_methods_are_none_of_ours() -> None:
    check_hooks(Further(), "callbacks.mine")
    check_hooks(Further, "callbacks.mine")


class NoCompute:
    def update(self, preds: Any, target: Any) -> None: ...

    def reset(self) -> None: ...


def make_metric() -> Any:
    return NoCompute()


def test_a_metric_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^metrics\.mine .*NoCompute.* no compute\(\)"):
        Trainer(experiment(metrics={"mine": node(make_metric)}))


class NoData: ...


def test_a_dataset_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"NoData"):
        Trainer(experiment(data={"train": node(NoData)}))
