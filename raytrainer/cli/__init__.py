"""The command line: `main` runs one and returns its exit code.

dispatch     exit codes, the verbs, and what starts a run or a sweep
hydra_line   a command line in Hydra's syntax: compose its config and call the task with it
completion   tab completion
"""

from raytrainer.cli.dispatch import VERBS, main

__all__ = ["VERBS", "main"]
