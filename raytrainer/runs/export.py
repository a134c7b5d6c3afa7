"""`export ID`: write a checkpoint's weights as safetensors, the config and, on request, MLflow's form of the model."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytrainer import mlflow_model, tracking
from raytrainer.attempt import CONFIG
from raytrainer.config import Experiment, build, checkpoint_mode, from_text, locate
from raytrainer.errors import CheckpointNotFound, ConfigError, StorageError
from raytrainer.names import few
from raytrainer.runs import printing
from raytrainer.runs.arguments import VerbParser
from raytrainer.runs.recorded import TrainedRun, trained_run
from raytrainer.runs.resolve import tracking_uri_of
from raytrainer.tracking.server import Server

ABOUT = "Write the weights of a checkpoint (the best) as safetensors, with the config, into a new folder."
WEIGHTS = "model.safetensors"
_MLFLOW = "mlflow_model"


def add_arguments(parser: VerbParser) -> None:
    parser.add_checkpoint()
    add = parser.add_argument
    add("--to", metavar="DIR", help="the folder (NAME-step-N); it must not exist")
    add("--mlflow", action="store_true", help="also write the MLflow model to DIR/mlflow_model")
    about = "upload the MLflow model to the run, and register it as a new version of NAME"
    add("--register", metavar="NAME", help=about)
    parser.add_id()


def run(arguments: argparse.Namespace) -> int:
    if arguments.to and "://" in arguments.to:
        raise ConfigError("must be a folder of this machine", key="--to", value=arguments.to)
    exported = export(
        arguments.id,
        checkpoint=arguments.checkpoint or "best",
        to=Path(arguments.to).absolute() if arguments.to else None,
        mlflow=arguments.mlflow,
        register=arguments.register,
        say=printing.say,
    )
    print(printing.to_json(asdict(exported)) if arguments.json else exported.text())
    return 0


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        name: The run or trial.
        step: The optimizer step of the checkpoint.
        metric: The checkpoint's value of the monitor.
        averaged: Whether the weights are those of the EMA.
        folder: The folder that was written.
        files: The names of its files.
        version: The version of the registered model.
    """

    name: str
    step: int
    metric: float | None
    averaged: bool
    folder: str
    files: tuple[str, ...]
    version: str | None = None

    def text(self) -> str:
        """Return the result as text for a person."""
        metric = "" if self.metric is None else f", metric {self.metric:.6g}"
        rows = [("exported", f"{self.name}, step {self.step}{metric}{', averaged weights' if self.averaged else ''}")]
        rows += [("to", f"{self.folder}: {', '.join(self.files)}")]
        if self.version is not None:
            rows.append(("version", self.version))
        return "\n".join(f"{name:<8} {text}" for name, text in rows)


def export(
    identifier: str,
    *,
    checkpoint: str = "best",
    to: Path | None = None,
    mlflow: bool = False,
    register: str | None = None,
    say: Callable[[str], None],
) -> Export:
    """Write a checkpoint's weights into a new folder. If anything fails, the folder is not created.

    Args:
        identifier: The ID of a run, or of a trial of a sweep.
        checkpoint: `best`, `last`, or a step.
        to: The folder; None for NAME-step-N in the current directory.
        mlflow: Whether to write MLflow's form of the model too, which needs the run's code and data here.
        register: The name of a registered model that gets MLflow's form as a new version.
        say: Called with messages about the progress.

    Raises:
        RunNotFound, ConfigError: As for `trained_run`; the folder exists; MLflow does not have the run.
        CheckpointError, StorageError, TrackingError: Something cannot be read, written or uploaded.
    """
    source = trained_run(identifier, checkpoint)
    e = from_text(source.text).experiment
    if to is not None:
        _check_new(to)
    uri = tracking_uri_of(source.record)
    if register is not None and (uri is None or source.run_id is None or source.run_id.startswith("offline-")):
        raise ConfigError(f"needs the run in MLflow, which does not have {source.name}", key="--register")
    info, weights, averaged = _read(source, e, checkpoint)
    folder = to or Path.cwd() / f"{source.name}-step-{info.step}"
    _check_new(folder)
    version = None
    with _temporary_beside(folder) as temporary:
        made = temporary / "export"
        made.mkdir()
        _write_weights(made, e, weights, {"raytrainer.run": source.name, "raytrainer.step": str(info.step)}, say)
        (made / CONFIG).write_text(source.text)
        if mlflow or register is not None:
            how = mlflow_model.export(source.text, (), weights, made / _MLFLOW, step=info.step)
            say(f"the MLflow model is in the form {how}")
        if register is not None:
            assert uri is not None
            assert source.run_id is not None
            version = _register(uri, source.run_id, info.step, made / _MLFLOW, register)
        if not mlflow:
            shutil.rmtree(made / _MLFLOW, ignore_errors=True)
        made.rename(folder)
    files = tuple(sorted(path.name for path in folder.iterdir()))
    return Export(source.name, info.step, info.metric, averaged, str(folder), files, version)


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise ConfigError("exists already; nothing is overwritten", key="--to", value=str(folder))


