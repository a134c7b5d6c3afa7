"""A loss with parameters or buffers is trained, moved, saved and evaluated like the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrainer.config import Experiment
from raytrainer.errors import ConfigError
from raytrainer.optim import Muon, build_optimizer
from raytrainer.parallel import World
from raytrainer.trainer import Trainer, snapshot
from raytrainer.trainer.system import build_loss, stateful_part, together
from tests import ranks, training
from tests.training import checkpointer, differences, experiment, fitted, node


class Learned(nn.Module):
    """A head and a temperature that are trained, a running mean that is kept, and dropout that is active only in
    training."""

    def __init__(self, track: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.head, self.log_s = nn.Linear(4, 4), nn.Parameter(torch.zeros(()))
        self.dropout, self.track = nn.Dropout(drop), track
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int16))
        self.evaluated_in: bool | None = None
        self.mean: Tensor
        self.seen: Tensor

    def forward(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        logits = self.dropout(self.head(model(batch["image"])))
        if self.track and self.training:
            self.seen += 1
            self.mean.lerp_(logits.detach().mean(0).to(self.mean.dtype), 0.1)
        self.evaluated_in = self.training
        loss = F.cross_entropy(logits, batch["label"]) * torch.exp(-self.log_s) + self.log_s
        return {"loss": loss, "log_s": self.log_s}


def learned(**sections: Any) -> Experiment:
    options = {"loss": node(Learned), **sections}
    return experiment(**options)


def test_it_is_trained_counted_and_evaluated_in_its_mode() -> None:
    e = learned(trainer={"max_grad_norm": 1.0, "ema_decay": 0.9})
    trainer, recorder = fitted(e)
    assert len(set(recorder.series("train/log_s").values())) == 4
    start = recorder.events("on_fit_start")[0]
    model = sum(p.numel() for p in trainer.raw_model.parameters())
    assert (start.parameters, start.trainable) == (model + 21, model + 21)
    assert isinstance(trainer.loss, Learned)
    assert int(trainer.loss.seen) == 4
    assert trainer.loss.evaluated_in is False  # its last call was in the evaluation
    assert trainer.loss.training
    # Only the model's weights are exported.
    assert not [name for name in trainer.best_weights()[1] if name.startswith("loss")]


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "16-mixed"])
def test_it_has_the_type_of_the_precision(precision: str) -> None:
    trainer, _ = fitted(learned(trainer={"precision": precision}))
    assert isinstance(trainer.loss, Learned)
    assert trainer.loss.head.weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert trainer.loss.log_s.item() != 0


def end(world: World, e: Experiment) -> dict[str, Tensor]:
    trainer, _ = fitted(e, world)
    model = snapshot.shared(trainer)
    return {**{k: whole(v) for k, v in model["model"].items()}, **{f"loss.{k}": v for k, v in model["loss"].items()}}


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_one(strategy: str) -> None:
    def case(micro: int | None) -> Experiment:
        return learned(
            loss=node(Learned, track=False),
            data={"val": None, "micro_batch_size": micro},
            trainer={"precision": "64-true", "max_grad_norm": 0.5, "strategy": strategy},
        )

    for micro in (None, 2):
        expected = end(World(), case(micro))
        for got in ranks.run(2, end, case(micro)):
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=name)
            assert float(got["loss.log_s"]) != 0


def resumed(world: World, folder: Path, e: Experiment) -> list[str]:
    """Return what differs between 8 steps, and 4 steps with 4 more in another trainer."""
    e.trainer.max_steps = 8
    straight, _ = fitted(e, world)
    e.trainer.max_steps = 4
    fitted(e, world, checkpointer=checkpointer(world, folder))
    e.trainer.max_steps = 8
    saved = checkpointer(world, folder)
    again = Trainer(e, world=world, checkpointer=saved)
    latest = saved.latest()
    assert latest is not None
    again.restore(latest)
    again.fit()
    return [
        *differences(snapshot.shared(again), snapshot.shared(straight)),
        *differences(snapshot.local(again)["buffers"], snapshot.local(straight)["buffers"]),
    ]


def test_a_resume_is_exact(tmp_path: Path) -> None:
    e = learned(loss=node(Learned, drop=0.3), optimizer=node("torch.optim.AdamW", lr=0.01, fused=True))
    assert resumed(World(), tmp_path / "1", e) == []
    assert ranks.run(2, resumed, tmp_path / "2", e) == [[], []]


def test_a_checkpoint_from_before_it_was_trained_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = experiment(checkpoint={"every_n_steps": 4})
    fitted(plain, checkpointer=checkpointer(World(), tmp_path))
    e = learned(trainer={"max_steps": 6})
    saved = checkpointer(World(), tmp_path)
    trainer = Trainer(e, checkpointer=saved)
    latest = saved.latest()
    assert latest is not None
    trainer.restore(latest)
    assert "no state of the loss" in caplog.text
    assert trainer.fit().step == 6
    assert isinstance(trainer.loss, Learned)
    assert trainer.loss.log_s.item() != 0


def test_it_is_frozen_by_its_names() -> None:
    trainer, _ = fitted(learned(trainer={"freeze": ["loss.head.*"]}))
    before = build_loss(learned())
    assert isinstance(trainer.loss, Learned)
    assert isinstance(before, Learned)
    assert torch.equal(trainer.loss.head.weight, before.head.weight)
    assert trainer.loss.log_s.item() != 0


def test_a_loss_alone_may_be_trained() -> None:
    e = learned(trainer={"freeze": [name for name, _ in Trainer(learned()).raw_model.named_parameters()]})
    trainer, _ = fitted(e)
    assert [n for n, p in trainer.system.named_parameters() if p.requires_grad] == [
        "loss.log_s",
        "loss.head.weight",
        "loss.head.bias",
    ]


class Keeping(nn.Module):
    """A loss that keeps the model that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        self.kept = model
        return {"loss": self.scale * F.cross_entropy(model(batch["image"]), batch["label"])}


