"""The names that raytrainer.config exports: those that other packages use, and no others."""

from __future__ import annotations

import ast
from pathlib import Path

from raytrainer import config

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = """
CONFIG_MODULE CONFIG_NAME CheckpointConfig ClusterConfig Composition Experiment FSDPConfig InitFrom Parameter
SweepConfig TrainerConfig bind build check_keys check_modes check_sweep check_targets checkpoint_mode compose
composed_keys early_stopping_mode experiment_of explain factory flattened from_hydra from_text group_names
holds_password key_of locate looks_secret mode_problem new_name parameters_of parse_space quiet
refuse_settings_of_no_sweep register_schema resolved sweep_mode texts_of with_modes with_number_keys with_values
written_space
"""


def test_the_exported_names_are_these() -> None:
    assert sorted(config.__all__) == sorted(EXPORTS.split())


def test_other_packages_use_each_exported_name() -> None:
    files = [*(ROOT / "raytrainer").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    others = [file for file in files if (ROOT / "raytrainer" / "config") not in file.parents]
    assert sorted(set(config.__all__) - {name for file in others for name in _names_of_config(file)}) == []


def _names_of_config(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "raytrainer.config"
        for alias in node.names
    }
    attributes = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    return imported | attributes
