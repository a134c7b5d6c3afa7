"""Convert errors of Hydra and OmegaConf to a `ConfigError` with the key, the value and the nearest valid choices.

Hydra's errors have few fields, so their texts are matched, as hydra-core 1.3 writes them (`_internal/defaults_list.py`,
`config_loader_impl.py`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

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
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    values = {key_of(o): value_of(o) for o in overrides}
    explanations: Iterator[Exception | None] = itertools.chain(
        (_of_type(link, values) for link in links),
        (_of_composition(str(e), overrides, values, known) for e in links if isinstance(e, ConfigCompositionException)),
        (_of_text(str(link), overrides) for link in links),
        (_of_value(o, str(error), known) for o in overrides if isinstance(error, AssertionError | ValueError)),
    )
    return next((e for e in explanations if e is not None), None) or ConfigError(_first_line(links))


def _of_type(error: BaseException, values: dict[str, str | None]) -> Exception | None:
    """Explain an error whose class has the fields that are needed."""
    match error:
        case RaytrainerError():
            return error
        case OverrideParseException():
            return _unparsed(error.override)
        case MissingConfigException():
            return _missing_config(error, values)
        case yaml.MarkedYAMLError():
            mark = error.problem_mark or error.context_mark
            place = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
            return ConfigError(f"{place}: not valid YAML: {error.problem or error.context}")
        case MissingMandatoryValue() | InterpolationKeyError() | InterpolationResolutionError():
            return unresolved(error.full_key, error)
    return None


def _of_text(text: str, overrides: Sequence[str]) -> ConfigError | None:
    """Explain two errors that Hydra raises without a class of their own."""
    if m := re.search(r"does not support sweep type : (\w+)_SWEEP", text):
        kind = m[1].lower()
        sweep = next((o for o in overrides if f"{kind}(" in o), "")
        reason = f"is a sweep over an {kind}, which Hydra's own sweeper cannot sample; list its values: 0.1,0.2"
        return ConfigError(reason, key=key_of(sweep) or "-m", value=value_of(sweep))
    if m := re.search(r"Unsupported item value in defaults : (\w+)", text):
        kind = {"bool": "true or false (on, off, yes and no mean these, too)"}.get(m[1], m[1])
        return ConfigError(f"a choice in the defaults of a config is {kind}, where a name must be: put it in quotes")
    return None


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


# Hydra's sentence → ours, with {1}, {2}, … for the groups and {place} for the config file; and the numbers of the groups
# that are the key and the value. The value is that of the override if its number is 0.
_SENTENCES: tuple[tuple[str, str, int | None, int | None], ...] = (
    (r"The value of '([^']+)' is (.*) and not (.*)\.$", "cannot be deleted: its value is {2}", 1, 3),
    (r"An item is already at '([^']+)'", "is a key already: write it without the +", 1, 0),
    (
        r"Override '([^':]+?) ?: ?[^']*' is defined before",
        "'override /{1}: …' must come last in the defaults of a config{place}, after all entries without override",
        None,
        None,
    ),
    (
        r"Multiple values for ([^.]+)\.",
        "is chosen twice; an experiment's file writes 'override /{1}: …' in its defaults",
        1,
        None,
    ),
    (
        r"Ambiguous value for argument '([^'=]+)=(.*)'",
        "is several values: as a list {1}=[{2}], as a sweep over them with -m first",
        1,
        2,
    ),
    (r"Sweep parameters '([^'=]+)=(.*)' requires", "is a sweep, which needs -m first", 1, 2),
)


def _of_composition(
    text: str, overrides: Sequence[str], values: dict[str, str | None], known: Callable[[], Sequence[str]]
) -> ConfigError | None:
    """Explain an error of Hydra's composition by its first line."""
    first = text.strip().partition("\n")[0]
    where = re.match(r"In '?([^':]+)'?: ", first)
    place = f" (in {where[1]})" if where else ""
    if error := _of_missing(first, text, overrides, values, known, place):
        return error
    for pattern, sentence, key, value in _SENTENCES:
        if m := re.search(pattern, first):
            groups = dict(enumerate((m[0], *m.groups())))
            shown = values.get(m[1]) if value == 0 else groups.get(value or -1)
            message = sentence.format(*groups.values(), place=place)
            return ConfigError(message, key=groups.get(key or -1), value=shown)
    if m := re.search(r"looks like a config group override, but config group '([^']+)' does not", first):
        return ConfigError(f"is not a group{place}", key=m[1], choices=[k for k in known() if "." not in k])
    if m := re.search(r"You must specify '([^']+)'", first):
        return ConfigError("must be chosen", key=m[1], choices=[x.strip() for x in text.splitlines()[2:]])
    if m := re.search(r"Error merging override [+~]*([^=]+)=?(.*)", first):
        sweep = ": write a sweep inside of a value as a text, in quotes" if "(" in m[2] else ""
        return ConfigError(f"cannot be set{sweep}", key=m[1], value=m[2] or None)
    return None


