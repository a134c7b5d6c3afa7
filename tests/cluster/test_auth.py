"""Tests of a cluster's token: which one is used, which files are refused, and that no message contains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raytrainer.backends.jobs_api.auth import Token, denied, find_token
from raytrainer.errors import ConfigError

SECRET = "planted-secret-0123456789"
ADDRESS = "https://ray.example.com"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return holding(tmp_path / "my token", SECRET)


def holding(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_order_of_the_places(file: Path, home: Path) -> None:
    assert find_token(environ={}) is None
    holding(home / ".ray" / "auth_token", "of-the-home\n")
    other = holding(file.parent / "other", "of-the-path")
    environ: dict[str, str] = {}
    for name, value, wanted in (
        ("RAY_USELESS", "", "of-the-home"),
        ("RAY_AUTH_TOKEN_PATH", str(other), "of-the-path"),
        ("RAY_AUTH_TOKEN", "of-the-variable", "of-the-variable"),
    ):
        environ[name] = value
        found = find_token(environ=environ)
        assert found is not None
        assert found.value == wanted
    given = find_token(str(file), environ)
    assert given is not None
    assert given.value == SECRET
    # In this mode no token is sent, as by Ray's own client, except from a file that the user has named.
    environ["RAY_AUTH_MODE"] = "disabled"
    assert find_token(environ=environ) is None
    assert find_token(str(file), environ) == given


def test_a_home_directory_is_meant_by_a_tilde(home: Path) -> None:
    holding(home / "secrets" / "ray", SECRET)
    for found in (find_token("~/secrets/ray", {}), find_token(environ={"RAY_AUTH_TOKEN_PATH": "~/secrets/ray"})):
        assert found is not None
        assert found.value == SECRET


def test_a_token_shows_where_it_is_from_and_not_itself(file: Path) -> None:
    found = find_token(str(file), {})
    assert str(file) in repr(found)
    assert SECRET not in repr(found)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_read_or_change(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        find_token(str(file), {})
    assert str(caught.value).startswith(f"cluster.token_file={file} is a token that others")
    assert str(caught.value).endswith(f"chmod 600 '{file}'")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.*chmod 600"):
        find_token(environ={"RAY_AUTH_TOKEN_PATH": str(file)})


def test_so_is_ray_s_own_file_which_ray_makes_with_0644(home: Path) -> None:
    path = holding(home / ".ray" / "auth_token", SECRET, 0o644)
    with pytest.raises(ConfigError, match=rf"chmod 600 {path}"):
        find_token(environ={})


def test_an_invalid_token_is_refused(file: Path, tmp_path: Path) -> None:
    def told(given: str, environ: dict[str, str] | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            find_token(given or None, environ or {})
        return str(caught.value)

    assert "is empty" in told(str(holding(tmp_path / "empty", " \n")))
    assert "No such file" in told(str(tmp_path / "missing"))
    assert "Is a directory" in told(str(tmp_path))
    for text in (f"two words {SECRET}", f"{SECRET}\n{SECRET}", f"{SECRET}ü"):
        said = told(str(holding(file, text)))
        assert "one word" in said
        assert SECRET not in said
    assert "RAY_AUTH_TOKEN does not hold" in told("", {"RAY_AUTH_TOKEN": f"{SECRET} x"})
    # The user gives the token itself instead of the path of its file.
    assert SECRET not in told(SECRET)
    assert "the path of a file" in told(SECRET)
    assert SECRET not in told("", {"RAY_AUTH_TOKEN_PATH": SECRET})


def test_one_that_is_demanded_and_not_there(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=token .*cluster\.token_file"):
        find_token(environ={"RAY_AUTH_MODE": "token"})


@pytest.mark.parametrize(
    ("status", "said", "scheme", "token", "environ", "told"),
    [
        (
            401,
            "Unauthorized",
            "",
            None,
            {},
            r"requires a token \(401\), and none was found: set cluster\.token_file=PATH",
        ),
        (401, "Unauthorized", "", None, {"RAY_AUTH_MODE": "disabled"}, r"RAY_AUTH_MODE=disabled.*unset it"),
        (
            403,
            "Forbidden: Invalid authentication token",
            "",
            SECRET,
            {},
            r"refuses the token of HERE \(403\).*get-auth-",
        ),
        (401, "Unauthorized", "", SECRET, {}, r"it got no token \(401\), although that of HERE was sent: a proxy"),
        (403, "<html>403</html>", "", SECRET, {}, r"403 Forbidden, and the answer is not from Ray"),
        (401, "", 'Basic realm="x"', SECRET, {}, r"asks for Basic authentication"),
        (401, "", "Bearer", None, {}, r"requires a token"),
    ],
)
def test_a_refusal_is_explained(
    status: int, said: str, scheme: str, token: str | None, environ: dict[str, str], told: str
) -> None:
    sent = Token("HERE", token) if token is not None else None
    message = str(denied(ADDRESS, status, said, scheme, sent, environ))
    assert message.startswith(ADDRESS)
    assert SECRET not in message
    assert re.search(told, message), message
