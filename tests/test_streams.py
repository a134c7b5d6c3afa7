"""Output that nobody reads, or that the stream cannot encode, changes no exit code. The processes tested own their
streams."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytrainer.progress import Display

ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "LANG": "C", "PYTHONIOENCODING": "ascii"}
BEGIN = "from raytrainer.core import streams; streams.protect(); import os, sys\n"


def run(program: str, environment: dict[str, str] | None = None, **how: object) -> subprocess.CompletedProcess[bytes]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run([sys.executable, "-c", BEGIN + program], env={**os.environ, **(environment or {})}, **how)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_printed_in_any_encoding(encoding: str) -> None:
    text = "loss… 3 × 4 → é \U0001f600 \udcff ─"
    ended = run(f"print({text!r}); print({text!r}, file=sys.stderr); sys.exit(3)", {"PYTHONIOENCODING": encoding})
    assert ended.returncode == 3
    for shown in (ended.stdout.decode(encoding), ended.stderr.decode(encoding)):
        assert "\\udcff" in shown
        if encoding == "ascii":
            assert shown == "loss... 3 x 4 -> \\xe9 \\U0001f600 \\udcff -\n"
        else:
            assert "é" in shown


def test_a_reader_that_has_gone_is_noticed_and_ends_nothing() -> None:
    program = """
for n in range(20000):
    print("line", n)
    print("line", n, file=sys.stderr)
os.write(int(sys.argv[1]), str(streams.is_lost(sys.stdout)).encode())
sys.exit(4)
"""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program, str(write)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[write],
    )
    os.close(write)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    with os.fdopen(read) as reader:
        assert reader.read() == "True"
    assert process.wait(60) == 4


def test_closed_streams_stay_closed_and_no_file_takes_their_place(tmp_path: Path) -> None:
    program = """
import subprocess
file = open(sys.argv[1], "w")
assert file.fileno() > 2
print("to nobody"); print("to nobody", file=sys.stderr)
subprocess.run(["echo", "nor from a child"])
file.write("alone")
sys.exit(5)
"""
    command = '"$0" -c "$1" "$2" <&- >&- 2>&-'
    ended = subprocess.run(["/bin/sh", "-c", command, sys.executable, BEGIN + program, str(tmp_path / "file")])
    assert ended.returncode == 5
    assert (tmp_path / "file").read_text() == "alone"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_as_output_ends_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        assert run("print('x' * 100000); sys.exit(6)", stdout=full, stderr=full).returncode == 6


def test_a_pipe_that_does_not_block_loses_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + "os.set_blocking(1, False)\nprint('x' * 1000000); sys.exit(0)"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    time.sleep(0.1)  # so that the pipe is full; the test also passes if it is not
    assert len(process.stdout.read()) == 1000001
    assert process.wait(60) == 0


def test_an_ascii_log_of_a_worker_takes_any_text() -> None:
    program = f"streams.take_any_text(); print({chr(233)!a}, {chr(0xDCFF)!a}); print({chr(0x2192)!a}, file=sys.stderr)"
    ended = run(program, ASCII)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "é \\udcff\n".encode(), "→\n".encode())


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("kind", ["broken", "closed", "none", "ascii"])
def test_progress_is_shown_or_not_and_never_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress never fails, also on the stream of another program, such as an application that is swept."""
    data = io.BytesIO()
    stream = {"broken": Broken(), "closed": io.StringIO(), "none": None, "ascii": io.TextIOWrapper(data, "ascii")}[kind]
    if kind == "closed":
        assert stream is not None
        stream.close()
    kept: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        display = Display()
        display.also = kept.append
        display.say("a → é")
        display.draw(["…"])
        display.close()
    assert kept == ["a → é\n"]
    if kind == "ascii":
        assert data.getvalue() == b"a -> \\xe9\n"


@pytest.mark.parametrize("how", ["ascii", "closed", "head"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list", "--json"], 0),
        (["--help"], 0),
        (["--cfg", "job", "experiment=mlp"], 0),
        (["experiment=mlp", "trainer.max_epoch=3"], 2),
    ],
)
def test_verbs_end_with_their_code_whoever_reads(arguments: list[str], code: int, how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raytrainer", *arguments]
    shell = {"ascii": '"$@"', "closed": '"$@" >&- 2>&-', "head": '{ "$@"; echo $? > ../code; } 2>&1 | head -c 1'}[how]
    (tmp_path / "é").mkdir()
    ended = subprocess.run(
        ["/bin/sh", "-c", shell, "sh", *command],
        cwd=tmp_path / "é",
        env={**os.environ, **(ASCII if how == "ascii" else {})},
        capture_output=True,
    )
    if how == "head":
        assert int((tmp_path / "code").read_text()) == code
        return
    assert ended.returncode == code
    assert b"Traceback" not in ended.stderr
    if how == "ascii" and "--json" in arguments:
        assert json.loads(ended.stdout) == []
