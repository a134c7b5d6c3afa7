"""Tests of the package: git's files without data, secrets and what .rayignore excludes. The same contents give one
package, also in Ray."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

from raytrainer.errors import ConfigError
from raytrainer.provenance import may_hold_secrets
from raytrainer.submission import package, sent_files
from raytrainer.submission.imports import elsewhere
from raytrainer.submission.package import collect
from raytrainer.submission.sent_files import RECORDS

CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
KEY = "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(found: package.Package) -> list[str]:
    return [name for name, _ in found.files]


def refusal(root: Path, **given: float) -> str:
    with pytest.raises(ConfigError) as caught:
        collect(root, **given)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.fixture(params=["git", "no git"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project, once as a git checkout and once as a plain directory. Both give the same package."""
    root = write(
        tmp_path / "project", {"train.py": "import torch\n", "mine/net.py": "", "mine/__pycache__/net.pyc": ""}
    )
    if request.param == "git":
        git(root, "init")
        git(root, "add", "train.py")
    return root


def test_tracked_and_untracked_but_not_ignored(tree: Path) -> None:
    write(tree, {".gitignore": "*.log\nbuild/\n!kept.log\n", "a.log": "", "kept.log": "", "build/x.py": "", "new": ""})
    write(tree, {".venv/lib/x.py": "", "sub/.gitignore": "/local.py\n", "sub/local.py": "", "sub/deep/local.py": ""})
    assert names(collect(tree)) == ["kept.log", "mine/net.py", "new", "sub/deep/local.py", "train.py"]


def test_what_git_tracks_goes_along_though_it_ignores_it_and_what_is_deleted_does_not(tmp_path: Path) -> None:
    git(tmp_path, "init")
    write(tmp_path, {".gitignore": "*.log\n", "a.log": "", "gone.py": "", "odd name\n.py": "", "ä/ö.py": ""})
    git(tmp_path, "add", "--force", ".")
    (tmp_path / "gone.py").unlink()
    assert names(collect(tmp_path)) == ["a.log", "odd name\n.py", "ä/ö.py"]


def test_rayignore_leaves_out_more(tree: Path) -> None:
    write(tree, {".rayignore": "/new\ndocs/\n*.csv\n!small.csv\n", "new": "", "sub/new": "", "docs/a.md": ""})
    write(tree, {"a.csv": "", "small.csv": "", "sub/.rayignore": "!a.csv\nb.*\n", "sub/a.csv": "", "sub/b.py": ""})
    write(tree, {"docs/.rayignore": "!a.md\n"})  # files in an excluded directory stay excluded
    assert names(collect(tree)) == ["mine/net.py", "small.csv", "sub/a.csv", "sub/new", "train.py"]


def test_a_walk_ignores_what_git_ignores(tmp_path: Path) -> None:
    """git and our own walk list the same files of a tree."""
    patterns = ["*.a", "!keep.a", "/top.b", "deep/", "x/**/y.c", "**/z.d", "[ab]?.e", "\\#f", "sp ace.g ", "!/in/deep/"]
    files = [
        *("keep.a", "no.a", "in/keep.a", "in/no.a", "top.b", "in/top.b", "deep/f", "in/deep/f", "deep", "x/y.c"),
        *("x/1/y.c", "x/1/2/y.c", "z.d", "in/z.d", "a1.e", "c1.e", "#f", "sp ace.g", "in/sub/one.h", "in/sub/two.h"),
    ]
    root = write(tmp_path, {name: "" for name in files if name != "deep"})
    write(root, {".gitignore": "\n".join(patterns), "in/.gitignore": "*.h\n!two.h\n!no.a\n"})
    ours = set(sent_files._walked(root, "", lambda name: False))
    git(root, "init")
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "-o", "--exclude-standard"], capture_output=True, check=True
    )
    theirs = {name.decode() for name in listed.stdout.split(b"\0") if name}
    assert {name for name in ours if not name.startswith(".git/")} == theirs
    assert 5 < len(theirs) < len(files)


