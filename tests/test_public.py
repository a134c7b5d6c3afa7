"""The public names are frozen: a change here is a change for users, and belongs in CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import raytrainer
from raytrainer.events import HOOKS

ROOT = Path(__file__).resolve().parent.parent

# The names in `__all__`.
PUBLIC = {
    "raytrainer": """
        Backend Callback Composition Experiment FitResult Job Outcome Tracker Trainer __version__ check compose errors
        events launch
    """,
    "raytrainer.checkpoint": """
        CheckpointInfo Checkpointer EXTRA_STATE Weights as_read copy_out find_weights fit take import_checkpoint import_note unread
    """,
    "raytrainer.config": """
        CONFIG_MODULE CONFIG_NAME CheckpointConfig ClusterConfig Composition Experiment FSDPConfig InitFrom Parameter
        SweepConfig TrainerConfig bind
        build check_keys check_modes check_sweep check_targets checkpoint_mode compose composed_keys
        early_stopping_mode experiment_of explain factory flattened
        from_hydra from_text group_names holds_password key_of leaves_of locate looks_secret mode_problem new_name parameters_of
        parse_space quiet refuse_settings_of_no_sweep register_schema resolved with_modes sweep_mode texts_of
        with_number_keys with_values written_space
    """,
    "raytrainer.data": """
        Arrays Batch ColumnDataset Digits EncodedImages ImageFolder Loader LoaderOptions MicroBatch Normalize ParquetDataset
        PythonSources RandomCropFlip RayDataset TokenDataset
    """,
    "raytrainer.events": """
        HOOKS Artifact Callback CheckpointSaved EvalEnd FitEnd FitStart Logged Place StepEnd Training
    """,
    "raytrainer.models": """
        MLP ResNet Transformer resnet101 resnet152 resnet18 resnet34 resnet50
    """,
    "raytrainer.optim": """
        Constant Cosine Curve Linear Muon WSD build_optimizer build_scheduler freeze mend_fused_sgd parameter_groups
    """,
    "raytrainer.storage": """
        StorageEntry Lock Storage redacted
    """,
    "raytrainer.submission": """
        JobBackend MOUNTED Request Sources Submission
    """,
    "raytrainer.sweep": """
        GridSearch TrialJournal Plan RandomSearch Report SweepOutcome Trial check describe_sweep launch make_plan report summary
    """,
    "raytrainer.tracking": """
        ChildRunUploader MlflowTracker NullTracker Run Uploader Tracker check_tracking default_tracking_uri
        find_own_dir variable_problems open_run recorded_run_id redacted register_model replay
    """,
}
# The names that these modules define. Users name the modules in a `_target_`, or catch the exceptions.
DEFINED = {
    "raytrainer.errors": """
        CheckpointCorrupt CheckpointError CheckpointNotFound ClusterDenied ClusterError ClusterLost ClusterUnreachable
        ConfigError DataError JobExists NonFiniteLoss PreflightError RaytrainerError Refused RunNotFound Stopped StorageError StorageFull StorageGone StorageLocked
        TrackingDenied TrackingError TrackingUnreachable TrainingError WorkerError nearest
    """,
    "raytrainer.callbacks": "SavePretrained",
    "raytrainer.losses": "CrossEntropy MeanSquaredError TokenCrossEntropy",
    "raytrainer.names": "Match few is_extra_state match matching renamed",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        assert getattr(found, name) is not None


@pytest.mark.parametrize("module", DEFINED)
def test_defined_names(module: str) -> None:
    found = importlib.import_module(module)
    defined = [n for n, x in vars(found).items() if not n.startswith("_") and getattr(x, "__module__", "") == module]
    assert sorted(
        n for n in defined if inspect.isclass(vars(found)[n]) or inspect.isfunction(vars(found)[n])
    ) == sorted(DEFINED[module].split())


@pytest.mark.parametrize("module", [*PUBLIC, *DEFINED])
def test_each_is_documented(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__doc__
    for name in (PUBLIC.get(module) or DEFINED[module]).split():
        thing = getattr(found, name)
        if inspect.isfunction(thing):
            assert thing.__doc__, f"{module}.{name}"


def test_hooks_of_a_callback() -> None:
    assert HOOKS == (
        "on_fit_start",
        "on_step_end",
        "on_log",
        "on_eval_end",
        "on_checkpoint",
        "on_artifact",
        "on_fit_end",
    )


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert raytrainer.__version__ == project["version"]


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'raytrainer' has no attribute 'Trainr'"):
        _ = raytrainer.Trainr
    assert "Trainer" in dir(raytrainer)


def test_each_name_is_imported_when_it_is_used() -> None:
    """The imports happen in a new process, because other tests have imported everything in this one."""
    program = """
import json, sys
heavy = lambda: sorted({"torch", "ray", "mlflow", "hydra", "omegaconf", "pyarrow"} & set(sys.modules))
import raytrainer
steps = [heavy()]
raytrainer.errors.ConfigError, raytrainer.Callback, raytrainer.events.EvalEnd, raytrainer.Tracker
steps.append(heavy())
raytrainer.compose, raytrainer.Experiment
steps.append(heavy())
raytrainer.Trainer
steps.append(heavy())
print(json.dumps(steps))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    first, errors, config, trainer = json.loads(done.stdout)
    assert first == errors == []
    assert config == ["hydra", "omegaconf"]
    assert "torch" in trainer
    assert not {"ray", "mlflow"} & set(trainer)


def test_the_types_are_those_of_the_modules() -> None:
    from raytrainer.config import compose
    from raytrainer.trainer import Trainer

    same: Any = (raytrainer.compose is compose, raytrainer.Trainer is Trainer)
    assert same == (True, True)
