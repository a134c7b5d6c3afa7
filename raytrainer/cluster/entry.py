"""The command of every job is `python -m raytrainer.cluster.entry`; the code is in `raytrainer.submission.entrypoint`.

Requests keep this name: the command is part of a request's digest, and the raytrainer on the cluster may be older or
newer than the one that submits.
"""

from __future__ import annotations

import sys

from raytrainer.submission.entrypoint import start

if __name__ == "__main__":
    sys.exit(start())
