"""What runs as a job's driver on a shared cluster: `python -m raytrainer.cluster.entry`, the same words for every run.

What to run comes as files beside the code, in the package `raytrainer_request`; nothing of it is in a command line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytrainer import environment
from raytrainer.config import Composition, Experiment, from_text
from raytrainer.errors import ConfigError, RaytrainerError, Refused, Stopped
from raytrainer.run import Record
from raytrainer.storage import Storage

REQUEST = "raytrainer_request"
MOUNTED = "RAYTRAINER_REQUEST"  # a variable: where the files of a request are that came as a Kubernetes ConfigMap


@dataclass(frozen=True)
class Asked:
    """What was submitted.

    Attributes:
        kind: `run` or `sweep`.
        argv: The command line, for the records.
        config: `Composition.text` of a run.
        choices: Its group choices.
        plan: Of a sweep: what `sweep.json` holds.
        changed: Optimizer settings that a resume has given.
        job: Address, submission_id and content, for the run's record.
        forward_env, env_file: As `environment.provide`.
    """

    kind: str
    argv: list[str]
    config: str
    choices: dict[str, str]
    plan: dict[str, Any] | None
    changed: list[str]
    job: dict[str, str]
    forward_env: list[str]
    env_file: str | None

    @classmethod
    def read(cls, folder: Path) -> Asked:
        """What the files of a request say."""
        found: Mapping[str, Any] = json.loads((folder / "request.json").read_text())
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        return cls(**{"config": (folder / "config.yaml").read_text(), "plan": None, "changed": [], **known})


def main() -> int:
    """Runs what was submitted; returns the exit code that the same command has on a laptop."""
    try:
        return run(Asked.read(_folder()))
    except Refused as error:
        print(f"raytrainer: refused: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"raytrainer: stopped: {error}", file=sys.stderr)
        return error.exit_code
    except RaytrainerError as error:
        print(f"raytrainer: failed: {error}", file=sys.stderr)
        return 1


def run(asked: Asked) -> int:
    """Runs a request here, in the middle of the cluster."""
    environment.provide(asked.forward_env, asked.env_file)
    return _sweep(asked) if asked.kind == "sweep" else _run(asked)


def _run(asked: Asked) -> int:
    from raytrainer import run

    composition = replace(from_text(asked.config), choices=tuple(sorted(asked.choices.items())))
    here(composition.experiment)
    outcome = run.launch(
        composition,
        argv=asked.argv,
        record=_earlier(composition, asked.job),
        changed=asked.changed,
        job=asked.job,
    )
    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    print(run.summary(outcome, "python -m raytrainer"), flush=True)
    return outcome.exit_code


def _sweep(asked: Asked) -> int:
    from raytrainer import sweep

    plan = sweep.Plan.from_dict(asked.plan or {})
    for composition in plan.compositions.values():
        here(composition.experiment)
    outcome = sweep.launch(plan, argv=asked.argv, record=_earlier(plan.first, asked.job), job=asked.job)
    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    print(sweep.summary(outcome, "python -m raytrainer"), flush=True)
    return outcome.exit_code


def here(e: Experiment) -> None:
    """The experiment as it is launched from within the cluster. What is logged, the text, still says how it was sent."""
    e.cluster.kind, e.cluster.address = "existing", "auto"
    e.cluster.runtime_env = {}  # the job's own, which its workers inherit


def _earlier(composition: Composition, job: Mapping[str, str]) -> Record | None:
    """The record of the same request's earlier attempt, whose driver died: it goes on, in the same MLflow run.

    Raises:
        ConfigError: The name belongs to something else.
    """
    e = composition.experiment
    storage = Storage(e.storage_path or "").child(e.name or "")
    record = Record.read(storage)
    if record is None:
        return None
    if record.job.get("content") != job.get("content") and not job.get("resumes"):
        raise ConfigError(
            f"is the name of a run that exists in {e.storage_path}, of another content; resume {e.name} goes on with it",
            key="name",
            value=e.name,
        )
    return record


def _folder() -> Path:
    """Where Ray, or Kubernetes, has put the request's files."""
    if mounted := os.environ.get(MOUNTED):
        return Path(mounted)
    found = importlib.util.find_spec(REQUEST)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"the package {REQUEST}, which a submission brings, is not here: this is no job of raytrainer's"
        )
    return Path(found.submodule_search_locations[0])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
