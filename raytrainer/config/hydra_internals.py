"""The private parts of Hydra that raytrainer uses. They were read in hydra-core 1.3.8; read them again after an upgrade.

- `run_hydra` runs a parsed command line. Hydra's public `hydra.main` parses `sys.argv` itself and ends the process with
  exit code 1 on every error.
- `argument_parser` returns Hydra's own parser.
- `Hydra` and `create_automatic_config_search_path` compose as the command line does. The public `initialize` takes only
  one directory of configs.
- `escape_special_characters` writes a text as Hydra's grammar reads it.
"""

from hydra._internal.grammar.utils import escape_special_characters
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra as run_hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra._internal.utils import get_args_parser as argument_parser

__all__ = [
    "Hydra",
    "argument_parser",
    "create_automatic_config_search_path",
    "escape_special_characters",
    "run_hydra",
]
