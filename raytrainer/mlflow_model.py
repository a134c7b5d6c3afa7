"""Write MLflow's form of a trained model in a separate process, without process group or GPU and with a time limit.

After training, no user code runs on a single rank of a process group: a collective in it would wait forever.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrainer import config
from raytrainer.core.isolated import Isolated
from raytrainer.errors import TrainingError
from raytrainer.own_code import CannotCopy, copy_sources

GRAPH_S, PICKLE_S = 300.0, 120.0
"""Seconds for the export as a graph, which calls the model; and for the one that only makes it."""
_STATE, _CODE = "state.pt", "code"


def export(
    text: str,
    overrides: Sequence[str],
    weights: Mapping[str, Any],
    path: Path,
    *,
    step: int,
    example: Mapping[str, Any] | None = None,
    no_graph: str | None = None,
    graph_s: float = GRAPH_S,
) -> str:
    """Write the model into the folder `path`: as a graph, or else pickled with the user's own source.

    Args:
        text, overrides: The config of its run.
        weights: A state dict on the CPU.
        path: The folder to create.
        step: The step of the weights.
        example: The result of `Example.on_cpu()`; None to call the loss on the first batch to get an example.
        no_graph: Why the model cannot be exported as a graph, if that is known.
        graph_s: The time limit of the export as a graph, in seconds.

    Returns:
        The form as text: `pt2`, or `pickle (REASON)`.

    Raises:
        TrainingError: The model cannot be built again or pickled.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="raytrainer-") as folder:
        state = str(Path(folder, _STATE))
        torch.save({"weights": weights, "example": None if example is None else dict(example)}, state)
        request: dict[str, Any] = {
            "state": state,
            "text": text,
            "overrides": list(overrides),
            "path": str(path),
            "step": step,
        }
        if re.search(r"_target_: ['\"]?__main__\.", text):  # only this process, which has no group, has that class
            return str(write(**request, graph=no_graph is None, reason=no_graph or ""))
        reason = no_graph or ""
        for graph, limit_s in ((True, graph_s), (False, PICKLE_S)):
            if graph and no_graph is not None:
                continue
            ended = Isolated(
                "raytrainer.mlflow_model:write",
                {**request, "graph": graph, "reason": reason},
                path=[place for place in sys.path if place],
                threads=torch.get_num_threads(),
            ).run(limit_s)
            if ended.problem is None:
                return str(ended.value)
            reason = f"as a graph {ended.problem}" if graph else ended.problem
            shutil.rmtree(path, ignore_errors=True)
    raise TrainingError(reason)


# --- in the process ---------------------------------------------------------------------------------------------------


def write(state: str, text: str, overrides: Sequence[str], path: str, step: int, graph: bool, reason: str = "") -> str:
    """Write the model in the calling process, and return the form as text.

    Args:
        state: The file that `export` has written.
        text, overrides, path, step: As for `export`.
        graph: Whether to try the export as a graph.
        reason: Why not.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    from raytrainer.state import restore_module

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    e = config.experiment_of(text, overrides)
    kept = torch.load(state, weights_only=False)  # the parent process has just written it
    # A new model contains neither torch.compile nor DDP. Every consumer can run float32.
    model = config.build(e.model or {}).float().eval()
    restore_module(model, kept["weights"], f"the checkpoint of step {step}")
    requirements = [f"torch=={torch.__version__.partition('+')[0]}", "numpy"]
    if graph:
        try:
            with torch.no_grad():
                seen = kept["example"] or called_with(e, model)
                inputs = seen["args"]
                if seen["kwargs"] or len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
                    raise ValueError("its forward takes more than one tensor")
                example = inputs[0].numpy()
                mlflow.pytorch.save_model(
                    model,
                    path,
                    signature=infer_signature(example, seen["output"].numpy()),
                    input_example=example,
                    pip_requirements=requirements,
                    serialization_format="pt2",
                )
            return "pt2"
        except Exception as error:  # noqa: BLE001  torch.export fails in many ways; then the other format is used
            reason = first_line(error)
            shutil.rmtree(path, ignore_errors=True)
    code: list[str] = []
    folder = Path(state).with_name(_CODE)
    try:
        code = [str(place) for place in copy_sources(_modules_of(model), folder)]
    except CannotCopy as problem:
        reason = f"{reason}; without its source, since {problem}"
    mlflow.pytorch.save_model(
        model, path, pip_requirements=requirements, serialization_format="pickle", code_paths=code or None
    )
    return f"pickle ({reason})"[:500]


def called_with(e: config.Experiment, model: Any) -> dict[str, Any]:
    """Return what the loss passes to `model` on the first batch, for a run that recorded no example."""
    from raytrainer.batches import map_tensors
    from raytrainer.trainer import Trainer
    from raytrainer.trainer.example import ExampleRecorder

    e.trainer.strategy, e.trainer.compile, e.trainer.ema_decay, e.init_from = "ddp", False, None, None
    e.callbacks = {}
    trainer, recorder = Trainer(e), ExampleRecorder()
    batch = next(trainer.example_batches())
    data = map_tensors(batch.micro[0].data, lambda t: t.detach().cpu().float() if t.is_floating_point() else t.cpu())
    with recorder.watching(model):
        trainer.loss(model, data)
    if recorder.example is None or recorder.example.too_large:
        raise ValueError("the loss does not call the model with a small batch")
    return recorder.example.on_cpu()


def _modules_of(model: Any) -> set[str]:
    """Return the modules that a pickle of the model names: those of its classes and of the functions that it holds."""
    names = set()
    for module in model.modules():
        for value in (type(module), *vars(module).values()):
            kind = value if isinstance(value, type) or callable(value) else type(value)
            names.add(str(getattr(kind, "__module__", None) or type(kind).__module__))
    return names


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
