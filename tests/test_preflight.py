"""Pure checks of an experiment against probed values: each problem is a sentence with the key, the value and the
fix."""

from __future__ import annotations

import copy
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrainer import attempt, preflight
from raytrainer.attempt import Record, launching
from raytrainer.backends.existing import Existing
from raytrainer.config import Experiment, compose, from_text, with_values
from raytrainer.errors import ConfigError, PreflightError, StorageError, StorageFull, TrackingDenied
from raytrainer.preflight import Resources
from raytrainer.preflight.resources import _gpu_kinds
from raytrainer.storage import Storage
from raytrainer.tracking import check_tracking

pytestmark = pytest.mark.usefixtures("in_tmp")


def experiment(*overrides: str) -> Experiment:
    return compose(["experiment=mlp", *overrides]).experiment


@pytest.mark.parametrize(
    ("overrides", "resources", "problems"),
    [
        (["scaling.num_workers=2"], Resources(2), []),
        (
            ["scaling.num_workers=4"],
            Resources(2),
            ["scaling.num_workers=4 × 1 CPU = 4 CPUs, and here has 2 CPUs; scaling"],
        ),
        (["scaling.num_workers=4"], Resources(2), ["scaling.num_workers=2 fits"]),
        (["scaling.num_workers=[2,8]"], Resources(2), []),  # elastic: the minimum must fit
        (["scaling.num_workers=[3,8]"], Resources(2), ["scaling.num_workers=3 × 1 CPU"]),
        (["scaling.use_gpu=true"], Resources(2), ["scaling.num_workers=1 × 1 GPU = 1 GPU, and here has 0 GPUs"]),
        (["scaling.use_gpu=true"], Resources(2), ["scaling.use_gpu=false trains on CPUs"]),
        (["scaling.use_gpu=true", "scaling.num_workers=3"], Resources(8, 2), ["scaling.num_workers=2 fits"]),
        (["scaling.num_workers=2"], Resources(8, 1), []),  # auto: not enough GPUs for all workers, so CPUs
        (["+scaling.resources_per_worker={CPU: 4}"], Resources(2), ["resources_per_worker.CPU must be at most 2"]),
        (["+scaling.resources_per_worker={CPU: 0.5}", "scaling.num_workers=4"], Resources(2), []),
        (
            ["+scaling.resources_per_worker.memory=2e10"],
            Resources(2, memory=1e10),
            ["= 18.6 GiB of memory, and here has 9.3 GiB of memory; scaling.resources_per_worker.memory must be"],
        ),
        (["+scaling.resources_per_worker.FPGA=1"], Resources(2), ["1 FPGA, and here has 0 FPGA"]),
        (["+scaling.resources_per_worker.FPGA=1"], Resources(2, other={"FPGA": 1.0}), []),
        (
            ["scaling.accelerator_type=H100"],
            Resources(2),
            ["scaling.accelerator_type=H100, and here has no accelerator"],
        ),
        (
            ["scaling.accelerator_type=H100"],
            Resources(2, other={"accelerator_type:A100": 1.0, "node:1": 1.0}),
            ["scaling.accelerator_type=H100, and here has A100"],
        ),
        (["scaling.accelerator_type=A100"], Resources(2, other={"accelerator_type:A100": 1.0}), []),
    ],
)
def test_more_than_there_is(overrides: list[str], resources: Resources, problems: list[str]) -> None:
    problems = preflight.check_resources(experiment(*overrides), resources, "here")
    assert len(problems) == len(problems)
    assert all(wanted in one for wanted, one in zip(problems, problems, strict=True))


@pytest.mark.parametrize(
    ("use_gpu", "gpus", "uses"), [("auto", 0, False), ("auto", 1, True), ("true", 0, True), ("false", 8, False)]
)
def test_whether_gpus_are_used(use_gpu: str, gpus: int, uses: bool) -> None:
    assert preflight.uses_gpu(experiment(f"scaling.use_gpu={use_gpu}"), Resources(2, gpus)) is uses


