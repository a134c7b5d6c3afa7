"""A complete submission as one frozen value, which is sent unchanged or printed by `--dry-run`.

Building it makes no requests to a cluster.

`prepare` inspects this machine (files, git, the user); `build` uses only its arguments and the paths in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from raytrainer import preflight, provenance
from raytrainer.attempt import tracking_uri
from raytrainer.backends.jobs_api.auth import Token, find_token
from raytrainer.backends.kubernetes import rayjob
from raytrainer.backends.kubernetes.kubectl import Kubectl, address_of
from raytrainer.config import (
    ClusterConfig,
    Composition,
    Experiment,
    holds_password,
    looks_secret,
    texts_of,
    with_values,
)
from raytrainer.errors import ClusterError, ConfigError, StorageError, nearest
from raytrainer.provenance import Provenance
from raytrainer.storage import Storage
from raytrainer.submission.entrypoint import REQUEST
from raytrainer.submission.package import IGNORE, RECORDS, Module, Package, check_limit, collect, elsewhere
from raytrainer.sweep import Plan

ENTRYPOINT = "python -m raytrainer.cluster.entry"
_LONGEST_ID = 100
_LEAST_SECRET = 8  # a shorter value may be a common word that occurs anywhere
_SEARCHED_BYTES = 2**23  # of each file that is sent, searched for secrets
_PLACEHOLDER = re.compile(r"[{<\[][^{}<>\[\]\n]*[}>\]]|…|\*{3,}")  # stands for a password in a patch
_SHOWN_BYTES = 2**16  # of a file, printed by --dry-run
_PATCH_BYTES = 2**18  # of a patch, if the files go into a ConfigMap of 1 MiB
# Settings for sending and following a job, which do not change what runs.
_OF_THE_SENDING = ("address", "context", "wait", "retries", "package_limit_mb", "ca_file", "token_file")
# The tools' own variables for addresses and names. Their local values are sent, because they differ on the cluster.
_FIXED = {"MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
_VARIABLE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(,?)")


@dataclass(frozen=True)
class Request:
    """What is sent to a shared cluster.

    Attributes:
        kind: `run` or `sweep`.
        name: The name of the run.
        address: The address of the cluster.
        submission_id: The id of the job: the run's name, `NAME--2` for the second attempt.
        entrypoint: Its command, the same for every run.
        environment: Names of variables that the run needs; the cluster provides their values.
        runtime_env: Ray's runtime environment, with digests in place of the paths that `stage` creates.
        metadata: The metadata of the job, visible to all users.
        resources: The resources that the driver reserves.
        files: The files for the entrypoint: name → content.
        content: The digest that decides whether two requests are the same.
        package: The launching directory; None if the cluster's image or a URI provides the code.
        modules: Code from other directories, each with its import name.
        asked: The run or sweep.
    """

    kind: str
    name: str
    address: str
    submission_id: str
    entrypoint: str
    environment: tuple[str, ...]
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]
    resources: Mapping[str, float]
    files: Mapping[str, bytes]
    content: str
    package: Package | None
    modules: tuple[Module, ...]
    asked: Composition | Plan = field(compare=False, repr=False)

    @property
    def experiment(self) -> Experiment:
        return self.asked.experiment

    def to_text(self) -> str:
        """Return the whole request as YAML; for Kubernetes, the manifest that would be applied."""
        if self.experiment.cluster.kind == "kuberay":
            return rayjob.to_text(*self.manifest())
        shown: dict[str, Any] = {
            name: getattr(self, name) for name in ("name", "kind", "address", "submission_id", "entrypoint")
        }
        shown |= {"environment": list(self.environment), "resources": dict(self.resources)}
        shown |= {"metadata": dict(self.metadata), "runtime_env": dict(self.runtime_env)}
        shown["files"] = {name: _shown(content) for name, content in sorted(self.files.items())}
        if self.package is not None:
            shown["package"] = _listed(self.package)
        shown["modules"] = {one.name: _listed(one.package) for one in self.modules}
        return rayjob.to_text(shown)

    def table(self) -> str:
        """Return a table of the uploads by size; empty if there are none."""
        packages = [*([self.package] if self.package else []), *(one.package for one in self.modules)]
        return "\n".join(one.table() for one in packages)

    def stage(self, folder: Path) -> dict[str, Any]:
        """Put the uploads into a directory, one folder per package. Return the runtime environment with their paths.

        The request's own files are a separate package, so that another config does not change the code's package.

        Raises:
            ConfigError: A file cannot be read any more.
        """
        env = dict(self.runtime_env)
        paths = {_mark(REQUEST, self.content): folder / REQUEST}
        paths[_mark(REQUEST, self.content)].mkdir(parents=True)
        for name, content in {"__init__.py": b"", **self.files}.items():
            (folder / REQUEST / name).write_bytes(content)
        for one in self.modules:
            paths[_mark(one.name, one.package.digest)] = folder / "modules" / one.name
            one.package.stage(folder / "modules" / one.name)
        if self.package is not None:
            self.package.stage(folder / "tree")
            env["working_dir"] = str(folder / "tree")
        env["py_modules"] = [str(paths.get(one, one)) for one in env["py_modules"]]
        return env

    def again(self, attempt: int, *, replaces: str | None = None) -> Request:
        """Return the same request as another job.

        Args:
            attempt: The attempt's number, with which the job's id ends.
            replaces: The id of an earlier job that is known to be dead; the new job may remove its lease.
        """
        identifier = submission_id(self.name, attempt)
        told = json.loads(self.files["request.json"])
        told["job"] |= {"submission_id": identifier, **({"replaces": replaces} if replaces else {})}
        files = {**self.files, "request.json": json.dumps(told, indent=1).encode()}
        return replace(self, submission_id=identifier, files=files)

    def manifest(self) -> tuple[rayjob.Document, rayjob.Document]:
        """Return the ConfigMap and the RayJob.

        Raises:
            ConfigError: A setting is not possible in a RayJob.
        """
        return rayjob.documents(
            self.experiment,
            submission_id=self.submission_id,
            entrypoint=self.entrypoint,
            files=self.files,
            job_metadata=self.metadata,
            runtime_env=self.runtime_env,
            content=self.content,
            workers=_workers(self.asked) if isinstance(self.asked, Plan) else None,
        )

    def differences(self, metadata: Mapping[str, str]) -> list[str]:
        """Return which parts differ from those in a job's metadata: config, package, runtime_env, driver."""
        then = dict(part.partition("=")[::2] for part in metadata.get("raytrainer.parts", "").split())
        now = dict(part.partition("=")[::2] for part in self.metadata["raytrainer.parts"].split())
        return [name for name in now if now[name] != then.get(name)]


