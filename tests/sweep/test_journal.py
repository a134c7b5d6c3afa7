"""The trial journal: every value survives unchanged, a kill loses nothing, and errors in reading and writing are
reported."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from raytrainer.errors import StorageError, StorageFull
from raytrainer.storage import Storage
from raytrainer.sweep import journal_file
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.trial_state import Status

NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(-(2**80), 2**80))


def same(a: Any, b: Any) -> bool:
    """Return whether two values have the same type and bits: NaN equals NaN, and -0.0 does not equal 0.0."""
    return type(a) is type(b) and repr(a) == repr(b)


def report(evaluation: int, value: float = 0.5, **metrics: float) -> Report:
    return Report(evaluation, evaluation * 10, value, metrics, 100.0 + evaluation)


def trial(id: str = "0001", **parameters: Any) -> Trial:  # noqa: A002
    return Trial(id, parameters, [f"{key}={value}" for key, value in parameters.items()], 12.5)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "sweep é#")


@pytest.fixture
def path(storage: Storage) -> Path:
    return storage.local_path / "ledger.jsonl"


def begun(storage: Storage) -> TrialJournal:
    journal = TrialJournal.open(storage)
    journal.begin({"argv": ["-m", "x=1,2"]})
    return journal


def report_until_refused(journal: TrialJournal) -> None:
    """Report until a call raises the error that the saving thread has met."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        journal.report("0001", report(1))


def test_everything_comes_back_as_it_was(storage: Storage) -> None:
    journal = TrialJournal.open(storage, clock=lambda: 7.0)
    journal.begin({"argv": ["-m", "x=é", os.fsdecode(b"\xff")], "path": Path("/a"), "loss": math.inf})
    journal.start(
        Trial("0001", {"lr": 0.1, "n": 3, "b": True, "none": None, "s": "nan", "x": math.nan}, ["lr=0.1"], 1.5)
    )
    journal.start(trial("0002", lr=-0.0))
    journal.report("0001", Report(1, 10, math.nan, {"val/loss": math.nan, "a": -math.inf, "count": 3}, 2.5))
    journal.report("0002", Report(1, 10, 0.1 + 0.2, {"val/loss": 0.1 + 0.2}, 2.5))
    journal.report("0002", Report(2, 20, 0.0, {}, 2.5, interim=True))
    journal.note_run("0001", "offline-1")
    journal.note_run("0001", "abc")
    journal.inherit("0001", "0002", 1, {"lr": 0.12}, ["lr=0.12"])
    journal.end("0001", Status.FAILED, "NonFiniteLoss: the loss is nan", trace="Traceback of the first try")
    assert journal.trials["0001"].error == "trials/0001/error.txt"
    journal.end("0002", Status.FAILED, "ValueError: \ud800", trace="Traceback\nValueError: \ud800")
    journal.reopen("0001")
    journal.close()
    journal.close()

    again = TrialJournal.open(storage)
    assert list(again.trials) == ["0001", "0002"]
    assert again.attempts == [{"time": 7.0, "argv": ["-m", "x=é", os.fsdecode(b"\xff")], "path": "/a", "loss": "inf"}]
    first, second = again.trials.values()
    assert (first.run_id, first.status, first.cause, first.ended, first.started) == ("abc", "running", None, None, 1.5)
    assert (first.parameters, first.overrides) == ({"lr": 0.12}, ["lr=0.12"])
    assert first.inherited == [{"evaluation": 1, "from": "0002", "parameters": {"lr": 0.12}}]
    assert math.isnan(first.reports[0].value)
    assert first.reports[0].metrics["a"] == -math.inf
    assert same(first.reports[0].metrics["count"], 3)
    assert same(second.parameters["lr"], -0.0)
    assert second.reports[0] == Report(1, 10, 0.1 + 0.2, {"val/loss": 0.1 + 0.2}, 2.5)
    assert second.reports[1:] == [Report(2, 20, 0.0, {}, 2.5, interim=True)]
    assert (second.status, second.ended, second.error) == ("failed", 7.0, "trials/0002/error.txt")
    assert storage.read_bytes("trials/0002/error.txt") == b"Traceback\nValueError: ?"
    # The reader finds what the writer has in memory. They are compared as text, because NaN does not equal NaN.
    assert repr(again.trials) == repr(journal.trials)


