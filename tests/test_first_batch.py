"""`preflight.first_batch` trains one real batch before the start; some of its failures refuse the run."""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from raytrainer import attempt, preflight
from raytrainer.attempt import driver, launching
from raytrainer.attempt.lifecycle import Phase
from raytrainer.attempt.locking import locked_attempt
from raytrainer.config import Composition, from_text
from raytrainer.core.isolated import ProcessEnded
from raytrainer.data import Arrays
from raytrainer.errors import ConfigError, DataError, PreflightError
from raytrainer.preflight import first_batch, objects, probe
from raytrainer.preflight.first_batch import Verdict, verdict_of, why_not_tried
from raytrainer.progress import Display
from tests.training import images, node

# --- user objects -----------------------------------------------------------------------------------------------------


def bare(model: nn.Module, batch: Any) -> Any:
    return model(batch["image"]).sum()


def misspelt(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"loss": model(batch["picture"]).sum()}


def for_gpus(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    raise RuntimeError("\"some_kernel\" not implemented for 'CPU'")


def reduced(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    total = model(batch["image"]).square().mean()
    dist.all_reduce(total.detach())
    return {"loss": total}


def apart(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    logits = model(batch["image"])
    return {"loss": logits.square().mean(), "preds": logits, "target": batch["label"]}


def without_loss_name(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"total": model(batch["image"]).sum()}


def empty() -> Arrays:
    return images(rows=0)


def missing() -> Arrays:
    return Arrays({"image": torch.from_numpy(_read("/no/such/file.npy"))})


def _read(path: str) -> Any:
    import numpy as np

    return np.load(path)


def far_away() -> Arrays:
    raise ConnectionError("the server is down")


def no_collate(samples: list[Any]) -> Any:
    raise TypeError("cannot put these samples together")


class Closure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


class OnPlateau:
    """A scheduler whose `step` needs the metric."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, metric: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.used(image.flatten(1))
        return logits


class FewSamples:
    """A metric that needs more than one batch."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        pass

    def compute(self) -> float:
        raise ValueError("needs at least 1000 samples")

    def reset(self) -> None:
        pass


# --- the verdict of the probe -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _private_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the temporary directory private, as it is in the probe's process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def function(target: Any) -> dict[str, Any]:
    return node(target, _partial_=True)


def composed(*overrides: str, **sections: Any) -> Composition:
    """Return a small experiment. A keyword replaces a whole section, or a node of `data`."""
    values: dict[str, Any] = {
        "name": "one",
        "storage_path": str(Path.cwd() / "runs"),
        "model": node("raytrainer.models.MLP", in_features=16, num_classes=4, width=8, depth=1),
        "loss": function(apart),
        "optimizer": node("torch.optim.SGD", lr=0.1),
        "data": {"train": node(images, rows=50), "val": node(images, rows=17, seed=1), "global_batch_size": 12},
        "trainer": {"max_steps": 4},
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
    }
    for name, value in sections.items():
        below = values if name in ("model", "loss", "optimizer", "lr_scheduler", "metrics") else values["data"]
        below[name] = value
    return from_text(yaml.safe_dump(values), overrides)


def tried(*overrides: str, elsewhere: bool = False, most_tflop: float = 1.0, **sections: Any) -> dict[str, str]:
    text = composed(*overrides, **sections).text
    return probe.try_step(text, gpu=False, elsewhere=elsewhere, most_tflop=most_tflop)


def test_a_good_one_passes_and_leaves_the_random_state_and_the_directory_alone(in_tmp: Path) -> None:
    verdict = tried("trainer.ema_decay=0.9", "trainer.max_grad_norm=1")
    assert verdict["verdict"] == "passed", verdict
    assert verdict["text"].startswith("loss ")
    assert {p.name for p in in_tmp.iterdir()} <= {"checkpoints", f"torchinductor_{getpass.getuser()}"}  # its TMPDIR
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loss": function(bare)}, ()),
        ({"loss": function(without_loss_name)}, ("loss",)),
        ({"loss": function(misspelt)}, ("picture",)),
        ({"optimizer": node(Closure, lr=0.1)}, ("closure",)),
        ({"lr_scheduler": node(OnPlateau)}, ("step",)),
        ({"train": node(empty)}, ("no rows",)),
        ({"train": node(missing)}, ("/no/such/file.npy",)),
        ({"collate_fn": function(no_collate)}, ("cannot put these samples together",)),
        ({"model": node("raytrainer.models.MLP", in_features=17, num_classes=4, width=8, depth=1)}, ("shapes",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "-",
)
def test_what_the_first_step_would_raise_is_refused(sections: dict[str, Any], words: tuple[str, ...]) -> None:
    verdict = tried(**sections)
    assert verdict["verdict"] == "refused", verdict
    assert all(word in verdict["text"] for word in words), verdict


def test_a_refusal_names_the_line_of_the_user_and_the_way_around() -> None:
    text = tried(loss=function(misspelt))["text"]
    assert "tests/test_first_batch.py:" in text
    assert "preflight.first_batch=false" in text


def test_a_monitor_that_the_evaluation_does_not_give_is_refused() -> None:
    verdict = tried("checkpoint.monitor=val/acuracy", "checkpoint.mode=max")
    assert verdict["verdict"] == "refused"
    assert "checkpoint.monitor=val/acuracy" in verdict["text"]


def test_parameters_without_a_gradient_are_refused_where_several_workers_would_wait_for_them() -> None:
    assert tried(model=node(TwoHeads))["verdict"] == "passed"
    verdict = tried("scaling.num_workers=2", model=node(TwoHeads))
    assert verdict["verdict"] == "refused"
    assert "trainer.find_unused_parameters" in verdict["text"]
    assert "unused.weight" in verdict["text"]
    verdict = tried("scaling.num_workers=2", "trainer.find_unused_parameters=true", model=node(TwoHeads))
    assert verdict["verdict"] == "passed"


def test_fewer_samples_than_workers_for_a_metric_are_refused() -> None:
    verdict = tried("scaling.num_workers=3", metrics={"some": node(FewSamples)}, val=node(images, rows=2))
    assert verdict["verdict"] == "refused"
    assert "2 samples for 3 workers" in verdict["text"]


def test_the_batch_is_the_one_of_the_first_of_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    step = probe._FirstRank.train_step

    def noted(self: Any, batch: Any) -> None:
        sizes.append(batch.micro[0].size)
        step(self, batch)

    monkeypatch.setattr(probe._FirstRank, "train_step", noted)
    assert tried("scaling.num_workers=3")["verdict"] == "passed"
    assert sizes == [4]


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": function(for_gpus)},
        {"train": node(far_away)},
        {"metrics": {"some": node(FewSamples)}},
    ],
    ids=["an operation that the CPU lacks", "a server", "a metric over one batch alone"],
)
def test_what_may_be_true_here_alone_is_no_refusal(sections: dict[str, Any]) -> None:
    assert tried(**sections)["verdict"] == "unknown"


def test_data_that_are_on_the_other_machines_are_no_refusal() -> None:
    assert tried(elsewhere=True, train=node(missing))["verdict"] == "unknown"
    assert tried(elsewhere=True, loss=function(misspelt))["verdict"] == "refused"


def test_a_loss_that_uses_the_process_group_finds_one() -> None:
    assert tried(loss=function(reduced))["verdict"] == "passed"


def test_a_model_or_a_step_that_is_too_large_is_skipped_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = tried(most_tflop=1e-9)
    assert verdict["verdict"] == "skipped"
    assert "floating-point operations" in verdict["text"]
    large = node("raytrainer.models.MLP", in_features=16, num_classes=4, width=60000, depth=2)
    verdict = tried(model=large)  # created only on the meta device, which needs no memory
    assert verdict["verdict"] == "skipped"
    assert "more than the 50 million" in verdict["text"]


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("Could not run 'aten::x' with arguments from the 'CPU' backend"),
        RuntimeError("Found no NVIDIA driver on your system"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        ImportError("flash_attn is needed"),
        MemoryError(),
        PermissionError(13, "Permission denied", "/root/cache"),
        OSError("We couldn't connect to 'https://huggingface.co' to load the files"),
    ],
)
def test_exceptions_that_say_nothing(error: Exception) -> None:
    assert probe.verdict_of_error(error)["verdict"] == "unknown"
    wrapped = ConfigError("could not be built", key="model")
    wrapped.__cause__ = error
    assert probe.verdict_of_error(wrapped)["verdict"] == "unknown"


def test_an_error_of_ours_keeps_its_message() -> None:
    assert probe.verdict_of_error(ConfigError("is wrong", key="loss"))["text"] == "loss is wrong"
    assert "sample 3 is bad" in probe.verdict_of_error(DataError("sample 3 is bad"))["text"]
    assert probe.verdict_of_error(SystemExit("usage: train.py"))["verdict"] == "refused"


# --- around the probe -------------------------------------------------------------------------------------------------


def test_only_an_answer_can_refuse() -> None:
    refused = verdict_of(ProcessEnded({"verdict": "refused", "text": "The first batch fails."}))
    with pytest.raises(PreflightError, match="The first batch fails"):
        refused.refuse()
    for ended in (
        ProcessEnded(problem="it did not end within 60 s", timed_out=True),
        ProcessEnded(problem="its process was ended by SIGKILL"),
        ProcessEnded(problem="its process ended with exit code 3"),
    ):
        verdict = verdict_of(ended)
        verdict.refuse()
        assert str(ended.problem) in verdict.words()
    assert "preflight.first_batch_timeout_s" in verdict_of(ProcessEnded(problem="too long", timed_out=True)).words()


def test_where_no_process_is_started() -> None:
    assert why_not_tried(composed().experiment) is None
    assert why_not_tried(composed("preflight.first_batch=false").experiment) == ""
    remote = node("raytrainer.data.ParquetDataset", path="s3://bucket/x.parquet")
    assert why_not_tried(composed(train=remote).experiment) == "data.train.path is not on this machine"
    through_ray = node("raytrainer.data.RayDataset", path="x.parquet")
    assert "RayDataset" in str(why_not_tried(composed(train=through_ray).experiment))
    e = composed().experiment
    e.data.train = {**node(images), "download": True}
    assert "data.train.download=true" in str(why_not_tried(e))


def test_the_choices_and_the_limit_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"^preflight\.first_batch=maybe .*valid: auto, true, false"):
        composed("preflight.first_batch=maybe")
    with pytest.raises(ConfigError, match=r"preflight\.first_batch_timeout_s"):
        composed("preflight.first_batch_timeout_s=0")


