"""Tab completion of verbs, their options, and runs and trials by name. Hydra completes groups and keys.

Hydra cannot handle options, quotes and lists of choices, so the command line that it sees is simplified first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from raytrainer.runs import verbs

_VARIABLE = "COMP_LINE"  # the command line so far, which the shell sets
# A word with quotes or parentheses chooses no group. Hydra does not need it, and would have to parse it.
_UNPARSED = re.compile(r"['\"()$\\]")
_LIST = re.compile(r"(?P<key>[+]?[\w/@]+=)(?P<typed>[^=]*,)(?P<last>[^,=]*)")


def prepare(parsed: argparse.Namespace) -> str | None:
    """Complete what Hydra does not know, and set COMP_LINE and the config directory for what it does.

    Args:
        parsed: Hydra's arguments.

    Returns:
        The key and the already typed choices of a list, for `prefixed`; None if the answer is complete.
    """
    if _VARIABLE not in os.environ or not any(word.startswith("query=") for word in parsed.overrides):
        return ""
    program, *words = os.environ[_VARIABLE].replace("python -m raytrainer", "raytrainer").split(" ")
    if len(words) == 1:
        _print(verb for verb in ("check", *verbs.VERBS) if verb.startswith(words[0]))
    elif words and words[0] in ("check", *verbs.VERBS):
        completions = _after_verb(words)
        if completions is not None:
            _print(completions)
            return None
        words = words[1:]
    *before, last = words or [""]
    parsed.config_dir = _config_dir(before) or parsed.config_dir
    choices = _LIST.fullmatch(last)
    word = choices["key"] + choices["last"] if choices else last
    os.environ[_VARIABLE] = " ".join([program, *filter(None, map(_simplified, before)), word])
    return choices["key"] + choices["typed"] if choices else ""


@contextlib.contextmanager
def prefixed(typed: str) -> Iterator[None]:
    """Put what `prepare` returned in front of the choices that are printed meanwhile: `model=a,` → `model=a,b`."""
    if not typed:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()) as output:
        yield
    key, _, chosen = typed.partition("=")
    choices = [word.removeprefix(f"{key}=") for word in output.getvalue().split() if word.startswith(f"{key}=")]
    _print(typed + choice for choice in choices if choice and choice not in chosen.split(","))


def _after_verb(words: Sequence[str]) -> list[str] | None:
    """Return the completions of the last word after a verb: its options, or the names of runs; None to ask Hydra."""
    verb, last = words[0], words[-1]
    if verb not in verbs.VERBS:
        return None
    if last.startswith("-"):
        return [flag for flag in verbs.parser(verb).flags() if flag.startswith(last)]
    if verb == "list":
        return []
    if any(not word.startswith("-") for word in words[1:-1]):  # the ID is already there
        return None if verb in verbs.VERBS_THAT_START_RUNS else []
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


def _config_dir(words: Sequence[str]) -> str | None:
    """Return the last `--config-dir` on a command line that is a directory."""
    folder = None
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            path = Path(value if equals else (*words, "")[place + 1].strip("'\"")).expanduser()
            folder = str(path) if path.is_dir() else folder
    return folder


def _simplified(word: str) -> str | None:
    """Return a word as Hydra needs it; None for an ID or an option, with which Hydra would find nothing."""
    if "=" not in word or word[0] == "-" or _UNPARSED.search(word):
        return None
    return word.partition(",")[0]  # of several choices, the first determines the keys


def _print(completions: Iterator[str] | Sequence[str]) -> None:
    if lines := list(completions):
        print("\n".join(lines))
