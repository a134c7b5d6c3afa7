"""Commands that start no run (list, status, logs, stop, export and prune): their arguments, output and exit codes."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from raytrainer import provenance
from raytrainer.config.checks import seconds
from raytrainer.core import streams
from raytrainer.errors import ConfigError, nearest
from raytrainer.runs.listing import STATUSES

_ABOUT = {
    "list": "Runs and sweeps, the newest first. Runs marked RUNNING whose driver is dead are marked FAILED.",
    "status": "Everything about a run: where it is, how far, its best value, what it waits for, what to do next.",
    "logs": "What a run printed. Ctrl-C while following stops nothing.",
    "stop": "Ask a run to end after a last checkpoint, and wait until its resources are free.",
    "resume": "Continue a run or sweep where it stopped, in the same MLflow run.",
    "rerun": "Start a new run with the same commit, patch, config and seed, and with the given values.",
    "evaluate": "Validate a checkpoint (the best) on its own validation set or another, in a new child run in MLflow.",
    "prune": "List old checkpoints, uploaded spools and leftovers of killed runs. Only --yes deletes them.",
    "export": "Write the weights of a checkpoint (the best) as safetensors, with the config, into a new folder.",
}

_TAKE_OVERRIDES = ("resume", "rerun", "evaluate")


class Parser(argparse.ArgumentParser):
    """The arguments of a command. Every error names what the command takes."""

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(f"{provenance.program()} {verb}", description=about, allow_abbrev=False)
        self.verb = verb
        self.add_argument("--json", action="store_true", help="print JSON, for programs")

    def error(self, message: str) -> NoReturn:
        if "required" in message:
            message = "which run?"
        raise ConfigError(f"{message} {self.takes()}" if message[-1] == "?" else f"{message}; {self.takes()}")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse options and positional arguments in any order.

        Raises:
            ConfigError: The command does not have an option; the message names the nearest one.
        """
        known, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            wrong = unknown[0].partition("=")[0]
            close = nearest(wrong, self.flags(), 1) if wrong.startswith("-") else []
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{unknown[0]} has no meaning here{meant}; {self.takes()}")
        return known

    def takes(self) -> str:
        """Return what the command takes, as text."""
        values = [str(action.metavar) for action in self._actions if not action.option_strings]
        return f"{self.verb} takes {', '.join([*values, *self.flags()])}"

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag not in ("-h", "--help")]