def prepare(
    asked: Composition | Plan,
    argv: Sequence[str],
    *,
    folder: Path | None = None,
    changed: Sequence[str] = (),
    resumes: bool = False,
    attempt: int = 1,
) -> Request:
    """Return the request for a run or sweep, launched in `folder` (default: the current directory).

    Args:
        asked: The run or sweep; its `cluster` says where it runs.
        argv: The command line, for the records.
        folder: The launching directory, whose files are sent.
        changed, resumes, attempt: As in `build`.

    Raises:
        ConfigError: Something cannot be sent; the message names the fix.
    """
    folder = folder or Path.cwd()
    runtime_env = checked_runtime_env(asked.experiment.cluster.runtime_env)
    c, package, modules = asked.experiment.cluster, None, list[Module]()
    context, token = c.context, None
    if c.kind == "job":
        package, modules, runtime_env = _packages(asked, runtime_env, folder)
        with suppress(ConfigError):  # the connection to the cluster reports it
            token = find_token(c.token_file)
        for one in (*([package] if package is not None else []), *(one.package for one in modules)):
            _check_package(one, _secrets(c, os.environ, token))
    elif context is None:
        # The current context may change later. Without kubectl, the manifest can still be printed.
        with suppress(ConfigError, ClusterError):
            context = Kubectl(None, c.namespace).current_context()
    return build(
        asked,
        argv,
        package=package,
        modules=modules,
        runtime_env=runtime_env,
        origin=provenance.collect(list(argv), folder),
        user=provenance.user(),
        environ=os.environ,
        token=token,
        context=context,
        changed=changed,
        resumes=resumes,
        attempt=attempt,
    )


