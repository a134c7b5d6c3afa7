"""A complete submission as one frozen value, which is sent unchanged or printed by `--dry-run`.

Building it makes no requests to a cluster. `Sources` holds what is read from this machine; `build` uses only that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from raytrainer import plugins, provenance
from raytrainer.config import ClusterConfig, Experiment, with_values
from raytrainer.errors import ConfigError
from raytrainer.provenance import Provenance
from raytrainer.submission import secrets
from raytrainer.submission.package import Module, Package
from raytrainer.submission.target import Target, compositions_of, first_of, with_texts
from raytrainer.sweep import Plan

# The command keeps its old name, an alias: it is part of each request's digest, and the raytrainer on the cluster may
# be older.
ENTRYPOINT = "python -m raytrainer.cluster.entry"
_LONGEST_ID = 100
_SHOWN_BYTES = 2**16  # of a file, printed by --dry-run
# Settings for sending and following a job, which do not change what runs.
_SENDING_KEYS = ("address", "context", "wait", "retries", "package_limit_mb", "ca_file", "token_file")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The inputs of a request from the machine that sends it.

    Attributes:
        address: The address of the cluster.
        origin: Commit, patch and versions.
        user: The user who submits it.
        environ: The variables of this process. A value may be sent only if its variable's name does not look secret.
        runtime_env: Ray's runtime environment, from `checked_runtime_env`; without what the packages replace.
        package, modules: The code that is sent.
        secrets: Values that must not be sent either, by their source: the cluster's token.
        driver: The backend of the driver that the job starts.
    """

    address: str
    origin: Provenance
    user: str
    environ: Mapping[str, str]
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    package: Package | None = None
    modules: tuple[Module, ...] = ()
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    driver: str = plugins.ON_ITS_CLUSTER


@dataclass(frozen=True)
class Request:
    """A request: everything that is sent to a shared cluster.

    Attributes:
        kind: `run` or `sweep`.
        name: The name of the run.
        address: The address of the cluster.
        submission_id: The id of the job: the run's name, `NAME--2` for the second attempt.
        entrypoint: Its command, the same for every run.
        environment: Names of variables that the run needs; the cluster provides their values.
        runtime_env: The user's runtime environment for Ray.
        metadata: The metadata of the job, visible to all users.
        resources: The resources that the driver reserves.
        files: The files for the entrypoint: name → content.
        content: The digest that decides whether two requests are the same.
        package: The launching directory; None if the cluster's image or a URI provides the code.
        modules: Code from other directories, each with its import name.
        target: The run or sweep.
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
    target: Target = field(compare=False, repr=False)

    @property
    def experiment(self) -> Experiment:
        return self.target.experiment

    def shown(self) -> dict[str, Any]:
        """Return the whole request as plain values, for people. A large file is replaced by its digest."""
        shown: dict[str, Any] = {
            name: getattr(self, name) for name in ("name", "kind", "address", "submission_id", "entrypoint")
        }
        shown |= {"environment": list(self.environment), "resources": dict(self.resources)}
        shown |= {"metadata": dict(self.metadata), "runtime_env": dict(self.runtime_env)}
        shown["files"] = {name: _shown(content) for name, content in sorted(self.files.items())}
        if self.package is not None:
            shown["package"] = _listed(self.package)
        shown["modules"] = {module.name: _listed(module.package) for module in self.modules}
        return shown

    def table(self) -> str:
        """Return a table of the uploads by size; empty if there are none."""
        packages = [*([self.package] if self.package else []), *(module.package for module in self.modules)]
        return "\n".join(package.table() for package in packages)

    def again(self, attempt: int, *, replaces: str | None = None) -> Request:
        """Return the same request as another job.

        Args:
            attempt: The attempt's number, with which the job's id ends.
            replaces: The id of an earlier job that is known to be dead; the new job may remove its lease.
        """
        identifier = submission_id(self.name, attempt)
        content = json.loads(self.files["request.json"])
        content["job"] |= {"submission_id": identifier, **({"replaces": replaces} if replaces else {})}
        files = {**self.files, "request.json": json.dumps(content, indent=1).encode()}
        return replace(self, submission_id=identifier, files=files)

    def differences(self, metadata: Mapping[str, str]) -> list[str]:
        """Return which parts differ from those in a job's metadata: config, package, runtime_env, driver."""
        then = dict(part.partition("=")[::2] for part in metadata.get("raytrainer.parts", "").split())
        now = dict(part.partition("=")[::2] for part in self.metadata["raytrainer.parts"].split())
        return [name for name in now if now[name] != then.get(name)]