def test_check_tries_it_and_a_launch_only_on_request(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[str] = []

    def refuse(self: Any) -> Verdict:
        trials.append("tried")
        return Verdict("refused", "The first batch fails.")

    monkeypatch.setattr(first_batch.FirstBatch, "run", refuse)
    with pytest.raises(PreflightError, match="The first batch fails"):
        attempt.check(composed("cluster.kind=inline"))
    with pytest.raises(PreflightError, match="The first batch fails"):
        attempt.launch(composed("preflight.first_batch=true"))
    assert trials == ["tried"] * 2
    assert not (in_tmp / "runs" / "one").exists()
    attempt.check(composed("preflight.first_batch=false"))
    assert trials == ["tried"] * 2


class Probe:
    """A stand-in for the probe's process. A launch with `cluster=inline` stands in for one that starts Ray
    meanwhile."""

    def __init__(self, verdict: Verdict | None) -> None:
        self.verdict, self.closed = verdict, False

    def wait(self, timeout_s: float) -> Verdict | None:
        return self.verdict

    def close(self) -> None:
        self.closed = True


def test_a_run_that_the_probe_beside_ray_refuses_is_not_recorded(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(Verdict("refused", "The first batch fails."))
    monkeypatch.setattr(launching, "_probe_beside_ray", lambda *_: probe)
    monkeypatch.setattr(driver.Driver, "_train_inline", lambda *_: pytest.fail("started"))
    c = composed("cluster.kind=inline", f"tracking.tracking_uri=sqlite:///{in_tmp}/mlflow.db")
    with pytest.raises(PreflightError, match="The first batch fails"):
        attempt.launch(c)
    assert probe.closed
    assert not (in_tmp / "runs/one/run.json").exists()
    assert not (in_tmp / "runs/one/config.yaml").exists()
    assert not (in_tmp / "mlflow.db").exists()


@pytest.mark.parametrize("verdict", [None, Verdict("unknown", "it crashed"), Verdict("passed", "loss 1")])
def test_the_probe_delays_a_run_no_longer_than_ray_starts(verdict: Verdict | None, in_tmp: Path) -> None:
    probe, composition = Probe(verdict), composed()
    with locked_attempt(composition.experiment, new=True, display=Display()) as this:
        this.prepare(attempt.Record("one", "", created=""), "here")
        this.move(Phase.STARTING)
        if verdict is None:
            this.move(Phase.OPENING)
        driver.Driver(composition, this, probe).admit()  # type: ignore[arg-type]
    assert probe.closed
    assert {"config.yaml", "run.json"} <= {p.name for p in (in_tmp / "runs/one").iterdir()}


def test_beside_ray_the_probe_needs_a_free_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_batch, "this_machine", lambda: preflight.Resources(8.0))
    for load, free in ((0.5, True), (5.5, False)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, load, load))
        assert first_batch.is_free_beside_ray() is free
    started: list[str] = []
    monkeypatch.setattr(preflight, "is_free_beside_ray", lambda: True)
    monkeypatch.setattr(first_batch.FirstBatch, "start", lambda self: started.append("started"))
    record = attempt.Record("one", "", created="", attempts=1)
    probe = launching._probe_beside_ray(composed(), record, False)
    assert probe is not None
    probe.close()
    for changed in ("cluster.kind=inline", "preflight.first_batch=false", "preflight.first_batch=true"):
        assert launching._probe_beside_ray(composed(changed), record, False) is None
    assert launching._probe_beside_ray(composed(), attempt.Record("one", "", created="", attempts=2), False) is None
    assert started == ["started"]