@pytest.mark.parametrize(("share", "gpus", "uses"), [(0.5, 1, True), (0.5, 0, True), (0.0, 8, False)])
def test_gpus_that_are_asked_for_by_number(share: float, gpus: int, uses: bool) -> None:
    """`auto` uses GPUs if their number is set. Ray accepts no number of GPUs with `use_gpu=False`."""
    overrides = [f"+scaling.resources_per_worker.GPU={share}", "scaling.num_workers=2"]
    assert preflight.uses_gpu(experiment(*overrides), Resources(2, gpus)) is uses
    problems = preflight.check_resources(experiment(*overrides), Resources(2, gpus), "here")
    assert [problem.partition("; ")[2] for problem in problems] == (
        ["scaling.resources_per_worker without GPU trains on CPUs"] if uses > gpus else []
    )
    contradiction = str(not uses).lower()
    with pytest.raises(ConfigError, match=rf"GPU={share} contradicts scaling.use_gpu={contradiction}"):
        experiment(*overrides, f"scaling.use_gpu={contradiction}")


def test_the_kinds_of_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds come from the driver's files, because asking CUDA would create a context on a GPU."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\n")
    assert _gpu_kinds(tmp_path) == {}
    monkeypatch.setattr("raytrainer.preflight.resources._gpus", lambda: 1)
    assert "accelerator_type:H100" in _gpu_kinds(tmp_path)


def test_resources_of_a_cluster() -> None:
    resources = Resources.of_ray({"CPU": 4.0, "memory": 8.0, "node:10.0.0.1": 1.0, "TPU": 2.0})
    assert (resources.cpus, resources.gpus, resources.memory, resources.get("TPU"), resources.get("nothing")) == (
        4.0,
        0,
        8.0,
        2.0,
        0.0,
    )


def cluster(nodes: list[dict[str, float]], more: list[dict[str, float]] | None = None, most: int = 0) -> Resources:
    return Resources.of_nodes(nodes, more or [], most)


