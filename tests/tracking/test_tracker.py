"""The tracker itself: the cost of a call, what is on disk and when, and what happens at every limit."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytrainer.errors import StorageError
from raytrainer.tracking import MlflowTracker, NullTracker, Tracker, replay
from raytrainer.tracking.keys import metric_key
from raytrainer.tracking.segments import SpoolBatch, SpoolRow, read_batch
from raytrainer.tracking.sender import DROPPED_TAG
from raytrainer.tracking.spool import Spool
from raytrainer.tracking.system_metrics import SystemSampler
from tests.tracking.fakes import FakeServer


def make(folder: Path, **options: object) -> MlflowTracker:
    return MlflowTracker("r", "http://127.0.0.1:9", folder, ship=False, **{"system_metrics": False, **options})  # type: ignore[arg-type]


def content(folder: Path) -> list[SpoolBatch]:
    batches = []
    for segment in Spool(folder).segments():
        offset = 0
        while (batch := read_batch(segment, offset)).end > offset:
            batches.append(batch)
            offset = batch.end
    return batches


def rows(folder: Path) -> list[SpoolRow]:
    return [row for batch in content(folder) for row in batch.rows]


def until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_both_are_trackers(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    assert isinstance(tracker, Tracker)
    assert isinstance(NullTracker(), Tracker)
    tracker.close()


def test_a_call_costs_microseconds(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    metrics = {f"train/metric{i}": float(i) for i in range(8)}
    costs = []
    for step in range(3000):
        start = time.perf_counter_ns()
        tracker.log_metrics(metrics, step)
        costs.append(time.perf_counter_ns() - start)
    tracker.close()
    # 0.9 µs here; the limit leaves room for a busy machine. The median is used because the thread writes in between.
    assert sorted(costs)[len(costs) // 2] < 50_000
    assert len(rows(tmp_path)) == 3000 * 8


def test_rows_are_on_disk_without_a_close_with_the_time_of_the_call(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    before = time.time_ns() // 1_000_000
    tracker.log_metrics({"a": math.nan, "b": math.inf}, 3)
    after = time.time_ns() // 1_000_000
    until(lambda: len(rows(tmp_path)) == 2)
    nan, infinity = rows(tmp_path)
    assert math.isnan(nan.value)
    assert infinity[:2] == ("b", math.inf)
    assert before <= nan.time == infinity.time <= after
    tracker.close()


def test_later_changes_of_the_callers_objects_change_nothing(tmp_path: Path) -> None:
    tracker = make(tmp_path / "spool")
    metrics, file = {"a": 1.0}, tmp_path / "x.txt"
    file.write_text("first")
    tracker.log_metrics(metrics, 1)
    tracker.log_artifact(file, "logs")
    metrics["a"] = 2.0
    file.unlink()
    tracker.set_tags({"t": "1"})
    tracker.close()
    server = FakeServer()
    run = server.add()
    replay(tmp_path / "spool", "r", "", server=server)
    assert {row.value for row in run.rows} == {1.0}
    assert (run.artifacts, run.tags) == ({"logs/x.txt": "first"}, {"t": "1"})


def test_values_that_are_not_numbers_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make(tmp_path)
    tracker.log_metrics({"a": "one"}, 1)  # type: ignore[dict-item]
    tracker.log_metrics({"a": 10**400}, 1)
    tracker.log_metrics({"a": 1}, 1)
    tracker._flush()
    tracker.log_metrics({"a": 2}, 2)
    tracker.log_metrics({}, 1)
    tracker.close()
    assert [row.value for row in rows(tmp_path)] == [1.0, 2.0]
    assert sum(batch.dropped for batch in content(tmp_path)) == 2
    assert "one of ['a'] is not a number" in caplog.messages[0]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train/loss", "train/loss"),
        ("loss@5 (%)", "loss_5 ___"),
        ("/a//b/../c/", "a/b/c"),
        ("..", "_"),
        ("", "_"),
        ("é", "é"),
        ("a" * 300, "a" * 250),
        ("e\N{COMBINING ACUTE ACCENT}", "é"),
        ("a\nb\x00", "a_b_"),
    ],
)
def test_metric_names(key: str, name: str) -> None:
    assert metric_key(key) == name


def test_a_name_that_mlflow_refuses_is_changed_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = make(tmp_path)
    for step in range(3):
        tracker.log_metrics({"top@5": 1.0}, step)
    tracker.close()
    assert {row.key for row in rows(tmp_path)} == {"top_5"}
    assert len(caplog.messages) == 1
    assert "'top@5'" in caplog.messages[0]


def test_names_that_become_one_keep_their_values_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make(tmp_path)
    for step in range(2):
        tracker.log_metrics({"top@5": 1, "top_5": 2, "top%5": 3, "x" * 260: 4, "x" * 270: 5, "x" * 250: 6}, step)
    tracker.log_metrics({"top&5": 7}, 3)
    tracker.close()
    values = {key: {row.value for row in rows(tmp_path) if row.key == key} for key in {r.key for r in rows(tmp_path)}}
    assert values == {
        "top_5": {2},
        "top_5_2": {1},
        "top_5_3": {3},
        "top_5_4": {7},
        "x" * 250: {6},
        "x" * 248 + "_2": {4},
        "x" * 248 + "_3": {5},
    }
    warnings = [message for message in caplog.messages if "'top@5'" in message]
    assert len(warnings) == 1
    assert "'top_5_2'" in warnings[0]
    assert "'top_5'" in warnings[0]


def test_a_name_whose_key_is_in_use_gets_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make(tmp_path)
    tracker.log_metrics({"top@5": 1.0}, 1)
    tracker.log_metrics({"top_5": 2.0}, 1)
    tracker.close()
    assert {row.key: row.value for row in rows(tmp_path)} == {"top_5": 1.0, "top_5_2": 2.0}
    assert "'top_5' is logged to MLflow as 'top_5_2': the name is in use" in caplog.messages[1]


def test_a_full_spool_keeps_what_it_has_and_counts_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make(tmp_path / "spool", max_spool_bytes=20_000)
    for step in range(5000):
        tracker.log_metrics({"a": 1.0, "b": 2.0}, step)
        if step % 100 == 0:
            tracker._flush()
    (tmp_path / "big").write_bytes(b"x" * 20_000)
    tracker.log_artifact(tmp_path / "big")
    tracker.close()
    assert Spool(tmp_path / "spool").size() < 21_000
    server = FakeServer()
    run = server.add()
    kept = replay(tmp_path / "spool", "r", "", server=server)
    assert 0 < kept == len(run.rows)
    assert run.tags == {DROPPED_TAG: str(10_000 - kept)}
    assert sum("max_spool_bytes=20000" in message for message in caplog.messages) == 1
    assert sum("big" in message for message in caplog.messages) == 1
    assert {row.step for row in run.rows} == set(range(kept // 2))


def test_a_full_queue_is_counted_and_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.tracking.mlflow_tracker._QUEUE_ENTRIES", 10)
    monkeypatch.setattr("raytrainer.tracking.mlflow_tracker._TICK_S", 3600.0)
    tracker = make(tmp_path)
    for step in range(15):
        tracker.log_metrics({"a": 1.0, "b": 1.0}, step)
    tracker.set_tags({"t": "1"})
    tracker.close()
    tracker.close()
    tracker.log_metrics({"late": 1.0}, 1)
    assert len(rows(tmp_path)) == 20
    assert sum(batch.dropped for batch in content(tmp_path)) == 11


def test_a_full_disk_is_named_and_rows_wait_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        tracker.log_metrics({"a": 1.0}, 1)
        until(lambda: bool(caplog.messages))
        tracker.log_metrics({"a": 2.0}, 2)
        tracker._flush()
    tracker.close()
    assert [row.step for row in rows(tmp_path)] == [1, 2]
    assert len(caplog.messages) == 1
    assert f"no space at {tmp_path}" in caplog.messages[0]


def test_memory_is_bounded_on_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.tracking.mlflow_tracker._MEMORY_BYTES", 1000)
    tracker = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        for step in range(100):
            tracker.log_metrics({"a": 1.0}, step)
        tracker._flush()
        assert tracker._line_bytes <= 1000
    tracker.close()
    kept = rows(tmp_path)
    assert [row.step for row in kept] == list(range(len(kept)))
    assert sum(batch.dropped for batch in content(tmp_path)) == 100 - len(kept) > 0


def test_a_spool_that_cannot_be_written_at_all_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        make(tmp_path / "file" / "spool")


def test_system_metrics_have_mlflows_names_and_own_steps(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    tracker = make(tmp_path, system_metrics=True, system_interval_s=0.0)
    until(lambda: sum(row.key == "system/cpu_utilization_percentage" for row in rows(tmp_path)) >= 1)
    tracker.close()
    steps = [row.step for row in rows(tmp_path) if row.key == "system/disk_usage_percentage"]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 2
    names = {row.key for row in rows(tmp_path)}
    assert names >= {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"}


class FakePsutil:
    """A machine with two cores, one of which is busy from the first sample on."""

    def __init__(self) -> None:
        import psutil

        self._real, self._looks = psutil, 0

    def cpu_times(self) -> object:
        self._looks += 1
        times = self._real.cpu_times()
        nothing = dict.fromkeys(times._fields, 0.0)
        return times._replace(**{**nothing, "user": 1.0 * self._looks, "idle": 1.0 * self._looks})

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


def test_the_load_is_measured_whichever_thread_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread measures the load. psutil's own `cpu_percent` returns 0 on a thread's first call."""
    pytest.importorskip("psutil")
    monkeypatch.setitem(sys.modules, "psutil", FakePsutil())
    now = iter(range(100))
    monkeypatch.setattr("raytrainer.tracking.system_metrics.time", SimpleNamespace(monotonic=lambda: float(next(now))))
    sampler, samples = SystemSampler(), []
    for _ in range(4):
        thread = threading.Thread(target=lambda: samples.append(sampler.sample()["system/cpu_utilization_percentage"]))
        thread.start()
        thread.join()
    assert samples == [50.0] * 4


