"""Tests of whole launches on a machine with a GPU: `scaling.use_gpu=auto` uses it, a share of it is enough, and false
does not use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launches import Runs, launched, summary, trials

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RUN = ["experiment=mlp", "name=run", "tracking.log_model=false", "trainer.max_epochs=2", "scaling.num_workers=1"]


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("scaling.use_gpu=auto", "local Ray, 1 worker on GPU"),
        ("+scaling.resources_per_worker.GPU=0.5", "local Ray, 1 worker on GPU"),
        ("scaling.use_gpu=false", "local Ray, 1 worker on CPU"),
    ],
)
def test_on_ray(override: str, where: str, tmp_path: Path) -> None:
    ended = launched(tmp_path, *RUN, override).exits(0)
    assert summary(ended.out)["where"] == where
    assert Runs(tmp_path).status("run") == "FINISHED"


def test_a_model_is_logged_from_the_gpu(tmp_path: Path) -> None:
    launched(tmp_path, *RUN, "cluster=inline", "tracking.log_model=true").exits(0)
    assert Runs(tmp_path).tags("run")["raytrainer.model_format"] == "pt2"


def test_trials_share_a_gpu(tmp_path: Path) -> None:
    sweep = ["-m", "experiment=mlp", "name=sweep", "trainer.max_epochs=2", "sweep=grid", "optimizer.lr=0.1,0.01,0.001"]
    launched(tmp_path, *sweep, "+scaling.resources_per_worker={CPU: 1, GPU: 0.25}").exits(0)
    assert [trial.status for trial in trials(tmp_path).values()] == ["finished"] * 3
