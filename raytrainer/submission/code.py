"""The code and the runtime environment that go along with a request: the launching directory and other directories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytrainer.config import Composition, Experiment, texts_of
from raytrainer.errors import ConfigError, StorageError, nearest
from raytrainer.storage import Storage
from raytrainer.submission.imports import elsewhere
from raytrainer.submission.package import Module, Package, check_limit, collect
from raytrainer.submission.sent_files import IGNORE, RECORDS
from raytrainer.sweep import Plan


@dataclass(frozen=True)
class Code:
    """The code for a run.

    Attributes:
        package: The launching directory; None if the cluster's image or a URI provides the code.
        modules: Code from other directories, each with its import name.
        runtime_env: Ray's runtime environment, without the fields that became packages.
    """

    package: Package | None
    modules: tuple[Module, ...]
    runtime_env: Mapping[str, Any]

    @property
    def packages(self) -> list[Package]:
        return [*([self.package] if self.package is not None else []), *(module.package for module in self.modules)]


def collect_code(target: Composition | Plan, folder: Path) -> Code:
    """Return the code that a run or sweep needs on other machines.

    Args:
        target: The run or sweep; `cluster.runtime_env` and `cluster.package_limit_mb` are honoured.
        folder: The launching directory, whose files are sent.

    Raises:
        ConfigError: Something cannot be sent; the message names the fix.
    """
    cluster = target.experiment.cluster
    env, limit = checked_runtime_env(cluster.runtime_env), cluster.package_limit_mb
    for key in ("container", "image_uri"):
        if key in env:
            raise ConfigError(
                "is an image in which Ray starts processes, and Ray accepts no package with it: give pip, uv or "
                "conda, or have the cluster run that image",
                key=f"cluster.runtime_env.{key}",
                value=env[key],
            )
    package, root = _tree(target.experiment, env, folder)
    targets = dict(_targets(target))
    names = {"raytrainer", *(text.partition(".")[0] for text in targets.values())}
    checkouts, files = elsewhere(names | (package.imports if package is not None else frozenset()), root, limit)
    if files and package is None:
        raise ConfigError(
            f"cannot upload {files[0].name}, a single file in {files[0].parent}", key="cluster.runtime_env"
        )
    if package is not None:
        package = package.with_files(files)
        _check_sent(targets, package)
    modules = {module.name: module for module in checkouts} | _py_modules(env, folder, limit)
    code = Code(package, tuple(modules[name] for name in sorted(modules)), env)
    sizes = list(package.files) if package is not None else []
    sizes += [(f"{module.name}/{name}", size) for module in code.modules for name, size in module.package.files]
    check_limit(sizes, limit)
    return code


def _tree(e: Experiment, env: dict[str, Any], folder: Path) -> tuple[Package | None, Path]:
    """Return the package of the working directory and its root. Take what it replaces out of `env`."""
    cluster = e.cluster
    working_dir, excludes = env.pop("working_dir", None), env.pop("excludes", None) or []
    root = folder if working_dir is None or "://" in working_dir else folder / working_dir
    if working_dir is not None and ("://" in working_dir or root.is_file()):  # Ray handles a URI or an archive itself
        env["working_dir"] = working_dir if "://" in working_dir else str(root)
        return None, root
    secrets = [folder / Path(path).expanduser() for path in (cluster.token_file, cluster.env_file) if path is not None]
    left_out = [*RECORDS, *_storage_below(e, root), *excludes]
    return collect(root, limit_mb=cluster.package_limit_mb, leave_out=left_out, secrets=secrets), root


def _py_modules(env: dict[str, Any], folder: Path, limit_mb: float) -> dict[str, Module]:
    """Return the directories of `py_modules` by name. Leave only URIs and archives in `env`, which Ray handles."""
    modules, kept = dict[str, Module](), list[str]()
    for path in env.pop("py_modules", None) or []:
        place = (folder / path).resolve()
        if "://" in path or place.is_file():
            kept.append(path if "://" in path else str(place))
        else:
            modules[place.name] = Module(place.name, collect(place, limit_mb=limit_mb))
    if kept:
        env["py_modules"] = kept
    return modules


def _targets(target: Composition | Plan) -> Iterator[tuple[str, str]]:
    """Yield the key and value of every `_target_`."""
    for composition in target.compositions.values() if isinstance(target, Plan) else [target]:
        for key, value in texts_of(asdict(composition.experiment), ""):
            if key.endswith("._target_"):
                yield key.lstrip("."), value


def _check_sent(targets: Mapping[str, str], package: Package) -> None:
    """Check that the code of the tree that a `_target_` names is sent; otherwise workers could not import it."""
    sent = {name for name, _ in package.files}
    for key, target in targets.items():
        parts = target.split(".")
        for count in range(1, len(parts) + 1):
            path = "/".join(parts[:count])
            for name in (f"{path}.py", f"{path}/__init__.py"):
                if (package.root / name).is_file() and name not in sent:
                    raise ConfigError(
                        f"is in {name}, which git ignores or {IGNORE} leaves out; a line !/{name} in {IGNORE} includes it",
                        key=key,
                        value=target,
                    )


def _storage_below(e: Experiment, root: Path) -> list[str]:
    """Return a pattern for the run directories if they are in the tree."""
    try:
        path = Storage(e.storage_path or "").local_path
    except StorageError:
        return []
    below = path.is_relative_to(root.resolve()) and path != root.resolve()
    return ["/" + re.sub(r"([*?\[\]\\])", r"\\\1", path.relative_to(root.resolve()).as_posix()) + "/"] if below else []


def checked_runtime_env(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a runtime environment as Ray parses it: requirement files are read, defaults are filled in.

    Raises:
        ConfigError: Ray refuses it.
    """
    if not settings:
        return {}
    from ray.runtime_env import RuntimeEnv

    known = {key for key in RuntimeEnv.known_fields if not key.startswith("_")} | {"nsight", "rocprof_sys"}
    for key, value in settings.items():
        if key not in known and (close := nearest(key, known)):  # other keys may belong to a plugin
            raise ConfigError("is not a field of Ray's runtime_env", key=f"cluster.runtime_env.{key}", choices=close)
        if key == "env_vars" and isinstance(value, dict):
            for name, text in value.items():
                if not isinstance(text, str):
                    raise ConfigError(
                        "must be text: put it in quotes within the shell's", key=f"cluster.runtime_env.env_vars.{name}"
                    )
    try:
        parsed = RuntimeEnv(**settings).to_dict()
    except Exception as error:  # jsonschema's errors, ValueError, TypeError: Ray refuses it
        lines = str(getattr(error, "message", None) or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"is refused by Ray: {lines[0]}", key="cluster.runtime_env") from error
    return {key: value for key, value in parsed.items() if not key.startswith("_ray")}
