"""The command line: Hydra's own, with verbs in front. Imports neither torch, ray nor mlflow until something runs.

Exit codes: 0 finished, 1 failed, 2 refused before it started, 130 interrupted, 143 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from omegaconf import DictConfig, OmegaConf

from raytrainer import config, provenance
from raytrainer.errors import ConfigError, RaytrainerError, Refused, Stopped, nearest

VERBS = {
    "check": "check EXPERIMENT… (everything that can be known before a start; starts nothing)",
    "resume": "resume ID [key=value…] (go on from the run's last checkpoint)",
    "rerun": "rerun ID [key=value…] (a new run of the same thing)",
}
_FULL_ERROR = "HYDRA_FULL_ERROR"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A console script does not have the current directory on its path, `python -m` does: a user's package is there.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    return _guarded(lambda: _command(arguments))


def _command(arguments: list[str]) -> int:
    if arguments and arguments[0].isalpha():
        return _verb(arguments[0], arguments[1:])
    outcomes: list[Any] = []

    def train(composition: config.Composition, arguments: list[str]) -> int:
        outcomes.append(_trained(composition, arguments))
        return int(outcomes[-1].exit_code)

    code = _hydra(arguments, train, _sweep)
    if len(outcomes) > 1:  # a grid of whole runs
        from raytrainer import run

        print(f"\n{run.table(outcomes)}", flush=True)
    return code


def _guarded(call: Callable[[], int]) -> int:
    """The exit code of a call, with what it raised told in a line."""
    try:
        return call()
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
    except SystemExit as end:  # argparse has shown something, or Hydra found an option's argument to be wrong
        return 2 if end.code else 0
    except BrokenPipeError:  # `raytrainer --cfg job | head`
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  or Python complains at its exit
        return 141


def _verb(verb: str, rest: list[str]) -> int:
    if verb not in VERBS:
        close = nearest(verb, VERBS)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(VERBS)}"
        raise ConfigError(f"{verb!r} is not a command{hint} (keys are given as key=value)")
    if verb == "check":
        return _hydra(rest, _check, _check_sweep)
    if not rest or rest[0].startswith("-") or "=" in rest[0]:
        raise ConfigError(f"which run? {VERBS[verb]}")
    for argument in rest[1:]:
        if argument.startswith("-"):
            raise ConfigError(f"{argument} has no meaning here; {VERBS[verb]}")
    from raytrainer import history

    record, _ = history.find(rest[0])
    if verb == "rerun":
        if record.kind == "sweep" and history.trial_of(rest[0], record) is None:
            return _run_sweep(history.to_rerun_sweep(rest[0], rest[1:]), ["rerun", *rest])
        return int(_trained(history.to_rerun(rest[0], rest[1:]), ["rerun", *rest]).exit_code)
    if record.kind == "sweep":
        plan, record = history.to_resume_sweep(rest[0], rest[1:])
        return _run_sweep(plan, ["resume", *rest], record)
    from raytrainer import run

    composition, record, changed = history.to_resume(rest[0], rest[1:])
    outcome = run.launch(composition, argv=["resume", *rest], record=record, changed=changed)
    return _told(outcome, run.summary(outcome, provenance.program()))


def _trained(composition: config.Composition, arguments: list[str]) -> Any:
    """The outcome of a run, after its last words."""
    from raytrainer import run

    outcome = run.launch(composition, argv=arguments)
    _told(outcome, run.summary(outcome, provenance.program()))
    return outcome


def _check(composition: config.Composition, arguments: list[str]) -> int:
    from raytrainer import run

    where = run.check(composition)
    print(f"ok: {composition.experiment.name} would train: {where}")
    return 0


def _sweep(plan: Any, arguments: list[str]) -> int:
    return _run_sweep(plan, arguments)


def _check_sweep(plan: Any, arguments: list[str]) -> int:
    from raytrainer import sweep

    where = sweep.check(plan)
    print(f"ok: {plan.experiment.name} would run {sweep.in_words(plan)}, each on {where}")
    return 0


def _run_sweep(plan: Any, arguments: list[str], record: Any = None) -> int:
    from raytrainer import sweep

    outcome = sweep.launch(plan, argv=arguments, record=record)
    return _told(outcome, sweep.summary(outcome, provenance.program()))


def _told(outcome: Any, summary: str) -> int:
    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    print(summary, flush=True)
    return int(outcome.exit_code)


class _Ended(BaseException):
    """Leaves Hydra, which would print or swallow an Exception: a bug's exception, or the code of a stopped job."""

    def __init__(self, cause: Exception | int) -> None:
        self.cause = cause