@contextmanager
def _temporary_beside(folder: Path) -> Iterator[Path]:
    """Provide a temporary directory on the same disk as the future folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", key="--to", value=str(folder)) from error
    try:
        with temporary as name:
            yield Path(name)
    except OSError as error:  # for instance a full disk; the directory is already deleted
        raise StorageError(f"{folder}: {error.strerror or error}") from error


def _read(source: TrainedRun, e: Experiment, checkpoint: str) -> tuple[Any, dict[str, Any], bool]:
    """Return the checkpoint, its weights on the CPU, and whether they are averaged."""
    from raytrainer.checkpoint import Checkpointer, unread

    checkpoints = Checkpointer(source.place.child("checkpoints"), mode=checkpoint_mode(e))
    info = checkpoints.best() if checkpoint == "best" else None
    if info is None:
        newest_first = reversed(checkpoints.list())
        info = next((saved for saved in newest_first if checkpoint in ("best", "last", str(saved.step))), None)
    if info is None:
        raise CheckpointNotFound(f"{source.name}: its checkpoint {checkpoint} is gone")
    shared, _ = checkpoints.load(info, {"optimizer": unread})
    return info, shared.get("ema") or shared["model"], bool(shared.get("ema"))


def _write_weights(
    folder: Path, e: Experiment, weights: Mapping[str, Any], about: Mapping[str, str], say: Callable[[str], None]
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from torch import Tensor

    from raytrainer.checkpoint import EXTRA_STATE
    from raytrainer.checkpoint.tree import flatten

    others = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
    weights = {name: value for name, value in weights.items() if name not in others}
    # A transformers model is saved in its own format with its config, so that `from_pretrained` reads the folder.
    if (model := _hugging_face(e, say)) is not None:
        if others:
            say(f"skipped, because save_pretrained writes only tensors: {few(sorted(others))}")
        model.save_pretrained(folder, state_dict=weights, max_shard_size="10000GB")
        return
    if others:
        text, inside = flatten(others)
        if inside:
            say(f"skipped, because it is not a tensor but contains some: {few(sorted(others))}")
        else:
            say(f"{few(sorted(others))}: not a tensor, so it is in the metadata of {WEIGHTS}, as JSON")
            about = {**about, EXTRA_STATE: text.decode()}

    # A further name of a tensor gets a copy, because the file has no shared memory.
    taken: set[int] = set()
    tensors = {}
    for name, tensor in weights.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **about})
    except SafetensorError as error:  # it also stands for an OSError
        raise StorageError(f"{folder / WEIGHTS}: {error}") from error


def _hugging_face(e: Experiment, say: Callable[[str], None]) -> Any:
    """Return the model if transformers defines its class, `from_pretrained` or `from_config`, else None."""
    try:
        target = locate("model", (e.model or {})["_target_"])
        owner = target if isinstance(target, type) else getattr(target, "__self__", target)
        if str(getattr(owner, "__module__", "")).partition(".")[0] != "transformers":
            return None
        return build(e.model or {})
    except ConfigError as error:  # its code or its config's folder is not here; the weights are
        say(f"without the model's own config, since it cannot be made here: {error}")
        return None


def _register(uri: str, run_id: str, step: int, model: Path, name: str) -> str:
    """Upload the model to the run's artifacts, once, and register it. Return the version."""
    server, folder = Server(uri, timeout_s=60), f"export/step-{step}"
    if f"{folder}/{model.name}/MLmodel" not in server.artifacts(run_id, f"{folder}/{model.name}"):
        server.log_artifact(run_id, model, folder)
    return tracking.register_model(uri, run_id, f"{folder}/{model.name}", name)