@given(
    values=st.dictionaries(st.text(), st.one_of(NUMBERS, st.text(), st.booleans(), st.none()), max_size=4),
    metrics=st.dictionaries(st.text(), NUMBERS, max_size=4),
    value=NUMBERS,
)
def test_any_parameter_and_metric_survives(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], metrics: dict[str, Any], value: float
) -> None:
    storage = Storage(tmp_path_factory.mktemp("journal"))
    journal = begun(storage)
    journal.start(Trial("0001", values, [], 0.0))
    journal.report("0001", Report(1, 1, value, metrics, 0.0))
    journal.close()
    found = TrialJournal.open(storage).trials["0001"]
    assert found.parameters.keys() == values.keys()
    assert all(same(found.parameters[key], values[key]) for key in values)
    assert all(same(found.reports[0].metrics[key], metrics[key]) for key in metrics)
    assert same(found.reports[0].value, value)


def test_numpys_scalars_become_numbers(storage: Storage) -> None:
    float32: Any = np.float32
    journal = begun(storage)
    journal.start(trial(n=np.int64(3), lr=np.float64(0.1)))
    journal.report("0001", Report(1, 1, float32(0.5), {"a": float32(math.nan)}, 0.0))
    journal.close()
    found = TrialJournal.open(storage).trials["0001"]
    assert found.parameters == {"n": 3, "lr": 0.1}
    assert (found.reports[0].value, str(found.reports[0].metrics["a"])) == (0.5, "nan")


def test_a_second_attempt_goes_on_in_the_same_file(storage: Storage) -> None:
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    journal.report("0001", report(1))
    journal.close()
    journal = begun(storage)
    journal.reopen("0001")
    journal.report("0001", report(2))
    journal.start(trial("0002", lr=0.2))
    journal.close()
    again = TrialJournal.open(storage)
    assert len(again.attempts) == 2
    assert [r.evaluation for r in again.trials["0001"].reports] == [1, 2]
    assert list(again.trials) == ["0001", "0002"]


