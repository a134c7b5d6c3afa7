"""The command `ray`, the processes of whose cluster are forked: `python forked_ray.py PYTHON ARGUMENTS`, where PYTHON is
`tests.forkserver.Server.python`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def fork(python: str) -> None:
    """As `tests.forkserver.fork_rays_processes`, in a process that does not have the tests on its path."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tests import forkserver

    sys.path.pop()
    forkserver.fork_rays_processes(python)


if __name__ == "__main__":
    fork(sys.argv.pop(1))
    from ray.scripts.scripts import main

    main()
