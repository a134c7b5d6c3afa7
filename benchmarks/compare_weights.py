"""Compare the weights that this code trains with those of another commit, bit for bit.

Run it before a refactoring is merged: the code may change, and the trained weights may not. It checks out the other commit
into a temporary git worktree, trains the same experiments with both trees on the CPU, and compares every tensor of the last
checkpoints: weights, optimizer state, random states. The exit code is 1 if any tensor differs.

    python -m benchmarks.compare_weights                           this working tree against the parent commit
    python -m benchmarks.compare_weights --commit main --experiments mlp
    python -m benchmarks.compare_weights trainer.ema_decay=0.9     with further overrides for both trees
    python -m benchmarks.compare_weights --there seed=1            fails: the other tree trains with another seed

The comparison needs only the command line `python -m raytrainer` and the files of a checkpoint, and it imports nothing from
either tree. Modules may therefore move between the two commits.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("resnet", "mlp", "transformer")
_NAME = "compared"
_SHOWN = 5  # the number of differences that are printed for each experiment


class Stored(NamedTuple):
    """A tensor as it is stored: its dtype, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read(data: bytes) -> dict[str, Stored]:
    """Return the tensors in the content of a safetensors file, by name."""
    found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: Stored(one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found}


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return all tensors of a checkpoint by name.

    The tensors that all ranks share may be stored in any of the files `shared-*`, so their names have no prefix. The tensors
    of one rank have the name of its file as prefix, for instance `local-00000:random/torch`. The parts of a sharded tensor
    have the name of their file as suffix.
    """
    files = {path.stem: read(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}
    shared = [name for stem, tensors in files.items() if stem.startswith("shared-") for name in tensors]
    sharded = {name for name in shared if shared.count(name) > 1}
    found = {}
    for stem, tensors in files.items():
        for name, tensor in tensors.items():
            prefix = "" if stem.startswith("shared-") else f"{stem}:"
            found[f"{prefix}{name}{f'@{stem}' if name in sharded and not prefix else ''}"] = tensor
    return found


def digest(tensors: Mapping[str, Stored]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes, which does not depend on the order of the tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(repr((name, tensor.dtype, tensor.shape, len(tensor.data))).encode())
        total.update(tensor.data)
    return total.hexdigest()


def differences(here: Mapping[str, Stored], there: Mapping[str, Stored]) -> list[str]:
    """Return one sentence for each tensor that differs between two checkpoints."""
    found = []
    for name in sorted({*here, *there}):
        a, b = here.get(name), there.get(name)
        if a is None or b is None:
            found.append(f"{name} exists only {'there' if a is None else 'here'}")
        elif a.dtype != b.dtype:
            found.append(f"{name} has dtype {a.dtype} here and {b.dtype} there")
        elif a.shape != b.shape:
            found.append(f"{name} has shape {list(a.shape)} here and {list(b.shape)} there")
        elif a.data != b.data:
            count = sum(x != y for x, y in zip(a.data, b.data, strict=True))
            found.append(f"{name} differs in {count:,} of {len(a.data):,} bytes")
    return found


def last_checkpoint(run: Path) -> Path:
    """Return the newest committed checkpoint of a run.

    Raises:
        SystemExit: The run has none.
    """
    steps = sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))
    if not steps:
        raise SystemExit(f"There is no checkpoint in {run}/checkpoints.")
    return steps[-1]


def train(tree: Path, folder: Path, experiment: str, overrides: Sequence[str]) -> Path:
    """Train an experiment with the code in `tree`. Return its last checkpoint.

    Args:
        tree: The root of a working tree.
        folder: An empty folder for everything that the run writes.
        experiment: The name of an experiment.
        overrides: Further overrides.

    Raises:
        SystemExit: The run did not finish, or it did not import raytrainer from `tree`.
    """
    folder.mkdir(parents=True)
    # The current directory comes first in the path of `python -m`, so it must not contain a `raytrainer`.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH", "")]))
    environment |= {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    where = [sys.executable, "-c", "import raytrainer; print(raytrainer.__file__)"]
    imported = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    if not Path(imported.strip()).is_relative_to(tree):
        raise SystemExit(f"The code in {tree} was to be compared, but Python imports {imported.strip()}.")
    arguments = [
        f"experiment={experiment}",
        f"name={_NAME}",
        "trainer.max_epochs=null",
        "trainer.eval_every_n_steps=0",
        "trainer.deterministic=true",
        "scaling.use_gpu=false",
        "tracking.log_model=false",
        "preflight.first_batch=false",
        f"storage_path={folder}/runs",
        f"tracking.tracking_uri=sqlite:///{folder}/mlflow.db",
        *overrides,
    ]
    command = [sys.executable, "-m", "raytrainer", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{experiment} failed with the code in {tree}:\n{done.stdout}{done.stderr}")
    return last_checkpoint(folder / "runs" / _NAME)


def compare(name: str, here: Path, there: Path) -> bool:
    """Compare two checkpoints and print the result. Return whether all tensors are equal."""
    ours, theirs = read_checkpoint(here), read_checkpoint(there)
    found = differences(ours, theirs)
    if here.name != there.name:
        found.insert(0, f"the last checkpoint is {here.name} here and {there.name} there")
    size = sum(len(tensor.data) for tensor in ours.values())
    about = f"{len(ours)} tensors, {size:,} bytes, {here.name}, sha256 {digest(ours)[:16]}"
    if not ours:
        found.append("there are no tensors to compare")
    print(f"{name:<12} {'equal' if not found else f'DIFFERENT in {len(found)}'}: {about}", flush=True)
    for sentence in found[:_SHOWN]:
        print(f"{'':<12} {sentence}")
    if len(found) > _SHOWN:
        print(f"{'':<12} and {len(found) - _SHOWN} more")
    return not found


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary git worktree, which is removed at the end."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(ROOT), "worktree", *arguments], check=True, capture_output=True)

    with tempfile.TemporaryDirectory(prefix="raytrainer-commit-") as folder:
        tree = Path(folder).resolve() / "tree"
        git("add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("remove", "--force", str(tree))


def described(commit: str) -> str:
    """Return the abbreviated hash and the subject of a commit.

    Raises:
        SystemExit: There is no such commit.
    """
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h %s", commit, "--"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"Unknown commit {commit!r}: {done.stderr.strip()}")
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.compare_weights", description=__doc__, formatter_class=about)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for both trees")
    parser.add_argument("--commit", default="HEAD~1", help="the commit to compare with (default: HEAD~1)")
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS, metavar="NAME", help="default: all three")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each training (default: 20)")
    parser.add_argument(
        "--there",
        action="append",
        default=[],
        metavar="key=value",
        help="an override for the other commit only: a key that was renamed, or a value that must be detected",
    )
    options = parser.parse_intermixed_args(arguments)
    print(f"{ROOT} against {described(options.commit)}", flush=True)
    own = [f"trainer.max_steps={options.steps}", *options.overrides]
    same = []
    with worktree(options.commit) as tree, tempfile.TemporaryDirectory(prefix="raytrainer-weights-") as folder:
        for experiment in options.experiments:
            here = train(ROOT, Path(folder, "here", experiment), experiment, own)
            there = train(tree, Path(folder, "there", experiment), experiment, [*own, *options.there])
            same.append(compare(experiment, here, there))
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