def test_data_stays_here_unless_it_is_named(tree: Path) -> None:
    write(tree, {"w.pt": "", "a/b.parquet": "", "runs/one/run.json": "", "mlflow.db-wal": "", "mine/runs/x.py": ""})
    found = collect(tree, leave_out=RECORDS)
    assert names(found) == ["mine/net.py", "mine/runs/x.py", "train.py"]
    assert found.left_out == (("a/b.parquet", "data"), ("mlflow.db-wal", "data"), ("runs/", "data"), ("w.pt", "data"))
    assert "left out  a/b.parquet, mlflow.db-wal, runs/, w.pt (data; !NAME in .rayignore includes" in found.table()
    write(tree, {".rayignore": "!*.pt\n!/runs/\n", ".gitignore": "/runs/\n"})
    brought = ["mine/net.py", "mine/runs/x.py", "runs/one/run.json", "train.py", "w.pt"]
    assert names(collect(tree, leave_out=RECORDS)) == brought


def test_further_patterns(tree: Path) -> None:
    write(tree, {"out/x": "", "a/out/x": ""})
    assert names(collect(tree, leave_out=["/out/"])) == ["a/out/x", "mine/net.py", "train.py"]


def test_rayignore_brings_along_what_git_ignores(tree: Path) -> None:
    write(tree, {".gitignore": "_version.py\nassets/\n", "mine/_version.py": "", "assets/a": "", "assets/b/c": ""})
    assert names(collect(tree)) == ["mine/net.py", "train.py"]
    write(tree, {".rayignore": "!mine/_version.py\n!/assets/\nassets/a\n!../project/x\n!nope\n"})
    assert names(collect(tree)) == ["assets/b/c", "mine/_version.py", "mine/net.py", "train.py"]


def test_secrets_never_go_along(tree: Path) -> None:
    secret = [
        ".env",
        "sub/.env.local",
        "id_rsa",
        "tls/server.key",
        "tls/both.pem",
        ".netrc",
        "x/.aws/config",
        "kubeconfig",
    ]
    write(tree, dict.fromkeys(secret, KEY))
    write(tree, {".env.example": "", "tls/ca.pem": CERTIFICATE, "mine/secrets.py": "", "cluster-token": "x"})
    write(tree, {".rayignore": "".join(f"!{name}\n" for name in secret)})
    if (tree / ".git").exists():
        git(tree, "add", "--force", ".")
    found = collect(tree, secrets=[tree / "cluster-token"])
    assert names(found) == [".env.example", "mine/net.py", "mine/secrets.py", "tls/ca.pem", "train.py"]
    assert {name for name, why in found.left_out if why == "secret"} == {*secret, "cluster-token"}
    assert "(may hold secrets)" in found.table()


def test_links(tree: Path) -> None:
    write(tree, {"configs/a.yaml": "a", "configs/deep/b.yaml": "b", ".env": "A=1", "w.pt": ""})
    (tree / "mine" / "configs").symlink_to("../configs")
    (tree / "one.yaml").symlink_to("configs/a.yaml")
    (tree / "innocent").symlink_to(".env")
    (tree / "weights").symlink_to("w.pt")
    (tree / "env").symlink_to(".venv")
    (tree / ".venv").mkdir()
    (tree / "nowhere").symlink_to("not-there")
    found = collect(tree)
    assert names(found) == [
        *("configs/a.yaml", "configs/deep/b.yaml", "mine/configs/a.yaml", "mine/configs/deep/b.yaml", "mine/net.py"),
        *("one.yaml", "train.py"),
    ]
    assert dict(found.left_out)["innocent"] == "secret"
    found.stage(tree.parent / "staged")
    assert (tree.parent / "staged/mine/configs/deep/b.yaml").read_text() == "b"
    assert not (tree.parent / "staged/mine/configs").is_symlink()
    assert not (tree.parent / "staged/one.yaml").is_symlink()


