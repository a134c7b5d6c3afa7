"""Tests of `rerun` with the code of the earlier run: commit and patch in a worktree of real git, with a report of what
differs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer import provenance
from raytrainer.attempt import Record
from raytrainer.errors import ConfigError
from raytrainer.provenance import Provenance
from raytrainer.runs import rerun, worktree
from raytrainer.runs.resolve import resolve_run
from raytrainer.storage import Storage
from raytrainer.submission.package import collect
from raytrainer.tracking.server import Server
from tests.launches import launch, launched, summary
from tests.runs.past import Store, record


def git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "a", f"GIT_{who}_EMAIL": "a@example.com"}
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def repository(in_tmp: Path) -> Path:
    """A repository with a committed second and an uncommitted third version, ignored data and an untracked note."""
    git(in_tmp, "init", "-q")
    (in_tmp / ".gitignore").write_text("runs/\ndata/\n__pycache__/\nmlflow.db*\nmlartifacts/\n*.out\n*.err\n")
    (in_tmp / "code.txt").write_text("first\n")
    git(in_tmp, "add", ".")
    git(in_tmp, "commit", "-qm", "first")
    (in_tmp / "code.txt").write_text("second\n")
    git(in_tmp, "commit", "-qam", "second")
    (in_tmp / "code.txt").write_text("third\n")
    (in_tmp / "new.txt").write_text("added\n")
    git(in_tmp, "add", "new.txt")
    (in_tmp / "note.txt").write_text("not tracked\n")
    (in_tmp / "data" / "deep").mkdir(parents=True)
    (in_tmp / "data" / "values").write_text("7\n")
    return in_tmp


@pytest.fixture
def past(repository: Path) -> Storage:
    """A run of the third version, in a repository that now has a fourth."""
    _, storage = record("one", status="FINISHED")
    storage.write_bytes(provenance.FILE, provenance.collect(["experiment=mlp"], repository).to_json())
    (repository / "code.txt").write_text("fourth\n")
    git(repository, "commit", "-qam", "fourth")
    return storage


class Seen:
    """Records what a command finds in the tree, and its arguments and environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.files: dict[str, str] = {}
        self.arguments: list[str] = []
        self.environment: dict[str, str] = {}
        self.origin = Provenance("")

        def run(folder: worktree.WorkingTree, arguments: list[str]) -> int:
            self.path, self.arguments, self.environment = folder.path, list(arguments), folder.environment
            self.files = {
                str(path.relative_to(folder.path)): path.read_text()
                for path in sorted(folder.path.rglob("*"))
                if path.is_file() and path.name not in (".git", ".gitignore")
            }
            self.run = Record.read(Storage(folder.path / "runs" / "one"))
            self.origin = provenance.collect([], folder.path)
            return code

        monkeypatch.setattr(worktree, "rerun_in", run)


