"""`rerun ID`: the config of the new run, and the choice between the code here and that of the original run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raytrainer import provenance
from raytrainer.attempt import Record
from raytrainer.config import Composition, from_text, key_of, new_name
from raytrainer.errors import ConfigError, TrackingError
from raytrainer.provenance import Provenance
from raytrainer.runs import worktree
from raytrainer.runs.arguments import VerbParser
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.recorded import base_name, composition_of, composition_of_trial
from raytrainer.runs.resolve import find, resolve_run, tracking_uri_of, trial_of, with_mlflow_run
from raytrainer.sweep.plan import Plan
from raytrainer.tracking.server import Server

ABOUT = "Start a new run with the same commit, patch, config and seed, and with the given values."
_COMPARED = ("raytrainer", "torch", "ray", "python")  # the versions that are compared


def add_arguments(parser: VerbParser) -> None:
    about = "use the code in this directory instead of the recorded code"
    parser.add_argument("--here", action="store_true", help=about)
    parser.add_id()
    parser.add_overrides()


def to_rerun(identifier: str, overrides: Sequence[str]) -> Composition:
    """Return the config of a run under a new name, with value overrides, for `launch`.

    Raises:
        RunNotFound, ConfigError: As for `to_resume`.
    """
    record, storage = find(identifier)
    overrides = _with_new_name(record, overrides)
    if number := trial_of(identifier, record):
        composition = composition_of_trial(number, record, storage)
        return replace(from_text(composition.text, overrides), choices=composition.choices)
    return composition_of(record, storage, overrides)


def to_rerun_sweep(identifier: str, overrides: Sequence[str]) -> Plan:
    """Return the plan of a sweep under a new name, with value overrides.

    Raises:
        RunNotFound: There is no such sweep.
        ConfigError: An override is wrong, or sets a parameter of the sweep.
    """
    record, storage = find(identifier)
    overrides = _with_new_name(record, overrides)
    plan = Plan.read(storage)
    swept = {key_of(p.key) for p in plan.parameters}
    for key in map(key_of, overrides):
        if key in swept:
            raise ConfigError("is a parameter of the sweep; start another sweep with -m", key=key)
    return plan.with_overrides(overrides)


def rerun_recorded_code(
    identifier: str, arguments: Sequence[str], *, here: bool = False, say: Callable[[str], None] = lambda text: None
) -> int | None:
    """Run `rerun ID …` with the code that the run had, and return its exit code; None if the code here can be used.

    Args:
        identifier: The ID of the run.
        arguments: The other arguments of the command: overrides and options.
        here: Whether to use the code here, whatever the run had.
        say: Called with each difference from the original run.

    Raises:
        RunNotFound: There is no such run.
        ConfigError: Its code is no longer available.
    """
    if worktree.is_inside():
        return None
    handle, now = resolve_run(identifier), provenance.collect([], Path.cwd())
    then = recorded_provenance(handle)
    overrides = [a for a in arguments if "=" in a or a.startswith("~")]
    for line in differences(then, now, overrides):
        say(f"rerun of {identifier}: {line}")
    if then is None or then.commit is None or now.commit is None or here or _is_same_code(then, now):
        return None
    with worktree.checkout(handle, then, say) as folder:
        return worktree.rerun_in(folder, [identifier, *arguments])


def recorded_provenance(handle: RunHandle) -> Provenance | None:
    """Return a run's provenance from its directory, else from MLflow; None if neither has it."""
    if handle.storage is not None:
        data = handle.storage.read_if_exists(provenance.FILE)
        if data is not None:
            with suppress(ValueError):
                return Provenance.from_json(data)
    try:
        handle = with_mlflow_run(handle)
        uri, run = tracking_uri_of(handle.record), handle.mlflow_run
        if uri is None or run is None or "mlflow.source.git.commit" not in run.tags:
            return None
        tags, patch = run.tags, ""
        if tags.get("mlflow.source.git.dirty") == "true":
            suffix = f"-{handle.record.attempts}" if handle.record.attempts > 1 else ""
            data = Server(uri, timeout_s=30).read_artifact(run.run_id, f"git{suffix}.patch")
            patch = data.decode("utf-8", "surrogateescape")
    except TrackingError:
        return None
    prefix = "raytrainer.version."
    versions = {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}
    command = tags.get("raytrainer.command", "")
    return Provenance(command, versions, tags["mlflow.source.git.commit"], tags.get("mlflow.source.git.branch"), patch)


def differences(then: Provenance | None, now: Provenance, overrides: Sequence[str]) -> list[str]:
    """Return the differences from the original run, one line each.

    Args:
        then: The provenance of the original run; None if it was not recorded.
        now: The provenance of this process.
        overrides: The overrides of the rerun.
    """
    if then is None:
        return ["its code is not recorded; the code in this directory is used"]
    versions = [
        f"{name} {then.versions.get(name, 'unknown')} → {now.versions.get(name, 'none')}"
        for name in _COMPARED
        if then.versions.get(name) != now.versions.get(name)
    ]
    values = [f"other values: {' '.join(overrides)}"] if overrides else []
    return [_code_difference(then, now), *versions, *values]


def _code_difference(then: Provenance, now: Provenance) -> str:
    if then.commit is None:
        return "it did not run from a git checkout; the code in this directory is used"
    if now.commit is None:
        return f"this is not a git checkout, it ran with commit {then.commit[:12]}; the code in this directory is used"
    if _is_same_code(then, now):
        return f"same code, commit {now.commit[:12]}" + (" with the same patch" if now.diff else "")
    patch = "without a patch"
    if then.diff:
        patch = "another patch than here" if now.diff and then.commit == now.commit else "with a patch"
    return f"its code is commit {then.commit[:12]}, {patch}; here is commit {now.commit[:12]}"


def _is_same_code(then: Provenance, now: Provenance) -> bool:
    return then.commit == now.commit and then.diff == now.diff and not then.is_cut


def _with_new_name(record: Record, overrides: Sequence[str]) -> Sequence[str]:
    if any(o.partition("=")[0] == "name" for o in overrides):
        return overrides
    return [*overrides, f"name={new_name(base_name(record))}"]