@pytest.mark.parametrize(
    ("overrides", "resources", "problems"),
    [
        # One worker cannot use the resources of two nodes.
        (["+scaling.resources_per_worker.CPU=3"], cluster([{"CPU": 2}, {"CPU": 2}]), ["a worker asks for 3 CPUs, and"]),
        (
            ["+scaling.resources_per_worker.CPU=2", "scaling.num_workers=3"],
            cluster([{"CPU": 3}, {"CPU": 3}]),
            ["3 × (2 CPUs), and here has room for 2: each worker must fit on one node; scaling.num_workers=2 fits"],
        ),
        (["+scaling.resources_per_worker={CPU: 0.1}", "scaling.num_workers=3"], cluster([{"CPU": 0.3}]), []),
        (
            ["scaling.num_workers=2", "scaling.placement_strategy=STRICT_SPREAD"],
            cluster([{"CPU": 8}]),
            ["STRICT_SPREAD"],
        ),
        (
            ["scaling.num_workers=3", "scaling.placement_strategy=STRICT_PACK"],
            cluster([{"CPU": 2}, {"CPU": 2}]),
            ["scaling.placement_strategy=STRICT_PACK, and here has room for 2"],
        ),
        # All GPUs of the kind are on one node, and the CPUs are on another.
        (
            ["+scaling.resources_per_worker={CPU: 4, GPU: 1}", "scaling.accelerator_type=A100"],
            cluster([{"CPU": 1, "GPU": 1, "accelerator_type:A100": 1}, {"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}]),
            ["a worker asks for 4 CPUs, 1 GPU of A100, and no node of here has that"],
        ),
        # A cluster that can add two of the listed nodes.
        (["scaling.num_workers=5"], cluster([{"CPU": 1}], [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}], 2), []),
        (
            ["scaling.num_workers=6"],
            cluster([{"CPU": 1}], [{"CPU": 2}, {"CPU": 2}, {"CPU": 1}], 2),
            ["6 CPUs, and here has at most 5 CPUs, including nodes that it can add; scaling.num_workers=5 fits"],
        ),
        (["scaling.use_gpu=true"], cluster([{"CPU": 1}], [{"CPU": 8, "GPU": 1}], 1), []),
        (
            ["+scaling.resources_per_worker.CPU=4"],
            cluster([{"CPU": 2}], [{"CPU": 3}], 1),
            ["a worker asks for 4 CPUs, and no node of here, including nodes that it can add, has that"],
        ),
        # The memory of a node type is rarely known.
        (
            ["+scaling.resources_per_worker={CPU: 2, memory: 9e9}"],
            cluster([{"CPU": 1, "memory": 1e9}], [{"CPU": 2}], 1),
            [],
        ),
        (["scaling.num_workers=64"], Resources(1, endless=True), []),
    ],
)
def test_more_than_the_nodes_of_a_cluster_have(overrides: list[str], resources: Resources, problems: list[str]) -> None:
    problems = preflight.check_resources(experiment(*overrides), resources, "here")
    assert len(problems) == len(problems), problems
    assert all(wanted in one for wanted, one in zip(problems, problems, strict=True)), problems


def test_gpus_that_can_be_added_are_used() -> None:
    grows = cluster([{"CPU": 8}], [{"CPU": 8, "GPU": 2}], 1)
    assert preflight.uses_gpu(experiment("scaling.num_workers=2"), grows)
    assert not preflight.uses_gpu(experiment("scaling.num_workers=3"), grows)


def test_this_machine() -> None:
    machine = preflight.this_machine()
    assert 1 <= machine.cpus <= (os.cpu_count() or 1)
    assert machine.memory is not None
    assert machine.memory > 2**28


@pytest.mark.parametrize("path", ["/proc/runs", "a-file/runs", "a-file"])
def test_storage_that_cannot_be_written(in_tmp: Path, path: str) -> None:
    """The paths are refused for root too, by the file system and not by a permission."""
    (in_tmp / "a-file").write_text("")
    storage = Storage(str(in_tmp / path))
    (problem,) = preflight.check_storage(storage.child("run").check_writable, path)
    assert problem.startswith(f"storage_path={path} cannot be used: ")
    assert preflight.check_storage(Storage(str(in_tmp / "new" / "deep")).check_writable, "new") == []
    assert not (in_tmp / "new").exists()  # the check creates nothing


def test_other_errors_of_storage() -> None:
    def full() -> None:
        raise StorageFull("no space at /x")

    assert preflight.check_storage(full, "/x") == ["storage_path=/x cannot be used: no space at /x"]


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_tracking_server_that_is_not_there() -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    (problem,) = preflight.check_tracking(check_tracking, uri, required=True)
    assert uri in problem
    assert "tracking.required=false trains without it" in problem
    assert preflight.check_tracking(check_tracking, uri, required=False) == []


def test_a_tracking_server_that_refuses() -> None:
    def refuse(uri: str) -> None:
        raise TrackingDenied(f"{uri} refuses the credentials")

    (problem,) = preflight.check_tracking(refuse, "http://x", required=True)
    assert problem.startswith("http://x refuses the credentials")


def test_ray_address_and_a_ray_of_ones_own() -> None:
    environ = {"RAY_ADDRESS": "10.0.0.1:6379"}
    (problem,) = preflight.check_environment(experiment(), environ)
    assert problem.startswith("RAY_ADDRESS=10.0.0.1:6379 ")
    assert "cluster=local" in problem
    assert "use cluster=existing" in problem
    assert preflight.check_environment(experiment("cluster=existing"), environ) == []
    assert preflight.check_environment(experiment("cluster=inline"), environ) == []
    assert preflight.check_environment(experiment(), {}) == []


JOB = ["cluster=job", "cluster.address=https://ray.example.com"]
REACHED = "https://mlflow.example.com"


def elsewhere(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "10.0.0.9")


@pytest.mark.parametrize(
    ("overrides", "is_elsewhere"),
    [
        ([], False),
        (["cluster=existing"], False),
        (["cluster=existing", "cluster.address=10.0.0.9:6379"], False),
        (["cluster=existing", "cluster.address=10.0.0.8:6379"], True),
        (["cluster=existing", "cluster.address=head:6379"], True),
        (["cluster=job", "cluster.address=http://127.0.0.1:8265"], False),
        (["cluster=job", "cluster.address=https://ray.example.com/path"], True),
        (["cluster=kuberay", "cluster.image=x"], True),
    ],
)
def test_which_clusters_are_elsewhere(overrides: list[str], is_elsewhere: bool) -> None:
    e = experiment(*overrides)
    assert preflight.is_elsewhere(e, elsewhere) is is_elsewhere
    problems = preflight.check_reach(e, "sqlite:////here/mlflow.db", elsewhere)
    assert [p.partition("=")[0] for p in problems] == ["storage_path", "tracking.tracking_uri"] * is_elsewhere


def test_this_machine_by_its_names() -> None:
    assert preflight.is_this_machine("127.0.0.1")
    assert preflight.is_this_machine("localhost")
    assert preflight.is_this_machine("::1")
    assert not preflight.is_this_machine("203.0.113.7")
    assert not preflight.is_this_machine("")
    assert not preflight.is_this_machine("no such host")


@pytest.mark.parametrize(
    ("overrides", "tracking_uri", "problems"),
    [
        (["storage_path=s3://bucket/runs"], REACHED, []),
        (["storage_path=s3://bucket/runs"], "postgresql://me:pw@db.example.com/mlflow", []),
        (["storage_path=/nfs/runs", "cluster.shared_paths=[/nfs]"], REACHED, []),
        (["storage_path=/nfs/runs", "cluster.shared_paths=[/nfs]"], "sqlite:////nfs/mlflow.db", []),
        (["storage_path=file:///nfs/runs", "cluster.shared_paths=[/nfs/]"], "file:///nfs/mlruns", []),
        (
            ["storage_path=/nfs2/runs", "cluster.shared_paths=[/nfs]"],
            REACHED,
            [
                "storage_path=/nfs2/runs is on this machine, and cluster=job runs on other machines: set storage_path=s3:"
            ],
        ),
        (
            ["storage_path=/nfs/../home/runs", "cluster.shared_paths=[/nfs]"],
            REACHED,
            ["storage_path=/home/runs is on this"],
        ),
        (
            ["storage_path='s3://a:b@bucket/runs?endpoint_override=127.0.0.1:5000&scheme=http'"],
            REACHED,
            ["has an endpoint_override=127.0.0.1:5000 that is on this machine"],
        ),
        (
            ["storage_path=s3://bucket/runs"],
            "sqlite:////home/mlflow.db",
            [
                "tracking.tracking_uri=sqlite:////home/mlflow.db is a file on this machine, and cluster=job runs on other "
            ],
        ),
        (["storage_path=s3://bucket/runs"], "/home/mlruns", ["tracking.tracking_uri=/home/mlruns is a file on this"]),
        (
            ["storage_path=s3://bucket/runs"],
            "http://me:pw@localhost:5000",
            [
                "tracking.tracking_uri=http://localhost:5000 is a loopback address of this machine, and cluster=job runs on"
            ],
        ),
        (["storage_path=s3://bucket/runs", "init_from=another-run"], REACHED, []),
        (["storage_path=s3://bucket/runs", "init_from=s3://bucket/weights.safetensors"], REACHED, []),
        (
            ["storage_path=s3://bucket/runs", "init_from=weights.safetensors"],
            REACHED,
            ["weights.safetensors is on this machine, and cluster=job runs on other machines: copy it to the storage"],
        ),
    ],
)
def test_what_only_this_machine_has(in_tmp: Path, overrides: list[str], tracking_uri: str, problems: list[str]) -> None:
    (in_tmp / "weights.safetensors").write_bytes(b"x")
    problems = preflight.check_reach(experiment(*JOB, *overrides), tracking_uri, elsewhere)
    assert len(problems) == len(problems), problems
    assert all(wanted in one for wanted, one in zip(problems, problems, strict=True)), problems
    assert not [one for one in problems if "pw" in one or "a:b" in one]


def test_a_launch_on_other_machines_is_refused_what_only_this_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Existing, "resources", lambda self, e: (Resources(8), "the cluster"))
    overrides = ["experiment=mlp", "cluster=existing", "cluster.address=203.0.113.7:6379"]
    with pytest.raises(PreflightError) as caught:
        attempt.check(compose(overrides))
    assert [p.partition("=")[0] for p in caught.value.problems] == ["storage_path", "tracking.tracking_uri"]
    attempt.check(compose([*overrides[:-1], "cluster.address=127.0.0.1:6379"]))


def test_files_that_the_workers_may_miss(in_tmp: Path) -> None:
    (in_tmp / "data").mkdir()
    (in_tmp / "data" / "words.json").write_text("[]")
    absolute = str(in_tmp / "data" / "words.json")
    named = [f"+data.train.words={absolute}", "+data.val.words=data/words.json", "+data.train.other=data/not-there"]
    e = experiment(*JOB, *named)
    first, second = preflight.local_files(e)
    assert first.startswith(f"data.train.words={absolute} is on this machine ")
    assert second.startswith("data.val.words=data/words.json ")
    assert preflight.local_files(e, ["data/words.json"]) == [first]
    assert (
        preflight.local_files(experiment(*JOB, *named, f"cluster.shared_paths=[{in_tmp}]"), ["data/words.json"]) == []
    )
    assert preflight.local_files(experiment(*JOB)) == []


def test_all_problems_are_reported_at_once() -> None:
    preflight.refuse([])
    with pytest.raises(PreflightError) as caught:
        preflight.refuse(["one", "two"])
    assert caught.value.problems == ("one", "two")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer.lr=abc"], "optimizer.lr=abc must be a number"),
        (["optimizer.lr=-1"], "optimizer is refused by its constructor: Invalid learning rate: -1"),
        (["optimizer=sgd", "optimizer.momentum=0"], "Nesterov momentum requires a momentum"),
        (["lr_scheduler.warmup_steps=-3"], "lr_scheduler.warmup_steps=-3 must be"),
        (["model.width=1.5"], "model.width=1.5 must be a whole number"),
        (["data.train.split=trn"], "data.train.split=trn is not a valid choice; valid: train, val"),
        (["+callbacks.mine={_target_: collections.OrderedDict}"], "callbacks.mine=OrderedDict has none of the hooks"),
    ],
)
def test_objects_that_would_refuse(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight.check_objects(experiment(*overrides))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["~optimizer", "+optimizer={_target_: torch.optim.Muon, lr: 0.1}"],
        ["lr_scheduler=wsd", "trainer.max_time=1h", "trainer.max_epochs=null", "trainer.max_steps=100"],
        [
            "++lr_scheduler={_target_: torch.optim.lr_scheduler.StepLR, step_size: 3}",
            "~lr_scheduler.warmup_steps",
            "~lr_scheduler.min_factor",
        ],
        ["~lr_scheduler"],
        ["+callbacks.none=null"],
    ],
)
def test_objects_that_would_not(overrides: list[str]) -> None:
    preflight.check_objects(experiment(*overrides))


