"""The table of verbs. Each verb is a module with its description, its arguments and, if it starts no run, its `run`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from raytrainer.runs.arguments import VerbParser

# Verb → its module here. `check` has none, because its arguments are Hydra's command line.
VERBS = {
    "list": "listing",
    "status": "status",
    "logs": "logs",
    "stop": "stop",
    "resume": "resume",
    "rerun": "rerun",
    "evaluate": "evaluate",
    "export": "export",
    "prune": "prune",
}
VERBS_THAT_START_RUNS = ("resume", "rerun", "evaluate")  # these take overrides, and `cli` starts what they compose


class Verb(Protocol):
    """The module of a verb."""

    ABOUT: str

    def add_arguments(self, parser: VerbParser) -> None: ...
    def run(self, arguments: argparse.Namespace) -> int: ...


def parser(verb: str) -> VerbParser:
    """Return the parser for the arguments of a verb."""
    module = _module(verb)
    made = VerbParser(verb, module.ABOUT)
    module.add_arguments(made)
    return made


def run(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb that starts no run, and return its exit code.

    Raises:
        Refused: An argument is wrong, or the run does not exist.
    """
    parsed = parser(verb).parse(arguments)
    if verb not in ("list", "status"):
        return _module(verb).run(parsed)
    # Garbage collection in the objects that mlflow's import creates, during the import and at exit, would take half of
    # the time of these two verbs.
    gc.disable()
    try:
        return _module(verb).run(parsed)
    finally:
        gc.freeze()
        gc.enable()


def _module(verb: str) -> Verb:
    return cast(Verb, import_module(f"raytrainer.runs.{VERBS[verb]}"))
