"""Private parts of Hydra, read in hydra-core 1.3.8: read them again after an upgrade.

Hydra's public `hydra.main` parses `sys.argv` itself, and ends the process with exit code 1 on every error.

Imports of `hydra._internal` are inside the functions, because most launches need only a few of them.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig


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