def test_an_evaluation_done_again_takes_the_place_of_the_first(storage: Storage) -> None:
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    for evaluation in (1, 2, 3, 4):
        journal.report("0001", report(evaluation, 1.0))
    journal.reopen("0001")  # continues from the checkpoint of evaluation 2
    journal.report("0001", report(3, 2.0))
    expected = [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [(r.evaluation, r.value) for r in journal.trials["0001"].reports] == expected
    # An exploit copies the weights of a trial with fewer evaluations. The reports that this trial made before stay.
    journal.inherit("0001", "0002", 1, {"lr": 0.2}, ["lr=0.2"])
    journal.report("0001", report(2, 3.0))
    journal.report("0001", report(2, 4.0))
    expected += [(2, 4.0)]
    assert [(r.evaluation, r.value) for r in journal.trials["0001"].reports] == expected
    journal.close()
    assert [(r.evaluation, r.value) for r in TrialJournal.open(storage).trials["0001"].reports] == expected


def test_a_torn_last_line_is_dropped_and_written_over(storage: Storage, path: Path) -> None:
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"report","id":"0001","evaluation":1')
    reader, writer = TrialJournal.open(storage), TrialJournal.open(storage)
    assert path.read_bytes() != whole, "opening writes nothing"
    assert reader.trials["0001"].reports == []
    writer.begin({})
    writer.report("0001", report(1))
    writer.close()
    assert path.read_bytes().startswith(whole + b'{"kind":"begin"')
    assert [r.evaluation for r in TrialJournal.open(storage).trials["0001"].reports] == [1]


@pytest.mark.parametrize(
    "broken",
    [
        "nonsense",
        "[]",
        "{}",
        "",
        '{"kind":"report","id":"0009","evaluation":1,"step":1,"value":1,"time":1,"metrics":{}}',
        '{"kind":"report","id":"0001","evaluation":1,"step":1,"value":"x","time":1,"metrics":{}}',
        '{"kind":"report","id":"0001","evaluation":1,"step":1,"value":1,"time":1,"metrics":{"a":null}}',
        '{"kind":"start","id":"0001","time":1,"parameters":{},"overrides":[]}',
        '{"kind":"end","id":"0001","time":1,"status":"excellent","cause":null}',
        '{"kind":"begin","version":1,"time":1,"info":[]}',
    ],
)
def test_a_broken_line_is_named(storage: Storage, path: Path, broken: str) -> None:
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    journal.close()
    path.write_bytes(path.read_bytes() + broken.encode() + b'\n{"kind":"reopen","id":"0001","time":1}\n')
    with pytest.raises(StorageError, match=rf"{path}, line 3: not a line"):
        TrialJournal.open(storage)


def test_another_file_is_refused_as_a_journal(storage: Storage, path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"kind":"else"}\n')
    with pytest.raises(StorageError, match="line 1"):
        TrialJournal.open(storage)


def test_later_versions(storage: Storage, path: Path) -> None:
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind":"mood","id":"0001"}\n{"kind":"reopen","id":"0001","time":1,"new":2}\n')
    assert list(TrialJournal.open(storage).trials) == ["0001"]
    path.write_bytes(whole + b'{"kind":"begin","version":2,"time":1,"info":{}}\n')
    with pytest.raises(StorageError, match=r"has format 2, this version reads 1"):
        TrialJournal.open(storage)


def test_no_space_is_said_and_leaves_whole_lines(storage: Storage, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:-8])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFull, match=rf"no space at {path}"):
            journal.report("0001", report(1))
        assert journal.trials["0001"].reports == []
        # If a partial line cannot be removed at once, it is removed before the next line is written.
        patch.setattr(os, "ftruncate", lambda *_: full(0, b""))
        with pytest.raises(StorageFull):
            journal.report("0001", report(1))
    journal.report("0001", report(2))
    journal.close()
    assert [r.evaluation for r in TrialJournal.open(storage).trials["0001"].reports] == [2]


def test_a_disk_that_loses_what_it_took_is_said_by_the_next_call(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def lost(descriptor: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal_file, "_SYNC_S", 0.0)
    journal = begun(storage)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lost)
        journal.start(trial(lr=0.1))
        assert failed.wait(30)
        with pytest.raises(StorageError, match="Input/output"):
            report_until_refused(journal)
    # A later fsync that succeeds does not show that the earlier data has reached the disk.
    with pytest.raises(StorageError, match="Input/output"):
        journal.close()


def test_two_writers_are_refused(storage: Storage) -> None:
    begun(storage).close()
    first, second = TrialJournal.open(storage), TrialJournal.open(storage)
    first.begin({})
    with pytest.raises(StorageError, match="another process has written it"):
        second.begin({})
    first.close()


