"""`experiment=transformer` on two workers learns more than the frequencies of bytes and of pairs of bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raytrainer.config import Experiment, build, compose
from raytrainer.parallel import World
from raytrainer.trainer import Trainer
from tests import ranks


def evaluated(world: World, e: Experiment) -> dict[str, float]:
    trainer = Trainer(e, world=world)
    trainer.fit()
    return {name: value for name, value in trainer.metrics.items() if name.startswith("val/")}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_it_beats_a_unigram_and_a_bigram_model(layers: int) -> None:
    """The model beats both even with one layer less than the experiment has."""
    steps = ["trainer.max_steps=120", "trainer.eval_every_n_steps=120", "data.val.max_bytes=40000"]
    model = f"model.num_layers={layers}"
    e = compose(["experiment=transformer", "trainer.num_threads=1", model, *steps]).experiment
    assert e.scaling.num_workers == 2
    train, val = (build(node or {}).tokens for node in (e.data.train, e.data.val))
    assert (len(train), len(val)) == (2_000_000, 40_000)

    # The counts in the training text, each increased by one, give the losses on the validation targets.
    singles = np.bincount(train, minlength=256) + 1.0
    pairs = np.ones((256, 256))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    unigram = -np.log(singles / singles.sum())[val[1:]].mean()
    bigram = -np.log(pairs / pairs.sum(1, keepdims=True))[val[:-1], val[1:]].mean()
    assert 2 < bigram < unigram < 4

    first, second = ranks.run(2, evaluated, e)
    assert first == second
    assert first["val/loss"] < bigram < unigram
    assert first["val/bits_per_byte"] == pytest.approx(first["val/loss"] / math.log(2))
    assert first["val/perplexity"] == pytest.approx(math.exp(first["val/loss"]))
