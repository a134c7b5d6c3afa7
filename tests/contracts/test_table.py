"""No private name that the rooms use is missing in the table of `private_parts.py`, and none is listed in vain."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.contracts.private_parts import PARTS, VARIABLES, PrivatePart, instance_attributes, look_up
from tests.private_names import defined_names, is_private, own_private_names, private_accesses, private_imports
from tests.test_layering import PRIVATE, PRIVATE_ROOMS, ROOT, tree_of

ROOMS = sorted(path for room in PRIVATE_ROOMS for path in (ROOT / "raytrainer").glob(room))


def relative(room: Path) -> str:
    return room.relative_to(ROOT / "raytrainer").as_posix()


def inherited(room: Path) -> Iterator[tuple[str, str]]:
    """Yield `Class._name` for the private names that a class of ours shares with its bases in other libraries."""
    module = importlib.import_module(".".join(room.relative_to(ROOT).with_suffix("").parts))
    for node in tree_of(room).body:
        if not isinstance(node, ast.ClassDef):
            continue
        names = own_private_names(node)
        for base in inspect.getmro(getattr(module, node.name))[1:]:
            if base.__module__.split(".")[0] in PRIVATE:
                theirs = {name for name in vars(base) if is_private(name)} | instance_attributes(base)
                yield from ((name, f"{node.name}.{name}, which {base.__qualname__} has too") for name in names & theirs)


@pytest.mark.parametrize("room", ROOMS, ids=relative)
def test_each_private_name_is_in_the_table(room: Path) -> None:
    listed = {segment for part in PARTS if part.module == relative(room) for segment in part.name.split(".")}
    listed |= {name for part in PARTS if part.module == relative(room) for name in part.takes}
    tree = tree_of(room)
    missing = {use.text for use in private_imports(tree, PRIVATE) if use.name.split(".")[-1] not in listed}
    own = defined_names(tree)
    # `_memory` has a test of its own; `_actions` is of the standard library.
    listed |= {"_memory", "_actions"}
    missing |= {use.text for use in private_accesses(tree) if use.name not in listed | own}
    missing |= {text for name, text in inherited(room) if name not in listed}
    assert not missing, (
        f"in raytrainer/{relative(room)}, and not in tests/contracts/private_parts.py: {sorted(missing)}"
    )


def test_each_part_of_the_table_is_used() -> None:
    for part in PARTS:
        text = (ROOT / "raytrainer" / part.module).read_text()
        name = part.name.rpartition(".")[2]
        wanted = part.name.split(".")[-2] if name == "__init__" else name
        assert wanted in text or any(word in text for word in part.takes), f"{part.name} is not used in {part.module}"


def test_each_variable_is_in_the_table() -> None:
    from raytrainer.ray_internals.cluster import ENVIRONMENT

    assert set(ENVIRONMENT) <= set(VARIABLES)


def test_the_table_names_a_part_once() -> None:
    names = [(part.module, part.name) for part in PARTS]
    assert len(names) == len(set(names))


def test_a_missing_part_is_found() -> None:
    with pytest.raises(AttributeError, match="TuneController has no _nothing"):
        look_up("ray.tune.execution.tune_controller.TuneController._nothing")
    with pytest.raises(ImportError):
        look_up("ray.tune.nothing_here.x")


def test_a_broken_contract_names_version_part_module_and_purpose() -> None:
    name = "ray.tune.execution.tune_controller.TuneController._actor_failed"
    part = PrivatePart(name, "ray_internals/tune.py", "do something", overridden=("actor",))
    with pytest.raises(AssertionError) as raised:
        part.check()
    (line, *_) = str(raised.value).splitlines()
    assert line.startswith(
        f"ray {version('ray')} changed tune.execution.tune_controller.TuneController._actor_failed, "
    )
    assert "takes (tracked_actor, exception) instead of (actor)" in line
    assert line.endswith("raytrainer/ray_internals/tune.py relies on it to do something")
