"""The arguments of verbs: the parser, and the types and options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from raytrainer import provenance
from raytrainer.config.checks import seconds
from raytrainer.errors import ConfigError, nearest


class VerbParser(argparse.ArgumentParser):
    """The arguments of a verb. Every error names what the verb takes."""

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
            ConfigError: The verb does not have an option; the message names the nearest one.
        """
        parsed, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            name = unknown[0].partition("=")[0]
            close = nearest(name, self.flags(), 1) if name.startswith("-") else []
            suggestion = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{unknown[0]} has no meaning here{suggestion}; {self.takes()}")
        return parsed

    def takes(self) -> str:
        """Return what the verb takes, as text."""
        values = [str(action.metavar) for action in self._actions if not action.option_strings]
        return f"{self.verb} takes {', '.join([*values, *self.flags()])}"

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag not in ("-h", "--help")]

    def add_id(self) -> None:
        self.add_argument("id", metavar="ID", help="a run's name, its MLflow run id, or its Ray submission id")

    def add_overrides(self) -> None:
        self.add_argument("overrides", metavar="key=value", nargs="*", help="values to change")

    def add_checkpoint(self) -> None:
        """Add the options that choose a run's checkpoint: the best, the last, or that of a step."""
        choice = self.add_mutually_exclusive_group()
        about = "the last checkpoint, not the best"
        choice.add_argument("--last", dest="checkpoint", action="store_const", const="last", help=about)
        about = "the checkpoint of this step"
        choice.add_argument("--step", dest="checkpoint", metavar="N", type=lambda s: str(count(s)), help=about)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    if count(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def number_of_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


def age(text: str) -> float:
    """Return an age such as `30d`, `12h` or `90m` in seconds."""
    try:
        return seconds(text, "--older-than") or 0.0
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: 30d, 12h, 90m") from None
