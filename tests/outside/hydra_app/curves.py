"""An application in a package, which reports its progress: `python -c 'from hydra_app.curves import main; main()'`."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
from omegaconf import DictConfig

from raytrainer.sweep import report

CALLS = 0


def counted() -> int:
    global CALLS
    CALLS += 1
    return CALLS


def losses(x: float) -> Iterator[float]:
    yield from (x + 1 / epoch for epoch in range(1, 10))


@hydra.main(version_base=None, config_path="conf", config_name="curves")
def main(cfg: DictConfig) -> float:
    call, last, swallowed = counted(), 0, False
    try:
        for last, loss in enumerate(losses(cfg.x), start=1):
            try:
                report(loss, step=10 * last)
            except Exception:  # noqa: BLE001  # a stopped trial raises no Exception
                swallowed = True
    finally:
        time.sleep(float(os.environ.get("CURVES_CLEAN_UP_S", "0")))
        found = {"pid": os.getpid(), "call": call, "calls": CALLS, "x": cfg.x, "last": last, "swallowed": swallowed}
        with Path("curves").open("a") as file:
            file.write(json.dumps(found) + "\n")
    return float(cfg.x)
