"""The schema of an experiment: one dataclass per section, with the default, valid choices and bounds of each key.

Hydra composes YAML against it; `validate` then checks what types cannot express. This module imports neither torch, Ray
nor MLflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from raytrainer import plugins
from raytrainer.errors import ConfigError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def key(
    default: Any = None, *, choices: tuple[Any, ...] = (), least: float | None = None, most: float | None = None
) -> Any:
    """Return a dataclass field with what `validate` checks: the valid values, or an inclusive range."""
    return field(default=default, metadata={"choices": choices, "least": least, "most": most})


@dataclass(kw_only=True, slots=True)
class DataConfig:
    train: dict[str, Any] | None = None
    val: dict[str, Any] | None = None  # a node, or NAME → node
    global_batch_size: int = key(128, least=1)
    micro_batch_size: int | None = key(None, least=1)
    shuffle: bool = True
    drop_last: bool = True
    collate_fn: dict[str, Any] | None = None
    num_workers: int = key(0, least=0)
    prefetch: int = key(2, least=0)
    start_method: str = key("forkserver", choices=("forkserver", "spawn", "fork"))  # of the processes
    resident: Any = key("auto", choices=("auto", True, False))  # noqa: RUF009

    @property
    def val_sets(self) -> dict[str, dict[str, Any]]:
        """The nodes of the validation sets by name. If `val` is itself a node, its name is the empty string."""
        sets = {name: node for name, node in (self.val or {}).items() if node is not None}
        if sets and all(isinstance(node, dict) for node in sets.values()):
            return sets
        return {"": self.val} if self.val else {}

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """The nodes of all sets by their keys: `data.train`, `data.val` or `data.val.NAME`."""
        train = {"data.train": self.train} if self.train else {}
        return train | {f"data.val.{name}".rstrip("."): node for name, node in self.val_sets.items()}


@dataclass(kw_only=True, slots=True)
class EarlyStopping:
    monitor: str | None = None  # null: checkpoint.monitor
    mode: str | None = key(None, choices=(None, "min", "max"))  # null: derived from the monitor
    patience: int = key(3, least=0)  # evaluations without improvement before the run ends
    min_delta: float = key(0.0, least=0)


@dataclass(kw_only=True, slots=True)
class Profile:
    start: int = key(10, least=1)  # the first step recorded
    steps: int = key(5, least=1)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    max_steps: int | None = key(None, least=1)
    max_epochs: int | None = key(None, least=1)
    max_time: Any = None  # seconds, or "90m", "1h30m", "01:30:00"
    precision: str = key("32-true", choices=("32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"))
    num_threads: int | None = key(None, least=1)
    compile: Any = key(False, choices=(False, True, "default", "reduce-overhead", "max-autotune"))  # noqa: RUF009
    strategy: str = key("ddp", choices=("ddp", "fsdp"))
    activation_checkpointing: Any = False  # true: the model's blocks; or a list of classes
    find_unused_parameters: bool = False
    freeze: Any = field(default_factory=list)  # patterns of names of parameters and buffers
    max_grad_norm: float | None = key(None, least=0)
    ema_decay: float | None = key(None, least=0, most=1)
    nonfinite: str = key("stop", choices=("stop", "warn"))
    log_every_n_steps: int = key(10, least=1)
    eval_every_n_steps: int | None = key(None, least=0)
    channels_last: bool = False
    deterministic: bool | None = None  # null: true on CPU, false on GPU
    peak_tflops: float | None = key(None, least=0)  # for train/mfu; null: looked up by the GPU's name
    profile: Profile | None = None
    early_stopping: EarlyStopping | None = None


_DTYPES = (None, "float32", "bfloat16", "float16")


@dataclass(kw_only=True, slots=True)
class FSDPConfig:
    wrap: Any = None  # a list of classes; null: the model's blocks
    reshard_after_forward: Any = None  # true, false, or the number of workers to shard among; null: all but the root
    replicas: int = key(1, least=1)
    param_dtype: str | None = key(None, choices=_DTYPES)  # null: follows trainer.precision
    reduce_dtype: str | None = key(None, choices=_DTYPES)
    meta_init: bool = True


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every_n_steps: int | None = key(None, least=1)  # null: at every evaluation
    num_to_keep: int | None = key(2, least=1)  # null: all
    monitor: str = "val/loss"
    mode: str | None = key(None, choices=(None, "min", "max"))  # null: derived from the monitor
    async_save: bool = True
    min_interval_s: float | None = key(None, least=0)  # null: 0, or 10 in a trial; the last checkpoint is always saved


@dataclass(kw_only=True, slots=True)
class ScalingConfig:
    num_workers: Any = 1  # 4, or [2, 8] for elastic
    use_gpu: Any = key("auto", choices=("auto", True, False))  # noqa: RUF009
    resources_per_worker: dict[str, float] | None = None
    placement_strategy: str = key("PACK", choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None


@dataclass(kw_only=True, slots=True)
class FailureConfig:
    max_failures: int = key(3, least=-1)
    max_preemption_failures: int = key(-1, least=-1)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    tracking_uri: str | None = None
    experiment_name: str | None = None
    required: bool = True
    register_model: str | None = None
    log_model: bool = True


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    kind: str = "local"  # the name of a backend
    address: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # settings of a backend from another package
    runtime_env: dict[str, Any] = field(default_factory=dict)
    # For a shared cluster.
    forward_env: Any = field(default_factory=list)  # names of variables; the cluster has their values
    env_file: str | None = None  # file on the cluster with NAME=value lines, for variables of forward_env not set there
    shared_paths: Any = field(default_factory=list)  # directories that this machine shares with the cluster's machines
    package_limit_mb: float = key(100.0, least=0)
    wait: bool = True
    retries: int = key(0, least=0)
    ca_file: str | None = None
    token_file: str | None = None
    driver_resources: dict[str, float] | None = None
    # kuberay
    context: str | None = None  # kubectl context; null: the current one
    namespace: str = "default"
    image: str | None = None
    queue: str | None = None  # Kueue queue
    service_account: str | None = None
    secrets: Any = field(default_factory=list)  # names of Kubernetes secrets, whose keys become environment variables
    pod_resources: dict[str, str] | None = None  # of a worker's pod; null: the resources of one worker
    min_pods: int | None = key(None, least=0)
    max_pods: int | None = key(None, least=1)


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    metric: str | None = None  # null: checkpoint.monitor
    mode: str | None = key(None, choices=(None, "min", "max"))  # null: derived from the metric
    num_samples: int | None = key(None, least=1)  # null: every combination of a grid
    scheduler: dict[str, Any] | None = None
    search_alg: dict[str, Any] | None = None
    max_concurrent_trials: int | None = key(None, least=1)  # null: as many as the cluster can place
    time_budget_s: Any = None  # seconds, or a duration as trainer.max_time
    space: dict[str, Any] = field(default_factory=dict)  # key → values, in the grammar of the command line
    seed: int | None = key(None, least=0, most=2**31 - 1)  # seed of the sampling; null: the experiment's
    max_trial_failures: int = key(0, least=0)  # how often a failed trial is retried
    allow_failed: Any = True  # failed trials that still give exit code 0: true for any, false for none, or a number
    num_to_keep: int | None = key(5, least=1)  # number of best trials whose checkpoints are kept; null: all


@dataclass(kw_only=True, slots=True)
class Evaluate:
    run_dir: str | None = None  # directory of the evaluated run, without a password
    checkpoint: str = "best"  # best, last, or a step
    run_id: str | None = None  # MLflow run of the evaluated run


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    # Train one real batch on the CPU first. auto: always for `check`; for a launch if cores are free while Ray starts.
    first_batch: Any = key("auto", choices=("auto", True, False))  # noqa: RUF009
    first_batch_timeout_s: float = key(60.0, least=1)  # after that the probe has no result and refuses nothing


@dataclass(kw_only=True, slots=True)
class InitFrom:
    source: str | None = None
    strict: bool = True
    mapping: dict[str, str] = field(default_factory=dict)  # prefix of a name in the source → in the model
    exclude: Any = field(default_factory=list)  # patterns of names in the model


@dataclass(kw_only=True, slots=True)
class Experiment:
    """A whole experiment, resolved and typed.

    The sections `model`, `loss`, `optimizer`, `lr_scheduler`, `data.train`, `data.val` and `data.collate_fn` are
    `_target_` nodes, whose objects `raytrainer.config.build` creates. `callbacks`, `metrics` and a `data.val` with
    several sets are dicts of such nodes.
    """

    name: str | None = None
    seed: int = key(0, least=0, most=2**31 - 1)
    storage_path: str | None = None
    init_from: InitFrom | None = field(default=None, metadata={"text": "source"})
    debug: bool = False
    evaluate: Evaluate | None = None  # set by `evaluate ID`, which validates a checkpoint and does not train
    model: dict[str, Any] | None = None
    loss: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    lr_scheduler: dict[str, Any] | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def max_workers(self) -> int:
        """The largest number of workers: `scaling.num_workers`, or its upper bound for an elastic run."""
        n = self.scaling.num_workers
        return int(n[1]) if isinstance(n, list) else int(n)

    @property
    def backend(self) -> plugins.Backend:
        """The backend that `cluster.kind` names."""
        return plugins.backend_named(self.cluster.kind)

    @property
    def uses_ray(self) -> bool:
        """Whether its workers run on Ray; otherwise one trains in the driver's process."""
        return not self.debug and self.backend.ray != "none"