def one_cycle(steps: int) -> list[str]:
    node = f"{{_target_: torch.optim.lr_scheduler.OneCycleLR, max_lr: 0.1, total_steps: {steps}}}"
    return ["~lr_scheduler", f"+lr_scheduler={node}", "trainer.max_steps=12", "trainer.max_epochs=null"]


def test_a_schedule_that_is_shorter_than_the_run() -> None:
    with pytest.raises(ConfigError, match=r"^lr_scheduler=OneCycleLR .*6 steps.*trainer\.max_steps=12"):
        preflight.check_objects(experiment(*one_cycle(6)))
    preflight.check_objects(experiment(*one_cycle(12)))
    preflight.check_objects(experiment(*one_cycle(6), "trainer.max_time=1h"))  # the time limit may end the run before


def test_a_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    preflight.check_objects(experiment())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recorded_mode_that_contradicts_its_metric_goes_on_and_is_not_done_again() -> None:
    text = with_values(compose(["experiment=mlp", "name=old", "cluster=inline"]).text, {"checkpoint.mode": "min"})
    composition = from_text(text)
    with pytest.raises(ConfigError, match=r"^checkpoint\.mode=min .*checkpoint\.monitor=val/accuracy"):
        attempt.check(composition)
    assert attempt.check(composition, Record("old", f"{Path.cwd()}/runs/old")).startswith("inline")


