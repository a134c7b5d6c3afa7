"""Fork launches from a server that has imported torch, Ray and MLflow. This saves the seconds that a new interpreter needs
for these imports. `tests/launches.py` decides which launches are forked and which get a new interpreter.

The child behaves as `python -m raytrainer ARGUMENTS`. It has its own session, working directory, environment, output and
`sys.path`, no other threads, and the interpreter's default signal handlers. Two things differ: its modules are already
imported, and variables that a library reads on import have the server's values.

All processes of the child's Ray, such as its workers, are forked too: see `CLIENT`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import re
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What a launch on this machine imports; `raytrainer.__main__` is run, not imported.
PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),  # by optimizers and by DDP
    *("ray", "ray.train.torch", "ray.tune", "ray.dag.compiled_dag_node", "ray.dashboard.optional_deps"),
    *("hydra", "pyarrow.fs", "pyarrow.parquet", "sklearn.datasets"),
    *(
        "mlflow",
        "mlflow.pytorch",
        "mlflow.store.tracking.sqlalchemy_store",
        "sqlalchemy.dialects.sqlite",
        "alembic.command",
    ),
    *("mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.db.utils"),
    *(
        f"raytrainer.{name}"
        for name in ("cli", "attempt", "sweep", "runs", "worker", "trainer", "checkpoint", "parallel")
    ),
    *(f"raytrainer.{name}" for name in ("data", "models", "losses", "optim", "metrics", "preflight", "tracking")),
)
# What Ray's workers and its other processes import, less Ray: its library reads variables that the raylet sets for each
# worker when it is loaded.
PRELOADED_FOR_RAY = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "pandas", "pyarrow.fs"),
    *("pyarrow.parquet", "pyarrow.compute", "sklearn.datasets", "aiohttp", "requests", "jsonschema", "pydantic"),
    *(
        "google.protobuf.descriptor",
        "hydra",
        "omegaconf",
        "psutil",
        "yaml",
        "packaging.version",
        "fsspec",
        "tensorboardX",
    ),
    *("pydantic.json_schema", "pydantic.deprecated.class_validators", "rich.panel", "tqdm.auto", "wcwidth", "click"),
    *(
        f"raytrainer.{name}"
        for name in ("checkpoint", "trainer", "data", "models", "losses", "optim", "metrics", "callbacks", "worker")
    ),
)
# Variables that Python, the C library or a preloaded package reads once, at its start or import. A launch with another value
# than the server's needs a new interpreter. Exceptions: only the raylet reads RAY_memory_…, and a token is read when needed.
_READ_ON_IMPORT = re.compile(
    r"(PYTHON(?!PATH$)|RAY_(?!memory_|AUTH_TOKEN)|TUNE_|OMP_|MKL_|KMP_|GOMP_|OPENBLAS_|TORCH|PYTORCH_|CUDA_|ARROW_|LC_|LD_|MALLOC_)\w*"
    r"|LANG|LANGUAGE|TZ|HOME|TMPDIR|MLFLOW_(?!TRACKING_|S3_)\w*"
)


_KIND = socket.SOCK_SEQPACKET  # keeps the boundaries of messages
_LONGEST = 2**20
_SERVERS = ("ray", "launches")

# Ray runs this file instead of the interpreter. It asks the server to fork a process for Ray's script or for a job's driver
# (`python -m raytrainer.…`), and then waits for that process. A test that looks for leftover processes, or kills one, finds
# this client in the session where the real process would be, and the forked process ends with its client. Any other program
# runs in a new interpreter.
CLIENT = """\
#!{python} -IS
import json, os, signal, socket, sys
is_named = sys.argv[1] == "ray::Agent"
if is_named:
    del sys.argv[1]
arguments = sys.argv[1:]
while arguments and arguments[0] in ("-u", "-S", "-s"):
    del arguments[0]
