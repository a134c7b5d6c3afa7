"""Tab completion of commands, their options, and runs and trials by name. Hydra completes groups and keys.

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

# A word with quotes or parentheses chooses no group. Hydra does not need it, and would have to parse it.
_HARD = re.compile(r"['\"()$\\]")
_LIST = re.compile(r"(?P<key>[+]?[\w/@]+=)(?P<taken>[^=]*,)(?P<last>[^,=]*)")


def prepare(parsed: argparse.Namespace, verbs: Sequence[str]) -> str | None:
    """Complete what Hydra does not know, and set COMP_LINE and the config directory for what it does.

    Args:
        parsed: Hydra's arguments.
        verbs: The commands of raytrainer.

    Returns:
        The key and the choices that are already typed of a list, for `prefixed`; None if the answer is complete.
    """
    if "COMP_LINE" not in os.environ or not any(word.startswith("query=") for word in parsed.overrides):
        return ""
    words = os.environ["COMP_LINE"].replace("python -m raytrainer", "raytrainer").split(" ")
    if len(words) == 2:
        for verb in verbs:
            if verb.startswith(words[1]):
                print(verb)
    elif len(words) > 2 and words[1] in verbs:
        from raytrainer import runs

        found = runs.completions(words[1:])
        if found is not None:
            print("\n".join(found))
            return None
        words = [words[0], *words[2:]]
    before, last = words[1:-1], words[-1]
    for place, word in enumerate(before):
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = Path(value if equals else (*before, "")[place + 1].strip("'\"")).expanduser()
            parsed.config_dir = str(folder) if folder.is_dir() else parsed.config_dir
    # With an ID or an option, which are not overrides, Hydra would find nothing. Of several choices, the first
    # determines the keys.
    known = [word.partition(",")[0] for word in before if "=" in word and word[0] != "-" and not _HARD.search(word)]
    several = _LIST.fullmatch(last)
    os.environ["COMP_LINE"] = " ".join([words[0], *known, several["key"] + several["last"] if several else last])
    return several["key"] + several["taken"] if several else ""


@contextlib.contextmanager
def prefixed(taken: str) -> Iterator[None]:
    """Put what `prepare` returned in front of the choices that are printed meanwhile: `model=a,` → `model=a,b`."""
    if not taken:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()) as said:
        yield
    key, _, chosen = taken.partition("=")
    offered = [word.removeprefix(f"{key}=") for word in said.getvalue().split() if word.startswith(f"{key}=")]
    print("\n".join(taken + choice for choice in offered if choice and choice not in chosen.split(",")))
