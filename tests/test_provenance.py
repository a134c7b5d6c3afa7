"""Where a run comes from, read from a real git repository that is created here."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer import provenance
from tests.promises import Within


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
    """The patch keeps Windows line ends, another encoding, and files in a directory below the root."""
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
def test_names_of_files_that_may_hold_secrets(name: str, secret: bool) -> None:
    assert provenance.may_hold_secrets(name) is secret


def test_untracked_files_are_named_from_the_root(repository: Path) -> None:
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


def test_a_job_has_the_provenance_of_its_submission(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTRAINER_SUBMITTED_BY", "")
    origin = provenance.collect(["experiment=mlp"], repository)
    (tmp_path / "origin.json").write_bytes(replace(origin, versions={"torch": "0.0"}).to_json())
    provenance.adopt(tmp_path / "origin.json")
    found = provenance.collect(["other"], repository.parent)
    assert (found.command, found.commit) == (origin.command, origin.commit)
    assert found.versions == origin.versions


def test_other_files_are_no_provenance() -> None:
    for data in (b"", b"[]", b"{}"):
        with pytest.raises(ValueError):
            provenance.Provenance.from_json(data)


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance.collect([], tmp_path)
    assert (found.commit, found.patch) == (None, "")
    assert "mlflow.source.git.commit" not in found.tags()
    assert found.versions["torch"]


def test_a_repository_without_a_commit_is_recorded_as_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    assert provenance.collect([], tmp_path).commit is None


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git(repository, "checkout", "-q", "-b", "feature/é")
    assert provenance.collect([], repository).branch == "feature/é"
    git(repository, "checkout", "-q", "--detach")
    found = provenance.collect([], repository)
    assert found.commit is not None
    assert found.branch is None
    assert "mlflow.source.git.branch" not in found.tags()


def test_a_bare_repository_and_the_inside_of_one_are_no_checkout(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(repository), "bare.git")
    for folder in (tmp_path / "bare.git", repository / ".git"):
        assert provenance.collect([], folder).commit is None


@pytest.fixture
def with_submodule(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with the submodule `lib/sub`, which has the file `s.py` and its own submodule `inner`."""
    inner, outer = tmp_path_factory.mktemp("inner"), tmp_path_factory.mktemp("outer")
    for folder, name in ((inner, "i.py"), (outer, "s.py")):
        git(folder, "init", "-q")
        (folder / name).write_text("v = 1\n")
        (folder / ".env").write_text("nothing\n")
        git(folder, "add", "-f", ".")
        git(folder, "commit", "-qm", "first")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "inner")
    git(outer, "commit", "-qm", "second")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(outer), "lib/sub")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "update", "-q", "--init", "--recursive")
    git(repository, "commit", "-qm", "second")
    return repository


def test_a_clean_submodule_does_not_count_as_a_change(with_submodule: Path) -> None:
    found = provenance.collect([], with_submodule)
    assert found.patch == ""
    assert found.diffs == {"": ""}


