"""Every private or undocumented part of Ray, Hydra, OmegaConf and MLflow that raytrainer relies on, what for, and where.

`test_*.py` beside this file checks each of them against the installed version, and `test_table.py` that none is missing.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class PrivatePart:
    """A part of another library.

    Attributes:
        name: Its dotted name. The attribute of an instance is named by its class.
        module: Our module that uses it, below `raytrainer/`.
        purpose: What for: completes "relies on it to …".
        takes: Parameters that we pass.
        overridden: All parameters, for a method that we override.
    """

    name: str
    module: str
    purpose: str
    takes: tuple[str, ...] = ()
    overridden: tuple[str, ...] | None = None

    @property
    def library(self) -> str:
        return self.name.split(".")[0]

    def problem(self) -> str | None:
        """Return how the installed version differs from what we rely on; None if it does not."""
        try:
            value = look_up(self.name)
        except (ImportError, AttributeError) as error:
            return f"is missing ({error})"
        if not self.takes and self.overridden is None:
            return None
        names = tuple(name for name in inspect.signature(value).parameters if name != "self")
        if self.overridden is not None and names != self.overridden:
            return f"takes ({', '.join(names)}) instead of ({', '.join(self.overridden)})"
        lost = [name for name in self.takes if name not in names]
        return f"does not take {', '.join(lost)} any more, only ({', '.join(names)})" if lost else None

    def broken(self, problem: str) -> str:
        """Return the message of a failed contract."""
        distribution = {"hydra": "hydra-core"}.get(self.library, self.library)
        short = self.name.removeprefix(f"{self.library}.")
        return (
            f"{distribution} {version(distribution)} changed {short}, which {problem}: "
            f"raytrainer/{self.module} relies on it to {self.purpose}"
        )

    def check(self) -> None:
        problem = self.problem()
        assert problem is None, self.broken(problem or "")


def look_up(name: str) -> Any:
    """Return the part with a dotted name; None for an attribute that a class sets on its instances.

    Raises:
        ImportError, AttributeError: It is not there.
    """
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        if hasattr(value, part):
            value = getattr(value, part)
        elif isinstance(value, type) and part in instance_attributes(value):
            value = None
        elif inspect.ismodule(value):
            value = importlib.import_module(".".join(parts[:number]))
        else:
            raise AttributeError(f"{'.'.join(parts[: number - 1])} has no {part}")
    return value


@cache
def instance_attributes(kind: type) -> frozenset[str]:
    """Return the names that the methods of a class and of its bases assign to `self`, read from their sources."""
    names: set[str] = set()
    # Of the methods, because Ray changes `__module__` of public classes, and then the source of the class is not found.
    methods = [method for base in kind.__mro__ for method in vars(base).values() if inspect.isfunction(method)]
    for method in methods:
        with contextlib.suppress(OSError):  # generated, as `__init__` of a dataclass
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
                match node:
                    case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                        names.add(name)
    return frozenset(names)


def _parts(module: str, prefix: str, rows: Mapping[str, str | tuple[Any, ...]]) -> list[PrivatePart]:
    """Return the parts of one module of ours. A row is a purpose, or `(purpose, takes)`, or `(purpose, None, overridden)`."""
    parts = []
    for name, row in rows.items():
        purpose, takes, *rest = row if isinstance(row, tuple) else (row, ())
        parts.append(PrivatePart(prefix + name, module, purpose, tuple(takes or ()), tuple(rest[0]) if rest else None))
    return parts


_POLICY = "failure_handling.DefaultFailurePolicy"
_GROUP = "worker_group.WorkerGroup"
_PLACE = "worker_group.placement_group_handle.DefaultPlacementGroupHandle"

RAY: Sequence[PrivatePart] = [
    *_parts(
        "ray_internals/cluster.py",
        "ray.",
        {
            "_private.auto_init_hook.enable_auto_connect": "keep a thread from starting a second Ray after a forced end",
            "_private.worker._global_node": "find the processes of an embedded Ray",
            "_private.node.Node.dead_processes": "name an essential process that died",
            "_private.node.Node.all_processes": "end the raylet's agents with this process",
            "_private.node.Node.kill_all_processes": (
                "stop an embedded Ray whose GCS or raylet is dead, without waiting for it",
                ("check_alive", "allow_graceful"),
            ),
            "_private.utils.set_sigterm_handler": (
                "keep Ray from replacing our handler of SIGTERM",
                None,
                ("sigterm_handler",),
            ),
            "_private.utils.check_version_info": (
                "name both versions when a cluster has another one",
                ("cluster_metadata", "this_process_address"),
            ),
            "_raylet.GcsClient": "ask whether a Ray cluster listens at an address",
            "_private.worker.init": "tell an embedded node the memory that workers may request",
        },
    ),
    *_parts(
        "ray_internals/cluster_state.py",
        "ray.",
        {
            "_private.state.state": "read the tables of the cluster",
            "_private.state.GlobalState._connect_and_get_accessor": "read the tables of actors, placement groups and jobs",
            "autoscaler.v2.sdk.get_cluster_status": ("show the nodes that are coming", ("gcs_address", "timeout")),
            "core.generated.gcs_pb2.ActorTableData": "count the resources that other drivers hold",
            "core.generated.gcs_pb2.JobTableData": "name the drivers that hold resources",
            "core.generated.gcs_pb2.PlacementGroupTableData": "count the resources of placement groups",
        },
    ),
    *_parts(
        "ray_internals/output.py",
        "ray._private.",
        {
            "ray_logging.global_worker_stdstream_dispatcher": "take the workers' output before Ray prints it",
            "ray_logging.WorkerStandardStreamDispatcher.add_handler": "take the workers' output",
            "ray_logging.WorkerStandardStreamDispatcher.remove_handler": "keep Ray from printing the workers' output",
            "worker.print_to_stdstream": (
                "take the notices of dead workers, which bypass the dispatcher",
                None,
                ("data", "ignore_prefix"),
            ),
        },
    ),
    *_parts(
        "ray_internals/job_client.py",
        "ray.dashboard.modules.dashboard_sdk.SubmissionClient.",
        {
            "_do_request": (
                "send the requests of the Jobs API over our own connection",
                None,
                ("method", "endpoint", "data", "json_data", "kwargs"),
            ),
        },
    ),
    *_parts(
        "ray_internals/train.py",
        "ray.train.v2._internal.",
        {
            "callbacks.DatasetsCallback": "leave out the callback of Ray Data",
            "callbacks.metrics.ControllerMetricsCallback": "leave out an actor for metrics",
            "callbacks.metrics.WorkerMetricsCallback": "leave out an actor for metrics",
            "callbacks.placement_group_callback.PlacementGroupCleanerCallback": "leave out the cleaner, which needs an actor",
            "execution.callback.ReportCallback.after_report": (
                "take the reports of a trial's workers",
                None,
                ("training_report", "metrics"),
            ),
            "execution.controller.TrainController": "run the controller in the launching process",
            "execution.controller.TrainController.worker_group_cls": "use our own worker group",
            "execution.controller.TrainController.run": "run the controller in the launching process",
            "execution.controller.TrainController.get_result": "return the result of a run",
            "execution.controller.TrainController.get_worker_group": "stop and kill the workers",
            f"execution.{_POLICY}": "count failures as Ray Train does",
            f"execution.{_POLICY}.make_decision": ("decide about a retry", None, ("training_failed_error",)),
            f"execution.{_POLICY}.failure_config": "show how many restarts are left",
            f"execution.{_POLICY}._log_decision": "suppress Ray's message about a restart",
            "execution.failure_handling.FailureDecision.RETRY": "restart the workers",
            "execution.failure_handling.FailureDecision.RAISE": "end the run",
            "execution.scaling_policy.FixedScalingPolicy.after_controller_start": (
                "keep Ray from starting a detached actor on the cluster",
                None,
                ("train_run_context",),
            ),
            "execution.scaling_policy.FixedScalingPolicy._maybe_send_resource_request": (
                "keep Ray from requesting the resources twice",
                None,
                (),
            ),
            f"execution.{_GROUP}": "run a worker group whose controller is no actor",
            f"execution.{_GROUP}._create_placement_group": (
                "place a trial's workers into the trial's own placement group",
                None,
                ("scaling_config", "worker_group_context"),
            ),
            f"execution.{_GROUP}._init_train_context_on_workers": (
                "start workers whose controller is no actor",
                None,
                ("workers", "sync_actor", "train_context_args"),
            ),
            f"execution.{_GROUP}._decorate_worker_log_file_paths": (
                "keep Ray's records of the workers complete",
                ("workers",),
            ),
            f"execution.{_GROUP}._storage_context": "start workers whose controller is no actor",
            f"execution.{_GROUP}._train_run_context": "start workers whose controller is no actor",
            f"execution.{_GROUP}._worker_callbacks_to_propagate": "start workers whose controller is no actor",
            f"execution.{_GROUP}.has_started": "know whether workers can be stopped",
            f"execution.{_GROUP}.get_workers": "kill the workers",
            f"execution.{_GROUP}.execute_async": ("ask the workers to stop", ("fn",)),
            "execution.worker_group.worker.RayTrainWorker.init_train_context": (
                "start workers whose controller is no actor",
                (
                    "train_run_context",
                    "distributed_context",
                    "synchronization_actor",
                    "storage_context",
                    "worker_callbacks",
                    "controller_actor",
                ),
            ),
            f"execution.{_PLACE}": ("borrow a trial's placement group", ("pg",)),
            f"execution.{_PLACE}.shutdown": ("keep a trial's placement group for the next trial", None, ()),
            f"execution.{_PLACE}.placement_group": "know whether the workers wait for resources",
        },
    ),
    *_parts(
        "ray_internals/train.py",
        "ray.train.v2.api.",
        {
            "exceptions.WorkerGroupError.worker_failures": "find the first error of a worker group",
            "data_parallel_trainer.DataParallelTrainer._create_default_callbacks": (
                "choose Train's callbacks",
                None,
                (),
            ),
            "data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller": (
                "run the controller in the launching process",
                None,
                ("controller_init_kwargs",),
            ),
        },
    ),
]

TUNE: Sequence[PrivatePart] = [
    *_parts(
        "ray_internals/schedulers.py",
        "ray.tune.schedulers.",
        {
            "MedianStoppingRule._hard_stop": "know whether it pauses trials",
            "MedianStoppingRule._min_time_slice": "know whether it pauses trials",
            "MedianStoppingRule._results": "restore the reports of a resumed sweep",
            "AsyncHyperBandScheduler._stop_last_trials": "tell a full trial from a pruned one",
            "AsyncHyperBandScheduler._max_t": "tell a full trial from a pruned one",
            "AsyncHyperBandScheduler._brackets": "restore the reports of a resumed sweep",
            "AsyncHyperBandScheduler._trial_info": "restore the reports of a resumed sweep",
            "async_hyperband._Bracket._rungs": "restore the reports of a resumed sweep",
            "HyperBandScheduler._stop_last_trials": "tell a full trial from a pruned one",
            "HyperBandScheduler._max_t_attr": "tell a full trial from a pruned one",
            "PopulationBasedTraining._get_new_config": (
                "keep the ids of a trial when it copies another one",
                None,
                ("trial", "trial_to_clone"),
            ),
            "PopulationBasedTraining.on_trial_add": (
                "combine it with our random search",
                None,
                ("tune_controller", "trial"),
            ),
        },
    ),
    *_parts(
        "ray_internals/tune.py",
        "ray.tune.execution.tune_controller.TuneController.",
        {
            "_actor_manager": "kill, drain and count trial processes",
            "_actor_cache": "keep the processes of paused trials",
            "_actor_failed": ("treat a process that dies between two trials", None, ("tracked_actor", "exception")),
            "_actor_to_trial": "give a trial another process",
            "_fail_fast": "let exceptions of the journal and the searcher end the sweep unchanged",
            "RAISE": "let exceptions of the journal and the searcher end the sweep unchanged",
            "_failed_trials": "forget ended trials, which hold memory",
            "_stopped_trials": "forget ended trials, which hold memory",
            "_trials": "forget ended trials, which hold memory",
            "_live_trials": "forget ended trials, which hold memory",
            "_trials_to_cache": "forget ended trials, which hold memory",
            "_has_errored": "continue after a failed trial",
            "_max_pending_trials": "limit the concurrent trials exactly",
            "_maybe_add_actors": ("limit the concurrent trials exactly", None, ()),
            "_maybe_update_trial_queue": ("ask the searcher only when there is room for a trial", None, ()),
            "_update_trial_queue": "sample one trial",
            "_search_alg": "know whether all trials are sampled",
            "_pending_trials": "show that trials wait for resources",
            "_running_trials": "show that trials wait for resources",
            "_trial_to_actor": "count the trials that have a process",
            "_started_actors": "give a trial another process",
            "_resetting_trials": "know that a process died between two trials",
            "_process_trial_failure": ("record why a trial failed", None, ("trial", "exception")),
            "_trial_task_failure": ("treat a process that dies between two trials", None, ("trial", "exception")),
            "_schedule_trial_actor": ("give a trial another process", ("trial",)),
            "checkpoint": ("leave out Tune's snapshots", None, ("force", "wait")),
            "on_step_end": ("forget ended trials, which hold memory", None, ()),
            "setup_experiments": ("begin a sweep", ("experiments", "total_num_samples")),
            "__init__": (
                "begin a sweep",
                (
                    "search_alg",
                    "scheduler",
                    "callbacks",
                    "metric",
                    "trial_checkpoint_config",
                    "storage",
                    "reuse_actors",
                ),
            ),
        },
    ),
    *_parts(
        "ray_internals/tune.py",
        "ray.air.execution._internal.actor_manager.RayActorManager.",
        {
            "_actor_task_failed": (
                "treat a kill for too much memory as a dead process",
                None,
                ("tracked_actor_task", "exception"),
            ),
            "_live_actors_to_ray_actors_resources": "kill and drain trial processes",
            "num_pending_actors": "limit the concurrent trials exactly",
            "num_live_actors": "show that trials wait for resources",
            "clear_actor_task_futures": ("give a trial another process", ("tracked_actor",)),
            "remove_actor": ("give a trial another process", ("tracked_actor", "kill")),
            "cleanup": "end all trial processes",
        },
    ),
    *_parts(
        "ray_internals/tune.py",
        "ray.tune.",
        {
            "utils.object_cache._ObjectCache.increase_max": ("keep the processes of paused trials", ("key", "by")),
            "search.search_generator.SearchGenerator.is_finished": ("keep the processes of paused trials", None, ()),
        },
    ),
]

HYDRA: Sequence[PrivatePart] = [
    *_parts(
        "config/hydra_internals.py",
        "hydra.",
        {
            "_internal.utils._run_hydra": (
                "run the command line with our own errors and exit codes",
                ("args", "args_parser", "task_function", "config_path", "config_name"),
            ),
            "_internal.utils.get_args_parser": "parse the command line as Hydra does",
            "_internal.utils.create_automatic_config_search_path": (
                "find the same configs as the command line",
                ("calling_file", "calling_module", "config_path"),
            ),
            "_internal.hydra.Hydra.create_main_hydra2": (
                "compose as the command line does",
                ("task_name", "config_search_path"),
            ),
            "_internal.grammar.utils.escape_special_characters": "write the keys of a dictionary in Hydra's grammar",
            "_internal.core_plugins.basic_launcher.BasicLauncher": "refuse other launchers beside a sweep",
            "core.singleton.Singleton._instances": "restore the state of another Hydra application after composing",
            "core.utils.JobReturn._return_value": "raise a job's exception without Hydra's message",
        },
    ),
    *_parts(
        "config/hydra_internals.py",
        "omegaconf.",
        {
            "basecontainer.BaseContainer._resolvers": "list the resolvers, and restore those of another application",
            "DictConfig._get_node": "visit a config without resolving it",
            "ListConfig._get_node": "visit a config without resolving it",
            "DictConfig._get_full_key": "name the key that cannot be resolved",
            "DictConfig._is_none": "visit a config without resolving it",
            "DictConfig._is_missing": "visit a config without resolving it",
            "DictConfig._is_interpolation": "visit a config without resolving it",
            "nodes.AnyNode._value": "read a value as it is written",
        },
    ),
]

MLFLOW: Sequence[PrivatePart] = _parts(
    "tracking/mlflow_internals.py",
    "mlflow.",
    {
        "store.tracking.sqlalchemy_store.SqlAlchemyStore": (
            "create a tracking database in one step",
            ("db_uri", "default_artifact_root"),
        ),
        "store.tracking.sqlalchemy_store.SqlAlchemyStore._dispose_engine": "close the database that it has created",
        "utils.credentials.get_default_host_creds": "ask a server for its HTTP status with the user's credentials",
        "utils.rest_utils.http_request": (
            "ask a server for its HTTP status",
            ("host_creds", "endpoint", "method", "raise_on_status"),
        ),
    },
)

PARTS: Sequence[PrivatePart] = [*RAY, *TUNE, *HYDRA, *MLFLOW]

_TRAIN_V2 = "ray.train.v2._internal.constants"
VARIABLES: Mapping[str, str] = {
    # A variable → the module that reads it; `raylet` for a program of Ray.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": _TRAIN_V2,
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _TRAIN_V2,
    "RAY_TRAIN_ENABLE_PRINT_PATCH": _TRAIN_V2,
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": _TRAIN_V2,
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": _TRAIN_V2,
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": _TRAIN_V2,
    "RAY_CHDIR_TO_TRIAL_DIR": "ray.train.constants",
    "RAY_DEDUP_LOGS": "ray._private.ray_constants",
    "RAY_SCHEDULER_EVENTS": "ray._private.ray_constants",
    "RAY_USAGE_STATS_ENABLED": "ray._common.usage.usage_constants",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "ray._private.accelerators.accelerator",
    "RAY_enable_metrics_collection": "raylet",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "ray.tune.execution.tune_controller",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "ray.tune.utils.callback",
}
