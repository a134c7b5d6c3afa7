"""Start what a command line names: a verb, a run, or a sweep.

This module imports torch, Ray and MLflow only when something runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrainer import config, provenance
from raytrainer.cli.exit_codes import exit_code_of
from raytrainer.cli.hydra_line import HydraLine
from raytrainer.errors import ConfigError, nearest
from raytrainer.runs import verbs

VERBS = ("check", *verbs.VERBS)
_DRY_RUN = "--dry-run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Unlike `python -m`, a console script does not have the current directory, with the user's package, on its path.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    return exit_code_of(lambda: _command(arguments))


def _command(arguments: list[str]) -> int:
    # --dry-run is not an option of Hydra, whose parser would refuse it.
    dry, arguments = _DRY_RUN in arguments, [argument for argument in arguments if argument != _DRY_RUN]
    if arguments and arguments[0].isalpha():
        return _verb(arguments[0], arguments[1:], dry=dry)
    if dry:
        return HydraLine(arguments, _would_send, _would_send, prefix=[_DRY_RUN]).run()
    outcomes: list[Any] = []

    def train(composition: config.Composition, arguments: list[str]) -> int:
        if _is_sent(composition):
            return _submit(composition, arguments)
        outcomes.append(_trained(composition, arguments))
        return int(outcomes[-1].exit_code)

    code = HydraLine(arguments, train, _sweep).run()
    if len(outcomes) > 1:  # a grid of whole runs
        from raytrainer import attempt

        print(f"\n{attempt.table(outcomes)}", flush=True)
    return code


def _verb(verb: str, rest: list[str], *, dry: bool) -> int:
    if verb not in VERBS:
        close = nearest(verb, VERBS)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(VERBS)}"
        raise ConfigError(f"{verb!r} is not a command{hint} (keys are given as key=value)")
    if verb == "check":
        return HydraLine(rest, _check, _check_sweep, prefix=["check", *([_DRY_RUN] if dry else [])]).run()
    if verb not in verbs.VERBS_THAT_START_RUNS:
        if dry and verb != "prune":
            raise ConfigError(f"{_DRY_RUN} is for experiment=…, resume, rerun, evaluate and prune")
        return verbs.run(verb, [*rest, _DRY_RUN] if dry else rest)
    parser = verbs.parser(verb)
    parsed = parser.parse(rest)
    if "=" in parsed.id:
        raise ConfigError(f"which run? {parser.takes()}")
    return {"resume": _resume, "rerun": _rerun, "evaluate": _evaluate}[verb](parsed, [verb, *rest], dry=dry)


def _resume(parsed: argparse.Namespace, arguments: list[str], *, dry: bool) -> int:
    from raytrainer.runs.resolve import find
    from raytrainer.runs.resume import to_resume, to_resume_sweep

    record, _ = find(parsed.id)
    if record.kind == "sweep":
        plan, record = to_resume_sweep(parsed.id, parsed.overrides)
        return _start(plan, arguments, record, as_json=parsed.json, dry=dry)
    composition, record, changed = to_resume(parsed.id, parsed.overrides)
    return _start(composition, arguments, record, changed, as_json=parsed.json, dry=dry)


def _rerun(parsed: argparse.Namespace, arguments: list[str], *, dry: bool) -> int:
    from raytrainer.runs.rerun import rerun_recorded_code, to_rerun, to_rerun_sweep
    from raytrainer.runs.resolve import find, trial_of

    options = [*(["--json"] if parsed.json else []), *([_DRY_RUN] if dry else [])]
    code = rerun_recorded_code(parsed.id, [*parsed.overrides, *options], here=parsed.here, say=_say)
    if code is not None:
        return code
    record, _ = find(parsed.id)
    is_sweep = record.kind == "sweep" and trial_of(parsed.id, record) is None
    target = (to_rerun_sweep if is_sweep else to_rerun)(parsed.id, parsed.overrides)
    return _start(target, arguments, as_json=parsed.json, dry=dry)


def _evaluate(parsed: argparse.Namespace, arguments: list[str], *, dry: bool) -> int:
    from raytrainer.runs.evaluate import to_evaluate

    checkpoint = parsed.checkpoint or "best"
    composition = to_evaluate(parsed.id, parsed.overrides, checkpoint=checkpoint, config_dir=parsed.config_dir)
    return _start(composition, arguments, as_json=parsed.json, dry=dry)


def _start(
    target: Any, arguments: list[str], record: Any = None, changed: Sequence[str] = (), *, as_json: bool, dry: bool
) -> int:
    """Start or continue the run or sweep that a verb has composed, or submit it, or only show it. Return the exit code.

    Args:
        target: A composed config, or the plan of a sweep.
        arguments: The command line.
        record: The record of the run that continues; None for a new one.
        changed: As for `attempt.launch`.
        as_json: Whether to print the outcome as JSON.
        dry: Whether to start nothing.
    """
    if dry:
        return _would_send(target, arguments, record, changed)
    if not isinstance(target, config.Composition):
        return _run_sweep(target, arguments, record, as_json=as_json)
    if _is_sent(target):
        return _submit(target, arguments, record, changed, as_json=as_json)
    return int(_trained(target, arguments, record, changed, as_json=as_json).exit_code)


def _trained(
    composition: config.Composition,
    arguments: list[str],
    record: Any = None,
    changed: Sequence[str] = (),
    *,
    as_json: bool = False,
) -> Any:
    """Train a run, print its summary, and return its outcome."""
    from raytrainer import attempt

    outcome = attempt.launch(composition, argv=arguments, record=record, changed=changed)
    _print_outcome(outcome, attempt.summary(outcome, provenance.program()), as_json=as_json)
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
    return _print_outcome(outcome, sweep.summary(outcome, provenance.program()), as_json=as_json)


def _print_outcome(outcome: Any, summary: str, *, as_json: bool = False) -> int:
    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    if as_json:
        from raytrainer.runs.printing import outcome_json

        summary = outcome_json(outcome)
    print(summary, flush=True)
    return int(outcome.exit_code)


def _say(text: str) -> None:
    print(f"raytrainer: {text}", file=sys.stderr, flush=True)
