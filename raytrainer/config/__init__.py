"""The experiment: its typed schema, composing it with Hydra, and building what its `_target_` nodes name.

Stage one (keys, types, groups) imports no torch; stage two (`check_targets`) imports the targets' libraries.
"""

from raytrainer.config.checks import holds_password, looks_secret, texts_of
from raytrainer.config.compose import (
    CONFIG_MODULE,
    CONFIG_NAME,
    Composition,
    check_keys,
    check_sweep,
    compose,
    composed_keys,
    experiment_of,
    flattened,
    from_hydra,
    from_text,
    group_names,
    new_name,
    quiet,
    refuse_settings_of_no_sweep,
    register_schema,
    with_values,
)
from raytrainer.config.explain import explain, key_of
from raytrainer.config.nodes import bind, build, check_targets, factory, locate
from raytrainer.config.parameter import Parameter
from raytrainer.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EarlyStopping,
    Experiment,
    FailureConfig,
    Profile,
    ScalingConfig,
    SweepConfig,
    TrackingConfig,
    TrainerConfig,
    validate,
)
from raytrainer.config.space import parse_space, written_space

__all__ = [
    "CONFIG_MODULE",
    "CONFIG_NAME",
    "CheckpointConfig",
    "ClusterConfig",
    "Composition",
    "DataConfig",
    "EarlyStopping",
    "Experiment",
    "FailureConfig",
    "Parameter",
    "Profile",
    "ScalingConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainerConfig",
    "bind",
    "build",
    "check_keys",
    "check_sweep",
    "check_targets",
    "compose",
    "composed_keys",
    "experiment_of",
    "explain",
    "factory",
    "flattened",
    "from_hydra",
    "from_text",
    "group_names",
    "holds_password",
    "key_of",
    "locate",
    "looks_secret",
    "new_name",
    "parse_space",
    "quiet",
    "refuse_settings_of_no_sweep",
    "register_schema",
    "texts_of",
    "validate",
    "with_values",
    "written_space",
]