def test_links_that_lead_out_or_round_are_refused(tree: Path) -> None:
    (tree.parent / "outside").mkdir()
    (tree / "data").symlink_to(tree.parent / "outside")
    (tree / "hosts").symlink_to("/etc/hosts")
    (tree / "mine" / "up").symlink_to("..")
    write(tree, {"a/x": "", "b/x": ""})
    (tree / "a" / "b").symlink_to("../b")
    (tree / "b" / "a").symlink_to("../a")
    said = refusal(tree)
    assert re.match(
        r"a/b/a(/b)?, b/a/b(/a)?, data, hosts, mine/up is a link that leads out of \S+, or back to ", said
    ), said
    assert said.endswith("a line of .rayignore, as in .gitignore, leaves it out")
    write(tree, {".rayignore": "/data/\nhosts\nup\na/b\nb/a/\n"})
    assert names(collect(tree)) == ["a/x", "b/x", "mine/net.py", "train.py"]


def test_a_link_to_another_part_of_the_repository(tmp_path: Path) -> None:
    """The package of a subdirectory contains what links in it lead to, wherever in the repository those files are."""
    git(tmp_path, "init")
    root = write(
        tmp_path, {"common/x.py": "", "common/ignored": "", "projects/one/train.py": "", "projects/two/y.py": ""}
    )
    write(root, {".gitignore": "ignored\n"})
    (root / "projects/one/common").symlink_to("../../common")
    assert names(collect(root / "projects/one")) == ["common/x.py", "train.py"]


def test_repositories_within_the_repository(tmp_path: Path) -> None:
    git(tmp_path, "init")
    for name in ("tracked", "untracked"):
        write(tmp_path, {f"{name}/a.py": "", f"{name}/b.log": "", f"{name}/.gitignore": "*.log\n"})
        git(tmp_path / name, "init")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-m", "one")
    git(tmp_path, "add", "tracked")  # like a submodule
    (tmp_path / "empty").mkdir()
    assert names(collect(tmp_path)) == ["tracked/a.py", "untracked/a.py"]


def test_a_directory_that_an_outer_repository_ignores(tmp_path: Path) -> None:
    git(tmp_path, "init")
    write(tmp_path, {".gitignore": "scratch/\n", "scratch/mine/x.py": "", "scratch/.gitignore": "*.log\n"})
    write(tmp_path, {"scratch/mine/a.log": ""})
    assert names(collect(tmp_path / "scratch/mine")) == ["a.log", "x.py"]


def test_a_hook_of_gits_does_not_mislead(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere/.git")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert names(collect(tree)) == ["mine/net.py", "train.py"]


def test_without_git_installed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tree))
    write(tree, {".gitignore": "*.log\n", "a.log": ""})
    assert names(collect(tree)) == ["mine/net.py", "train.py"]