class Clashing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(16, 4), nn.ParameterDict({"log_s": nn.Parameter(torch.zeros(()))})

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image.flatten(1))
        return logits


class OwnGroups(torch.optim.SGD):
    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(model.parameters(), lr=lr)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": node(Keeping)}, r"^loss=Keeping keeps the model as its attribute kept, .* in a list or a weakref$"),
        (
            {"model": node(Clashing)},
            r"^loss has a tensor that would be called loss.log_s .* Rename the model's attribute",
        ),
        (
            {"optimizer": node(OwnGroups)},
            r"^optimizer=OwnGroups .* leaves out the loss's parameter loss.log_s.*`system`",
        ),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(learned(**sections))


def test_muon_leaves_it_to_adamw() -> None:
    e = learned(optimizer=node("raytrainer.optim.Muon", lr=0.01))
    trainer, _ = fitted(e)
    assert isinstance(trainer.optimizer, Muon)
    matrices = {id(p) for group in trainer.optimizer.param_groups if group["use_muon"] for p in group["params"]}
    assert isinstance(trainer.loss, Learned)
    assert id(trainer.loss.head.weight) not in matrices
    assert trainer.loss.log_s.item() != 0


class Plain:
    """An object that is not a module, but has one among its attributes."""

    def __init__(self) -> None:
        self.head = nn.Linear(4, 4)

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.head(model(batch["image"])), batch["label"])}

    def method(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return self(model, batch)


def with_head(model: nn.Module, batch: Any, head: nn.Module) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(head(model(batch["image"])), batch["label"])}


def test_modules_that_a_loss_holds_are_trained_too() -> None:
    head = node("torch.nn.Linear", in_features=4, out_features=4)
    for loss, name in (
        (node(Plain), "loss.head.weight"),
        (node(with_head, _partial_=True, head=head), "loss.head.weight"),
    ):
        trainer, _ = fitted(experiment(loss=loss))
        other = Trainer(experiment(loss=loss))
        trained, initial = (dict(t.system.named_parameters())[name] for t in (trainer, other))
        assert not torch.equal(trained, initial)
    assert stateful_part(Learned().forward) is not None
    assert stateful_part(partial(Learned().forward)) is not None
    assert stateful_part(training.counted_loss) is None
    assert stateful_part(nn.CrossEntropyLoss()) is None


def test_an_optimizer_without_groups_gets_both() -> None:
    model, loss = nn.Linear(2, 2), Learned()
    optimizer = build_optimizer(partial(torch.optim.Rprop, lr=0.1), model, together(model, loss))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
