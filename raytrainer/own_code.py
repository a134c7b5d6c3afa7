"""The user's own source files that an object needs: those not of Python, an installed package or raytrainer."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from raytrainer.config import holds_password

_MOST_FILES, _MOST_BYTES = 1000, 10_000_000
_PLACES = (Path(sysconfig.get_path("stdlib")), Path(__file__).resolve().parent)


class CannotCopy(Exception):
    """The sources cannot be copied; the message says why."""


def copy_sources(modules: Iterable[str], folder: Path) -> list[Path]:
    """Copy the user's modules among `modules`, and the user's modules that they import, into `folder`.

    Only Python files that an import statement names are copied, at their place below their top-level package.

    Returns:
        The files and packages in `folder`, sorted. To import them, `folder` must be on `sys.path`.

    Raises:
        CannotCopy: The files are too many or too large, or one has a URL with a password.
    """
    files = sources(modules)
    size = sum(file.stat().st_size for file in files.values())
    if len(files) > _MOST_FILES or size > _MOST_BYTES:
        raise CannotCopy(f"its source is {len(files)} files of {size / 1e6:.1f} MB in all")
    for name, file in files.items():
        if holds_password(file.read_text(errors="replace")):
            raise CannotCopy(f"{file.name} holds a URL with a password")
        parts = name.split(".")
        target = folder.joinpath(*parts, "__init__.py") if file.stem == "__init__" else folder.joinpath(*parts)
        target = target if target.suffix == ".py" else target.with_name(f"{target.name}.py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return sorted(folder.iterdir()) if files else []


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """Return the files of the user's modules among `modules`, and of those that they import: name → file."""
    files: dict[str, Path] = {}
    to_do, seen = [name for name in modules if name != "__main__"], set[str]()
    while to_do:
        name = to_do.pop()
        parts = name.split(".")
        for prefix in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if prefix in seen:
                continue
            seen.add(prefix)
            if (file := _own_file(prefix)) is not None:
                files[prefix] = file
                to_do += _imported(prefix, file)
    return files


def _own_file(name: str) -> Path | None:
    module = sys.modules.get(name)
    origin = getattr(module, "__file__", None)
    if module is None:
        with contextlib.suppress(Exception):  # raised if the parent package cannot be imported
            spec = importlib.util.find_spec(name)
            origin = spec.origin if spec is not None and spec.has_location else None
    if not isinstance(origin, str) or not origin.endswith(".py"):
        return None
    file = Path(origin).resolve()
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return None if installed or any(file.is_relative_to(place) for place in _PLACES) else file


def _imported(name: str, file: Path) -> Iterator[str]:
    """Yield the names in the import statements of a module, including those in functions."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
