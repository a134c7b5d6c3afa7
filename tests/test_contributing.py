"""The table of promises in CONTRIBUTING.md: its tests exist, and each runs as often as the table says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import shares

ROOT = Path(__file__).resolve().parent.parent
NIGHTLY = "mark.nightly"


def nightly_of(file: Path) -> dict[str, bool | None]:
    """Return the tests of a file by id, and whether each is nightly; None if only some of its parameters are."""
    module = ast.parse(file.read_text())
    whole, values = False, {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = ast.unparse(node.value)
    whole = NIGHTLY in values.get("pytestmark", "")
    found: dict[str, bool | None] = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            # Parameters may be named by a constant of the file.
            named = [values.get(n.id, "") for m in node.decorator_list for n in ast.walk(m) if isinstance(n, ast.Name)]
            own = whole or f"pytest.{NIGHTLY}" in marks
            some = any(NIGHTLY in text for text in [*marks, *named])
            found[f"{file.relative_to(ROOT)}::{node.name}"] = True if own else None if some else False
    return found


@pytest.fixture(scope="module")
def suite() -> dict[str, bool | None]:
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "gpu" not in file.parts]
    return {name: nightly for file in files for name, nightly in nightly_of(file).items()}


def rows() -> list[tuple[str, str, str]]:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    table = page[page.index("| promise |") :].split("\n\n")[0].splitlines()[2:]
    return [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in table]  # type: ignore[misc]


def test_each_promise_has_a_test_that_runs_on_each_change(suite: dict[str, bool | None]) -> None:
    assert len(rows()) > 20
    for promise, test, _ in rows():
        assert test in suite, f"{promise}: there is no {test}"
        assert suite[test] is not True, f"{promise}: {test} is nightly only"


def test_each_nightly_test_repeats_a_promise(suite: dict[str, bool | None]) -> None:
    listed = {test for _, _, test in rows() if test}
    assert listed == {test for test, nightly in suite.items() if nightly is not False}


def test_shards_have_each_file_once_and_about_the_same_cost() -> None:
    cost = {f"file-{n}": float(n % 7 + 1) for n in range(40)}
    order = sorted(cost, key=lambda name: -cost[name])
    parts = shares(order, cost, 3)
    assert sorted(name for part in parts for name in part) == sorted(cost)
    totals = [sum(cost[name] for name in part) for part in parts]
    assert max(totals) - min(totals) <= max(cost.values())
