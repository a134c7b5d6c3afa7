"""Does raytrainer work with the newest Ray of the package index, pre-releases included? `make ray-next` runs it.

    python -m tests.matrix.newest [FOLDER]

Installs it into the virtual environment FOLDER (.venv-ray-next), which shares all other packages with this one, runs the
contract tests and `experiment=smoke`, and prints a line for each part that changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.matrix.environments import ROOT, Environment, share_packages

_EXTRAS = "ray[default,train,tune]"


def install(folder: Path) -> Environment:
    """Install the newest Ray, and what it needs that this environment lacks."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    share_packages(folder)
    python = str(folder / "bin" / "python")
    options = ["--quiet", "--disable-pip-version-check", "--pre", "--upgrade", "--upgrade-strategy=only-if-needed"]
    subprocess.run([python, "-m", "pip", "install", *options, _EXTRAS], check=True)
    subprocess.run([python, "-c", "import ray; print('ray', ray.__version__)"], check=True)
    return Environment("newest ray", python)


def broken_parts(newest: Environment) -> list[str]:
    """Run the contract tests and return a line for each that fails."""
    tests = [str(ROOT / "tests" / "contracts"), f"--rootdir={ROOT}"]
    command = [newest.python, "-m", "pytest", "-q", "--tb=line", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=newest.variables, text=True, capture_output=True, check=False)
    if done.returncode == 0:
        return []
    return re.findall(r"^/.*?: (?:AssertionError: )?(.*)$", done.stdout, re.MULTILINE) or [done.stdout + done.stderr]


def smoke_problem(newest: Environment) -> str | None:
    """Train a small model on two workers; return the end of the output if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [newest.python, "-m", "raytrainer", "experiment=smoke", "scaling.num_workers=2"]
        done = subprocess.run(command, cwd=folder, env=newest.variables, text=True, capture_output=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def main(folder: Path) -> int:
    newest = install(folder)
    problems = broken_parts(newest)
    if text := smoke_problem(newest):
        problems.append(f"experiment=smoke fails: {text}")
    print("\n".join(problems) or "The contracts hold, and experiment=smoke trains.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / ".venv-ray-next"))
