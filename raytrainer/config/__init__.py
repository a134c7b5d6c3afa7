"""The experiment: its typed schema, composing it with Hydra, and building what its `_target_` nodes name.

Stage one (keys, types, groups) imports no torch; stage two (`check_targets`) imports the targets' libraries.
"""

from raytrainer.config.compose import (
    CONFIG_MODULE,
    CONFIG_NAME,
    Composition,
    compose,
    explain,
    flattened,
    from_hydra,
    from_text,
    new_name,
    register_schema,
)
from raytrainer.config.nodes import bind, build, check_targets, factory
from raytrainer.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EarlyStopping,
    Experiment,
    FailureConfig,
    Profile,
    ScalingConfig,
    TrackingConfig,
    TrainerConfig,
    validate,
)

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
    "Profile",
    "ScalingConfig",
    "TrackingConfig",
    "TrainerConfig",
    "bind",
    "build",
    "check_targets",
    "compose",
    "explain",
    "factory",
    "flattened",
    "from_hydra",
    "from_text",
    "new_name",
    "register_schema",
    "validate",
]
