"""Checks that types and ranges cannot express: values that must fit together, names, durations, `_target_` nodes.

The functions use only an `Experiment`, and do not depend on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raytrainer.config.nodes import targets
from raytrainer.config.schema import NAME_PATTERN, ClusterConfig, Experiment
from raytrainer.config.strategy import check_strategy
from raytrainer.errors import ConfigError
from raytrainer.plugins import Backend, built_in, recorded_kind


def check_together(e: Experiment) -> None:
    """Check keys that depend on each other, and values that need more than a range. Durations are converted to seconds.

    Raises:
        ConfigError: A value is not valid; the message names the first such key.
    """
    if not re.fullmatch(NAME_PATTERN, e.name or ""):
        raise ConfigError(
            "must be letters, digits, '.', '_' and '-', begin with a letter or digit, and have at most 100",
            key="name",
            value=e.name,
        )
    _check_nodes(e)
    _check_workers(e)
    check_strategy(e)
    _check_length(e)
    _check_trainer(e)
    _check_init_from(e)
    _check_monitors(e)
    if e.tracking.register_model and not e.tracking.log_model:
        raise ConfigError(
            "needs tracking.log_model=true: there is no model to register",
            key="tracking.register_model",
            value=e.tracking.register_model,
        )
    _check_cluster(e)
    _check_sweep(e)


def _check_length(e: Experiment) -> None:
    t = e.trainer
    if e.debug:
        t.max_steps, t.max_epochs, t.max_time = 1, None, None  # one step, whatever length is configured
    t.max_time = seconds(t.max_time)
    if t.max_steps is None and t.max_epochs is None and t.max_time is None:
        raise ConfigError(
            "is not set, and neither is trainer.max_epochs nor trainer.max_time, so the run would never end. Set at least "
            "one; training ends at the first that is reached (experiment=mlp sets max_epochs)",
            key="trainer.max_steps",
        )


def _check_trainer(e: Experiment) -> None:
    t, optimizer = e.trainer, e.optimizer or {}
    if t.precision == "16-mixed":
        reason = ""
        if optimizer.get("_target_") == "raytrainer.optim.Muon":
            reason = "does not work with optimizer=muon, whose updates do not shrink with the gradients; use bf16-mixed"
        elif not optimizer.get("fused"):
            reason = "needs a fused optimizer, or the gradient scaler waits for the device at every step: set optimizer.fused=true"
        if reason:
            raise ConfigError(reason, key="trainer.precision", value=t.precision)
    if not isinstance(t.freeze, list) or not all(isinstance(pattern, str) for pattern in t.freeze):
        raise ConfigError("must be a list of patterns, as [backbone.*]", key="trainer.freeze", value=t.freeze)
    if t.early_stopping is not None and not e.data.val:
        raise ConfigError("needs data.val, whose metrics it watches", key="trainer.early_stopping")
    if t.max_grad_norm == 0:
        raise ConfigError(
            "must be more than 0, or every gradient is 0; null turns clipping off", key="trainer.max_grad_norm", value=0
        )


def _check_monitors(e: Experiment) -> None:
    """Check that each monitor can be a metric of the evaluation. A loss names its metrics only when it is called."""
    early, sets = e.trainer.early_stopping, [name for name in e.data.val_sets if name]
    watched = {
        "checkpoint.monitor": e.checkpoint.monitor,
        "trainer.early_stopping.monitor": early.monitor if early else None,
        "sweep.metric": e.sweep.metric,
    }
    for name, metric in watched.items():
        if metric is None or e.evaluate or (name == "sweep.metric" and not metric.startswith("val/")):
            continue
        first, _, rest = metric.partition("/")
        if first != "val" or not rest:
            raise ConfigError("must be a metric of the evaluation, as val/loss", key=name, value=metric)
        if sets and not any(rest.startswith(f"{name_of_set}/") for name_of_set in sets):
            raise ConfigError(
                "names no validation set",
                key=name,
                value=metric,
                choices=[f"val/{name_of_set}/{rest.rpartition('/')[2]}" for name_of_set in sets],
            )


def _check_init_from(e: Experiment) -> None:
    if e.init_from is None:
        return
    if not e.init_from.source:
        raise ConfigError("is not set: a run, a checkpoint, a file or a folder of weights", key="init_from.source")
    exclude = e.init_from.exclude
    if not isinstance(exclude, list) or not all(isinstance(pattern, str) for pattern in exclude):
        raise ConfigError("must be a list of patterns, as [head.*]", key="init_from.exclude", value=exclude)


_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_KUBERNETES = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"


def _check_cluster(e: Experiment) -> None:
    c = e.cluster
    for problem in e.backend.validate(e):
        raise problem
    _check_address(e.backend, c)
    for name, pattern, what in (
        ("forward_env", _VARIABLE, "a list of names of variables, without their values"),
        ("shared_paths", r"/.*", "a list of absolute paths"),
        ("secrets", _KUBERNETES, "a list of names of Kubernetes secrets"),
    ):
        value = getattr(c, name)
        if not isinstance(value, list) or not all(isinstance(v, str) and re.fullmatch(pattern, v) for v in value):
            raise ConfigError(f"must be {what}", key=f"cluster.{name}")
    for name in ("namespace", "queue", "service_account"):
        value = getattr(c, name)
        if value is not None and not re.fullmatch(_KUBERNETES, value):
            raise ConfigError("is not a valid Kubernetes name: a-z, 0-9, '-', '.'", key=f"cluster.{name}", value=value)
    _check_runtime_env(c)
    if c.min_pods is not None and c.max_pods is not None and c.min_pods > c.max_pods:
        raise ConfigError(f"is more than cluster.max_pods={c.max_pods}", key="cluster.min_pods", value=c.min_pods)


def _check_address(backend: Backend, c: ClusterConfig) -> None:
    address = c.address
    if address is None:
        return
    if address.startswith("ray://"):
        # With the Ray Client, the driver is not part of the cluster: Ray Train's controller cannot run in it, and a
        # lost connection would end the run.
        host = address.removeprefix("ray://").rpartition(":")[0] or "HOST"
        raise ConfigError(
            "is a Ray Client address, and a training over it would end when the connection drops; "
            f"cluster=job cluster.address=http://{host}:8265 submits to the same cluster, and cluster=existing with "
            "host:6379 is for a machine of the cluster",
            key="cluster.address",
            value=address,
        )
    pattern, description = backend.address_form or ("", "")
    if pattern and re.fullmatch(pattern, address):
        return
    # The form of the address shows which backend was meant.
    meant = next((o for o in built_in() if o.address_form and re.fullmatch(o.address_form[0], address)), None)
    hint = f"; use cluster={recorded_kind(meant.name)}" if meant is not None else ""
    # The address may contain a password, which must not reach a terminal or a log.
    shown = re.sub(r"//[^/]*@", "//…@", address).partition("?")[0]
    wrong = f"must be {description}" if pattern else "has no meaning"
    raise ConfigError(f"{wrong} with cluster={c.kind}{hint}", key="cluster.address", value=shown)


_FORWARD = "send only its name, cluster.forward_env=[{name}], and set its value on the cluster"


def looks_secret(variable: str) -> bool:
    """Return whether a variable's name suggests a secret: `WANDB_API_KEY` does, `TOKENIZERS_PARALLELISM` does not."""
    return (
        re.search(r"(token|secret|passw(or)?d|key|credential|passphrase)s?(_|$)", variable, re.IGNORECASE) is not None
    )


