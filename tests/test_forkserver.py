"""The server that forks launches: its children behave like a new interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.forkserver import Forked, Server, server

# What a program can see of how it was started. Then it ends as the test asks.
PROGRAM = """
    import json, os, signal, sys, threading

    seen = {
        "folder": os.getcwd(),
        "arguments": sys.argv[1:],
        "program": sys.argv[0],
        "name": __name__,
        "module": __spec__ and __spec__.name,
        "file": globals().get("__file__"),
        "is_main": sys.modules["__main__"].__dict__ is globals(),
        "path": sys.path[:2],
        "environment": {name: value for name, value in os.environ.items() if name not in ("_", "LC_CTYPE")},
        "leads_session": os.getsid(0) == os.getpid(),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads": threading.active_count(),
        "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding, sys.stderr.errors],
        "files": [number for number in range(3, 64) if os.path.exists(f"/proc/self/fd/{number}")],
        "stdin": sys.stdin.read(),
    }
    print(json.dumps(seen))
    if sys.argv[1:] == ["waits"]:
        sys.stdout.flush()
        signal.pause()
    sys.exit(7)
"""


@pytest.fixture
def program(in_tmp: Path) -> Path:
    (in_tmp / "looks").mkdir()
    (in_tmp / "looks" / "__main__.py").write_text(textwrap.dedent(PROGRAM))
    return in_tmp


def start(
    folder: Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "looks"),
    environment: Mapping[str, str] | None = None,
) -> Forked:
    environment = {**os.environ, **(environment or {})}
    return server().start(program, arguments, folder, folder / "out", folder / "err", environment)


def seen(folder: Path) -> dict[str, Any]:
    assert (folder / "err").read_text() == ""
    found: dict[str, Any] = json.loads((folder / "out").read_text())
    return found


@pytest.mark.parametrize("kind", ["module", "script", "code"])
def test_a_child_is_as_a_new_interpreter(kind: str, program: Path) -> None:
    script = program / "looks" / "__main__.py"
    before = {"module": ["-m", "looks"], "script": [str(script)], "code": ["-c", script.read_text()]}[kind]
    environment = {**os.environ, "PYTHONPATH": "/first", "SOME": "value"}
    forked = start(program, "a", "b c", program=before, environment=environment)
    assert forked.wait(60) == 7, (program / "err").read_text()
    found = seen(program)
    with (program / "out").open("wb") as out, (program / "err").open("wb") as err:
        command = [sys.executable, *before, "a", "b c"]
        new = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
    assert new.returncode == 7
    expected = seen(program)
    # The files that torch keeps open do not belong to the server or to another child.
    kept = found.pop("files")
    assert expected.pop("files") == []
    assert len(kept) <= 2
    assert found == expected


def test_its_end_is_told_as_subprocess_tells_it(program: Path) -> None:
    forked = start(program, "waits")
    while not (program / "out").read_text():
        assert forked.poll() is None, (program / "err").read_text()
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.01)
    os.kill(forked.pid, signal.SIGTERM)
    assert forked.wait(60) == -signal.SIGTERM
    forked.kill()  # does nothing: the process has ended
    assert forked.poll() == -signal.SIGTERM


def test_a_variable_that_is_read_on_import_needs_a_new_interpreter() -> None:
    own = dict(server().environment)
    assert server().can_start(own)
    assert server().can_start({**own, "MLFLOW_TRACKING_URI": "http://localhost", "SOME": "value", "PYTHONPATH": "/a"})
    for name in ("OMP_NUM_THREADS", "RAY_AUTH_MODE", "PYTHONHASHSEED", "MLFLOW_ENABLE_ASYNC_LOGGING"):
        assert not server().can_start({**own, name: "1"}), name


def test_a_server_that_cannot_import_says_so(in_tmp: Path) -> None:
    broken = Server({**os.environ, "PYTHONHOME": "/nowhere"})
    with pytest.raises(RuntimeError, match="fork server"):
        broken.start(("-m", "looks"), (), in_tmp, in_tmp / "out", in_tmp / "err", {})
    broken.end()