def test_a_sample_right_after_another_says_nothing_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr("raytrainer.tracking.system_metrics.time", SimpleNamespace(monotonic=lambda: 0.0))
    sample = SystemSampler().sample()
    assert "system/cpu_utilization_percentage" not in sample
    assert "system/system_memory_usage_percentage" in sample


def test_other_nodes_have_names_of_their_own() -> None:
    pytest.importorskip("psutil")
    names = {key.replace("cpu_utilization_percentage", "") for key in SystemSampler(node=2).sample()}
    assert all(name.startswith("system/node-2/") for name in names)
    assert "system/node-2/disk_usage_percentage" in names


def test_a_node_without_psutil_or_nvml_has_no_system_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert SystemSampler().sample() == {}


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetMemoryInfo": type("Memory", (), {"used": 25e6, "total": 100e6}),
            "nvmlDeviceGetUtilizationRates": type("Rates", (), {"gpu": 70}),
            "nvmlDeviceGetPowerUsage": 150_000,
            "nvmlDeviceGetEnforcedPowerLimit": 300_000,
        }
        return lambda *_: answers[name]


def test_gpus_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    sample = SystemSampler().sample()
    assert {key: value for key, value in sample.items() if "gpu" in key} == {
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_memory_usage_megabytes": 25.0,
        "system/gpu_0_utilization_percentage": 70.0,
        "system/gpu_0_power_usage_watts": 150.0,
        "system/gpu_0_power_usage_percentage": 50.0,
    }


def test_a_process_that_forgets_to_close_loses_nothing_and_imports_neither_mlflow_nor_torch(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from raytrainer.tracking import MlflowTracker
        tracker = MlflowTracker("r", "http://127.0.0.1:9", Path(sys.argv[1]))
        for step in range(10):
            tracker.log_metrics({"a": float(step)}, step)
        assert not {"mlflow", "torch", "ray"} & set(sys.modules)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert [row.step for row in rows(tmp_path) if row.key == "a"] == list(range(10))
