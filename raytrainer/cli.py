"""The command line: Hydra's own, with verbs in front. Imports neither torch, ray nor mlflow until something runs.

Exit codes: 0 finished, 1 failed, 2 refused before it started, 130 interrupted, 143 stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from raytrainer import config
from raytrainer.errors import ConfigError, RaytrainerError, Refused, Stopped, nearest

VERBS = {
    "check": "check EXPERIMENT…        everything that can be known before a start; starts nothing",
    "resume": "resume ID [key=value…]   go on from the run's last checkpoint",
    "rerun": "rerun ID [key=value…]    a new run of the same thing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A console script does not have the current directory on its path, `python -m` does: a user's package is there.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if arguments and arguments[0].isalpha():
            return _verb(arguments[0], arguments[1:])
        return _hydra(arguments, _train)
    except Refused as error:
        _complain("refused", error)
        return 2
    except Stopped as error:
        _complain("stopped", error)
        return error.exit_code
    except RaytrainerError as error:
        _complain("failed", error)
        return 1
    except KeyboardInterrupt:
        return 130


def _verb(verb: str, rest: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is not a command; valid: {', '.join(nearest(verb, VERBS) or VERBS)}")
    if verb == "check":
        return _hydra(rest, _check)
    if not rest or rest[0].startswith("-") or "=" in rest[0]:
        raise ConfigError(f"which run? {VERBS[verb]}")
    from raytrainer import history, provenance, run

    if verb == "resume":
        composition, record, changed = history.to_resume(rest[0], rest[1:])
        return _told(run.launch(composition, argv=["resume", *rest], record=record, changed=changed), provenance.program())
    composition = history.to_rerun(rest[0], rest[1:])
    return _told(run.launch(composition, argv=["rerun", *rest]), provenance.program())


def _train(composition: config.Composition, arguments: list[str]) -> int:
    from raytrainer import provenance, run

    return _told(run.launch(composition, argv=arguments), provenance.program())


def _check(composition: config.Composition, arguments: list[str]) -> int:
    from raytrainer import run

    print(f"ok: {composition.experiment.name} would run on {run.check(composition)}")
    return 0


def _told(outcome: Any, program: str) -> int:
    from raytrainer import run

    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    print(run.summary(outcome, program), flush=True)
    return int(outcome.exit_code)


def _hydra(arguments: list[str], task: Callable[[config.Composition, list[str]], int]) -> int:
    """Hydra's own command line, with its errors in our words and our exit codes."""
    from hydra._internal.utils import _run_hydra, get_args_parser

    parser = get_args_parser()
    parsed = parser.parse_args(arguments)
    exit_codes: list[int] = []

    def job(cfg: DictConfig) -> None:
        exit_codes.append(task(config.from_hydra(cfg, parsed.overrides), arguments))

    config.register_schema()
    overrides = list(parsed.overrides)
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed and ending the process with 1
    try:
        _run_hydra(
            args=parsed,
            args_parser=parser,
            task_function=job,
            config_path=f"pkg://{config.CONFIG_MODULE}",
            config_name=config.CONFIG_NAME,
        )
    except (RaytrainerError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise config.explain(error, overrides) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
    return max(exit_codes, default=0)


def _complain(what: str, error: BaseException) -> None:
    print(f"raytrainer: {what}: {error}", file=sys.stderr)


def entry() -> None:
    """The console script."""
    sys.exit(main())