_BEFORE_AT = re.compile(
    # A user name alone may be a token, but Azure's container and SSH's user are not. After a port, `@` is in the path.
    # The parts have maximal lengths: otherwise a long text of letters would be scanned to its end from each letter.
    r"([a-z][a-z0-9+.-]{0,30})://(?:([^/\s:@'\"]{1,300})|[^/\s:@'\"]{0,300}:(?!\d*/)[^\s@'\"]{1,300})@",
    re.IGNORECASE,
)


def holds_password(text: str) -> bool:
    """Return whether a text contains a URL with a password or token. References such as `${oc.env:X}` do not count."""
    while (left := re.sub(r"\$\{[^{}]*\}", "", text)) != text:
        text = left
    public = re.compile(r"abfss?|(.*\+)?ssh", re.IGNORECASE)
    lines = (line for line in text.splitlines() if "://" in line and "@" in line)
    matches = (match for line in lines for match in _BEFORE_AT.findall(line))
    return any(not user or not public.fullmatch(scheme) for scheme, user in matches)


def check_references(runtime_env: Any, forward_env: Any) -> None:
    """Check that no reference in a runtime environment stands for a secret, because Ray gets the resolved values.

    Args:
        runtime_env, forward_env: Those keys of the section `cluster`; `runtime_env` is unresolved.

    Raises:
        ConfigError: A variable may hold a secret; the message names it.
    """
    for path, value in texts_of(runtime_env, "cluster.runtime_env"):
        for name in re.findall(r"\$\{oc\.env:([^,}]+)", value):
            if looks_secret(name) or name in forward_env:
                raise ConfigError(
                    f"would show the value of {name} to everyone on the cluster: {_FORWARD.format(name=name)}", key=path
                )


