"""Find words and constructions for which docs/glossary.md has a plain form. `make check` runs it.

python .ci/language.py [FOLDER]: prints `file:line: word: use …` for each, and ends with 1 if there is one.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# In comments, docstrings, messages, configs and documents: what not to write, and what to write instead.
WORDS = {
    r"hopeless": "non-retryable",
    r"claim(s|ed)?(?! about)": "lease",
    r"beats?": "heartbeat",
    r"ledger(?!\.jsonl)": "trial journal",
    r"told(?!\"$)": "the verb of what happened: logged, sent, reported, passed",
    r"anew": "again, or another",
    r"(is|are) no (name|file|directory|folder|path|key|kind|type|number) (of|that|from)": "is not a …",
    r"nobody has": "… does not exist, or no process has …",
    r"what (was|were) not": "a noun: the unsent metrics, the missing keys",
    r"those that say": "a noun",
    r"of which (a|the|one)": "two sentences",
    r"lets? us": "permission, or allow",
    r"without a word": "without a message",
}
# Names of variables, arguments and attributes that say nothing about what they hold.
NAMES = {"found", "told", "given", "said", "asked", "several"}
# Parts of identifiers whose word the glossary replaces.
PARTS = {"hopeless", "claim", "claims", "beat", "ledger", "told", "said", "mute", "shipper"}

# The beginnings of paths that are not checked. The documents are rewritten with the documentation site.
NOT_CHECKED = (
    *("CONTRIBUTING.md", "README.md"),
    *("docs/clusters", "docs/data", "docs/failures", "docs/hydra-sweeper", "docs/language-models", "docs/runs"),
    *("docs/sweeps", "docs/tracking", "docs/your-code"),
)

_WORDS = re.compile("|".join(rf"\b(?P<w{i}>{word})\b" for i, word in enumerate(WORDS)), re.IGNORECASE)


def problems_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the problem of each banned word in a Python file, a config or a document."""
    text = file.read_text()
    if file.suffix == ".py":
        yield from _names(ast.parse(text))
        pieces = _texts_of_python(text)
    elif file.suffix == ".yaml":
        pieces = [(n, line.partition("#")[2]) for n, line in enumerate(text.splitlines(), 1)]
    else:
        pieces = list(enumerate(text.splitlines(), 1))
    for start, piece in pieces:
        for match in _WORDS.finditer(piece):
            better = list(WORDS.values())[int(str(match.lastgroup)[1:])] if match.lastgroup else ""
            yield start + piece.count("\n", 0, match.start()), f"{match[0]!r}: use {better}"


def _texts_of_python(text: str) -> list[tuple[int, str]]:
    """Return the comments and string literals, with their first lines."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return [(t.start[0], t.string) for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in kinds]


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case _:
                continue
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
        if name.strip("_") in NAMES:
            yield node.lineno, f"the name {name!r} does not say what it holds"
        elif PARTS & set(words):
            yield node.lineno, f"the name {name!r}: {', '.join(PARTS & set(words))} is not a word of the glossary"


def files_below(root: Path) -> Iterator[Path]:
    for pattern in ("raytrainer/**/*.py", "hydra_plugins/**/*.py", "configs/**/*.yaml", "docs/*.md", "*.md"):
        for file in sorted(root.glob(pattern)):
            name = str(file.relative_to(root))
            if name not in ("docs/glossary.md", "CHANGELOG.md") and not name.startswith(NOT_CHECKED):
                yield file


def main(root: Path) -> int:
    lines = [
        f"{file.relative_to(root)}:{n}: {problem}" for file in files_below(root) for n, problem in problems_of(file)
    ]
    print("\n".join(lines) or "no banned words")
    return min(len(lines), 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent.parent)))