def test_a_launch_says_which_value_is_the_best() -> None:
    assert launching.best_words(experiment()) == "the highest val/accuracy is the best (checkpoint.mode=max)"
    lowest = experiment("checkpoint.monitor=val/mine", "checkpoint.mode=min")
    assert launching.best_words(lowest) == "the lowest val/mine is the best (checkpoint.mode=min)"
    assert launching.best_words(compose(["experiment=smoke"]).experiment) is None  # the monitor is val/loss


def test_weights_to_begin_with(in_tmp: Path) -> None:
    from safetensors.torch import save_file

    preflight.check_init_from(experiment())
    (in_tmp / "text.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"^init_from=.*text\.safetensors .*cannot be read as weights"):
        preflight.check_init_from(experiment("init_from=text.safetensors"))
    mine = preflight.unbuilt_model(experiment()).state_dict()
    there = {name: torch.zeros(t.shape) for name, t in mine.items()}
    save_file(there, in_tmp / "weights.safetensors")
    torch.save(there, in_tmp / "weights.pt")
    preflight.check_init_from(experiment("init_from=weights.safetensors"))
    preflight.check_init_from(experiment("init_from=weights.pt"))
    for name in ("weights.safetensors", "weights.pt"):
        with pytest.raises(ConfigError) as caught:  # only their headers are read
            preflight.check_init_from(experiment(f"init_from={name}", "model.width=8"))
        message = str(caught.value)
        assert message.startswith(f"init_from={in_tmp}/{name} holds another model: ")
        for parameter in ("head.weight: (10, 256) there, (10, 8) here", "hidden.0.bias: (256,) there, (8,) here"):
            assert parameter in message
        assert "hidden.0.weight: (256, 64) there, (8, 64) here and 2 more; " in message
        assert "init_from.mapping, exclude or strict=false" in message
    for source in ("nope", "/not/there", "runs"):
        with pytest.raises(ConfigError, match=f"^init_from={source} .*no weights file, run"):
            preflight.check_init_from(experiment(f"init_from={source}"))


def test_an_error_of_ours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in a probe is not reported as the user's mistake."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        preflight.check_storage(broken, "/x")
    assert issubclass(StorageFull, StorageError)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=imagenet"], "data.train.dataset cannot be used: images/train: no such file or directory"),
        (
            [
                "experiment=mlp",
                "+data.val={_target_: raytrainer.data.ParquetDataset, path: 'val/*.pq'}",
                "~data.val.split",
            ],
            "data.val cannot be used: val: no such file or directory",
        ),
        (
            ["experiment=transformer", "data=tokens", "data.train.path=no.tokens"],
            "data.train cannot be used: {here}/no.tokens: No such file or directory",
        ),
    ],
)
def test_data_that_are_not_here(overrides: list[str], message: str, in_tmp: Path) -> None:
    e = compose([overrides[0], *overrides[1:]]).experiment
    with pytest.raises(ConfigError) as refused:
        preflight.check_objects(e)
    assert str(refused.value) == message.format(here=in_tmp)
    e.cluster.kind = "existing"  # files on other machines cannot be checked from here
    preflight.check_objects(e)


