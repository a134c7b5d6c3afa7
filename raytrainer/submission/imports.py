"""Code outside the launching directory that must be sent: checkouts installed with `pip install -e`, and PYTHONPATH."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from raytrainer.submission.package import Module, collect, read_file

# Never sent, even from a source checkout: they belong to the image or to cluster.runtime_env.
_IN_THE_IMAGE = {"ray", "torch", "mlflow", "hydra", "omegaconf", "pyarrow", "numpy", "sklearn", "matplotlib", "psutil"}


def elsewhere(names: Iterable[str], root: Path, limit_mb: float | None = None) -> tuple[list[Module], list[Path]]:
    """Return the code that must be sent although it is outside the tree at `root`.

    It is imported from neither the tree nor an installation, but for instance from a checkout installed with `pip
    install -e`, or from PYTHONPATH.

    Args:
        names: Top-level modules; the modules that they import are searched, too.
        root: The tree that is sent.
        limit_mb: As in `collect`.

    Returns:
        Python packages, and single files.
    """
    modules, single, seen, left = dict[str, Module](), dict[str, Path](), set[str](), sorted(set(names))
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for place in _places(name, root.resolve()):
            if place.is_dir():
                modules[name] = Module(name, collect(place, limit_mb=limit_mb))
                left += modules[name].package.imports
            else:
                single[name] = place
                left += read_file(place.name, place)[1]
    return [modules[name] for name in sorted(modules)], [single[name] for name in sorted(single)]


def _places(name: str, root: Path) -> Iterator[Path]:
    """Yield where a top-level module is imported from, unless that is the tree, an installation or the image."""
    if name in sys.stdlib_module_names or name in _IN_THE_IMAGE or name in ("__main__", "__future__"):
        return
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin in ("built-in", "frozen"):
        return
    for place in spec.submodule_search_locations or [spec.origin or ""]:
        path = Path(place).resolve()
        # Text that only looks like an import can name any directory.
        if spec.origin is None and not any(path.glob("*.py")):
            continue
        of_the_tree = path in ((root / name).resolve(), (root / path.name).resolve())
        if path.exists() and not of_the_tree and not {"site-packages", "dist-packages"} & set(path.parts):
            yield path
