"""The peers of bench_sweep: its trials with a plain torch loop, run in the ways that people run sweeps.

    python -m benchmarks.sweep_peers nested|fresh|reused|bare|optuna TRIALS.json RESULT.json

nested: a TorchTrainer inside a Tune function, as in Ray's documentation; fresh: Tune with its defaults, a new process
for each trial; reused: Tune with `reuse_actors`; bare: like reused, but without the files that Tune writes for each
trial; optuna: one process, no Ray. None of them tracks anything.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep_peers import EPOCHS, train

AT_ONCE = 2
GRACE, FACTOR = 1, 3  # for successive halving


def by_tune(kind: str, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import ray
    import ray.train
    import torch
    from ray import tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def in_process(config: dict[str, Any]) -> None:
        train(config["trial"], tune.report)

    def on_worker(config: dict[str, Any]) -> None:
        train(config["trial"], ray.train.report)

    def nested(config: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            TorchTrainer(
                on_worker,
                train_loop_config=config,
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(storage_path=folder, callbacks=[TuneReportCallback()]),
            ).fit()

    class Collected(tune.Callback):  # type: ignore[misc]
        """Keeps the reports, and the times of Tune's first step and of the last trial's end."""

        def __init__(self) -> None:
            self.reports: dict[int, list[dict[str, float]]] = {}
            self.began = self.ended = 0.0

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            self.began = self.began or time.time()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            values = {name: result[name] for name in ("val/loss", "val/accuracy")}
            self.reports.setdefault(trial.config["trial"]["number"], []).append(values)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.ended = time.time()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            raise SystemExit(f"trial {trial.config['trial']} failed")

    torch.set_num_threads(1)
    if kind == "bare":
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # By default the function of a nested trial has one CPU beside its worker's, although it only waits.
    cpus = AT_ONCE * (2 if kind == "nested" else 1)
    ray.init(address="local", num_cpus=cpus, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray").setLevel(logging.ERROR)
    collected = Collected()
    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            nested if kind == "nested" else in_process,
            param_space={"trial": tune.grid_search([{**trial, "number": n} for n, trial in enumerate(trials)])},
            tune_config=tune.TuneConfig(
                metric="val/accuracy",
                mode="max",
                scheduler=tune.schedulers.ASHAScheduler(grace_period=GRACE, reduction_factor=FACTOR, max_t=EPOCHS),
                max_concurrent_trials=AT_ONCE,
                reuse_actors=kind in ("reused", "bare"),
            ),
            run_config=tune.RunConfig(storage_path=storage, verbose=0, callbacks=[collected]),
        )
        began = time.time()
        tuner.fit()
        fit = time.time() - began
    return {"trials_s": collected.ended - collected.began, "fit_s": fit, "reports": in_order(collected.reports, trials)}


def by_optuna(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    reports: dict[int, list[dict[str, float]]] = {}

    def objective(trial: optuna.Trial) -> float:
        number = trial.suggest_int("number", 0, len(trials) - 1)
        kept = reports.setdefault(number, [])

        def report(values: dict[str, float]) -> None:
            kept.append(values)
            trial.report(values["val/accuracy"], len(kept))
            if trial.should_prune():
                raise optuna.TrialPruned

        train(trials[number], report)
        return kept[-1]["val/accuracy"]

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=GRACE, reduction_factor=FACTOR)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for number in range(len(trials)):
        study.enqueue_trial({"number": number})
    began = time.time()
    study.optimize(objective, n_trials=len(trials))
    seconds = time.time() - began
    return {"trials_s": seconds, "fit_s": seconds, "reports": in_order(reports, trials)}


def in_order(
    reports: Mapping[int, list[dict[str, float]]], trials: Sequence[Mapping[str, Any]]
) -> list[list[dict[str, float]]]:
    return [reports[number] for number in range(len(trials))]


def main() -> None:
    kind, source, target = sys.argv[1:]
    trials = json.loads(Path(source).read_text())
    result = by_optuna(trials) if kind == "optuna" else by_tune(kind, trials)
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