@pytest.fixture
def nobody() -> Iterator[None]:
    """Run the test as a user without access rights."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read_is_named(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    root = write(tmp_path_factory.getbasetemp() / "unreadable", {"a.py": "", "b.py": "", "c/d.py": "", "e.py": ""})
    above = [root, *root.parents]
    modes = {folder: folder.stat().st_mode for folder in above}
    for folder in above:
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    (root / "a.py").chmod(0)
    (root / "b.py").chmod(0)
    try:
        request.getfixturevalue("nobody")
        message = refusal(root)
        assert message.startswith("a.py (Permission denied), b.py (Permission denied) cannot be read; ")
        assert ".rayignore" in message
    finally:
        os.seteuid(os.getuid())
        for folder, mode in modes.items():
            if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
                folder.chmod(mode)


def test_a_name_that_is_no_text(tree: Path) -> None:
    (tree / os.fsdecode(b"\xff.py")).write_text("")
    assert refusal(tree).startswith("?.py has a name that is not UTF-8; ")


# --- the same contents ------------------------------------------------------------------------------------------------


def uri(folder: Path) -> str:
    """Return Ray's URI for the package of a directory, with Ray's excludes for a working directory."""
    return str(get_uri_for_directory(str(folder), include_gitignore=True, excludes=get_runtime_env_default_excludes()))


def test_the_digest_is_of_contents_alone(tree: Path, tmp_path: Path) -> None:
    one = collect(tree)
    os.utime(tree / "train.py", (1, 1))
    shutil.copytree(tree, tmp_path / "copy", symlinks=True)
    assert collect(tree).digest == one.digest == collect(tmp_path / "copy").digest
    digests = {one.digest}
    (tree / "train.py").write_text("import torch  \n")
    digests.add(collect(tree).digest)
    (tree / "train.py").chmod(0o755)
    digests.add(collect(tree).digest)
    (tree / "train.py").rename(tree / "fit.py")
    digests.add(collect(tree).digest)
    assert len(digests) == 4


def test_ray_makes_one_package_of_the_same_contents(tree: Path, tmp_path: Path) -> None:
    write(tree, {".gitignore": "*.log\n", "kept.log": "tracked", "sub/.rayignore": "x\n", "sub/y": "", ".env": ""})
    if (tree / ".git").exists():
        git(tree, "add", "--force", "kept.log")
    one = collect(tree, leave_out=RECORDS)
    one.stage(tmp_path / "one")
    os.utime(tree / "train.py", (1, 1))
    write(tree, {".env": "other", "sub/x": "", "runs/x": ""})
    again = collect(tree, leave_out=RECORDS)
    again.stage(tmp_path / "elsewhere/two")
    assert uri(tmp_path / "one") == uri(tmp_path / "elsewhere/two")
    assert again.digest == one.digest
    # Ray leaves out no file of the package, not even a tracked file that .gitignore matches.
    create_package(str(tmp_path / "one"), tmp_path / "p.zip", True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert sorted(archive.namelist()) == names(one)
    assert ("kept.log" in names(one)) == (tree / ".git").exists()

    (tree / "train.py").write_text("import torch\n\n")
    collect(tree).stage(tmp_path / "three")
    assert uri(tmp_path / "three") != uri(tmp_path / "one")
    assert (tmp_path / "one/train.py").read_text() == (tmp_path / "three/train.py").read_text()  # linked, not copied


def test_staged_on_another_disk(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tree / "train.py").chmod(0o755)
    found = collect(tree)
    found.stage(tmp_path / "one")
    assert (tmp_path / "one/train.py").read_text() == "import torch\n"
    assert os.access(tmp_path / "one/train.py", os.X_OK)
    (tree / "train.py").unlink()
    with pytest.raises(ConfigError, match=r"/train\.py .*No such file"):
        found.stage(tmp_path / "two")


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_more_than_the_limit_names_what_is_large(tree: Path) -> None:
    write(tree, {"big.csv": "x" * 700_000, **{f"images/{i}.txt": "x" * 1000 for i in range(600)}})
    message = refusal(tree, limit_mb=1.2)
    assert message.startswith("cluster.package_limit_mb=1.2 is less than the 1.3 MB ")
    assert ": big.csv (700.0 kB), images/ (600.0 kB), train.py (13 B), mine/net.py (0 B); " in message
    assert ".rayignore" in message
    assert collect(tree, limit_mb=1.31).size == 1_300_013
    write(tree, {".rayignore": "images/\n"})
    assert collect(tree, limit_mb=1.2).size == 700_013


def test_nothing_is_read_of_what_is_too_large(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "read_file", lambda name, path: pytest.fail(f"read {name}"))
    with (tree / "huge").open("wb") as file:
        file.truncate(10**12)
    assert "huge (1000.0 GB)" in refusal(tree, limit_mb=100)


def test_more_files_than_anybody_means(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_files, "_MOST_FILES", 50)
    write(tree, {f"images/{i}": "" for i in range(60)})
    said = refusal(tree)
    assert "images/" in said
    assert "more than 50 files" in said
    assert ".rayignore" in said
    write(tree, {".rayignore": "images/\n"})
    assert len(collect(tree).files) == 2


def test_the_table_shows_what_is_large(tmp_path: Path) -> None:
    write(tmp_path, {f"images/{i}.txt": "x" * 2000 for i in range(100)})
    write(tmp_path, {"images/huge": "x" * 300_000, "a/b/c/d.txt": "x" * 1_200_000, "a/b/e": "x", "z": ""})
    *rows, total = collect(tmp_path).table(most=4).splitlines()
    assert rows == [
        "    1.2 MB  a/b/c/d.txt",
        "  300.0 kB  images/huge",
        "    2.0 kB  images/0.txt",
        "    2.0 kB  images/1.txt",
        "  196.0 kB  … 100 others",
    ]
    assert total == f"    1.7 MB  in 104 files of {tmp_path}"


# --- code in other places ---------------------------------------------------------------------------------------------


def test_imports_are_found_in_python_files(tree: Path) -> None:
    text = (
        "import os, torch.nn as nn, numpy\nfrom mine.net import x\nfrom . import y\n  import later\nx = 'import no'\n"
    )
    write(tree, {"train.py": text, "notes.txt": "import nothing\n", "odd.py": "import \xe4\nfrom\n"})
    assert collect(tree).imports == {"os", "torch", "numpy", "mine", "later"}


def test_code_that_is_imported_from_elsewhere(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write(
        tmp_path / "src",
        {
            "theirs/__init__.py": "from deeper import y\n",
            "theirs/runs/z.py": "",
            "theirs/w.pt": "",
            "deeper/__init__.py": "import single\n",
            "single.py": "import theirs\n",
            "word/notes.txt": "",
            "unused/__init__.py": "",
        },
    )
    installed = write(tmp_path / "venv/lib/site-packages", {"installed.py": ""})
    for folder in (src, installed, tree):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tree)
    write(
        tree, {"train.py": "import theirs, installed, mine, json, ray, torch\nfrom word import that\nimport nowhere\n"}
    )
    modules, single = elsewhere(collect(tree).imports, tree)
    assert [(one.name, names(one.package)) for one in modules] == [
        ("deeper", ["__init__.py"]),
        ("theirs", ["__init__.py", "runs/z.py"]),
    ]
    assert single == [src / "single.py"]
    more = collect(tree).with_files(single)
    assert names(more) == ["mine/net.py", "single.py", "train.py"]
    assert more.digest != collect(tree).digest
    with pytest.raises(ConfigError, match="package_limit_mb=0 is less"):
        elsewhere(["theirs"], tree, limit_mb=0)


def test_raytrainer_itself_is_sent_where_it_is_a_checkout(tmp_path: Path) -> None:
    root = Path(package.__file__).resolve().parents[2]
    modules, single = elsewhere(["raytrainer"], tmp_path)
    if "site-packages" in root.parts:  # installed from a wheel, which the image has, too
        assert modules == []
        return
    assert [one.name for one in modules] == ["raytrainer"]
    found = names(modules[0].package)
    assert {"__init__.py", "cluster/entry.py", "configs/train.yaml", "configs/experiment/mlp.yaml"} <= set(found)
    assert single == []
    # If the launch is from the checkout itself, its tree contains raytrainer.
    assert elsewhere(["raytrainer"], root) == ([], [])
    staged = tmp_path / "py_modules/raytrainer"
    modules[0].package.stage(staged)
    program = "import raytrainer; from raytrainer.config import compose; print(raytrainer.__file__, compose(['experiment=mlp']).experiment.seed)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(staged.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(staged / "__init__.py"), "0"]


# --- documentation ----------------------------------------------------------------------------------------------------


def test_what_stays_here_is_written_down() -> None:
    text = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
    section = re.sub(r"```.*?```", "", text.partition("## What goes along")[2].partition("\n## ")[0], flags=re.DOTALL)
    told = set(re.findall(r"`([^`]+)`", section))
    assert {*sent_files.DATA, *sent_files.RECORDS, *sent_files._SECRET_FOLDERS} <= told
    # Every name that the page lists as a secret is one, except .env.example.
    always = section.partition("**secrets, always**")[2].partition(";\n- ")[0]
    names = [name.replace("*", "x") for name in re.findall(r"`([^`]+)`", always) if not name.startswith("cluster.")]
    assert [name for name in names if not (may_hold_secrets(name) or name in sent_files._SECRET_FOLDERS)] == [
        ".env.example"
    ]
