"""A user's application that uses Hydra and nothing of raytrainer. `python app.py x=0.5` appends its call to ./calls, as
one JSON line, and does what `what` says."""

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import shapes  # type: ignore[import-not-found]  # beside this script, on no other path
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)
OmegaConf.register_new_resolver("twice", lambda number: 2 * number)


class Parabola:
    """A class in the script itself: `_target_: __main__.Parabola`."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: float) -> float:
        return float(shapes.SHIFT + self.scale * (x - 0.25) ** 2)


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg: DictConfig) -> Any:
    value = hydra.utils.instantiate(cfg.shape)(cfg.x) + cfg.doubled
    hydra_config = HydraConfig.get()
    job: Any = OmegaConf.to_container(hydra_config.job, throw_on_missing=False)
    found = {
        "pid": os.getpid(),
        "folder": str(Path.cwd()),
        "left": os.environ.get("LEFT"),
        "num": job["num"],
        "id": job["id"],
        "output_dir": hydra_config.runtime.output_dir,
        "overrides": list(hydra_config.overrides.task),
        "value": value,
    }
    with Path(hydra.utils.get_original_cwd(), "calls").open("a") as calls:
        calls.write(json.dumps(found) + "\n")
    log.info("x is %s", cfg.x)
    print(f"printed for {cfg.x}")
    if cfg.what == "raises":
        raise ValueError("as it was told")
    if cfg.what == "leaves":
        sys.exit("enough")
    if cfg.what == "changes":
        os.environ["LEFT"] = "something"
        os.chdir("/")
    while cfg.what == "holds" and cfg.n > 1 and Path("hold").exists():
        time.sleep(0.05)
    return {"nothing": None, "several": (value, 1.0), "undefined": math.nan}.get(cfg.what, value)


if __name__ == "__main__":
    main()
