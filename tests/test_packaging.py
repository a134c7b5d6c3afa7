"""A wheel, an sdist and an editable install each contain the code, the configs and the Hydra plugins, as seen from a
directory outside the repository. They are built and installed offline.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The fresh environment's Python runs this. Hydra's own reader of pkg:// shows whether the configs can be composed.
PROBE = """
import importlib, json, raytrainer, raytrainer.configs
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
source = ImportlibResourcesConfigSource(provider="probe", path="pkg://raytrainer.configs")
groups = {name: sorted(source.list(name, None)) for name in source.list("", None) if source.is_group(name)}
print(json.dumps({
    "package": raytrainer.__path__[0],
    "groups": {name: found for name, found in groups.items() if not name.startswith("__")},
    "lr": source.load_config("optimizer/sgd").config.lr,
    "plugins": [str(path) for path in importlib.import_module("hydra_plugins.raytrainer").__path__],
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the sdist and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def fresh_environment(where: Path) -> Path:
    """Create an environment with our dependencies and without raytrainer. Return its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", where, cwd=where.parent)
    (site,) = where.glob("lib/python*/site-packages")
    # Paths in a .pth file are searched, but .pth files in them are not read, so an editable raytrainer stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return where / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


def expected_groups() -> dict[str, list[str]]:
    folders = [folder for folder in (ROOT / "configs").iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_install_is_complete_from_another_directory(kind: str, built: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "fresh")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "editable":
        install(python, "-e", ROOT)
    else:
        (archive,) = built.glob("*.whl" if kind == "wheel" else "*.tar.gz")
        install(python, archive)

    found = json.loads(run(python, "-c", PROBE, cwd=elsewhere))
    base = ROOT if kind == "editable" else tmp_path / "fresh"
    assert Path(found["package"]).is_relative_to(base)
    assert Path(found["plugins"][0]).is_relative_to(base)
    assert {name: sorted(files) for name, files in found["groups"].items()} == expected_groups()
    assert found["lr"] == 0.1

    composed = run(python.parent / "raytrainer", "--cfg", "job", "experiment=resnet", cwd=elsewhere)
    assert "raytrainer.models.ResNet" in composed
    assert not list(elsewhere.iterdir()), "composing leaves nothing behind"


def test_the_archives_hold_the_sources_and_no_more(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [
        *(ROOT / "raytrainer").rglob("*"),
        *(ROOT / "hydra_plugins").rglob("*"),
        *(ROOT / "raytrainer" / "configs").glob("**/*"),  # rglob does not follow the link
    ]
    expected = {str(file.relative_to(ROOT)) for file in sources if file.is_file() and "__pycache__" not in file.parts}
    assert in_wheel == expected
    assert "hydra_plugins/__init__.py" not in in_wheel, "a namespace is shared with other plugins"
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert expected <= names
    assert not any(name.startswith(("tests/", "configs/", ".venv/")) for name in names)


def test_every_folder_of_configs_is_a_package() -> None:
    folders = [ROOT / "configs", *(path for path in (ROOT / "configs").rglob("*") if path.is_dir())]
    bare = [
        str(folder) for folder in folders if folder.name != "__pycache__" and not (folder / "__init__.py").is_file()
    ]
    assert not bare, "Hydra does not find a group in a wheel without an __init__.py"


def test_the_link_to_the_configs_is_relative() -> None:
    link = ROOT / "raytrainer" / "configs"
    assert link.is_symlink()
    assert str(link.readlink()) == "../configs"