def build(
    target: Target,
    argv: Sequence[str],
    sources: Sources,
    *,
    changed: Sequence[str] = (),
    resumes: bool = False,
    attempt: int = 1,
) -> Request:
    """Return the request for a run or sweep, from the arguments alone.

    Args:
        target: The run or sweep; its `cluster` says where it runs.
        argv: The command line, for the records.
        sources: What this machine contributes.
        changed: As for `raytrainer.launch`.
        resumes: Whether it continues an existing run.
        attempt: How often this run has been submitted, including this time.

    Raises:
        ConfigError: A secret would be sent, or the config refers to a variable that the cluster lacks.
    """
    c, name = target.experiment.cluster, target.experiment.name or ""
    kind = "sweep" if isinstance(target, Plan) else "run"
    target = with_texts(target, secrets.pinned)
    first, plan = first_of(target), target.to_dict() if isinstance(target, Plan) else None
    for composition in compositions_of(target):
        secrets.check_references(composition.text, c.forward_env, sources.environ)
    secrets.check_passwords([first.text, plan, list(argv)], sources.origin.patch)
    parts = _parts(first.text, plan, sources, [ENTRYPOINT, kind, dict(c.driver_resources or {})])
    content, identifier = _digest(parts), submission_id(name, attempt)
    job = {"cluster_address": sources.address, "submission_id": identifier, "content": content}
    job |= {"resumes": "true"} if resumes else {}
    request = Request(
        kind=kind,
        name=name,
        address=sources.address,
        submission_id=identifier,
        entrypoint=ENTRYPOINT,
        environment=tuple(c.forward_env),
        runtime_env=dict(sources.runtime_env),
        metadata=_metadata(name, kind, sources, parts),
        resources=dict(c.driver_resources or {}),
        files={
            "config.yaml": first.text.encode(),
            "request.json": _message(argv, target, sources, changed, job),
            provenance.FILE: sources.origin.to_json(),
        },
        content=content,
        package=sources.package,
        modules=sources.modules,
        target=target,
    )
    _check_secrets(request, secrets.secrets_of(c, sources.environ, sources.secrets))
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


def attempt_of(submission_id: str) -> int:
    """Return the number of the attempt in a job's id."""
    match = re.fullmatch(r".*--(\d+)", submission_id)
    return int(match[1]) if match else 1


def _message(
    argv: Sequence[str], target: Target, sources: Sources, changed: Sequence[str], job: Mapping[str, str]
) -> bytes:
    """Return what the entrypoint reads, beside the config."""
    c = target.experiment.cluster
    message = {
        "kind": "sweep" if isinstance(target, Plan) else "run",
        "argv": list(argv),
        "choices": dict(first_of(target).choices),
        "plan": target.to_dict() if isinstance(target, Plan) else None,
        "changed": list(changed),
        "job": dict(job),
        "forward_env": list(c.forward_env),
        "env_file": c.env_file,
        # Not sent needlessly, because an older raytrainer on the cluster does not know the key.
        **({"driver": sources.driver} if sources.driver != plugins.ON_ITS_CLUSTER else {}),
    }
    return json.dumps(message, indent=1).encode()


def _metadata(name: str, kind: str, sources: Sources, parts: Mapping[str, str]) -> dict[str, str]:
    return {
        "raytrainer.name": name,
        "raytrainer.kind": kind,
        "raytrainer.user": re.sub(r"[^\w.@-]+", "-", sources.user),
        "raytrainer.version": sources.origin.versions.get("raytrainer", "unknown"),
        "raytrainer.content": _digest(parts),
        "raytrainer.parts": " ".join(f"{part}={digest[:12]}" for part, digest in parts.items()),
    }


def _check_secrets(request: Request, values: Mapping[str, str]) -> None:
    texts = {name: content.decode(errors="replace") for name, content in request.files.items()}
    texts |= {"the runtime environment": json.dumps(dict(request.runtime_env))}
    texts |= {"metadata": json.dumps(dict(request.metadata))}
    secrets.check_values(texts, values)


def _parts(text: str, plan: Mapping[str, Any] | None, sources: Sources, driver: list[Any]) -> dict[str, str]:
    """Return the digests of the parts of a content: config, package, runtime_env, driver."""
    modules = [[module.name, module.package.digest] for module in sources.modules]
    return {
        "config": _digest(_without_sending(plan["compositions"] if plan else [{"text": text}], plan)),
        "package": _digest([sources.package.digest if sources.package else "", *modules]),
        "runtime_env": _digest(dict(sources.runtime_env)),
        "driver": _digest(driver),
    }


def _without_sending(compositions: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None) -> Any:
    """Return the configs without the settings for sending them, and without a backend's second name."""
    defaults = asdict(ClusterConfig())
    usual = {f"cluster.{key}": defaults[key] for key in _SENDING_KEYS}
    plain = []
    for composition in compositions:
        plain.append({**composition, "text": with_values(composition["text"], usual)})
        if "cluster" in (choices := composition.get("choices", {})):
            plain[-1]["choices"] = {**choices, "cluster": plugins.recorded_kind(choices["cluster"])}
    # The texts already contain what the fixed overrides have set.
    return {**{key: value for key, value in (plan or {}).items() if key != "fixed"}, "compositions": plain}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _listed(package: Package) -> dict[str, Any]:
    left_out = {"left_out": dict(package.left_out)} if package.left_out else {}
    size = {"root": str(package.root), "sha256": package.digest, "bytes": package.size}
    return {**size, **left_out, "files": dict(package.files)}


def _shown(content: bytes) -> str:
    if len(content) > _SHOWN_BYTES:
        return f"{len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    return content.decode(errors="replace")


# --- YAML for people --------------------------------------------------------------------------------------------------


def to_yaml(*documents: Mapping[str, Any]) -> str:
    """Return documents as a YAML stream in which people can read texts of several lines."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Quoted if it begins like a number, because another YAML parser may read `1e3` as one.
    style = "|" if "\n" in text else "'" if text[:1] in "0123456789+-." else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
