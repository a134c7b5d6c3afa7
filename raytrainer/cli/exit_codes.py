"""Exit codes: 0 finished, 1 failed, 2 refused before it started, 129 hung up, 130 interrupted, 143 stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable

from raytrainer.errors import RaytrainerError, Refused, Stopped


def exit_code_of(call: Callable[[], int]) -> int:
    """Return the exit code of a call. An error of raytrainer is reported on standard error; a bug is raised."""
    try:
        return call()
    except Refused as error:
        _report("refused", error)
        return 2
    except Stopped as error:
        _report("stopped", error)
        return error.exit_code
    except RaytrainerError as error:
        _report("failed", error)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # argparse has shown help, or Hydra has refused an option's argument
        return 2 if end.code else 0


def _report(outcome: str, error: BaseException) -> None:
    first, *more = str(error).splitlines() or [""]
    print("\n  ".join([f"raytrainer: {outcome}: {first}", *more]), file=sys.stderr)
