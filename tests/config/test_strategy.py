"""Tests that the strategy, the section `fsdp` and the number of workers are refused if they do not fit together."""

from __future__ import annotations

import pytest

from raytrainer.config import compose
from raytrainer.errors import ConfigError

FSDP = ["experiment=mlp", "trainer.strategy=fsdp"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fsdp.replicas=2", "scaling.num_workers=3"], r"fsdp.replicas=2 must divide .*: scaling.num_workers=3"),
        (["fsdp.replicas=2", "scaling.num_workers=[2,4]"], r"fsdp.replicas=2 must divide .*num_workers=\[2,4\]"),
        (["fsdp.replicas=0"], r"fsdp.replicas=0 must be at least 1"),
        (["fsdp.reshard_after_forward=3", "scaling.num_workers=8"], r"reshard_after_forward=3 must be true, .*\(8\)"),
        (["fsdp.reshard_after_forward=4", "fsdp.replicas=2", "scaling.num_workers=8"], r"forward=4 must be .*\(4\)"),
        (["fsdp.reshard_after_forward=2", "scaling.num_workers=[4,8]"], r"forward=2 must be .*it varies"),
        (["fsdp.reshard_after_forward=some"], r"fsdp.reshard_after_forward=some must be"),
        (["fsdp.wrap=true"], r"fsdp.wrap=true must be null"),
        (["fsdp.wrap=[]"], r"fsdp.wrap=\[\] must be null"),
        (["fsdp.reduce_dtype=bf16"], r"fsdp.reduce_dtype=bf16 is not a valid choice; valid: .*bfloat16"),
        (["trainer.activation_checkpointing=[1]"], r"activation_checkpointing=\[1\] must be true"),
        (["trainer.activation_checkpointing=null"], r"activation_checkpointing must be true"),
        (["~optimizer", "+optimizer._target_=torch.optim.Adafactor", "scaling.num_workers=2"], r"does not take shards"),
        (["trainer.strategy=fdsp"], r"trainer.strategy=fdsp is not a valid choice; valid: fsdp, ddp"),
        (["trainer.strategy=ddp", "fsdp.replicas=2"], r"fsdp.replicas=2 has no meaning with trainer.strategy=ddp"),
        (["trainer.strategy=ddp", "fsdp.wrap=[Block]"], r"fsdp.wrap=\[Block\] has no meaning with .*=ddp"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*FSDP, *overrides])


def test_what_fits_is_taken() -> None:
    e = compose([*FSDP, "scaling.num_workers=8", "fsdp.replicas=2", "fsdp.reshard_after_forward=2"]).experiment
    assert (e.fsdp.replicas, e.fsdp.reshard_after_forward) == (2, 2)
    e = compose(
        [*FSDP, "scaling.num_workers=[2,4]", "fsdp.wrap=Block", "trainer.activation_checkpointing=[A,b.C]"]
    ).experiment
    assert (e.fsdp.wrap, e.trainer.activation_checkpointing) == (["Block"], ["A", "b.C"])
    # A config for many workers can be debugged in one process.
    assert compose([*FSDP, "debug=default", "fsdp.replicas=4"]).experiment.max_workers == 1
