"""The private parts of Ray and Ray Train behave as `ray_internals` relies on. No Ray is started."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import ray

from raytrainer.ray_internals.cluster import VersionMismatch, _mismatch
from tests.contracts.private_parts import RAY, VARIABLES, PrivatePart


@pytest.mark.parametrize("part", RAY, ids=lambda part: part.name)
def test_part(part: PrivatePart) -> None:
    part.check()


@pytest.mark.parametrize("variable", VARIABLES)
def test_variable_is_read(variable: str) -> None:
    place = VARIABLES[variable]
    if place == "raylet":
        program = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
        is_read = variable.removeprefix("RAY_").encode() in program.read_bytes()
    else:
        is_read = f'"{variable}"' in inspect.getsource(importlib.import_module(place))
    assert is_read, f"ray {ray.__version__} does not read {variable} in {place}: ray_internals/cluster.py sets it"


def test_version_check_names_both_versions() -> None:
    """`ray_internals/cluster.py` reads both versions from the text of Ray's exception."""
    from ray._private.utils import check_version_info

    there = {"ray_version": "1.2.3", "python_version": "3.4.5"}
    with pytest.raises(RuntimeError) as raised:
        check_version_info(there, "node 127.0.0.1")
    error = _mismatch(raised.value)
    assert isinstance(error, VersionMismatch)
    assert "has ray 1.2.3 and Python 3.4.5" in str(error)
    assert f"this process has ray {ray.__version__}" in str(error)
    assert "pip install ray==1.2.3" in str(error)
    assert "cluster=job" in str(error)


def test_dispatcher_passes_lines_to_handlers() -> None:
    from ray._private.ray_logging import WorkerStandardStreamDispatcher

    dispatcher, seen = WorkerStandardStreamDispatcher(), list[object]()
    dispatcher.add_handler("one", seen.append)
    dispatcher.add_handler("two", seen.append)
    dispatcher.remove_handler("two")
    dispatcher.emit({"lines": ["a"]})
    assert seen == [{"lines": ["a"]}]


def test_dead_processes_are_pairs_of_name_and_process() -> None:
    """`dead_part` reads the name from the first of each pair."""
    from ray._private.node import Node

    node = object.__new__(Node)
    node.all_processes = {"raylet": [type("P", (), {"process": type("Q", (), {"poll": lambda self: 1})()})()]}
    assert [name for name, _ in node.dead_processes()] == ["raylet"]


def test_memory_of_a_node_is_an_argument() -> None:
    from ray._private.worker import init

    assert 'kwargs.pop("_memory"' in inspect.getsource(init), "ray_internals/cluster.py passes it to ray.init"


def test_global_node_is_a_variable_of_the_module() -> None:
    from ray._private import worker

    assert "_global_node = " in inspect.getsource(worker), "ray_internals/cluster.py finds the embedded Ray by it"
