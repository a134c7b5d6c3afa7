"""Forwarded variables come by name, from the cluster's environment or a private file, and no error shows a value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raytrainer.core.environment import provide, put_back
from raytrainer.errors import ConfigError


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "env"
    path.write_text("# comment=1\nexport PLANTED='s3cr3t value'\nOTHER=a=b\n\nnonsense\n")
    path.chmod(0o600)
    return path


def test_what_is_set_stays_and_the_rest_comes_from_the_file(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "mine")
    monkeypatch.delenv("PLANTED", raising=False)
    provide(["OTHER", "PLANTED"], str(env_file))
    assert (os.environ["OTHER"], os.environ["PLANTED"]) == ("mine", "s3cr3t value")
    monkeypatch.delenv("PLANTED")


def test_the_home_is_that_of_whoever_runs_it(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(env_file.parent))
    monkeypatch.setenv("PLANTED", "")
    monkeypatch.delenv("PLANTED")
    provide(["PLANTED"], "~/env")
    assert os.environ.pop("PLANTED") == "s3cr3t value"


def test_only_named_ones_are_taken(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTHER", raising=False)
    monkeypatch.setenv("PLANTED", "x")
    provide(["PLANTED"], str(env_file))
    assert "OTHER" not in os.environ


@pytest.mark.parametrize("given", [True, False])
def test_a_missing_variable_is_named_without_any_value(given: bool, env_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.forward_env=WANDB_API_KEY ") as caught:
        provide(["WANDB_API_KEY"], str(env_file) if given else None)
    assert "s3cr3t" not in str(caught.value)


def test_a_file_that_others_can_read_is_refused(env_file: Path) -> None:
    env_file.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {env_file}"):
        provide(["WANDB_API_KEY"], str(env_file))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.env_file=.*No such file"):
        provide(["WANDB_API_KEY"], str(tmp_path / "none"))


def test_only_what_changed_is_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAME": "1", "CHANGED": "2", "GONE": "3"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    monkeypatch.setenv("CHANGED", "4")
    monkeypatch.setenv("NEW", "5")
    monkeypatch.delenv("GONE")
    written: list[bytes] = []
    monkeypatch.setattr(os, "putenv", lambda name, value: written.append(name))
    monkeypatch.setattr(os, "unsetenv", written.append)
    put_back(before)
    assert dict(os.environ) == before
    assert sorted(written) == [b"CHANGED", b"GONE", b"NEW"]