def build(
    asked: Composition | Plan,
    argv: Sequence[str],
    *,
    package: Package | None,
    modules: Sequence[Module],
    runtime_env: Mapping[str, Any],
    origin: Provenance,
    user: str,
    environ: Mapping[str, str],
    token: Token | None = None,
    context: str | None = None,
    changed: Sequence[str] = (),
    resumes: bool = False,
    attempt: int = 1,
) -> Request:
    """Return the request, from the arguments alone.

    Args:
        asked: The run or sweep.
        argv: The command line, for the records.
        package, modules: The code that is sent.
        runtime_env: The user's runtime environment, from `checked_runtime_env`.
        origin: Commit, patch and versions.
        user: The user who submits it.
        environ: The variables of this process. A value may be sent only if its variable's name does not look secret.
        token: The cluster's token, which must not be sent either.
        context: The context of kubectl's configuration, if kubectl sends it.
        changed: As in `run.launch`.
        resumes: Whether it continues an existing run.
        attempt: How often this run has been submitted, including this time.

    Raises:
        ConfigError: A secret would be sent, or the config refers to a variable that the cluster lacks.
    """
    e, kind = asked.experiment, "sweep" if isinstance(asked, Plan) else "run"
    c, name = e.cluster, e.name or ""
    pinned = _pinned(asked)
    first = pinned.first if isinstance(pinned, Plan) else pinned
    plan = pinned.to_dict() if isinstance(pinned, Plan) else None
    for composition in pinned.compositions.values() if isinstance(pinned, Plan) else [pinned]:
        _check_references(composition.text, c.forward_env, environ)
    if any(holds_password(text) for _, text in texts_of([first.text, plan, list(argv)], "")):
        raise ConfigError(
            "a URL with a password is in the config or the command line, and would be sent and logged: write it as "
            "${oc.env:NAME}, with cluster.forward_env=[NAME], and set its value on the cluster"
        )
    if holds_password(_PLACEHOLDER.sub("", origin.patch)):
        raise ConfigError(
            "a URL with a password is in the changes that git has not committed (git diff HEAD), which would be sent and "
            "logged: take it out of them"
        )
    own = {key: value for key, value in runtime_env.items() if key != "working_dir"}
    resources = dict(c.driver_resources or {})
    parts = {
        "config": _digest(_of_the_run(plan["compositions"] if plan else [{"text": first.text}], plan)),
        "package": _digest([package.digest if package else "", *([one.name, one.package.digest] for one in modules)]),
        "runtime_env": _digest(dict(runtime_env)),
        "driver": _digest([ENTRYPOINT, kind, resources]),
    }
    content = _digest(parts)
    if c.kind == "kuberay":
        # The image has the code, and a ConfigMap has little room.
        address = address_of(context or "", c.namespace)
        sent, origin = dict(runtime_env), origin.cut(_PATCH_BYTES)
    else:
        address = (c.address or "").rstrip("/")
        marks = [_mark(REQUEST, content), *(_mark(one.name, one.package.digest) for one in modules)]
        sent = {**own, "py_modules": [*marks, *own.get("py_modules", [])]}
        if package is not None or "working_dir" in runtime_env:
            sent["working_dir"] = runtime_env.get("working_dir") or _mark("tree", package.digest if package else "")
    identifier = submission_id(name, attempt)
    told = {
        "kind": kind,
        "argv": list(argv),
        "choices": dict(first.choices),
        "plan": plan,
        "changed": list(changed),
        "job": {
            "cluster_address": address,
            "submission_id": identifier,
            "content": content,
            **({"resumes": "true"} if resumes else {}),
        },
        "forward_env": list(c.forward_env),
        "env_file": c.env_file,
    }
    request = Request(
        kind=kind,
        name=name,
        address=address,
        submission_id=identifier,
        entrypoint=ENTRYPOINT,
        environment=tuple(c.forward_env),
        runtime_env=sent,
        metadata={
            "raytrainer.name": name,
            "raytrainer.kind": kind,
            "raytrainer.user": re.sub(r"[^\w.@-]+", "-", user),
            "raytrainer.version": origin.versions.get("raytrainer", "unknown"),
            "raytrainer.content": content,
            "raytrainer.parts": " ".join(f"{part}={digest[:12]}" for part, digest in parts.items()),
        },
        resources=resources,
        files={
            "config.yaml": first.text.encode(),
            "request.json": json.dumps(told, indent=1).encode(),
            provenance.FILE: origin.to_json(),
        },
        content=content,
        package=package,
        modules=tuple(modules),
        asked=asked,
    )
    _check_secrets(request, _secrets(c, environ, token))
    return request


