"""The command line: Hydra's own, with verbs in front. `main` runs one and returns its exit code.

dispatch     the verbs, and what starts a run or a sweep
hydra_line   a command line in Hydra's syntax: compose its config and call a task with it
exit_codes   from errors to exit codes and one-line reports
completion   tab completion
"""

from raytrainer.cli.dispatch import VERBS, main

__all__ = ["VERBS", "main"]
