"""The Dockerfile, read and tried as far as possible without a Docker engine: what it copies exists and nothing else is
sent, everything is pinned, the user is not root, and the steps that run Python work.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from raytrainer.backends.kubernetes import pods

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Stage:
    """The part of the Dockerfile that one FROM begins."""

    image: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, its text with lines joined)

    def texts(self, instruction: str) -> list[str]:
        return [text for found, text in self.steps if found == instruction]


def parsed() -> tuple[dict[str, str], list[Stage]]:
    """Return the arguments before the first FROM, and the stages."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            image, _, name = rest.partition(" AS ")
            for key, value in arguments.items():
                image = image.replace(f"${{{key}}}", value)
            stages.append(Stage(image, name))
        elif not stages:
            assert instruction == "ARG", line
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            stages[-1].steps.append((instruction, rest))
    return arguments, stages


def copied(stage: Stage) -> list[tuple[list[str], str]]:
    """Return the sources and the target of each COPY from the source tree."""
    words = [shlex.split(text) for text in stage.texts("COPY")]
    return [(found[:-1], found[-1]) for found in words if not found[0].startswith("--from=")]


def is_sent(path: str) -> bool:
    """Return whether .dockerignore lets a file into the build. The last pattern that matches it, or a folder above,
    decides."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        wanted, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            above = "/".join(parts[:depth])
            # `**/` matches any folders or none; a `*` stays within one folder.
            name = pattern.removeprefix("**/")
            if fnmatch.fnmatchcase(parts[depth - 1] if pattern.startswith("**/") else above, name) and (
                "/" not in above or "*" not in pattern or pattern.startswith("**/")
            ):
                sent = wanted
                break
    return sent


def tracked() -> list[str]:
    """Return the files that are, or may become, part of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in found if (ROOT / path).exists()]


def test_what_is_copied_is_there_and_is_sent() -> None:
    sources = {source for stage in parsed()[1] for found, _ in copied(stage) for source in found}
    assert sources
    files = tracked()
    for source in sources:
        below = [file for file in files if file == source or file.startswith(f"{source}/")]
        assert below, source
        assert [file for file in below if not is_sent(file)] == []
    # Nothing else is sent: a file that is sent but not copied could only be there by mistake.
    tops = {file.split("/")[0] for file in files if is_sent(file)}
    assert tops == sources


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".env",
        "raytrainer/.env.local",
        ".venv/bin/python",
        "runs/a/run.json",
        "mlflow.db",
        "raytrainer/__pycache__/a.pyc",
        "id_rsa",
    ],
)
def test_what_is_never_sent(path: str) -> None:
    assert not is_sent(path)


def test_the_base_is_pinned_and_is_the_python_that_is_tested() -> None:
    _, stages = parsed()
    for stage in stages:
        version = re.fullmatch(r"python:(\d+)\.(\d+)\.(\d+)-slim-\w+", stage.image)
        assert version, stage.image
        with (ROOT / "pyproject.toml").open("rb") as file:
            assert f">={version[1]}.{version[2]}" == tomllib.load(file)["project"]["requires-python"]


def test_it_runs_as_nobody_in_particular() -> None:
    last = parsed()[1][-1]
    assert last.texts("USER") == [f"{pods.USER}:{pods.USER}"]
    instructions = [instruction for instruction, _ in last.steps]
    # The check of the image runs as that user, too.
    assert instructions.index("USER") < len(instructions) - 1 - instructions[::-1].index("RUN")
    assert f"--uid {pods.USER}" in " ".join(last.texts("RUN"))
    # KubeRay and `ray up` bring their own commands, which an entrypoint would take for its arguments.
    assert "ENTRYPOINT" not in instructions


def test_nothing_comes_from_anywhere_and_nothing_secret_goes_in() -> None:
    for stage in parsed()[1]:
        assert not stage.texts("ADD")
        for text in stage.texts("RUN"):
            assert not re.search(r"curl|https?://", text), text
        for text in [*stage.texts("ARG"), *stage.texts("ENV")]:
            assert not re.search(r"SECRET|TOKEN|PASSWORD|_KEY\b", text), text


def test_every_package_is_pinned() -> None:
    runs = [text for stage in parsed()[1] for text in stage.texts("RUN")]
    installs = [
        command for text in runs for command in text.split("&&") if re.search(r"\b(pip|apt-get) install\b", command)
    ]
    assert len(installs) == 4
    for command in installs:
        if "apt-get" in command:
            assert "--no-install-recommends" in command
        else:
            assert re.search(r"-c \S*constraints.txt|--no-deps \S+\.whl", command), command
        assert (
            "--no-cache-dir" in command
            or "apt-get" in command
            or "PIP_NO_CACHE_DIR=1" in parsed()[1][-1].texts("ENV")[0]
        )
    assert any("rm -rf /var/lib/apt/lists/*" in text for text in runs)


def test_the_steps_of_python_run(tmp_path: Path) -> None:
    """Run the build's own commands in the tree that the engine gets, with this Python and without a network."""
    _, (build, last) = parsed()
    source, wheels = tmp_path / "src", tmp_path / "wheels"
    source.mkdir()
    environment = {**os.environ, "PIP_NO_INDEX": "1"}

    def run(command: str) -> str:
        words = shlex.split(command.replace("/wheels", str(wheels)).replace("/opt/raytrainer", str(source)))
        words = [sys.executable, "-m", *words] if words[0] == "pip" else [sys.executable, *words[1:]]
        done = subprocess.run(words, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    files = [file for file in tracked() if is_sent(file)]
    for instruction, text in build.steps:
        if instruction == "COPY":
            for path in shlex.split(text)[:-1]:
                for file in files:
                    if file == path or file.startswith(f"{path}/"):
                        (source / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(ROOT / file, source / file, follow_symlinks=False)
        elif instruction == "RUN" and " > requirements.txt" in text:
            (source / "requirements.txt").write_text(run(text.partition(" > ")[0]))
        elif instruction == "RUN":
            run(text)
    (wheel,) = wheels.glob("raytrainer-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "raytrainer/configs/train.yaml" in names
    assert "hydra_plugins/raytrainer/ray_tune.py" in names
    # The requirements and the pinned versions fit together: they are installed here, so pip has nothing to fetch.
    install = next(text for text in last.texts("RUN") if "requirements.txt" in text)
    run(re.sub(r"\$\{(PACKAGES|TORCH_INDEX:[^ ]* \S+)\}*", "", install).replace("pip install", "pip install --dry-run"))
    composed = next(text for text in last.texts("RUN") if "--cfg" in text)
    assert "max_steps" in run(composed.partition(" > ")[0])