def test_commit_and_patch_are_checked_out(past: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, messages = Seen(monkeypatch, 7), list[str]()
    assert rerun.rerun_recorded_code("one", ["seed=2", "--json"], say=messages.append) == 7
    assert seen.files == {
        "code.txt": "third\n",
        "new.txt": "added\n",
        "note.txt": "not tracked\n",
        "data/values": "7\n",
    }
    assert seen.arguments == ["one", "seed=2", "--json"]
    assert seen.run is not None
    here = Path.cwd()
    assert seen.environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{here}/mlflow.db"
    assert seen.environment["PYTHONPATH"].split(os.pathsep)[0] == str(seen.path)
    # Inside the tree, the recorded commit and patch equal those of the earlier run.
    then = Provenance.from_json(past.read_bytes(provenance.FILE))
    assert (seen.origin.commit, seen.origin.diff) == (then.commit, then.diff)
    assert seen.origin.untracked == ["note.txt"]  # data/ is ignored there too
    assert messages[0].startswith(
        f"rerun of one: its code is commit {str(then.commit)[:12]}, with a patch; here is commit "
    )
    assert messages[1] == "rerun of one: other values: seed=2"
    assert "not tracked by git, so as they are now: note.txt" in messages
    assert messages[-1] == f"rerun of one: running in {seen.path}, which is removed afterwards"


def test_submodules_are_checked_out_with_their_changes(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, library = tmp_path_factory.mktemp("inner"), tmp_path_factory.mktemp("library")
    allowed = ("-c", "protocol.file.allow=always", "submodule")
    for folder, name in ((inner, "inner.txt"), (library, "library.txt")):
        git(folder, "init", "-q")
        (folder / name).write_text("committed\n")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "first")
    git(library, *allowed, "add", "-q", str(inner), "in")
    git(library, "commit", "-qm", "second")
    git(repository, *allowed, "add", "-q", str(library), "libs/library")
    git(repository, *allowed, "update", "-q", "--init", "--recursive")
    git(repository, "commit", "-qam", "with a library")
    library = repository / "libs/library"
    (library / "library.txt").write_text("changed\n")
    (library / "in/inner.txt").write_text("changed, too\n")
    _, storage = record("one", status="FINISHED")
    storage.write_bytes(provenance.FILE, provenance.collect([], repository).to_json())
    git(library, "checkout", "-q", ".")
    (library / "in/inner.txt").write_text("something else\n")
    seen = Seen(monkeypatch)
    assert rerun.rerun_recorded_code("one", []) == 0
    assert seen.files["libs/library/library.txt"] == "changed\n"
    assert seen.files["libs/library/in/inner.txt"] == "changed, too\n"
    # The checkout is unchanged and has no other worktree.
    assert (library / "in/inner.txt").read_text() == "something else\n"
    for folder in (repository, library, library / "in"):
        assert len(git(folder, "worktree", "list").splitlines()) == 1


def test_untracked_code_is_copied(past: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is copied, because a package has no links out of the tree. Data stays on this machine and is linked."""
    here = Path.cwd()
    (here / "mine" / "deep").mkdir(parents=True)
    (here / "mine" / "deep" / "code.py").write_text("x = 1\n")
    (here / "mine" / "messages.out").write_text("ignored\n")
    (here / ".env").write_text("KEY=1\n")
    (here / "many").mkdir()
    for number in range(3):
        (here / "many" / str(number)).write_text("")
    monkeypatch.setattr(worktree, "_MOST_FILES", 2)
    found: dict[str, list[str]] = {}

    def run(folder: worktree.WorkingTree, arguments: list[str]) -> int:
        (folder.path / "many").unlink()
        package = collect(folder.path, limit_mb=100)
        found["sent"] = sorted(name for name, _ in package.files)
        links = [path for path in folder.path.rglob("*") if path.is_symlink()]
        found["links"] = sorted(str(path.relative_to(folder.path)) for path in links)
        return 0

    monkeypatch.setattr(worktree, "rerun_in", run)
    assert rerun.rerun_recorded_code("one", []) == 0
    assert found["sent"] == ["code.txt", "mine/deep/code.py", "new.txt", "note.txt"]
    assert found["links"] == [".env", "data/deep", "data/values", "mine/messages.out", "runs/one"]
    assert (here / "many" / "0").exists()


def test_the_working_tree_is_removed(past: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(worktree, "rerun_in", run)
    with pytest.raises(KeyboardInterrupt):
        rerun.rerun_recorded_code("one", [])
    assert not Path("runs", worktree.PLACE).exists()
    assert len(git(Path.cwd(), "worktree", "list").splitlines()) == 1
    assert (Path.cwd() / "data" / "values").read_text() == "7\n"
    assert past.exists("run.json")


def test_the_working_tree_of_a_killed_process_is_removed_by_the_next(
    past: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    monkeypatch.setattr(worktree, "_remove", lambda *_: None)
    rerun.rerun_recorded_code("one", [])
    monkeypatch.undo()
    monkeypatch.chdir(Path(past.uri).parent.parent)
    left = seen.path
    Seen(monkeypatch)
    rerun.rerun_recorded_code("one", [])
    assert left.exists()  # its owner is this process, which is alive
    owner = left.parent / "owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "started": "1"}))
    rerun.rerun_recorded_code("one", [])
    assert not left.exists()


def test_the_same_code_is_run_here(repository: Path) -> None:
    _, storage = record("one", status="FINISHED")
    storage.write_bytes(provenance.FILE, provenance.collect([], repository).to_json())
    (repository / "later.txt").write_text("untracked files make no difference\n")
    messages: list[str] = []
    assert rerun.rerun_recorded_code("one", [], say=messages.append) is None
    commit = git(repository, "rev-parse", "HEAD")[:12]
    assert messages == [f"rerun of one: same code, commit {commit} with the same patch"]


def test_here_uses_the_code_in_this_directory(past: Storage) -> None:
    assert rerun.rerun_recorded_code("one", [], here=True) is None


def test_no_working_tree_is_made_inside_of_another(past: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worktree._VARIABLE, "/somewhere")
    assert rerun.rerun_recorded_code("one", []) is None


def test_from_a_directory_below_the_root(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = repository / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    _, storage = record("one", status="FINISHED")
    storage.write_bytes(provenance.FILE, provenance.collect([], below).to_json())
    git(repository, "commit", "-qam", "fourth")
    seen = Seen(monkeypatch)
    assert rerun.rerun_recorded_code("one", []) == 0
    assert seen.path.name == "below"
    assert (seen.path.parent / "code.txt").exists() is False  # the tree is already removed
    assert seen.run is not None


# --- no tree is made --------------------------------------------------------------------------------------------------


def test_a_run_without_git_and_a_directory_without(
    in_tmp: Path, past: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    origin = Provenance.from_json(past.read_bytes(provenance.FILE))
    past.write_bytes(provenance.FILE, replace(origin, commit=None).to_json())
    assert rerun.rerun_recorded_code("one", [], say=messages.append) is None
    assert messages == ["rerun of one: it did not run from a git checkout; the code in this directory is used"]
    past.write_bytes(provenance.FILE, origin.to_json())
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(in_tmp))
    (in_tmp / ".git").rename(in_tmp / "git")
    assert rerun.rerun_recorded_code("one", [], say=messages.append) is None
    assert messages[1].startswith("rerun of one: this is not a git checkout, it ran with commit ")
    past.delete(provenance.FILE)
    assert rerun.rerun_recorded_code("one", [], say=messages.append) is None
    assert messages[2] == "rerun of one: its code is not recorded; the code in this directory is used"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"commit": "0" * 40}, r"the commit 0+ of one is not in .*: git fetch it, or rerun --here one uses"),
        ({"patch": "diff --git a/nope b/nope\n--- a/nope\n+++ b/nope\n@@ -1 +1 @@\n-a\n+b\n"}, "does not apply to its"),
        ({"patch": "x\n" + provenance._CUT}, "the patch of one was too large to be recorded whole; rerun --here one"),
    ],
)
def test_code_that_is_not_available_is_refused(past: Storage, change: dict[str, str], reason: str) -> None:
    origin = Provenance.from_json(past.read_bytes(provenance.FILE))
    past.write_bytes(provenance.FILE, replace(origin, **change).to_json())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=reason):
        rerun.rerun_recorded_code("one", [])
    assert not Path("runs", worktree.PLACE).exists()


def test_different_versions_are_reported() -> None:
    then = Provenance("", {"torch": "2.9", "ray": "2.60.0", "numpy": "1"}, "a" * 40)
    now = Provenance("", {"torch": "2.13", "ray": "2.60.0", "numpy": "2"}, "a" * 40)
    assert rerun.differences(then, now, []) == ["same code, commit aaaaaaaaaaaa", "torch 2.9 → 2.13"]


def test_provenance_from_mlflow(store: Store) -> None:
    made, _ = store.add(
        "one",
        tags={
            "mlflow.source.git.commit": "b" * 40,
            "mlflow.source.git.dirty": "true",
            "raytrainer.version.torch": "2.9",
            "raytrainer.command": "python -m raytrainer x",
        },
    )
    assert made.run_id is not None
    patch = Path("git.patch")
    patch.write_bytes(b"# not tracked, and not in this patch: note.txt\ndiff \xe9\r\n")
    Server(store.uri).log_artifact(made.run_id, patch, None)
    found = rerun.recorded_provenance(resolve_run("one"))
    assert found is not None
    assert (found.commit, found.versions, found.untracked) == ("b" * 40, {"torch": "2.9"}, ["note.txt"])
    assert found.diff.encode("utf-8", "surrogateescape") == b"diff \xe9\r\n"


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_signal_is_passed_to_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is passed on to the child, and the command ends with the child's exit code."""
    program = tmp_path / "child"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "signal.pause()\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def stop() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert worktree.rerun_in(worktree.WorkingTree(tmp_path, {}), ["one"]) == 143


@pytest.mark.slow
def test_a_rerun_trains_with_the_old_code(in_tmp: Path) -> None:
    """A callback in the user's module writes which version of it ran, in the first run and in the rerun."""
    code = "from pathlib import Path\n\nclass Says:\n    def on_fit_start(self, trainer, event):\n"
    code += "        Path(self.place).open('a').write(VERSION + ' ' + Path('data/values').read_text())\n"
    code += "    def __init__(self, place):\n        self.place = place\n\n"
    (in_tmp / ".gitignore").write_text("runs/\ndata/\nmlflow.db*\nmlartifacts/\n__pycache__/\n*.out\n*.err\nsaid\n")
    (in_tmp / "mine.py").write_text(code + "VERSION = 'first'\n")
    (in_tmp / "data").mkdir()
    (in_tmp / "data" / "values").write_text("7\n")
    git(in_tmp, "init", "-q")
    git(in_tmp, "add", ".")
    git(in_tmp, "commit", "-qm", "first")
    (in_tmp / "mine.py").write_text(code + "VERSION = 'patched'\n")
    quick = ["experiment=smoke", "cluster=inline", "trainer.max_steps=4", "name=one"]
    says = ["+callbacks.says._target_=mine.Says", f"+callbacks.says.place={in_tmp / 'messages'}"]
    launched(in_tmp, *quick, *says).exits(0)
    (in_tmp / "mine.py").write_text(code + "VERSION = 'later'\n")
    git(in_tmp, "commit", "-qam", "later")
    with launch(in_tmp, "rerun", "one", "seed=5", "name=two") as again:
        ended = again.wait().exits(0)
    assert (in_tmp / "messages").read_text() == "patched 7\npatched 7\n"
    assert "rerun of one: its code is commit " in ended.err
    assert summary(ended.out)["output"] == str(in_tmp / "runs" / "two")
    assert not (in_tmp / "runs" / worktree.PLACE).exists()
    for name in ("one", "two"):
        origin = Provenance.from_json((in_tmp / "runs" / name / provenance.FILE).read_bytes())
        assert "VERSION = 'patched'" in origin.diff
    launched(in_tmp, "rerun", "one", "--here", "name=three").exits(0)
    assert (in_tmp / "messages").read_text().endswith("later 7\n")
