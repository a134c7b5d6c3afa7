"""Garbage is collected rarely while modules are imported, and as usual while a model trains."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from raytrainer import garbage


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(*garbage._AS_USUAL)
    yield garbage._AS_USUAL
    gc.set_threshold(*before)


def test_less_and_as_usual(usual: tuple[int, int, int]) -> None:
    garbage.collect_less()
    garbage.collect_less()
    assert gc.get_threshold()[0] >= 50 * usual[0]
    garbage.collect_as_usual()
    assert gc.get_threshold() == usual


def test_what_somebody_else_has_set_stays() -> None:
    gc.set_threshold(5_000, 3, 3)
    garbage.collect_less()
    garbage.collect_as_usual()
    assert gc.get_threshold() == (5_000, 3, 3)


def test_the_program_imports_with_less_and_trains_as_usual(tmp_path: object) -> None:
    """The thresholds when each of these is imported or called."""
    code = """
import gc, sys
from raytrainer import __main__, worker
seen = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append(gc.get_threshold()[0])
sys.meta_path.insert(0, Finder())
train = worker.config.experiment_of
def trains(*args):
    seen.append(gc.get_threshold()[0])
    raise SystemExit(0)
worker.config.experiment_of = trains
try:
    __main__.entry()
finally:
    print(seen)
"""
    arguments = ["experiment=mlp", "cluster=inline", "trainer.max_steps=1", f"storage_path={tmp_path}/runs"]
    uri = f"tracking.tracking_uri=sqlite:///{tmp_path}/mlflow.db"
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments, uri], cwd=str(tmp_path), capture_output=True, text=True, timeout=120
    )
    first, *_, last = ended.stdout.strip().splitlines()[-1].strip("[]").split(", ")
    assert (int(first), int(last)) == (garbage._LESS[0], garbage._AS_USUAL[0]), ended.stderr
