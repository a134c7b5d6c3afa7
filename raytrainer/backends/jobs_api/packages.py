"""The runtime environment of a request's job: its files and its code are packages in `py_modules`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from raytrainer.submission.entrypoint import REQUEST
from raytrainer.submission.request import Request


def runtime_env(request: Request) -> dict[str, Any]:
    """Return the runtime environment with a mark for each package: its name and the beginning of its digest.

    The request's own files are a separate package, so that another config does not change the code's package.
    """
    env = {key: value for key, value in request.runtime_env.items() if key != "working_dir"}
    marks = [
        _mark(REQUEST, request.content),
        *(_mark(module.name, module.package.digest) for module in request.modules),
    ]
    env["py_modules"] = [*marks, *env.get("py_modules", [])]
    if request.package is not None:
        env["working_dir"] = _mark("tree", request.package.digest)
    elif "working_dir" in request.runtime_env:
        env["working_dir"] = request.runtime_env["working_dir"]
    return env


def marked(request: Request) -> Request:
    """Return the request with that runtime environment, as `--dry-run` prints it."""
    return replace(request, runtime_env=runtime_env(request))


def stage(request: Request, folder: Path) -> dict[str, Any]:
    """Put the packages into a directory, one folder each. Return the runtime environment with their paths.

    Args:
        request: The request.
        folder: An empty folder, or one that does not exist.

    Raises:
        ConfigError: A file cannot be read any more.
    """
    env = runtime_env(request)
    paths = {_mark(REQUEST, request.content): folder / REQUEST}
    (folder / REQUEST).mkdir(parents=True)
    for name, content in {"__init__.py": b"", **request.files}.items():
        (folder / REQUEST / name).write_bytes(content)
    for module in request.modules:
        paths[_mark(module.name, module.package.digest)] = folder / "modules" / module.name
        module.package.stage(folder / "modules" / module.name)
    if request.package is not None:
        request.package.stage(folder / "tree")
        env["working_dir"] = str(folder / "tree")
    env["py_modules"] = [str(paths.get(entry, entry)) for entry in env["py_modules"]]
    return env


def _mark(name: str, digest: str) -> str:
    return f"{name} (sha256 {digest[:12]})"
