"""Convert errors of Hydra and OmegaConf to a `ConfigError` with the key, the value and the nearest valid choices.

Hydra's errors have few fields, so their texts are matched, as hydra-core 1.3 writes them (`_internal/defaults_list.py`,
`config_loader_impl.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException, SearchPathException
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from raytrainer.config import hydra_internals
from raytrainer.config.typed import OPEN, unknown_key
from raytrainer.errors import ConfigError, RaytrainerError, nearest


def explain(
    error: Exception, overrides: Sequence[str] = (), known: Callable[[], Sequence[str]] = lambda: ()
) -> Exception:
    """Return the error to report for an error while composing. Errors of raytrainer are returned unchanged.

    Args:
        error: Any error that Hydra raised.
        overrides: The overrides of the command line.
        known: Returns the valid keys of the same command line without its values. It is called only if a key is wrong.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    values = {key_of(o): value_of(o) for o in overrides}
    for one in chain:
        if isinstance(one, RaytrainerError):
            return one
        if isinstance(one, OverrideParseException):
            return _unparsed(one.override)
        if isinstance(one, MissingConfigException):
            return _missing_config(one, values)
        if isinstance(one, yaml.MarkedYAMLError):
            mark = one.problem_mark or one.context_mark
            place = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
            return ConfigError(f"{place}: not valid YAML: {one.problem or one.context}")
        if isinstance(one, MissingMandatoryValue | InterpolationKeyError | InterpolationResolutionError):
            return unresolved(one.full_key, one)
    for one in chain:
        if isinstance(one, ConfigCompositionException) and (
            found := _of_composition(str(one), overrides, values, known)
        ):
            return found
    for one in chain:
        if m := re.search(r"does not support sweep type : (\w+)_SWEEP", str(one)):
            sweep = next((o for o in overrides if f"{m[1].lower()}(" in o), "")
            reason = (
                f"is a sweep over an {m[1].lower()}, which Hydra's own sweeper cannot sample; list its values: 0.1,0.2"
            )
            return ConfigError(reason, key=key_of(sweep) or "-m", value=value_of(sweep))
        if m := re.search(r"Unsupported item value in defaults : (\w+)", str(one)):
            kind = {"bool": "true or false (on, off, yes and no mean these, too)"}.get(m[1], m[1])
            return ConfigError(
                f"a choice in the defaults of a config is {kind}, where a name must be: put it in quotes"
            )
    if isinstance(error, AssertionError | ValueError):
        for override in overrides:
            if found := _of_value(override, str(error), known):
                return found
    return ConfigError(_first_line(chain))


def key_of(override: str) -> str:
    """Return the key of an override: `+a.b=3` → `a.b`."""
    return override.partition("=")[0].lstrip("+~")


def value_of(override: str) -> str | None:
    """Return the value of an override: `+a.b=3` → `3`; None without `=`."""
    return override.partition("=")[2] if "=" in override else None


def _unparsed(override: str) -> ConfigError:
    name, equals, value = override.partition("=")
    if not equals:
        hint = "; a command comes first" if override.isalpha() else ""
        return ConfigError(f"{override!r} is not key=value{hint}")
    if not re.fullmatch(r"[+~]{0,2}[\w.@/:$-]+", name):
        return ConfigError(f"{override!r} is not key=value: {name!r} cannot be a key")
    return ConfigError(f"cannot be read: {why_unread(value)}", key=name, value=value)


HOW = (
    "a sweep is a list a,b or choice(a,b), range(1,10), interval(0,1), int(interval(1,9)), tag(log,interval(1e-4,0.1))"
)
# Hydra's functions, and those of Ray Tune and Optuna that users write instead, with Hydra's equivalents.
_FUNCTIONS = ("choice", "range", "interval", "tag", "int", "float", "str", "bool", "sort", "shuffle", "glob")
_OTHERS = {
    **dict.fromkeys(("log", "loguniform", "log_uniform", "qloguniform", "logspace"), "tag(log,interval(1e-4,0.1))"),
    **dict.fromkeys(("uniform", "quniform", "suggest_float", "linspace"), "interval(0,1)"),
    **dict.fromkeys(("randint", "qrandint", "suggest_int"), "int(interval(1,9))"),
    **dict.fromkeys(("lograndint", "qlograndint"), "tag(log,int(interval(1,9)))"),
    **dict.fromkeys(("categorical", "grid_search", "choices", "suggest_categorical"), "a,b or choice(a,b)"),
}