def test_the_patch_has_the_changes_inside_of_submodules(
    with_submodule: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    git(with_submodule, "config", "submodule.lib/sub.ignore", "all")  # hides changes in it from git's own diff
    (with_submodule / "a.txt").write_text("one\nthree\n")
    (with_submodule / "lib/sub/s.py").write_text("v = 2\n")
    (with_submodule / "lib/sub/.env").write_text("hunter2\n")
    (with_submodule / "lib/sub/new.py").write_text("")
    (with_submodule / "lib/sub/inner/i.py").write_text("v = 3\n")
    found = provenance.Provenance.from_json(provenance.collect([], with_submodule / "lib").to_json())
    assert found.tags()["mlflow.source.git.dirty"] == "true"
    assert list(found.diffs) == ["", "lib/sub", "lib/sub/inner"]
    assert found.untracked == ["lib/sub/new.py"]
    assert "# left out, since it may hold secrets: lib/sub/.env\n" in found.patch
    assert "hunter2" not in found.patch
    clone = tmp_path_factory.mktemp("clone")
    git(clone, "-c", "protocol.file.allow=always", "clone", "-q", "--recursive", str(with_submodule), ".")
    subprocess.run(["git", "apply", "-"], cwd=clone, input=found.patch.encode(), check=True)
    for name in ("a.txt", "lib/sub/s.py", "lib/sub/inner/i.py"):
        assert (clone / name).read_text() == (with_submodule / name).read_text()


def test_a_submodule_at_another_commit_is_a_change(with_submodule: Path) -> None:
    sub = with_submodule / "lib/sub"
    (sub / "s.py").write_text("v = 2\n")
    git(sub, "commit", "-qam", "third")
    found = provenance.collect([], with_submodule)
    assert f"+Subproject commit {git(sub, 'rev-parse', 'HEAD').strip()}\n" in found.patch
    assert list(found.diffs) == [""]


def test_a_repository_of_another_owner_is_reported_with_the_fix(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert provenance.collect([], repository).commit is None
    assert "git config --global --add safe.directory" in caplog.text
    assert "another user" in caplog.text


def test_variables_of_a_hook_do_not_name_another_repository(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    expected = git(repository, "rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    assert provenance.collect([], repository).commit == expected


def test_names_with_line_breaks(repository: Path) -> None:
    names = ["new\nline.py", "next\u2028line.py", '"quoted".py']
    for name in [*names, "old\nline.py"]:
        (repository / name).write_text("a\n")
    git(repository, "add", "old\nline.py")
    git(repository, "commit", "-qm", "second")
    (repository / "old\nline.py").write_text("b\n")
    folder = repository / "fol\nder"
    folder.mkdir()
    found = provenance.collect([], folder)
    assert sorted(found.untracked) == sorted(names)
    assert "-a\n+b\n" in found.diff
    (folder / "x").write_text("")
    assert provenance.collect([], folder).prefix == "fol\nder/"


def test_a_commit_under_way_a_file_that_is_to_be_added_and_a_conflict(repository: Path) -> None:
    (repository / ".git/index.lock").touch()  # held by another git process
    (repository / "a.txt").write_text("one\n")
    assert "-two" in provenance.collect([], repository).diff
    (repository / ".git/index.lock").unlink()
    (repository / "later.py").write_text("x = 1\n")
    git(repository, "add", "--intent-to-add", "later.py")
    assert "+x = 1" in provenance.collect([], repository).diff
    git(repository, "checkout", "-q", "-b", "theirs")
    git(repository, "commit", "-qam", "theirs")
    git(repository, "checkout", "-q", "-")
    (repository / "a.txt").write_text("two\n")
    git(repository, "commit", "-qam", "ours")
    subprocess.run(["git", "merge", "-q", "theirs"], cwd=repository, capture_output=True)
    assert "<<<<<<<" in provenance.collect([], repository).diff


@pytest.mark.parametrize("program", ["#!/bin/sh\nsleep 60 & sleep 60\n", "not a program", None])
def test_a_git_that_hangs_or_is_missing(
    program: str | None, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    if program is not None:
        (folder / "git").write_text(program)
        (folder / "git").chmod(0o755 if program.startswith("#!") else 0o644)
    monkeypatch.setenv("PATH", f"{folder}:/bin" if program and program.startswith("#!") else str(folder))
    monkeypatch.setattr("raytrainer.core.git.TIME_LIMIT_S", 0.2)
    within = Within(10.0)
    found = provenance.collect([], repository)
    assert found.commit is None
    within.check()


def test_no_more_of_a_huge_diff_is_read_than_is_kept(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "a.txt").write_text("x\n" * 3_000_000)
    monkeypatch.setattr(provenance, "_PATCH_LIMIT", 1000)
    found = provenance.collect([], repository)
    assert found.is_cut
    assert len(found.patch) < 1100
