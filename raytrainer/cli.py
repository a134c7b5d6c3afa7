"""The command line: Hydra's own, with commands in front. It imports torch, Ray and MLflow only when something runs.

Exit codes: 0 finished, 1 failed, 2 refused before it started, 129 hung up, 130 interrupted, 143 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

from raytrainer import completion, config, provenance
from raytrainer.errors import ConfigError, RaytrainerError, Refused, Stopped, nearest

VERBS = ("check", "list", "status", "logs", "stop", "resume", "rerun", "evaluate", "export", "prune")
_FULL_ERROR = "HYDRA_FULL_ERROR"
_DRY_RUN = "--dry-run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Unlike `python -m`, a console script does not have the current directory, with the user's package, on its path.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    return _guarded(lambda: _command(arguments))


def _command(arguments: list[str]) -> int:
    # --dry-run is not an option of Hydra, whose parser would refuse it.
    dry, arguments = _DRY_RUN in arguments, [argument for argument in arguments if argument != _DRY_RUN]
    if arguments and arguments[0].isalpha():
        return _verb(arguments[0], arguments[1:], dry=dry)
    if dry:
        return _hydra(arguments, _would_send, _would_send, before=[_DRY_RUN])
    outcomes: list[Any] = []

    def train(composition: config.Composition, arguments: list[str]) -> int:
        if _is_sent(composition):
            return _submit(composition, arguments)
        outcomes.append(_trained(composition, arguments))
        return int(outcomes[-1].exit_code)

    code = _hydra(arguments, train, _sweep)
    if len(outcomes) > 1:  # a grid of whole runs
        from raytrainer import attempt

        print(f"\n{attempt.table(outcomes)}", flush=True)
    return code


def _guarded(call: Callable[[], int]) -> int:
    """Return the exit code of a call, and report its error in one line."""
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
    except SystemExit as end:  # argparse has shown help, or Hydra has refused an option's argument
        return 2 if end.code else 0


def _verb(verb: str, rest: list[str], *, dry: bool) -> int:
    if verb not in VERBS:
        close = nearest(verb, VERBS)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(VERBS)}"
        raise ConfigError(f"{verb!r} is not a command{hint} (keys are given as key=value)")
    if verb == "check":
        return _hydra(rest, _check, _check_sweep, before=["check", *([_DRY_RUN] if dry else [])])
    from raytrainer import runs

    if verb not in ("resume", "rerun", "evaluate"):
        if dry and verb != "prune":
            raise ConfigError(f"{_DRY_RUN} is for experiment=…, resume, rerun, evaluate and prune")
        rest = [*rest, _DRY_RUN] if dry else rest
        return runs.command(verb, rest)
    parser = runs.parser(verb)
    given = parser.parse(rest)
    if "=" in given.id:
        raise ConfigError(f"which run? {parser.takes()}")
    if verb == "evaluate":
        composition = runs.to_evaluate(
            given.id, given.overrides, checkpoint=given.checkpoint or "best", config_dir=given.config_dir
        )
        return _launch(composition, [verb, *rest], as_json=given.json, dry=dry)
    return (_rerun if verb == "rerun" else _resume)(given, rest, dry=dry)


def _rerun(given: argparse.Namespace, rest: list[str], *, dry: bool) -> int:
    from raytrainer import runs

    options = [*(["--json"] if given.json else []), *([_DRY_RUN] if dry else [])]
    code = runs.rerun_there(given.id, [*given.overrides, *options], here=given.here, say=_say)
    if code is not None:
        return code
    record, _ = runs.find(given.id)
    if record.kind == "sweep" and runs.trial_of(given.id, record) is None:
        plan = runs.to_rerun_sweep(given.id, given.overrides)
        return _would_send(plan, ["rerun", *rest]) if dry else _run_sweep(plan, ["rerun", *rest], as_json=given.json)
    composition = runs.to_rerun(given.id, given.overrides)
    return _launch(composition, ["rerun", *rest], as_json=given.json, dry=dry)


def _launch(composition: config.Composition, arguments: list[str], *, as_json: bool, dry: bool) -> int:
    """Start a new run that a command has composed, or show or submit it. Return the exit code."""
    if dry:
        return _would_send(composition, arguments)
    if _is_sent(composition):
        return _submit(composition, arguments, as_json=as_json)
    return int(_trained(composition, arguments, as_json=as_json).exit_code)


def _resume(given: argparse.Namespace, rest: list[str], *, dry: bool) -> int:
    from raytrainer import attempt, runs

    record, _ = runs.find(given.id)
    if record.kind == "sweep":
        plan, record = runs.to_resume_sweep(given.id, given.overrides)
        if dry:
            return _would_send(plan, ["resume", *rest], record)
        return _run_sweep(plan, ["resume", *rest], record, as_json=given.json)
    composition, record, changed = runs.to_resume(given.id, given.overrides)
    if dry:
        return _would_send(composition, ["resume", *rest], record, changed)
    if _is_sent(composition):
        return _submit(composition, ["resume", *rest], record, changed, as_json=given.json)
    outcome = attempt.launch(composition, argv=["resume", *rest], record=record, changed=changed)
    return _told(outcome, attempt.summary(outcome, provenance.program()), as_json=given.json)


def _trained(composition: config.Composition, arguments: list[str], *, as_json: bool = False) -> Any:
    """Train a run, print its summary, and return its outcome."""
    from raytrainer import attempt

    outcome = attempt.launch(composition, argv=arguments)
    _told(outcome, attempt.summary(outcome, provenance.program()), as_json=as_json)
    return outcome


def _is_sent(target: Any) -> bool:
    """Return whether a composed config, or the plan of a sweep, runs as a job on a shared cluster."""
    return bool(target.experiment.backend.submits)


def _submit(
    target: Any, arguments: list[str], record: Any = None, changed: Sequence[str] = (), *, as_json: bool = False
) -> int:
    # With --json, standard output is for a program, so the job's output goes to standard error, like progress.
    out = sys.stderr if as_json else sys.stdout
    backend = target.experiment.backend
    submission = backend.submit(target, arguments, record=record, changed=changed, say=_say, out=out)
    print(json.dumps(submission.to_json()) if as_json else submission.text(provenance.program()), flush=True)
    return int(submission.exit_code)


def _check(composition: config.Composition, arguments: list[str], record: Any = None) -> int:
    if _is_sent(composition):
        where = composition.experiment.backend.check(composition, arguments, record=record, say=_say)
    else:
        from raytrainer import attempt

        where = attempt.check(composition, record, say=_say)
    e = composition.experiment
    print(f"ok: {e.name} would {'train' if e.evaluate is None else 'evaluate'}: {where}")
    return 0


def _would_send(target: Any, arguments: list[str], record: Any = None, changed: Sequence[str] = ()) -> int:
    """Print everything that would be sent to a shared cluster, or where else it would run. Nothing is started.

    Args:
        target: A composed config, or the plan of a sweep.
        arguments: The command line.
        record: The record of the run that would continue.
        changed: As for `attempt.launch`.
    """
    if not _is_sent(target):
        if isinstance(target, config.Composition):
            return _check(target, arguments, record)
        return _check_sweep(target, arguments, record)
    text = target.experiment.backend.render(target, arguments, record=record, changed=changed, say=_say)
    print(f"---\n{text}", end="", flush=True)
    return 0


def _sweep(plan: Any, arguments: list[str]) -> int:
    return _run_sweep(plan, arguments)


def _check_sweep(plan: Any, arguments: list[str], record: Any = None) -> int:
    from raytrainer import sweep

    if _is_sent(plan):
        where = plan.experiment.backend.check(plan, arguments, record=record, say=_say)
    else:
        where = sweep.check(plan, record, say=_say)
    print(f"ok: {plan.experiment.name} would run {sweep.describe_sweep(plan)}, each on {where}")
    return 0


def _run_sweep(plan: Any, arguments: list[str], record: Any = None, *, as_json: bool = False) -> int:
    if _is_sent(plan):
        return _submit(plan, arguments, record, as_json=as_json)
    from raytrainer import sweep

    outcome = sweep.launch(plan, argv=arguments, record=record)
    return _told(outcome, sweep.summary(outcome, provenance.program()), as_json=as_json)


def _told(outcome: Any, summary: str, *, as_json: bool = False) -> int:
    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    if as_json:
        from raytrainer import runs

        summary = runs.outcome_json(outcome)
    print(summary, flush=True)
    return int(outcome.exit_code)


def _say(text: str) -> None:
    print(f"raytrainer: {text}", file=sys.stderr, flush=True)


class _Ended(BaseException):
    """Carries a bug's exception or a stopped job's exit code out of Hydra, which prints or swallows Exceptions."""

    def __init__(self, cause: Exception | int) -> None:
        self.cause = cause


def _hydra(
    arguments: list[str],
    task: Callable[[config.Composition, list[str]], int],
    sweep_task: Callable[[Any, list[str]], int],
    before: Sequence[str] = (),
) -> int:
    """Run Hydra's command line with raytrainer's errors and exit codes.

    Args:
        arguments: The arguments after the program's name, or after the command.
        task: Called with a composed config.
        sweep_task: Called with the plan of a sweep.
        before: The words in front of the arguments, to suggest a complete command line in an error.
    """
    from hydra import version
    from hydra._internal.utils import _run_hydra

    parser = _parser()
    parsed = parser.parse_intermixed_args(arguments)  # `experiment=mlp -m seed=1,2` too
    overrides, asked = list(parsed.overrides), os.environ.get(_FULL_ERROR)
    codes: list[int] = []

    def without_m(choice: str | None) -> ConfigError:
        meant = shlex.join([*before, "-m", *arguments])
        return ConfigError(f"needs -m (multirun). Run: {provenance.program()} {meant}", key="sweep", value=choice)

    def known() -> list[str]:
        return config.composed_keys(overrides, parsed.config_dir)

    def one(cfg: DictConfig) -> int:
        try:
            composition = config.from_hydra(cfg)
        except Exception as error:
            raise config.explain(error, overrides, known) from error
        if sweep := dict(composition.choices).get("sweep"):  # chosen by an experiment, or by several
            if not parsed.multirun:
                raise without_m(sweep)
            raise ConfigError("is chosen by one of several experiments: choose it for all", key="sweep", value=sweep)
        config.refuse_settings_of_no_sweep(overrides)
        return task(composition, arguments)

    def job(cfg: DictConfig) -> None:
        try:
            with _variable(_FULL_ERROR, asked):
                codes.append(_guarded(lambda: one(cfg)))
        except Exception as error:
            raise _Ended(error) from error
        if codes[-1] >= 128:  # stopped, so the remaining jobs do not run either
            raise _Ended(codes[-1])

    def sweep(task_overrides: list[str], cfg: DictConfig) -> None:
        """Run all trials as one task. `hydra/sweeper=ray_tune` calls this instead of `job`."""

        def planned() -> int:
            from raytrainer.sweep import make_plan

            choice = cfg.hydra.runtime.choices.get("sweep")
            if choice is None:
                raise ConfigError("is needed with hydra/sweeper=ray_tune: random, grid, asha, optuna, pbt", key="sweep")
            if parsed.config_name not in (None, config.CONFIG_NAME):
                raise ConfigError(
                    "is the root of a run, not of a sweep; put what differs into experiment/NAME.yaml of a --config-dir",
                    key="--config-name",
                    value=parsed.config_name,
                )
            # Of Hydra's own overrides, the plan needs only this one: it decides which configs the others find.
            searchpath = [o for o in overrides if config.key_of(o) == "hydra.searchpath"]
            plan = make_plan(
                [*searchpath, *task_overrides],
                choice=choice,
                space=config.written_space(cfg),
                groups=config.group_names(parsed.config_dir, cfg.hydra.searchpath),
                config_dir=parsed.config_dir,
            )
            return sweep_task(plan, arguments)

        with _variable(_FULL_ERROR, asked):
            codes.append(_guarded(planned))

    job.sweep = sweep  # type: ignore[attr-defined]
    if parsed.help:  # help does not need them, and Hydra would refuse `sweep=`
        parsed.overrides = [o for o in overrides if config.key_of(o).startswith("hydra")]
    shows = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    choices = [o.partition("=")[2] for o in overrides if config.key_of(o) == "sweep" and not o.startswith("~")]
    if choices and not shows:
        if not parsed.multirun:
            raise without_m(None)
        if "," in choices[-1] or "(" in choices[-1]:
            raise ConfigError("is one choice: a sweep has one way of searching", key="sweep", value=choices[-1])
    taken = completion.prepare(parsed, VERBS) if parsed.shell_completion else ""
    if taken is None:
        return 0
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise ConfigError("is not a directory", key="--config-dir", value=parsed.config_dir)
    parsed.overrides = config.with_number_keys(parsed.overrides, parsed.config_dir)
    try:
        if parsed.multirun and not choices:
            config.check_sweep(overrides, parsed.config_dir)
        elif parsed.cfg in ("job", "all"):
            config.check_keys(overrides, parsed.config_dir)
        version.setbase("1.3")
        config.register_schema()
        # With the variable set, Hydra raises its errors. Without it, Hydra prints them and ends the process with 1.
        with _variable(_FULL_ERROR, "1"), config.quiet(), completion.prefixed(taken):
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


def _parser() -> argparse.ArgumentParser:
    """Return Hydra's parser, with raytrainer's name, version and errors."""
    from importlib.metadata import version

    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {provenance.program()} --help lists the options")

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
    """Set an environment variable for a while; None unsets it."""
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