def why_unread(text: str) -> str:
    """Return what is wrong with the value of an override that Hydra cannot parse."""
    for name in re.findall(r"([A-Za-z_]\w*)\(", text):
        if name in _OTHERS:
            return f"there is no {name}(): write {_OTHERS[name]}"
        if name not in _FUNCTIONS:
            return f"there is no {name}(); {HOW}"
    if text.count("(") != text.count(")"):
        return f"it has {text.count('(')} ( and {text.count(')')} ); {HOW}"
    if "(" in text or ",," in text:
        return HOW
    return "put text in quotes within the shell's, as in 'key=\"a text\"'"


def _missing_config(error: MissingConfigException, values: dict[str, str | None]) -> ConfigError:
    path = error.missing_cfg_file
    if path is None:
        return ConfigError(_first_line([error]))
    where = re.match(r"In '([^']+)': ", str(error))
    group, slash, choice = path.rpartition("/")
    # For a choice that an experiment's file overrides in the root config, Hydra names the root, which would mislead.
    place = f" (chosen in {where[1]})" if where and "/" in where[1] else ""
    place = place or ("" if group in values or not slash else " (chosen in a config file)")
    if slash and error.options is not None:
        return ConfigError(f"is not a valid choice{place}", key=group, value=choice, choices=sorted(error.options))
    if "primary config" in str(error):
        return ConfigError("is not a config on the search path", key="--config-name", value=path)
    return ConfigError(f"is not a config on the search path{place}", key=path)


def unresolved(name: str | None, error: OmegaConfBaseException) -> ConfigError:
    """Return the error for a value that is missing or whose interpolation cannot be resolved."""
    key = name or str(error.key)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError("is ??? and must be given", key=key)
    reason = str(error.msg or error).splitlines()[0]
    if m := re.search(r"Environment variable '([^']+)' not found", reason):
        reason = f"the environment variable {m[1]} is not set; ${{oc.env:{m[1]},null}} gives a default"
    elif m := re.search(r"Interpolation key '([^']+)' not found", reason):
        reason = f"there is no key {m[1]}"
    elif m := re.search(r"Unsupported interpolation type (\S+)", reason):
        reason = no_resolver(m[1])
    return ConfigError(f"cannot be resolved: {reason}", key=key)


def no_resolver(name: str) -> str:
    """Return why `${name:…}` has no value, and where to register a resolver so that every process has it."""
    own = [f for f in sorted(hydra_internals.resolvers()) if f != name]
    close = nearest(name, own, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"there is no resolver {name}{hint}. Register your own in a module of the package hydra_plugins "
        "(hydra_plugins/mine/__init__.py), which the launch and every worker import; see docs/your-code.md"
    )