def _check_runtime_env(c: ClusterConfig) -> None:
    """Check that the runtime environment holds no secret: Ray shows it to everyone and logs its variables."""
    variables = c.runtime_env.get("env_vars")
    for name in variables if isinstance(variables, dict) else ():
        if looks_secret(str(name)) or name in c.forward_env:
            raise ConfigError(
                f"would be shown to everyone on the cluster, and logged there: {_FORWARD.format(name=name)}",
                key=f"cluster.runtime_env.env_vars.{name}",
            )
    for path, value in texts_of(c.runtime_env, "cluster.runtime_env"):
        if holds_password(value):
            raise ConfigError("holds a URL with a password, which everyone on the cluster would see", key=path)


def leaves_of(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every value below a node that is neither a mapping nor a list, with its dotted key."""
    if isinstance(node, dict):
        for name, below in node.items():
            yield from leaves_of(below, f"{path}.{name}")
    elif isinstance(node, list):
        for below in node:
            yield from leaves_of(below, path)
    else:
        yield path, node


def texts_of(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every text below a node, with its dotted key."""
    return ((key, value) for key, value in leaves_of(node, path) if isinstance(value, str))


def _check_nodes(e: Experiment) -> None:
    for section in ("model", "loss", "optimizer"):
        if not getattr(e, section):
            raise ConfigError("is not set; choose one of the group, or give a _target_", key=section)
    if not e.data.train:
        raise ConfigError("is not set: a _target_ that gives the training dataset", key="data.train")
    for section, what in (("callbacks", "callback"), ("metrics", "metric")):
        for name, value in getattr(e, section).items():
            if value is not None and not isinstance(value, dict):
                raise ConfigError("must be a _target_ node", key=f"{section}.{name}", value=value)
            if value == {}:
                raise ConfigError(f"has no _target_; null leaves a {what} out", key=f"{section}.{name}")
    for section, names in (("metrics", e.metrics), ("data.val", e.data.val_sets)):
        for name in names:
            if name == "loss" or (name and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name)):
                raise ConfigError(
                    "becomes part of a metric's name: letters, digits, '_' and '-', and not loss",
                    key=f"{section}.{name}",
                )
    for name, node in targets(e):
        if not node.get("_target_"):
            raise ConfigError("has no _target_, the class or function to call", key=name)


def _check_workers(e: Experiment) -> None:
    n = e.scaling.num_workers
    if isinstance(n, str) and n.isascii() and n.isdigit():  # from an environment variable
        n = e.scaling.num_workers = int(n)
    elastic = isinstance(n, list) and len(n) == 2 and all(type(x) is int for x in n) and 1 <= n[0] <= n[1]
    if not (type(n) is int and n >= 1) and not elastic:
        raise ConfigError(
            "must be a number from 1, or [least, most] for an elastic run", key="scaling.num_workers", value=n
        )
    for name, amount in (e.scaling.resources_per_worker or {}).items():
        if not amount >= 0:
            raise ConfigError("must be at least 0", key=f"scaling.resources_per_worker.{name}", value=amount)
    gpus = (e.scaling.resources_per_worker or {}).get("GPU")
    if gpus is not None and e.scaling.use_gpu in (True, False) and e.scaling.use_gpu != (gpus > 0):
        message = f"contradicts scaling.use_gpu={str(e.scaling.use_gpu).lower()}; leave one of the two out"
        raise ConfigError(message, key="scaling.resources_per_worker.GPU", value=gpus)
    if e.data.global_batch_size < e.max_workers:
        raise ConfigError(
            f"is smaller than scaling.num_workers={e.max_workers}: a worker would have no sample",
            key="data.global_batch_size",
            value=e.data.global_batch_size,
        )


def _check_sweep(e: Experiment) -> None:
    s = e.sweep
    s.time_budget_s = seconds(s.time_budget_s, "sweep.time_budget_s")
    if not isinstance(s.allow_failed, bool) and not (isinstance(s.allow_failed, int) and s.allow_failed >= 0):
        raise ConfigError(
            "must be true, false, or how many trials may fail", key="sweep.allow_failed", value=s.allow_failed
        )


def seconds(value: Any, name: str = "trainer.max_time") -> float | None:
    """Convert a duration to seconds: a number, `90s`, `1h30m`, `2d`, or `HH:MM:SS`. `name` is its key, for the error.

    Raises:
        ConfigError: The value is not a duration, or not positive.
    """
    if value is None:
        return None
    total: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        total = float(value)
    elif isinstance(value, str):
        if match := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value.strip()):
            d, h, m, s = (int(x or 0) for x in match.groups())
            total = float(86400 * d + 3600 * h + 60 * m + s)
        elif match := re.fullmatch(r"(\d+):(\d\d):(\d\d)", value.strip()):
            h, m, s = (int(x) for x in match.groups())
            total = float(3600 * h + 60 * m + s)
    if total is None or not total > 0:
        raise ConfigError("must be a duration: seconds, 90m, 1h30m, 2d or HH:MM:SS", key=name, value=value)
    return total