module = arguments[1] if arguments[:1] == ["-m"] else ""
if not arguments or not (module.startswith("raytrainer.") or "/ray/" in arguments[0]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
if "/agent" in arguments[0] and not is_named:  # raytrainer finds the agents by the word Agent in their command line
    os.execv({python!r}, [{python!r}, "-IS", __file__, "ray::Agent", *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({address!r})
words = 2 if module else 1
request = {{
    "program": arguments[:words],
    "arguments": arguments[words:],
    "folder": os.getcwd(),
    "environment": dict(os.environ),
    "python": __file__,
    "priority": os.getpriority(os.PRIO_PROCESS, 0),
    "blocked": list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
}}
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
child = int(connection.recv(64))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(child, number))
code = int(connection.recv(64) or b"1")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""

# `ray ARGUMENTS` with forked processes. The first two arguments are the repository's root and `Server.python`.
_RAY = """\
import sys
sys.path.append(sys.argv.pop(1))
from tests import forkserver
sys.path.pop()
forkserver.fork_rays_processes(sys.argv.pop(1))
sys.argv[0] = "ray"
from ray.scripts.scripts import main
main()
"""


def is_read_on_import(name: str) -> bool:
    """Return whether a variable of this name is read only once, by a new interpreter."""
    return _READ_ON_IMPORT.fullmatch(name) is not None


class Forked:
    """A launch that the server started: the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._connection = connection

    returncode: int | None

    def poll(self) -> int | None:
        """Return its exit code, or minus the number of the signal that ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                line = self._connection.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("raytrainer", timeout or 0.0) from None
            if not line:
                raise RuntimeError(f"The fork server ended before its child {self.pid}.")
            self.returncode = int(line)
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Server:
    """Two fork servers: one for launches and one for the processes of a Ray. They import at the first request, and end with
    the process that started them, even if that is killed.

    Args:
        environment: The servers' environment variables.
        folder: The folder of servers that another process has started; None to start servers.

    Attributes:
        folder: The folder to pass to other processes that use these servers.
        python: The file with `CLIENT`, for `fork_rays_processes`.
        ray: The command `ray` with forked processes, as a list of words.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path | None = None) -> None:
        self.environment = dict(environment)
        self.folder = folder or Path(tempfile.mkdtemp(prefix="forkserver-"))
        self.python = str(self.folder / "python")
        self.ray = [sys.executable, "-c", _RAY, str(Path(__file__).parents[1]), self.python]
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        if folder is None:
            self._begin()
            atexit.register(self.end)

    def _begin(self) -> None:
        python = Path(self.python)
        python.write_text(CLIENT.format(python=sys.executable, address=str(self.folder / "ray")))
        python.chmod(0o755)
        with contextlib.ExitStack() as files:
            log = files.enter_context(self._log.open("ab"))
            listeners = [files.enter_context(socket.socket(socket.AF_UNIX, _KIND)) for _ in _SERVERS]
            for name, listener in zip(_SERVERS, listeners, strict=True):
                listener.bind(str(self.folder / name))
                listener.listen(64)
            numbers = [listener.fileno() for listener in listeners]
            # Its output is a file, as a launch's is: the children keep its `sys.stdout`, with that buffering.
            self._process = subprocess.Popen(
                [sys.executable, __file__, *map(str, numbers)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=numbers,
                env={name: value for name, value in self.environment.items() if name != "PYTHONPATH"},
            )

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Return whether a child with these variables is what a new interpreter would be."""
        names = {name for name in {*environment, *self.environment} if is_read_on_import(name)}
        return all(environment.get(name) == self.environment.get(name) for name in names)

    def start(
        self,
        program: Sequence[str],
        arguments: Sequence[str],
        folder: Path,
        out: Path,
        err: Path,
        environment: Mapping[str, str],
    ) -> Forked:
        """Start a program in `folder`, in a session of its own.

        Args:
            program: What stands before the arguments: `-m` and a module, `-c` and code, or the path of a script.
            out, err: The files that its output replaces.
        """
        for file in (out, err):
            file.write_bytes(b"")  # there when this returns, whenever the child comes to open it
        connection = socket.socket(socket.AF_UNIX, _KIND)
        request = {
            "program": list(program),
            "arguments": list(arguments),
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
            "environment": dict(environment),
            "python": self.python,
        }
        pid = b""
        with contextlib.suppress(ConnectionError):  # a server that has ended
            connection.connect(str(self.folder / "launches"))
            connection.sendall(json.dumps(request).encode())
            pid = connection.recv(64)
        if not pid:
            raise RuntimeError(f"The fork server did not start a child:\n{self._log.read_text(errors='replace')}")
        return Forked(connection, int(pid))

    def end(self) -> None:
        """End the servers, if they are this process's own; their children go on."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)


_use: dict[str, Any] = {}


def use(environment: Mapping[str, str], folder: Path | None = None) -> None:
    """Choose what `server` returns: the servers in `folder` if another process has started them, else new ones with these
    variables. They must be known before the first test: a test that uses Ray leaves variables behind, and servers with
    those variables could not fork an ordinary launch."""
    _use.update(environment=dict(environment), folder=folder)


@functools.cache
def server() -> Server:
    """Return the servers that `use` has chosen. The first call starts them if no other process has."""
    return Server(_use.get("environment", os.environ), _use.get("folder"))


# --- the server's side ------------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each request. Returns in each child, with its request; and None when stdin is closed."""
    children: dict[int, socket.socket] = {}
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes.fileno())
    waits = selectors.DefaultSelector()
    for source in (listener, woken, sys.stdin):
        waits.register(source, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in waits.select()}
        if sys.stdin in ready:
            return None
        if woken in ready:
            woken.recv(4096)
            _tell_ends(children)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        message, files, _, _ = socket.recv_fds(connection, _LONGEST, 3)
        if not message:  # the client was killed
            connection.close()
            continue
        request: dict[str, Any] = json.loads(message)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            waits.close()
            for own in (listener, woken, wakes, *children.values()):
                own.close()
            if files:
                _become_worker(request, files, connection)
            else:
                connection.close()
            return request
        for file in files:
            os.close(file)
        children[pid] = connection
        with contextlib.suppress(OSError):  # the client has ended
            connection.sendall(str(pid).encode())


def _tell_ends(children: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):  # no children are left
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = children.pop(pid, None)
            if connection is None:  # the server for launches, which is not a request's child
                continue
            with connection, contextlib.suppress(OSError):
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become_worker(request: Mapping[str, Any], files: Sequence[int], client: socket.socket) -> None:
    """Give this process what its client has from the raylet, and end it with its client."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setpgid(0, 0)  # the raylet kills the group of a worker that has ended
    os.setpriority(os.PRIO_PROCESS, 0, request["priority"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])

    def watch() -> None:
        client.recv(1)  # returns when the client has ended: it sends nothing more
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="forkserver-client", daemon=True).start()


def _run_worker(context: Any, arguments: list[str], language: Any) -> None:
    """Run a worker in this process. It replaces Ray's `RuntimeEnvContext.exec_worker`, which starts a new interpreter."""
    prefix = list(context.command_prefix)
    if prefix and (prefix[0], prefix[2:]) == ("cd", ["&&"]):  # the working directory that a job was submitted with
        os.chdir(prefix[1])
        prefix = []
    assert (prefix, context.py_executable) == ([], sys.executable), (
        f"a worker with a program of its own: {vars(context)}"
    )
    sys.modules["ray._private.utils"].update_envs(context.env_vars)
    if places := context.env_vars.get("PYTHONPATH"):
        sys.path[:0] = places.split(os.pathsep)
        _forget_own()
    _run(*_divided(arguments))


def _forget_own() -> None:
    """Forget the preloaded raytrainer, so that a job imports the copy that was submitted with it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "raytrainer"]:
        del sys.modules[name]


def _divided(words: list[str]) -> tuple[list[str], list[str]]:
    """Split an interpreter's command line into the program (`-m` and a module, `-c` and code, or a path) and its arguments."""
    count = 2 if words[0] in ("-m", "-c") else 1
    return words[:count], words[count:]


class _Sys:
    """`sys` as Ray's services see it, with another interpreter."""

    def __init__(self, executable: str) -> None:
        self.executable = executable

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


def fork_rays_processes(python: str) -> None:
    """The processes of a Ray that this process starts from now on are forked, by the server of `Server.python`."""
    services = importlib.import_module("ray._private.services")
    services.sys = _Sys(python)  # type: ignore[attr-defined]


def become(request: Mapping[str, Any], path: Sequence[str]) -> None:
    """Run the launch, or the worker, of a request in this process, with `path` as what is always in `sys.path`."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if "out" in request:
        os.setsid()
        write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, request["out"], write), (2, request["err"], write)):
            file = os.open(name, how, 0o666)
            os.dup2(file, number)
            os.close(file)
    else:
        importlib.import_module("ray._private.runtime_env.context").RuntimeEnvContext.exec_worker = _run_worker
    fork_rays_processes(request["python"])
    program, arguments = request["program"], request["arguments"]
    first = {"-m": request["folder"], "-c": ""}.get(program[0], str(Path(program[0]).parent))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.orig_argv[:] = [sys.executable, *program, *arguments]
    importlib.invalidate_caches()
    if program[0] == "-m" and "out" not in request:
        _forget_own()
    _run(program, arguments)


def _run(program: Sequence[str], arguments: Sequence[str]) -> None:
    if program[0] == "-m":
        sys.argv[1:] = arguments
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = [program[0], *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if program[0] == "-c":
        exec(program[1], vars(main))
    else:
        main.__file__ = program[0]
        exec(compile(Path(program[0]).read_bytes(), program[0], "exec"), vars(main))


def main() -> None:
    # Without the directory of this file. In a git worktree, the installed raytrainer is that of another checkout.
    path = [str(Path(__file__).resolve().parents[1]), *sys.path[1:]]
    sys.path[:] = path
    for_ray, for_launches = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    ready, _, _ = select.select([for_ray, for_launches, sys.stdin], [], [])
    if sys.stdin in ready:  # there was no request
        return
    _prepare(PRELOADED_FOR_RAY)
    if os.fork() == 0:
        for_ray.close()
        _prepare(PRELOADED)
        request = serve(for_launches)
    else:
        for_launches.close()
        request = serve(for_ray)
    if request is not None:
        become(request, path)


def _prepare(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    # mlflow.pytorch configures the root logger when it is imported, for errors alone. A launch does not import it.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    gc.collect()
    gc.freeze()  # a collection in a child does not copy the pages of what all have in common


if __name__ == "__main__":
    main()