def _hydra(
    arguments: list[str],
    task: Callable[[config.Composition, list[str]], int],
    sweep_task: Callable[[Any, list[str]], int],
) -> int:
    """Hydra's own command line, with its errors in our words and our exit codes.

    Args:
        arguments: Those after the program's name, or after the verb.
        task: What is done with a composed config.
        sweep_task: What is done with the plan of a sweep.
    """
    from hydra import version
    from hydra._internal.utils import _run_hydra

    parser = _parser()
    parsed = parser.parse_args(arguments)
    overrides, asked = list(parsed.overrides), os.environ.get(_FULL_ERROR)
    codes: list[int] = []

    def known() -> list[str]:
        return config.composed_keys(overrides, parsed.config_dir)

    def one(cfg: DictConfig) -> int:
        try:
            composition = config.from_hydra(cfg)
        except Exception as error:
            raise config.explain(error, overrides, known) from error
        if sweep := dict(composition.choices).get("sweep"):  # of an experiment's own, or several of them
            raise ConfigError(
                "is of many trials: one, with -m in front of what is swept over" if parsed.multirun else "needs -m",
                key="sweep",
                value=sweep,
            )
        return task(composition, arguments)

    def job(cfg: DictConfig) -> None:
        try:
            with _variable(_FULL_ERROR, asked):
                codes.append(_guarded(lambda: one(cfg)))
        except Exception as error:
            raise _Ended(error) from error
        if codes[-1] >= 128:  # stopped: the rest of a sweep too
            raise _Ended(codes[-1])

    def sweep(task_overrides: list[str], cfg: DictConfig) -> None:
        """What `hydra/sweeper=ray_tune` calls instead of `job`: all trials are one task."""

        def planned() -> int:
            from raytrainer.sweep import make_plan

            choice = cfg.hydra.runtime.choices.get("sweep")
            if choice is None:
                raise ConfigError("is needed with hydra/sweeper=ray_tune: random, grid, asha, optuna, pbt", key="sweep")
            plan = make_plan(
                task_overrides,
                choice=choice,
                space=cast(dict[str, Any], OmegaConf.to_container(cfg.sweep.space, resolve=True)),
                groups=config.group_names(parsed.config_dir),
                config_dir=parsed.config_dir,
            )
            return sweep_task(plan, arguments)

        with _variable(_FULL_ERROR, asked):
            codes.append(_guarded(planned))

    job.sweep = sweep  # type: ignore[attr-defined]
    chosen = any(config.key_of(o) == "sweep" for o in overrides)
    if chosen and not parsed.multirun and not (parsed.cfg or parsed.info or parsed.shell_completion):
        meant = shlex.join(["-m", *arguments])
        raise ConfigError(f"is of many trials, which -m runs: {provenance.program()} {meant}", key="sweep")
    if parsed.shell_completion:
        _complete_after_verb()
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise ConfigError("is not a directory", key="--config-dir", value=parsed.config_dir)
    try:
        if parsed.multirun and not chosen:
            config.check_sweep(overrides, parsed.config_dir)
        elif parsed.cfg in ("job", "all"):
            config.check_keys(overrides, parsed.config_dir)
        version.setbase("1.3")
        config.register_schema()
        # With the variable set errors come here; without, Hydra prints them and ends the process with 1.
        with _variable(_FULL_ERROR, "1"), config.quiet():
            _run_hydra(
                args=parsed,
                args_parser=parser,
                task_function=job,
                config_path=f"pkg://{config.CONFIG_MODULE}",
                config_name=config.CONFIG_NAME,
            )
    except _Ended as ended:
        if isinstance(ended.cause, Exception):
            raise ended.cause from None
    except Exception as error:
        if asked == "1":
            raise
        raise config.explain(error, overrides, known) from error
    return max(codes, default=0)


def _complete_after_verb() -> None:
    """The line to complete, as Hydra knows it: the program's name, then overrides."""
    words = os.environ.get("COMP_LINE", "").replace("python -m raytrainer", "raytrainer").split(" ")
    if len(words) > 2 and words[1] in VERBS:
        del words[1]
    if "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = " ".join(words)


def _parser() -> argparse.ArgumentParser:
    """Hydra's parser, with our name, version and form of errors."""
    from importlib.metadata import version

    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {provenance.program()} --help shows what there is")

    parser: argparse.ArgumentParser = get_args_parser()
    parser.prog = provenance.program()
    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if "--version" in action.option_strings:
            action.version = f"raytrainer {sys.modules['raytrainer'].__version__} (Hydra {version('hydra-core')})"  # type: ignore[attr-defined]
            action.help = "Show the version and exit"
    return parser


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable for a while; None: unset."""
    before = os.environ.get(name)
    try:
        _set(name, value)
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _complain(what: str, error: BaseException) -> None:
    first, *more = str(error).splitlines() or [""]
    print("\n  ".join([f"raytrainer: {what}: {first}", *more]), file=sys.stderr)
