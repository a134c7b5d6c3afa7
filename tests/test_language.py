"""The check of the language, .ci/language.py: what it finds, and that this repository passes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "language.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_this_repository_passes() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("x = 1\n# An error that is hopeless.\n", 2, "hopeless"),
        ('def f():\n    """One line.\n\n    The server was told.\n    """\n', 4, "told"),
        ('print("it goes on anew")\n', 1, "anew"),
        ("for found in (1, 2):\n    pass\n", 1, "found"),
        ("def f(given):\n    return given\n", 1, "given"),
        ("def f(x):\n    x._said = 1\n", 2, "_said"),
        ("class ClaimOfRun:\n    pass\n", 1, "claim"),
    ],
)
def test_a_banned_word_is_named_with_its_line(tmp_path: Path, text: str, line: int, problem: str) -> None:
    (tmp_path / "raytrainer").mkdir()
    (tmp_path / "raytrainer" / "sample.py").write_text(text)
    result = check(tmp_path)
    assert result.returncode == 1
    assert f"raytrainer/sample.py:{line}: " in result.stdout
    assert problem in result.stdout


def test_configs_and_documents_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("told: 1\nb: 2 # what was not drawn\n")
    (tmp_path / "docs" / "new.md").write_text("It says it without a word.\n")
    assert check(tmp_path).stdout.splitlines() == [
        "configs/a.yaml:2: 'what was not': use a noun: the unsent metrics, the missing keys",
        "docs/new.md:1: 'without a word': use without a message",
    ]


def test_words_that_only_contain_a_banned_one_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "raytrainer").mkdir()
    (tmp_path / "raytrainer" / "sample.py").write_text("foundation = 'heartbeat and ledger.jsonl'  # reclaimed\n")
    assert check(tmp_path).returncode == 0
