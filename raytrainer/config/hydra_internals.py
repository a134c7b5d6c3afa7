"""Private parts of Hydra and OmegaConf. Only this module uses them; `tests/contracts/private_parts.py` lists them.

Imports of `hydra._internal` are inside the functions, because most launches need only a few of them.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.basecontainer import BaseContainer

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

# --- the command line -------------------------------------------------------------------------------------------------


def argument_parser(program: str, version: str) -> ArgumentParser:
    """Return Hydra's parser of the command line, with another program name and version."""
    from hydra._internal.utils import get_args_parser

    parser: ArgumentParser = get_args_parser()
    parser.prog = program
    for action in parser._actions:
        if "--version" in action.option_strings:
            action.version = version  # type: ignore[attr-defined]
            action.help = "Show the version and exit"
    return parser


def run_hydra(
    args: Any,
    args_parser: ArgumentParser,
    task_function: Callable[[DictConfig], None],
    config_path: str,
    config_name: str,
) -> None:
    """Run the parsed command line `args` as `hydra.main` would do it."""
    from hydra._internal.utils import _run_hydra

    _run_hydra(
        args=args,
        args_parser=args_parser,
        task_function=task_function,
        config_path=config_path,
        config_name=config_name,
    )


# --- composing --------------------------------------------------------------------------------------------------------


def search_path(module: str) -> Any:
    """Return the search path of `hydra.main` for the configs of a package."""
    from hydra._internal.utils import create_automatic_config_search_path

    return create_automatic_config_search_path(None, None, f"pkg://{module}")


def initialize(task_name: str, path: Any) -> None:
    """Set up Hydra's global state for composing with a search path."""
    from hydra._internal.hydra import Hydra

    Hydra.create_main_hydra2(task_name=task_name, config_search_path=path)


def singletons() -> dict[Any, Any]:
    """Return the dictionary in which Hydra keeps its process-wide state, by class."""
    from hydra.core.singleton import Singleton

    instances: dict[Any, Any] = Singleton._instances
    return instances


def escaped_key(text: str) -> str:
    """Return a dictionary's key as Hydra's grammar writes it, without quotes."""
    from hydra._internal.grammar.utils import escape_special_characters

    return str(escape_special_characters(text))


def result_of(job: Any) -> Any:
    """Return what a job returned, or the exception that it raised. The public `return_value` prints and raises it."""
    return job._return_value


# --- OmegaConf --------------------------------------------------------------------------------------------------------


def resolvers() -> dict[str, Any]:
    """Return the dictionary of OmegaConf's resolvers, by name."""
    registered: dict[str, Any] = BaseContainer._resolvers
    return registered


def has_entries(node: Any) -> bool:
    """Return whether a node is a mapping or list with contents, neither null, `???` nor an interpolation."""
    return isinstance(node, DictConfig | ListConfig) and not (
        node._is_none() or node._is_missing() or node._is_interpolation()
    )


def leaves(cfg: DictConfig | ListConfig) -> Iterator[tuple[DictConfig | ListConfig, Any]]:
    """Yield the container and the name of each value that has no entries, depth first. Nothing is resolved."""
    names: Any = list(cfg) if isinstance(cfg, DictConfig) else range(len(cfg))
    for name in names:
        node = cfg._get_node(name)
        if has_entries(node):
            yield from leaves(node)  # type: ignore[arg-type]
        else:
            yield cfg, name


def full_key(container: DictConfig | ListConfig, name: Any) -> str:
    """Return the key of an entry from the root of its config."""
    return str(container._get_full_key(name))


def written(container: DictConfig | ListConfig, name: Any) -> str:
    """Return a value as it is written, without resolving its interpolation."""
    return str(container._get_node(name)._value())  # type: ignore[union-attr]
