"""`cluster=local`: start a Ray on this machine for this launch only. It ends with the launch."""

from __future__ import annotations

from raytrainer.plugins import Backend


class Local(Backend):
    name = "local"
    ray = "embedded"
