"""The configuration: a typed schema, its composition with Hydra, and the objects that `_target_` nodes name.

Stage one (keys, types, groups) imports no torch. Stage two (`check_targets`) imports the libraries of the targets.
This package exports what others use; `tests/test_public.py` has the list.
"""

from raytrainer.config.checks import holds_password, leaves_of, looks_secret, texts_of
from raytrainer.config.compose import (
    CONFIG_MODULE,
    CONFIG_NAME,
    Composition,
    check_keys,
    compose,
    composed_keys,
    experiment_of,
    from_hydra,
    from_text,
    group_names,
    new_name,
    quiet,
    register_schema,
    with_modes,
    with_number_keys,
)
from raytrainer.config.direction import check_modes, checkpoint_mode, early_stopping_mode, mode_problem, sweep_mode
from raytrainer.config.explain import explain, key_of
from raytrainer.config.multirun import check_sweep, refuse_settings_of_no_sweep
from raytrainer.config.nodes import bind, build, check_targets, factory, locate, parameters_of
from raytrainer.config.parameter import Parameter
from raytrainer.config.saved import flattened, resolved, with_values
from raytrainer.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Experiment,
    FSDPConfig,
    InitFrom,
    SweepConfig,
    TrainerConfig,
)
from raytrainer.config.space import parse_space, written_space

__all__ = [
    "CONFIG_MODULE",
    "CONFIG_NAME",
    "CheckpointConfig",
    "ClusterConfig",
    "Composition",
    "Experiment",
    "FSDPConfig",
    "InitFrom",
    "Parameter",
    "SweepConfig",
    "TrainerConfig",
    "bind",
    "build",
    "check_keys",
    "check_modes",
    "check_sweep",
    "check_targets",
    "checkpoint_mode",
    "compose",
    "composed_keys",
    "early_stopping_mode",
    "experiment_of",
    "explain",
    "factory",
    "flattened",
    "from_hydra",
    "from_text",
    "group_names",
    "holds_password",
    "key_of",
    "leaves_of",
    "locate",
    "looks_secret",
    "mode_problem",
    "new_name",
    "parameters_of",
    "parse_space",
    "quiet",
    "refuse_settings_of_no_sweep",
    "register_schema",
    "resolved",
    "sweep_mode",
    "texts_of",
    "with_modes",
    "with_number_keys",
    "with_values",
    "written_space",
]