def submission_id(name: str, attempt: int) -> str:
    """Return a job's id: the run's name, and `NAME--2` for its second attempt; at most 100 characters.

    Raises:
        ConfigError: The name looks like the id of another run's later attempt.
    """
    if re.search(r"--\d+$", name):
        raise ConfigError(
            f"looks like the id of attempt {name.rpartition('--')[2]} of run {name.rpartition('--')[0]!r}; give another",
            key="name",
            value=name,
        )
    if attempt == 1:
        return name
    suffix = f"--{attempt}"
    if len(name) + len(suffix) > _LONGEST_ID:
        short = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_ID - len(suffix) - 9]}-{short}"
    return name + suffix


def checked_runtime_env(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a runtime environment as Ray parses it: requirement files are read, defaults are filled in.

    Raises:
        ConfigError: Ray refuses it.
    """
    if not given:
        return {}
    from ray.runtime_env import RuntimeEnv

    known = {key for key in RuntimeEnv.known_fields if not key.startswith("_")} | {"nsight", "rocprof_sys"}
    for key, value in given.items():
        if key not in known and (close := nearest(key, known)):  # other keys may belong to a plugin
            raise ConfigError("is not a field of Ray's runtime_env", key=f"cluster.runtime_env.{key}", choices=close)
        if key == "env_vars" and isinstance(value, dict):
            for name, text in value.items():
                if not isinstance(text, str):
                    raise ConfigError(
                        "must be text: put it in quotes within the shell's", key=f"cluster.runtime_env.env_vars.{name}"
                    )
    try:
        found = RuntimeEnv(**given).to_dict()
    except Exception as error:  # jsonschema's errors, ValueError, TypeError: Ray refuses it
        said = str(getattr(error, "message", None) or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"is refused by Ray: {said[0]}", key="cluster.runtime_env") from error
    return {key: value for key, value in found.items() if not key.startswith("_ray")}


def problems(request: Request) -> tuple[list[str], list[str]]:
    """Return the reasons to refuse a submission, because the cluster cannot reach something, and the warnings."""
    refused, told = list[str](), list[str]()
    sent = [name for name, _ in request.package.files] if request.package else []
    asked = request.asked
    for composition in asked.compositions.values() if isinstance(asked, Plan) else [asked]:
        e = composition.experiment
        refused += preflight.check_reach(e, tracking_uri(e))
        told += preflight.local_files(e, sent) if preflight.is_elsewhere(e) else []
        told += _readable_token(e)
    return list(dict.fromkeys(refused)), list(dict.fromkeys(told))


def _readable_token(e: Experiment) -> list[str]:
    """Return a warning, as a list, if the token could be read on its way to the cluster."""
    address, token = e.cluster.address or "", None
    if e.cluster.kind == "job" and address.startswith("http://") and preflight.is_elsewhere(e):
        with suppress(ConfigError):  # the connection to the cluster reports it
            token = find_token(e.cluster.token_file)
    if token is None:
        return []
    warning = (
        f"the token of {token.source} goes to {address} over plain http, and anyone who intercepts it controls the "
        "cluster: use https://, through a proxy, unless the network is trusted (docs/clusters.md shows one with nginx)"
    )
    return [warning]


# --- what is sent -----------------------------------------------------------------------------------------------------


def _packages(
    asked: Composition | Plan, runtime_env: Mapping[str, Any], folder: Path
) -> tuple[Package | None, list[Module], dict[str, Any]]:
    """Return the tree's package, the code from other directories, and the rest of the runtime environment."""
    e, env = asked.experiment, dict(runtime_env)
    for key in ("container", "image_uri"):
        if key in env:
            raise ConfigError(
                "is an image in which Ray starts processes, and Ray accepts no package with it: give pip, uv or "
                "conda, or have the cluster run that image",
                key=f"cluster.runtime_env.{key}",
                value=env[key],
            )
    limit, given, excludes = e.cluster.package_limit_mb, env.pop("working_dir", None), env.pop("excludes", None) or []
    root = folder if given is None or "://" in given else folder / given
    package = None
    if given is not None and ("://" in given or root.is_file()):  # a URI or an archive, which Ray handles itself
        env["working_dir"] = given if "://" in given else str(root)
    else:
        c = e.cluster
        secret = [folder / Path(path).expanduser() for path in (c.token_file, c.env_file) if path is not None]
        left_out = [*RECORDS, *_storage_below(e, root), *excludes]
        package = collect(root, limit_mb=limit, leave_out=left_out, secrets=secret)
    named = dict(_targets(asked))
    imported = package.imports if package is not None else frozenset[str]()
    modules, single = elsewhere({"raytrainer", *(t.partition(".")[0] for t in named.values()), *imported}, root, limit)
    if single and package is not None:
        package = package.with_files(single)
    elif single:
        raise ConfigError(
            f"cannot upload {single[0].name}, a single file in {single[0].parent}", key="cluster.runtime_env"
        )
    own, kept = {one.name: one for one in modules}, list[str]()
    for path in env.pop("py_modules", None) or []:
        place = (folder / path).resolve()
        if "://" in path or place.is_file():
            kept.append(path if "://" in path else str(place))
        else:
            own[place.name] = Module(place.name, collect(place, limit_mb=limit))
    if kept:
        env["py_modules"] = kept
    if package is not None:
        _check_sent(named, package)
    check_limit(
        [
            *(package.files if package is not None else ()),
            *((f"{one.name}/{name}", size) for one in own.values() for name, size in one.package.files),
        ],
        limit,
    )
    return package, [own[name] for name in sorted(own)], env


def _targets(asked: Composition | Plan) -> Iterator[tuple[str, str]]:
    """Yield the key and value of every `_target_`."""
    for composition in asked.compositions.values() if isinstance(asked, Plan) else [asked]:
        for key, value in texts_of(asdict(composition.experiment), ""):
            if key.endswith("._target_"):
                yield key.lstrip("."), value


def _check_sent(named: Mapping[str, str], package: Package) -> None:
    """Check that the code of the tree that a `_target_` names is sent; otherwise workers could not import it."""
    sent = {name for name, _ in package.files}
    for key, target in named.items():
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


# --- what must not be sent --------------------------------------------------------------------------------------------


def _pinned(asked: Composition | Plan) -> Composition | Plan:
    """Return the same with addresses and names from this machine's variables written out, unless they hold a secret.
    Its texts then mean the same on the cluster."""
    if isinstance(asked, Plan):
        found = {key: replace(c, text=_pinned_text(c)) for key, c in asked.compositions.items()}
        return replace(asked, compositions=found)
    return replace(asked, text=_pinned_text(asked))


def _pinned_text(composition: Composition) -> str:
    e = composition.experiment
    raw = yaml.safe_load(composition.text)
    values: dict[str, Any] = {}
    uri = tracking_uri(e)
    for key, value in (("tracking_uri", uri), ("experiment_name", e.tracking.experiment_name)):
        written = (raw.get("tracking") or {}).get(key)
        if set(_variables(written)) <= _FIXED and not holds_password(str(value)):
            values[f"tracking.{key}"] = value
    for key, value in asdict(e.cluster).items():
        # Ray receives the runtime environment resolved, and the config refuses references to secrets in it.
        names = set(_variables((raw.get("cluster") or {}).get(key)))
        if names and not any(looks_secret(name) for name in names):
            values[f"cluster.{key}"] = value
        if names and key in ("token_file", "ca_file"):  # a path of this machine that is also valid there
            if not Path(value).expanduser().exists():
                raise ConfigError(
                    f"is not an existing file: {min(names)} must be the path of one", key=f"cluster.{key}"
                )
            values[f"cluster.{key}"] = value
    return with_values(composition.text, values)


def _check_references(text: str, forward_env: Sequence[str], environ: Mapping[str, str]) -> None:
    for key, value in texts_of(yaml.safe_load(text), ""):
        for name, default in _VARIABLE.findall(value):
            if name not in forward_env and (name in environ or not default):
                raise ConfigError(
                    f"refers to the variable {name} of this machine, which the cluster's machines do not have: "
                    f"set cluster.forward_env=[{name}] and its value on the cluster; or write the value, if it is not a "
                    "secret",
                    key=key.lstrip("."),
                )


def _secrets(c: ClusterConfig, environ: Mapping[str, str], token: Token | None) -> dict[str, str]:
    """Return the values that must not be sent, by their source. A path is never a secret."""
    found = {
        name: value
        for name, value in environ.items()
        if len(value) >= _LEAST_SECRET
        and looks_secret(name)
        and value not in (c.token_file, c.ca_file)
        and not (value.startswith(("/", "~")) and Path(value).expanduser().exists())
    }
    if token is not None and token.value not in found.values():
        found[token.source] = token.value
    return found


def _check_package(package: Package, secrets: Mapping[str, str]) -> None:
    """Check that no file that is sent contains a secret's value. Only the beginning of a large file is searched."""
    wanted = {name: value.encode() for name, value in secrets.items()}
    for entry in package.entries if wanted else ():
        try:
            with entry.source.open("rb") as file:
                content = file.read(_SEARCHED_BYTES)
        except OSError:  # sending it reports the error
            continue
        for name, value in wanted.items():
            if value in content:
                raise ConfigError(
                    f"the value of {name} is in {entry.name}, which would be sent: take it out of there; a line of "
                    f"{IGNORE}, as in .gitignore, leaves a file out"
                )


def _check_secrets(request: Request, secrets: Mapping[str, str]) -> None:
    """Check that nothing that is sent contains a secret's value, wherever it came from."""
    places = {name: content.decode(errors="replace") for name, content in request.files.items()}
    places |= {
        "the runtime environment": json.dumps(request.runtime_env),
        "metadata": json.dumps(dict(request.metadata)),
    }
    for name, value in secrets.items():
        written = json.dumps(value)[1:-1]
        for place, text in places.items():
            if value in text or written in text:
                where = {"config.yaml": "the config", "request.json": "the config or the command line"}.get(
                    place, place
                )
                where = "the changes that git has not committed" if place == provenance.FILE else where
                fix = f"write ${{oc.env:{name}}}, with cluster.forward_env=[{name}], and set its value on the cluster"
                if not name.isidentifier() or place == provenance.FILE:
                    fix = "take it out of there"
                raise ConfigError(f"the value of {name} is in {where}, and would be sent: {fix}")


def _variables(node: Any) -> list[str]:
    return [name for _, text in texts_of({"": node}, "") for name, _ in _VARIABLE.findall(text)]


# --- digests and texts ------------------------------------------------------------------------------------------------


def _of_the_run(compositions: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None) -> Any:
    """Return the configs without the settings for sending them."""
    plain = asdict(ClusterConfig())
    usual = {f"cluster.{key}": plain[key] for key in _OF_THE_SENDING}
    texts = [{**one, "text": with_values(one["text"], usual)} for one in compositions]
    # The texts already contain what the fixed overrides have set.
    return {**{key: value for key, value in (plan or {}).items() if key != "fixed"}, "compositions": texts}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _mark(name: str, digest: str) -> str:
    return f"{name} (sha256 {digest[:12]})"


def _workers(plan: Plan) -> tuple[int, int]:
    """Return the least and the most training processes at a time."""
    each = preflight.least_workers(plan.experiment)
    trials = plan.experiment.sweep.max_concurrent_trials or plan.total or 1
    return each, each * trials


def _listed(package: Package) -> dict[str, Any]:
    found: dict[str, Any] = {"root": str(package.root), "sha256": package.digest, "bytes": package.size}
    if package.left_out:
        found["left_out"] = dict(package.left_out)
    return {**found, "files": dict(package.files)}


def _shown(content: bytes) -> str:
    text = content.decode(errors="replace")
    return (
        text
        if len(content) <= _SHOWN_BYTES
        else f"{len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    )