def command(verb: str, arguments: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        Refused: An argument is wrong, or the run does not exist.
    """
    given = parser(verb).parse(arguments)
    if verb not in ("list", "status"):
        return _VERBS[verb](given)
    # Garbage collection in the objects that mlflow's import creates, during the import and at exit, would take half of
    # the time of these two commands.
    gc.disable()
    try:
        return _VERBS[verb](given)
    finally:
        gc.freeze()
        gc.enable()


def parser(verb: str) -> Parser:
    """Return the parser for the arguments of a command."""
    found = Parser(verb, _ABOUT[verb])
    add = found.add_argument
    if verb == "list":
        add("-a", "--all", action="store_true", help="runs of all users, not only mine")
        add("-s", "--status", metavar="STATUS", help=f"only runs with this status: {', '.join(STATUSES)}")
        add("-n", "--limit", metavar="N", type=_positive, default=30, help="at most this many (30)")
        return found
    if verb == "logs":
        add("-f", "--follow", action="store_true", help="follow new output until the run ends")
        add("-r", "--rank", metavar="N", type=_count, help="only the output of this rank")
    elif verb == "stop":
        add("--force", action="store_true", help="end it without a checkpoint, if it has not ended after 10 s")
        add("--timeout", metavar="S", type=_seconds, default=120.0, help="wait at most this many seconds (120)")
    elif verb == "rerun":
        add("--here", action="store_true", help="use the code in this directory instead of the recorded code")
    elif verb == "evaluate":
        _add_checkpoint(found)
        add("--config-dir", "-cd", metavar="DIR", help="a further directory with choices of data=…")
    elif verb == "export":
        _add_checkpoint(found)
        add("--to", metavar="DIR", help="the folder (NAME-step-N); it must not exist")
        add("--mlflow", action="store_true", help="also write the MLflow model to DIR/mlflow_model")
        add(
            "--register",
            metavar="NAME",
            help="upload the MLflow model to the run, and register it as a new version of NAME",
        )
    elif verb == "prune":
        add("--yes", action="store_true", help="delete it")
        add("--dry-run", action="store_true", help="delete nothing, even with --yes")
        add(
            "--keep",
            metavar="N",
            type=_positive,
            default=1,
            help="how many last checkpoints to keep, besides the best (1)",
        )
        add(
            "--older-than",
            metavar="AGE",
            type=_age,
            default=0.0,
            help="only runs that ended at least this long ago: 30d, 12h",
        )
        add("id", metavar="ID", nargs="?", help="a run or sweep; without it, all below ./runs")
        return found
    add("id", metavar="ID", help="a run's name, its MLflow run id, or its Ray submission id")
    if verb in _TAKE_OVERRIDES:
        add("overrides", metavar="key=value", nargs="*", help="values to change")
    return found


def _add_checkpoint(found: Parser) -> None:
    """Add the options that choose a run's checkpoint: the best, the last, or that of a step."""
    one = found.add_mutually_exclusive_group()
    one.add_argument(
        "--last", dest="checkpoint", action="store_const", const="last", help="the last checkpoint, not the best"
    )
    one.add_argument(
        "--step",
        dest="checkpoint",
        metavar="N",
        type=lambda text: str(_count(text)),
        help="the checkpoint of this step",
    )


def outcome_json(outcome: Any) -> str:
    """Return how a launch ended as JSON, for `--json`. Numbers that JSON cannot express are null.

    Args:
        outcome: A `run.Outcome` or `sweep.SweepOutcome`.
    """
    found = {key: getattr(outcome, key) for key in ("status", "exit_code", "where", "cause", "mlflow", "seconds")}
    found |= {"seconds_of_all_attempts": outcome.record.seconds, "attempts": outcome.record.attempts}
    found |= {"name": outcome.record.name, "run_id": outcome.record.run_id, "run_dir": outcome.record.run_dir}
    if hasattr(outcome, "trials"):
        keys = ("id", "status", "parameters", "overrides", "run_id", "cause")
        found["trials"] = [{**{k: getattr(t, k) for k in keys}, "reports": len(t.reports)} for t in outcome.trials]
    else:
        found["result"] = outcome.result
    return json.dumps(_strict(found), indent=1, default=str)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _list(given: argparse.Namespace) -> int:
    from raytrainer.runs import listing

    status = given.status.upper() if given.status else None
    if status is not None and status not in STATUSES:
        raise ConfigError("is not a status", key="--status", value=given.status, choices=STATUSES)
    found = listing.list_runs(everyone=given.all, status=status, limit=given.limit, say=_say)
    if given.json:
        print(json.dumps([facts.to_json() for facts in found], indent=1))
    else:
        print(listing.table(found, users=given.all))
    return 0


def _status(given: argparse.Namespace) -> int:
    from raytrainer.runs import status

    found = status.status_of(given.id, say=_say)
    print(json.dumps(found.to_json(), indent=1) if given.json else status.text(found))
    return 0


def _logs(given: argparse.Namespace) -> int:
    from raytrainer.runs import logs

    try:
        for line in logs.lines(given.id, rank=given.rank, follow=given.follow, say=_say):
            print(json.dumps({"line": line}) if given.json else line, flush=given.follow)
            if streams.is_lost(sys.stdout):  # `logs -f ID | head`
                break
    except KeyboardInterrupt:
        _say(f"stopped following; the run continues. {provenance.program()} stop {given.id} stops it")
        return 130
    return 0


def _stop(given: argparse.Namespace) -> int:
    from raytrainer.runs import stop

    try:
        result = stop.Stopper(given.id, force=given.force, timeout_s=given.timeout, say=_say).stop()
    except KeyboardInterrupt:
        _say(f"stopped waiting; the stop request for {given.id} remains")
        return 130
    print(json.dumps(result.to_json(), indent=1) if given.json else stop.text(result, provenance.program()))
    return 0 if result.done else 1


def _export(given: argparse.Namespace) -> int:
    from raytrainer.runs import export

    if given.to and "://" in given.to:
        raise ConfigError("must be a folder of this machine", key="--to", value=given.to)
    found = export.export(
        given.id,
        checkpoint=given.checkpoint or "best",
        to=Path(given.to).absolute() if given.to else None,
        mlflow=given.mlflow,
        register=given.register,
        say=_say,
    )
    print(json.dumps(_strict(found.to_json()), indent=1) if given.json else found.text())
    return 0


def _prune(given: argparse.Namespace) -> int:
    from raytrainer.runs import prune

    found = prune.prune(
        given.id,
        delete=given.yes and not given.dry_run,
        keep=given.keep,
        older_than_s=given.older_than,
        say=_say,
    )
    print(json.dumps(found.to_json(), indent=1) if given.json else found.text())
    return 1 if found.failed else 0


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
    "export": _export,
    "prune": _prune,
}


def _say(text: str) -> None:
    print(f"raytrainer: {text}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


def _age(text: str) -> float:
    try:
        return seconds(text, "--older-than") or 0.0
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: 30d, 12h, 90m") from None


def completions(words: Sequence[str]) -> list[str] | None:
    """Return completions for the last word after a command: its options, or the names of runs here; None to ask Hydra.

    Args:
        words: The words of the command line from the command on.
    """
    verb, last = words[0], words[-1]
    if verb not in _ABOUT:
        return None
    if last.startswith("-"):
        return [flag for flag in parser(verb).flags() if flag.startswith(last)]
    if verb == "list":
        return []
    if any(not word.startswith("-") for word in words[1:-1]):  # the ID is already there
        return None if verb in _TAKE_OVERRIDES else []
    names = _folders("runs")
    sweep, dot, _ = last.rpartition(".")
    if dot and sweep in names:
        names += [f"{sweep}.{trial}" for trial in _folders(f"runs/{sweep}/trials")]
    return sorted(name for name in names if name.startswith(last))


def _folders(path: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
