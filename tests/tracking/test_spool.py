"""The spool's files: complete lines or none, one uploader, one format version, and a clear error if the disk is
full."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from raytrainer.errors import StorageError, StorageFull
from raytrainer.storage import Storage
from raytrainer.tracking.segments import SegmentWriter, SpoolRow, discard_if_finished, line, read_batch
from raytrainer.tracking.spool import RunNote, Spool, State, spool_of


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool é#")


def lines(*rows: tuple[int, dict[str, float]]) -> bytes:
    return b"".join(line("m", 1000 + step, step, metrics) for step, metrics in rows)


def test_where_metrics_wait(tmp_path: Path) -> None:
    assert spool_of(Storage(tmp_path)) == tmp_path / "spool"
    places = [Storage(f"s3://bucket/{root}/{name}?region=eu-1") for root in ("a", "b") for name in ("run", "other")]
    assert len({spool_of(place) for place in places}) == 4  # two runs with one name differ too
    assert all(spool_of(place).is_absolute() for place in places)
    # A worker may know the URI without its password.
    assert spool_of(Storage("s3://KEY:secret@bucket/a")) == spool_of(Storage("s3://bucket/a"))


def test_rows_come_back_as_they_were_with_nan_and_infinities(spool: Spool) -> None:
    writer = SegmentWriter(spool, 1 << 20)
    writer.append(lines((3, {"a": 0.1, "b": -math.inf}), (4, {"a": math.nan})) + line("t", {"é": "ü"}))
    (segment,) = spool.segments()
    batch = read_batch(segment, 0)
    assert batch.rows[:2] == [SpoolRow("a", 0.1, 1003, 3), SpoolRow("b", -math.inf, 1003, 3)]
    assert math.isnan(batch.rows[2].value)
    assert (batch.tags, batch.dropped, batch.broken) == ({"é": "ü"}, 0, 0)
    assert batch.end == segment.path.stat().st_size
    assert read_batch(segment, batch.end).end == batch.end


def test_a_torn_last_line_is_left_and_a_broken_one_is_counted(spool: Spool) -> None:
    writer = SegmentWriter(spool, 1 << 20)
    writer.append(lines((1, {"a": 1.0})))
    writer.append(b'["m",5,{"a":1}]\nnonsense\n["new kind"]\n[]\n{"m":1}\n["m",1,2,3]\n')
    writer.append(lines((2, {"a": 2.0})) + b'["m",1000,3,{"a"')
    writer.close()
    (segment,) = spool.segments()
    batch = read_batch(segment, 0)
    assert [row.step for row in batch.rows] == [1, 2]
    assert batch.broken == 6
    assert discard_if_finished(segment, batch.end)
    assert spool.segments() == []


def test_a_batch_keeps_to_the_limits_of_one_call_at_whole_lines(spool: Spool) -> None:
    writer = SegmentWriter(spool, 1 << 30)
    writer.append(lines(*[(step, {f"k{i}": 1.0 for i in range(300)}) for step in range(10)]))
    writer.append(b"".join(line("t", {f"tag{n}-{i}": "x" for i in range(60)}) for n in range(3)))
    writer.append(lines((99, {f"k{i}": 1.0 for i in range(2500)})))
    (segment,) = spool.segments()
    sizes, offset = [], 0
    while (batch := read_batch(segment, offset)).end > offset:
        sizes.append((len(batch.rows), len(batch.tags)))
        offset = batch.end
    assert sizes == [(900, 0), (900, 0), (900, 0), (300, 60), (0, 60), (2500, 60)]


def test_a_live_segment_is_not_deleted_a_dead_one_is(spool: Spool) -> None:
    writer = SegmentWriter(spool, 1 << 20)
    writer.append(lines((1, {"a": 1.0})))
    (segment,) = spool.segments()
    end = read_batch(segment, 0).end
    assert not discard_if_finished(segment, end)
    writer.close()
    assert not discard_if_finished(segment, end - 1)
    assert discard_if_finished(segment, end)


def test_segments_follow_each_other_in_order_and_an_empty_one_goes(spool: Spool) -> None:
    first = SegmentWriter(spool, 50)
    for step in range(5):
        first.append(lines((step, {"a": 1.0})))
    second = SegmentWriter(spool, 1 << 20)
    second.append(lines((9, {"a": 1.0})))
    SegmentWriter(spool, 10).close()
    steps = [row.step for segment in spool.segments() for row in read_batch(segment, 0).rows]
    assert steps == [0, 1, 2, 3, 4, 9]
    attempts = [segment.attempt for segment in spool.segments()]
    assert attempts == [first.attempt] * (len(attempts) - 1) + [second.attempt]
    assert len(attempts) > 2
    assert not list(spool.root.glob("*.partial"))


def test_a_writer_whose_segment_was_deleted_goes_on_in_a_new_one(spool: Spool) -> None:
    writer = SegmentWriter(spool, 1 << 20)
    spool.segments()[0].path.unlink()
    writer.append(lines((7, {"a": 1.0})))
    assert [row.step for row in read_batch(spool.segments()[0], 0).rows] == [7]


def test_a_full_disk_is_named_and_leaves_no_part_of_a_line(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SegmentWriter(spool, 1 << 20)
    writer.append(lines((1, {"a": 1.0})))
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data[:8]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFull, match=r"no space at .*metrics-000001"):
            writer.append(lines((2, {"a": 2.0})))
    writer.append(lines((3, {"a": 3.0})))
    batch = read_batch(spool.segments()[0], 0)
    assert ([row.step for row in batch.rows], batch.broken) == ([1, 3], 0)


def test_only_one_sender_at_a_time(spool: Spool) -> None:
    with spool.lock() as first:
        assert first
        with spool.lock() as second:
            assert not second
    with spool.lock() as third:
        assert third


def test_state_forgets_what_is_gone(spool: Spool) -> None:
    writer = SegmentWriter(spool, 1 << 20)
    name = spool.segments()[0].path.name
    spool.write_state(State({name: 9, "metrics-000009-00000000.jsonl": 4}, {writer.attempt: {"a": 1}, "0": {}}, 3, "r"))
    assert spool.state() == State({name: 9}, {writer.attempt: {"a": 1}}, 3, "r")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', "{}"])
def test_a_file_of_another_format_is_refused_by_name(spool: Spool, text: str) -> None:
    spool.create()
    (spool.root / "state.json").write_text(text)
    with pytest.raises(StorageError, match=r"state\.json"):
        spool.state()


def test_a_segment_of_another_format_is_refused(spool: Spool) -> None:
    spool.create()
    (spool.root / "metrics-000001-00000000.jsonl").write_bytes(line("segment", 2))
    with pytest.raises(StorageError, match=r"format \[2\], this version reads 1"):
        read_batch(spool.segments()[0], 0)


def test_a_note_that_says_more_by_now_stays(spool: Spool) -> None:
    note = RunNote("r", "e", "n", tags={"a": "1"})
    spool.write_note(note)
    old = spool.note()
    assert old == note
    spool.write_note(RunNote("r", "e", "n", tags={"a": "1"}, status="FAILED", end_time=5))
    spool.drop_note(note)
    assert spool.pending()
    spool.drop_note(RunNote("r", "e", "n", tags={"a": "1"}, status="FAILED", end_time=5))
    assert not spool.pending()


def test_artifacts_are_copies_in_order(spool: Spool, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "plots"
    file.write_text("one")
    folder.mkdir()
    (folder / "b.txt").write_text("two")
    spool.add_artifact(file, "logs")
    spool.add_artifact(folder, None)
    file.unlink()
    first, second = spool.artifacts()
    assert (first.path.read_text(), first.folder) == ("one", "logs")
    assert ((second.path / "b.txt").read_text(), second.folder) == ("two", None)
    assert spool.size() == sum(len(text) for text in ("one", "two", json.dumps("logs"), json.dumps(None)))
    with pytest.raises(StorageError, match="missing"):
        spool.add_artifact(tmp_path / "missing", None)
    assert len(list(spool.artifacts())) == 2


def test_a_spool_that_cannot_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Spool(tmp_path / "file" / "spool").create()
