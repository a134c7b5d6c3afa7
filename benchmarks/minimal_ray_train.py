"""The peer of bench_launch: a short Ray Train script as in Ray's documentation, with as little output as possible.

python benchmarks/minimal_ray_train.py STEPS FILE   (writes the time of its first step to FILE)
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def loop(config: dict[str, Any]) -> dict[str, Any]:
    from raytrainer.data import Digits
    from raytrainer.models import ResNet

    torch.manual_seed(0)
    tables = {split: Digits(split) for split in ("train", "val")}
    columns = {split: d.__getitems__(list(range(len(d)))) for split, d in tables.items()}
    train = torch.utils.data.TensorDataset(columns["train"]["image"], columns["train"]["label"])
    model = ResNet("basic", [1, 1, 1], 10, in_channels=1, width=32, stem="small")
    model = ray.train.torch.prepare_model(model)
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    step, accuracy = 0, 0.0
    while step < config["steps"]:
        for image, label in loader:
            loss = torch.nn.functional.cross_entropy(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == 1 and ray.train.get_context().get_world_rank() == 0:
                with Path(config["first"]).open("w") as file:
                    file.write(str(time.time()))
            if step == config["steps"]:
                break
        model.eval()
        with torch.no_grad():
            val = columns["val"]
            accuracy = float((model(val["image"]).argmax(-1) == val["label"]).float().mean())
        model.train()
        with tempfile.TemporaryDirectory() as folder:
            if ray.train.get_context().get_world_rank() == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/state.pt")
            ray.train.report({"accuracy": accuracy}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    return {"steps": step, "accuracy": accuracy}


def main() -> None:
    ray.init(address="local", logging_level=logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as storage:
        result = TorchTrainer(
            loop,
            train_loop_config={"steps": int(sys.argv[1]), "first": sys.argv[2]},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=storage),
        ).fit()
    print(f"accuracy={result.return_value['accuracy']:.4f} steps={result.return_value['steps']}")


if __name__ == "__main__":
    main()
