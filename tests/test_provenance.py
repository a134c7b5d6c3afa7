"""Where a run comes from, read from a real git repository made here."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
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


def test_the_patch_is_byte_for_byte(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Windows' line ends, another encoding, and a directory below the root."""
    (repository / "below").mkdir()
    (repository / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (repository / "below/latin.py").write_bytes("caf\xe9 = 1\n".encode("latin-1"))
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "second")
    (repository / "windows.txt").write_bytes(b"one\r\nthree\r\n")
    (repository / "below/latin.py").write_bytes("caf\xe9 = 2\n".encode("latin-1"))
    found = provenance.Provenance.from_json(provenance.collect([], repository / "below").to_json())
    assert found.prefix == "below/"
    clone = tmp_path_factory.mktemp("clone")
    git(clone, "clone", "-q", str(repository), ".")
    subprocess.run(["git", "apply", "-"], cwd=clone, input=found.diff.encode("utf-8", "surrogateescape"), check=True)
    for name in ("windows.txt", "below/latin.py"):
        assert (clone / name).read_bytes() == (repository / name).read_bytes()
    assert provenance.collect([], clone).diff == found.diff


def test_files_for_secrets_are_left_out_of_the_patch(repository: Path) -> None:
    for name in (".env", "deploy/tls.pem", "Conf/Credentials.JSON", ".env.example"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("nothing yet\n")
    git(repository, "add", "-f", ".")
    git(repository, "commit", "-qm", "second")
    for name in (".env", "deploy/tls.pem", "Conf/Credentials.JSON", ".env.example"):
        (repository / name).write_text(f"hunter2 of {name}\n")
    found = provenance.collect([], repository / "deploy")
    assert found.patch.count("hunter2") == 1
    assert "hunter2 of .env.example" in found.patch
    for name in (".env", "deploy/tls.pem", "Conf/Credentials.JSON"):
        assert f"# left out, since it may hold secrets: {name}\n" in found.patch
    assert found.diff.startswith("diff --git a/.env.example")


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("a/.env", True),
        (".env.production", True),
        ("prod.env", True),
        ("id_ed25519", True),
        ("x/server.KEY", True),
        ("client_secret.json", True),
        ("secrets.yaml", True),
        (".netrc", True),
        (".env.example", False),
        ("environment.py", False),
        ("monkey", False),
        ("secret_santa.py", False),
        ("keys.py", False),
        ("credentials.py", False),
        ("id_rsa.py", False),
    ],
)
def test_what_may_hold_secrets(name: str, secret: bool) -> None:
    assert provenance.may_hold_secrets(name) is secret


def test_what_was_not_tracked_is_named_from_the_root(repository: Path) -> None:
    (repository / "below").mkdir()
    (repository / "b.txt").write_text("")
    found = provenance.collect([], repository / "below")
    assert found.untracked == ["b.txt"]
    assert found.diff == ""
    assert not found.is_cut


def test_a_patch_that_is_too_large_is_cut_and_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PATCH_LIMIT", 100)
    (repository / "a.txt").write_text("x" * 1000)
    found = provenance.collect([], repository)
    assert found.is_cut
    assert len(found.patch) < 200


def test_a_job_tells_of_the_launch_that_submitted_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_submitted", None)
    origin = provenance.collect(["experiment=mlp"], repository)
    provenance.adopt(replace(origin, versions={"torch": "0.0"}))
    found = provenance.collect(["other"], repository.parent)
    assert (found.command, found.commit) == (origin.command, origin.commit)
    assert found.versions == origin.versions


def test_anything_else_is_no_provenance() -> None:
    for data in (b"", b"[]", b"{}"):
        with pytest.raises(ValueError):
            provenance.Provenance.from_json(data)


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance.collect([], tmp_path)
    assert (found.commit, found.patch) == (None, "")
    assert "mlflow.source.git.commit" not in found.tags()
    assert found.versions["torch"]
