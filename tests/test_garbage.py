"""Garbage is collected rarely while modules are imported, and as usual while a model trains."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from raytrainer import __main__, worker
from raytrainer.core import garbage
from raytrainer.parallel import World


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(*garbage._DEFAULT)
    yield garbage._DEFAULT
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


def test_the_program_imports_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def main() -> int:
        seen.append(gc.get_threshold()[0])
        return 0

    monkeypatch.setattr("raytrainer.cli.main", main)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit):
        __main__.entry()
    assert seen == [garbage._HIGH[0]]


def test_a_worker_trains_as_usual(usual: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def reached(*_: object) -> None:
        raise Reached

    garbage.collect_less()
    monkeypatch.setattr("raytrainer.config.experiment_of", reached)
    with pytest.raises(Reached):
        worker.run(worker.WorkerJob(text="", run_dir="/nowhere"), World(), emit=lambda message: None)
    assert gc.get_threshold() == usual