def known_keys(kind: type = Experiment, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema, sections and leaves, e.g. `trainer.max_steps`."""
    for f in dataclasses.fields(kind):
        yield prefix + f.name
        section = section_of(f)
        if section is not None:
            yield from known_keys(section, f"{prefix}{f.name}.")


def section_of(f: dataclasses.Field[Any]) -> type | None:
    """Return the dataclass of a field that is a section, else None. Annotations are strings here: `Profile | None`."""
    name = str(f.type).removesuffix(" | None")
    section = globals().get(name)
    return section if isinstance(section, type) and dataclasses.is_dataclass(section) else None


def validate(section: Any, prefix: str = "") -> None:
    """Check the choices and bounds of a section and of the sections below it.

    Raises:
        ConfigError: A value is not valid; the message names the first such key.
    """
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            validate(value, f"{name}.")
            continue
        choices, least, most = (f.metadata.get(k) for k in ("choices", "least", "most"))
        # In Python `1 == True`, so types are compared too; otherwise `resident=1` would pass.
        if choices and not any(value == c and type(value) is type(c) for c in choices):
            raise ConfigError("is not a valid choice", key=name, value=value, choices=[_written(c) for c in choices])
        if value is None or isinstance(value, bool):
            continue
        if least is not None and not value >= least:  # `not >=`, so that NaN is refused
            raise ConfigError(f"must be at least {least:g}", key=name, value=value)
        if most is not None and not value <= most:
            raise ConfigError(f"must be at most {most:g}", key=name, value=value)


def _written(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)
