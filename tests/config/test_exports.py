"""raytrainer.config exports only what other packages use. tests/test_public.py has the list."""

from __future__ import annotations

import ast
from pathlib import Path

from raytrainer import config

ROOT = Path(__file__).resolve().parents[2]


def test_other_packages_use_each_exported_name() -> None:
    files = [*(ROOT / "raytrainer").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    others = [file for file in files if (ROOT / "raytrainer" / "config") not in file.parents]
    assert sorted(set(config.__all__) - {name for file in others for name in names_of_config(file)}) == []


def names_of_config(file: Path) -> set[str]:
    """Return the names that a file imports from raytrainer.config or reads as its attributes."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ImportFrom(module="raytrainer.config", names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.Attribute(value=ast.Name(id="config"), attr=name):
                names.add(name)
    return names