def _of_composition(
    text: str, overrides: Sequence[str], values: dict[str, str | None], known: Callable[[], Sequence[str]]
) -> ConfigError | None:
    first = text.strip().splitlines()[0] if text.strip() else ""
    where = re.match(r"In '?([^':]+)'?: ", first)
    place = f" (in {where[1]})" if where else ""
    if m := re.search(r"Could not (?:override|delete from config\.|delete) '([^'=]+)(?:=[^']*)?'(.*)", first):
        name = m[1]
        if where or ("does not exist" not in m[2] and _is_group(name, text, values)):
            if "append to your default list" in text and f"+{name}" in text:
                return ConfigError(
                    f"chooses from a group that no config has among its defaults; add it: +{name}={values.get(name)}",
                    key=name,
                    value=values.get(name),
                )
            return ConfigError(
                f"cannot be chosen: no defaults list has the group {name}{place}", key=name, value=values.get(name)
            )
        return _wrong_key(
            name, values.get(name), known(), deleted=f"~{name}" in {o.partition("=")[0] for o in overrides}
        )
    if m := re.search(r"The value of '([^']+)' is (.*) and not (.*)\.$", first):
        return ConfigError(f"cannot be deleted: its value is {m[2]}", key=m[1], value=m[3])
    if m := re.search(r"An item is already at '([^']+)'", first):
        return ConfigError("is a key already: write it without the +", key=m[1], value=values.get(m[1]))
    if m := re.search(r"looks like a config group override, but config group '([^']+)' does not", first):
        return ConfigError(f"is not a group{place}", key=m[1], choices=[k for k in known() if "." not in k])
    if m := re.search(r"Override '([^':]+?) ?: ?[^']*' is defined before", first):
        return ConfigError(
            f"'override /{m[1]}: …' must come last in the defaults of a config{place}, after all entries without override"
        )
    if m := re.search(r"Multiple values for ([^.]+)\.", first):
        return ConfigError(
            f"is chosen twice; an experiment's file writes 'override /{m[1]}: …' in its defaults", key=m[1]
        )
    if m := re.search(r"Ambiguous value for argument '([^'=]+)=(.*)'", first):
        return ConfigError(
            f"is several values: as a list {m[1]}=[{m[2]}], as a sweep over them with -m first", key=m[1], value=m[2]
        )
    if m := re.search(r"Sweep parameters '([^'=]+)=(.*)' requires", first):
        return ConfigError("is a sweep, which needs -m first", key=m[1], value=m[2])
    if m := re.search(r"You must specify '([^']+)'", first):
        return ConfigError("must be chosen", key=m[1], choices=[x.strip() for x in text.splitlines()[2:]])
    if m := re.search(r"Error merging override [+~]*([^=]+)=?(.*)", first):
        sweep = ": write a sweep inside of a value as a text, in quotes" if "(" in m[2] else ""
        return ConfigError(f"cannot be set{sweep}", key=m[1], value=m[2] or None)
    return None


def _is_group(name: str, text: str, values: dict[str, str | None]) -> bool:
    # Hydra writes "To append to your config use +x" for a key, and "…to your default list…" for a group.
    return "defaults list" in text or "default list" in text or "override one of" in text


def _wrong_key(name: str, value: str | None, known: Sequence[str], deleted: bool = False) -> ConfigError:
    section = name.rpartition(".")[0]
    number = name in known and re.fullmatch(r"-?\d+", name.rpartition(".")[2]) is not None
    if number and deleted:
        return ConfigError(
            f"has a number as its key, which ~ cannot name; give the config that you start from another {section}",
            key=name,
        )
    if number:
        return ConfigError(
            f"has a number as its key: write {section}={{{name.rpartition('.')[2]}:{value}}}", key=name, value=value
        )
    if deleted and name in known:
        return ConfigError("is null already", key=name)
    if name.startswith("hydra."):
        return ConfigError("is not a key; --cfg hydra shows Hydra's own", key=name, value=value)
    if section == "callbacks":
        return ConfigError(f"does not exist; add a callback as +{name}={{_target_: …}}", key=name, value=value)
    if name in known and (value or "").startswith("{"):
        return ConfigError(
            f"has keys that do not exist: a + in front adds them to the existing keys, and ~{name}.KEY removes one",
            key=name,
            value=value,
        )
    if name in known or section in OPEN:
        return ConfigError(f"is below {section}, which is null here; a + in front sets it", key=name, value=value)
    return unknown_key(name, value, known)


def _of_value(override: str, reason: str, known: Callable[[], Sequence[str]]) -> ConfigError | None:
    """Explain two errors in which Hydra names no key: a value of the wrong kind for a group, and a key below null."""
    name, value = key_of(override), value_of(override)
    if not name:
        return _unparsed(override)
    if "Config group override" in reason and value is not None and "." not in name:
        if value in ("null", ""):
            return ConfigError(f"is a group; to choose nothing write ~{name}", key=name, value=value)
        if value in ("true", "false") or re.fullmatch(r"[-+.\d]+", value):
            return ConfigError("is a group: it takes the name of a choice, which --help lists", key=name, value=value)
    if "Unexpected type for root" in reason and "." in name and not override.startswith("+"):
        return _wrong_key(name, value, known())
    return None


def _first_line(chain: Sequence[BaseException]) -> str:
    for one in chain:
        if lines := [x.strip() for x in str(one).splitlines() if x.strip() and "hydra.cc" not in x]:
            own = isinstance(
                one, ConfigCompositionException | SearchPathException | OmegaConfBaseException | ValueError
            )
            return lines[0] if own else f"{type(one).__name__}: {lines[0]}"
    return type(chain[0]).__name__