def _of_missing(
    first: str,
    text: str,
    overrides: Sequence[str],
    values: dict[str, str | None],
    known: Callable[[], Sequence[str]],
    place: str,
) -> ConfigError | None:
    """Explain that a key or group to override or delete does not exist."""
    m = re.search(r"Could not (?:override|delete from config\.|delete) '([^'=]+)(?:=[^']*)?'(.*)", first)
    if m is None:
        return None
    # Hydra writes "To append to your config use +x" for a key, and "…to your default list…" for a group.
    is_group = any(words in text for words in ("defaults list", "default list", "override one of"))
    if place or ("does not exist" not in m[2] and is_group):
        return _unchosen(m[1], values.get(m[1]), text, place)
    deleted = any(o.partition("=")[0] == f"~{m[1]}" for o in overrides)
    return _wrong_key(m[1], values.get(m[1]), known(), deleted=deleted)


def _unchosen(group: str, choice: str | None, text: str, place: str) -> ConfigError:
    """Return the error for a group that has no choice to replace."""
    reason = f"cannot be chosen: no defaults list has the group {group}{place}"
    if "append to your default list" in text and f"+{group}" in text:
        reason = f"chooses from a group that no config has among its defaults; add it: +{group}={choice}"
    return ConfigError(reason, key=group, value=choice)


def _wrong_key(name: str, value: str | None, known: Sequence[str], deleted: bool = False) -> ConfigError:
    section, _, last = name.rpartition(".")
    is_known = name in known
    if is_known and re.fullmatch(r"-?\d+", last):
        fix = f": write {section}={{{last}:{value}}}"
        if deleted:
            fix = f", which ~ cannot name; give the config that you start from another {section}"
        return ConfigError(f"has a number as its key{fix}", key=name, value=None if deleted else value)
    if deleted and is_known:
        return ConfigError("is null already", key=name)
    if name.startswith("hydra."):
        return ConfigError("is not a key; --cfg hydra shows Hydra's own", key=name, value=value)
    if section == "callbacks":
        return ConfigError(f"does not exist; add a callback as +{name}={{_target_: …}}", key=name, value=value)
    if is_known and (value or "").startswith("{"):
        return ConfigError(
            f"has keys that do not exist: a + in front adds them to the existing keys, and ~{name}.KEY removes one",
            key=name,
            value=value,
        )
    if is_known or section in OPEN:
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


def _first_line(errors: Sequence[BaseException]) -> str:
    for error in errors:
        if lines := [x.strip() for x in str(error).splitlines() if x.strip() and "hydra.cc" not in x]:
            explained = ConfigCompositionException | SearchPathException | OmegaConfBaseException | ValueError
            return lines[0] if isinstance(error, explained) else f"{type(error).__name__}: {lines[0]}"
    return type(errors[0]).__name__
