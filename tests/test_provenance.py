"""Where a run comes from, read from a real git repository made here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from raytrainer import provenance


def git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "a", f"GIT_{who}_EMAIL": "a@example.com"}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("one\ntwo\n\n")
    (tmp_path / "image.bin").write_bytes(bytes(range(256)))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_repository_has_no_patch(repository: Path) -> None:
    found = provenance.collect(["experiment=mlp"], repository)
    assert found.commit == git(repository, "rev-parse", "HEAD").strip()
    assert found.patch == ""
    assert found.tags()["mlflow.source.git.dirty"] == "false"
    assert found.command == "python -m raytrainer experiment=mlp"


def test_the_patch_makes_the_tree_again(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    git(repository, "config", "diff.noprefix", "true")
    git(repository, "config", "color.diff", "always")
    (repository / "a.txt").write_text("one\nthree\n\n\n")
    (repository / "image.bin").write_bytes(bytes(range(255, -1, -1)))
    (repository / "new é.txt").write_text("not tracked")
    found = provenance.collect([], repository)
    assert "# not tracked, and not in this patch: new" in found.patch
    clone = tmp_path_factory.mktemp("clone")
    git(clone, "clone", "-q", str(repository), ".")
    patch = clone.parent / "git.patch"
    patch.write_text(found.patch)
    git(clone, "apply", str(patch))
    for name in ("a.txt", "image.bin"):
        assert (clone / name).read_bytes() == (repository / name).read_bytes()


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance.collect([], tmp_path)
    assert (found.commit, found.patch) == (None, "")
    assert "mlflow.source.git.commit" not in found.tags()
    assert found.versions["torch"]