def test_the_whole_way_through_a_process_of_its_own(in_tmp: Path) -> None:
    """The one test with a real process. The user's module is in the current directory, as on the command line."""
    (in_tmp / "mine.py").write_text(
        "import os\n"
        "def loss(model, batch):\n"
        "    uri, own = os.environ['MLFLOW_TRACKING_URI'], os.environ['TMPDIR']\n"
        "    raise ValueError(f'private: {uri.startswith(f\"sqlite:///{own}\")}')\n"
    )
    composition = composed(
        loss={"_target_": "mine.loss", "_partial_": True},
        train={"_target_": "raytrainer.data.Digits", "split": "train"},
        val=None,
        model={"_target_": "raytrainer.models.MLP", "in_features": 64, "num_classes": 10, "width": 8, "depth": 1},
    )
    verdict = preflight.FirstBatch(composition.text, composition.experiment, gpu=False).run()
    assert verdict.kind == "refused", verdict
    assert "fails in mine.py:4: ValueError: private: True" in verdict.text
    assert sorted(p.name for p in in_tmp.iterdir()) == ["mine.py"]


# --- a target that the workers cannot import --------------------------------------------------------------------------


def test_a_target_of_the_launching_program_is_refused_where_workers_are_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import __main__

    monkeypatch.setattr(__main__, "Net", TwoHeads, raising=False)
    of_main = {"_target_": "__main__.Net"}
    for section in (
        {"model": of_main},
        {"train": node(images, of=of_main)},
        {"optimizer": node("x", by="__main__.Net")},
    ):
        e = composed(**section).experiment
        with pytest.raises(ConfigError, match=r"=__main__\.Net .*my_code\.Net"):
            objects._check_main(e)
    preflight.check_objects(composed("cluster.kind=inline", model=of_main).experiment)
    assert "__main__" in str(why_not_tried(composed("cluster.kind=inline", model=of_main).experiment))