def test_threads_write_whole_lines(storage: Storage) -> None:
    journal = begun(storage)
    for n in range(4):
        journal.start(trial(f"{n}"))

    def work(id: str) -> None:  # noqa: A002
        for evaluation in range(1, 101):
            journal.report(id, report(evaluation))
            journal.note_run(id, f"run-{evaluation}")

    threads = [threading.Thread(target=work, args=(f"{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    found = TrialJournal.open(storage).trials
    assert [len(t.reports) for t in found.values()] == [100] * 4
    assert {t.run_id for t in found.values()} == {"run-100"}


def test_a_killed_writer_loses_nothing_that_it_was_told_is_written(storage: Storage) -> None:
    program = """
        import sys
        from raytrainer.storage import Storage
        from raytrainer.sweep.journal import TrialJournal, Report, Trial
        journal = TrialJournal.open(Storage(sys.argv[1]))
        journal.begin({})
        journal.start(Trial("0001", {}, [], 0.0))
        for n in range(1, 10**6):
            journal.report("0001", Report(n, n, 0.5, {"a": 1.0}, 0.0))
            print(n, flush=True)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(storage.local_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 200:
            writer.send_signal(signal.SIGKILL)
            break
    rest = writer.stdout.read()
    writer.stdout.close()
    writer.wait()
    told_last = max([200, *(int(line) for line in rest.splitlines() if line)])
    found = TrialJournal.open(storage).trials["0001"].reports
    assert [r.evaluation for r in found] == list(range(1, len(found) + 1))
    assert len(found) >= told_last


class Flaky(Storage):
    """An object store that counts its uploads and can be made to fail."""

    error: OSError | None = None

    def write_bytes(self, rel: str, data: bytes) -> None:
        if self.error is not None:
            with self._errors(rel):
                raise self.error
        super().write_bytes(rel, data)
        uploads.append(data)
        uploaded.set()


uploads: list[bytes] = []
uploaded = threading.Event()


@pytest.fixture
def remote(tmp_path: Path) -> Flaky:
    uploads.clear()
    uploaded.clear()
    return Flaky("bucket/sweep", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


def test_an_object_store_gets_the_whole_file_now_and_then(remote: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begun(remote)
    journal.start(trial(lr=0.1))
    assert len(uploads) == 2
    for evaluation in range(1, 201):
        journal.report("0001", report(evaluation))
    assert len(uploads) == 2, "not an upload a line"
    journal.close()
    assert len(uploads) == 3
    assert len(TrialJournal.open(remote).trials["0001"].reports) == 200
    monkeypatch.setattr(journal_file, "_UPLOAD_S", 0.01)
    journal = begun(remote)
    uploaded.clear()
    journal.report("0001", report(201))
    assert uploaded.wait(30), "without a close"
    assert len(TrialJournal.open(remote).trials["0001"].reports) == 201
    journal.close()


def test_an_object_store_has_what_a_resume_must_know_when_it_is_told(remote: Flaky) -> None:
    """Starts, exploits and ends are uploaded at once. A lost id would be given to another trial, with the first one's
    checkpoints and run."""

    def there() -> Any:
        return TrialJournal.open(remote).trials

    journal = begun(remote)
    journal.start(trial(lr=0.1))
    assert list(there()) == ["0001"]
    journal.note_run("0001", "offline-1")
    assert there()["0001"].run_id == "offline-1"
    journal.report("0001", report(1))
    journal.inherit("0001", "0001", 1, {"lr": 0.2}, ["lr=0.2"])
    assert (there()["0001"].parameters, len(there()["0001"].reports)) == ({"lr": 0.2}, 1)
    journal.end("0001", Status.STOPPED)
    assert there()["0001"].status == "stopped"
    journal.reopen("0001")
    assert there()["0001"].status == "running"
    journal.report("0001", report(2))
    journal.save()
    assert len(there()["0001"].reports) == 2
    journal.close()


def test_an_object_store_that_fails_for_a_while_loses_nothing(
    remote: Flaky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_file, "_UPLOAD_S", 0.01)
    journal = begun(remote)
    remote.error = OSError("503 slow down")
    warned, log = threading.Event(), journal_file._log.warning

    def warning(*args: Any) -> None:
        log(*args)
        warned.set()

    monkeypatch.setattr(journal_file._log, "warning", warning)
    journal.start(trial(lr=0.1))
    journal.report("0001", report(1))
    assert warned.wait(30)
    uploaded.clear()
    remote.error = None
    assert uploaded.wait(30)
    journal.close()
    assert len([m for m in caplog.messages if "kept in memory" in m]) == 1
    assert len(TrialJournal.open(remote).trials["0001"].reports) == 1
    journal = begun(remote)
    remote.error = OSError("503 slow down")
    journal.end("0001", Status.FINISHED)
    with pytest.raises(StorageError, match="503"):
        journal.close()
    remote.error = None
    journal = begun(remote)
    remote.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(StorageFull):
        report_until_refused(journal)
    remote.error = None
    journal = begun(remote)
    remote.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(StorageFull):
        journal.end("0001", Status.FINISHED)


def test_a_line_is_cheap_and_synced_apart(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(threading.current_thread().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    journal = begun(storage)
    journal.start(trial(lr=0.1))
    before = len(synced)
    for evaluation in range(1, 101):
        journal.report("0001", report(evaluation))
    journal.end("0001", Status.FINISHED)
    assert threading.current_thread().name not in synced[before:], "nobody waits for the disk"
    journal.close()
    assert synced[-1] == threading.current_thread().name


def test_the_best_report(storage: Storage) -> None:
    one = trial()
    assert one.best("min") is None
    one.reports = [report(1, math.nan), report(2, 3.0), report(3, 1.0), report(4, 1.0), report(5, -math.inf)]
    assert (one.best("min"), one.best("max")) == (one.reports[2], one.reports[1])
    one.reports = [report(1, math.nan), report(2, math.inf)]
    assert one.best("max") is None
    one.reports = [replace(report(1, 9.0), interim=True), report(2, 3.0)]
    assert one.best("max") == one.reports[1]


def test_a_trial_that_diverged() -> None:
    one = trial()
    one.status, one.cause = Status.FAILED, "NonFiniteLoss: the loss is nan at step 3"
    assert one.diverged
    one.cause = "raytrainer.errors.NonFiniteLoss: the loss is nan at step 3"
    assert one.diverged
    one.cause = "OSError: a message about a NonFiniteLoss"
    assert not one.diverged
    one.reports = [report(1, math.nan)]
    assert one.diverged
    one.status = Status.PRUNED
    assert not one.diverged


def test_lines_are_plain_json(storage: Storage, path: Path) -> None:
    journal = begun(storage)
    journal.start(trial(x=math.inf))
    journal.report("0001", report(1, math.nan))
    journal.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    kinds = [json.loads(line, parse_constant=refuse)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["begin", "start", "report"]


def test_how_long_a_trial_trained(storage: Storage) -> None:
    """Training time counts neither the time in which the sweep was stopped nor that in which a trial waits for its
    place."""
    now = 20.0
    journal = TrialJournal.open(storage, clock=lambda: now)
    journal.begin({})
    journal.start(trial())
    assert journal.trials["0001"].took(now=20.0) == 7.5
    journal.report("0001", replace(report(1), seconds=2.0))  # reported at 101.0, after it had waited
    journal.close()
    now = 500.0
    journal = TrialJournal.open(storage, clock=lambda: now)
    one = journal.trials["0001"]
    assert one.took() == 2.0
    journal.begin({})
    journal.reopen("0001")
    assert one.took(now=503.0) == 5.0
    journal.report("0001", replace(report(2), seconds=3.5, time=504.0))
    assert one.took(now=505.0) == 6.5
    now = 600.0
    journal.end("0001", Status.STOPPED)
    journal.close()
    assert one.took() == TrialJournal.open(storage).trials["0001"].took() == 5.5


def test_how_long_a_trial_took_that_has_not_reported(storage: Storage) -> None:
    now = 20.0
    journal = TrialJournal.open(storage, clock=lambda: now)
    journal.begin({})
    journal.start(trial())
    now = 500.0
    journal.reopen("0001")
    now = 503.0
    journal.end("0001", Status.FAILED, "ValueError: no")
    journal.close()
    assert TrialJournal.open(storage).trials["0001"].took() == 3.0