class Guarded:
    """A dataset that finds before the start what it cannot read."""

    def __init__(self, folder: str, size: int = 3) -> None:
        raise AssertionError("a dataset is not made before a start")

    @staticmethod
    def check_source(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)


def test_a_users_dataset_has_a_say_before_the_start() -> None:
    e = experiment()
    e.data.val = {"one": {"_target_": f"{Guarded.__module__}.Guarded", "folder": "secret", "size": 4}}
    with pytest.raises(ConfigError, match=r"^data\.val\.one .*Permission denied.*secret"):
        preflight.check_objects(e)


def test_a_dataset_says_before_the_start_what_it_lacks(in_tmp: Path) -> None:
    """Empty datasets and missing columns are found in a footer or a header, without reading the data."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raytrainer.data.tokens import TokenWriter

    whole = experiment()

    def refusal_of(train: dict[str, Any], batch: int = 6, drop_last: bool = True, **sections: Any) -> str:
        e = copy.deepcopy(whole)
        e.data.global_batch_size, e.data.drop_last = batch, drop_last
        e.scaling.num_workers = sections.get("workers", 1)
        e.data.train = {**train, "_target_": f"raytrainer.data.{train['_target_']}"}
        e.metrics = sections.get("metrics", {})
        if "val" in sections:
            e.data.val = {**sections["val"], "_target_": f"raytrainer.data.{sections['val']['_target_']}"}
        try:
            preflight.check_objects(e)
        except ConfigError as error:
            return str(error)
        return ""

    table = pa.table({"image": pa.array([[0.0] * 4] * 6, pa.list_(pa.float32(), 4)), "label": np.arange(6)})
    for folder, rows in (("full", 6), ("empty", 0)):
        Path(folder).mkdir()
        pq.write_table(table.slice(0, rows), f"{folder}/0.parquet")
    Path("none").mkdir()
    Path("pictures/cat").mkdir(parents=True)
    Path("pictures/cat/readme.txt").touch()
    Path("images/cat").mkdir(parents=True)
    Path("images/cat/a.JPG").touch()
    with TokenWriter(Path("few.tokens"), vocab_size=9, separator=None, tokenizer="x") as writer:
        writer.add([[1, 2, 3]], 3)

    parquet: dict[str, Any] = {"_target_": "ParquetDataset", "path": "full"}
    assert refusal_of(parquet) == ""
    assert re.match(r"data\.train .*empty: .*no row", refusal_of({**parquet, "path": "empty"}))
    assert re.match(r"data\.train .*none: no Parquet file", refusal_of({**parquet, "path": "none"}))
    wrong = refusal_of({**parquet, "columns": ["image", "lable"]})
    assert "no column 'lable'; the nearest: label" in wrong
    assert "valid: label, image" in wrong
    assert "the column is fixed_size_list" in refusal_of({**parquet, "reshape": {"image": [3, 3]}})
    dropped = refusal_of(parquet, 8)
    assert "data.global_batch_size=8 is more than the dataset's 6 samples, and data.drop_last=true" in dropped
    assert refusal_of(parquet, 8, drop_last=False) == ""
    few: dict[str, Any] = {"_target_": "TokenDataset", "path": "few.tokens", "seq_len": 1}
    assert "data.val has 2 samples for 4 workers" in refusal_of(
        parquet, workers=4, val=few, metrics={"a": {"_target_": "collections.Counter"}}
    )
    assert re.search("at least two tokens .* 0", refusal_of({**few, "begin": 0.0, "end": 0.1}))
    assert "begin, end=0.5, 0.2 must be fractions" in refusal_of({**few, "begin": 0.5, "end": 0.2})
    assert refusal_of(few, 2) == ""
    encoded: dict[str, Any] = {
        "_target_": "EncodedImages",
        "dataset": {**parquet, "_target_": "raytrainer.data.ParquetDataset"},
    }
    assert re.search(r"key=img .*valid: image, label", refusal_of({**encoded, "key": "img"}))
    assert "is more than the dataset's 6 samples" in refusal_of(encoded, 8)
    pictures: dict[str, Any] = {"_target_": "raytrainer.data.ImageFolder", "path": "pictures"}
    assert re.match(r"data\.train\.dataset .*pictures: no image", refusal_of({**encoded, "dataset": pictures}))
    assert "pictures/*/*: no image matches" not in refusal_of(
        {**encoded, "dataset": {**pictures, "path": "pictures/*/*"}}
    )
    assert "no image matches" in refusal_of({**encoded, "dataset": {**pictures, "path": "pictures/*.png"}})
    assert refusal_of({**encoded, "dataset": {**pictures, "path": "images"}}) == ""
