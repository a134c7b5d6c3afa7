"""Storage and its locks: names cannot leave the root, writes are atomic, and errors name the place. The code for URIs
is tested with pyarrow's own file systems, which need no server, and with a real S3's interface."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from raytrainer.errors import StorageError, StorageFull, StorageLocked
from raytrainer.storage import Storage, files
from raytrainer.storage import lock as locks
from tests.promises import Within


def through_pyarrow(root: Path) -> Storage:
    """Return a storage that uses the code for URIs, on a local directory."""
    return Storage("bucket", filesystem=fs.SubTreeFileSystem(str(root), fs.LocalFileSystem()))


@contextmanager
def tiny_disk(tmp_path: Path, kib: int) -> Iterator[Path]:
    """Yield a file system of `kib` KiB. Skip the test if this process may not mount one."""
    place = tmp_path / "tiny"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write_bytes("a/b c/é#%.bin", b"one")
    storage.write_bytes("a/b c/é#%.bin", b"two")
    assert storage.read_bytes("a/b c/é#%.bin") == b"two"
    with storage.open_write("a/long") as file:
        file.write(b"x" * 10)
        file.write(memoryview(b"yz"))
    with storage.open_read("a/long") as file:
        file.seek(9)
        assert file.read() == b"xyz"
    assert [(entry.name, entry.is_dir, entry.size) for entry in storage.list("a")] == [
        ("b c", True, 0),
        ("long", False, 12),
    ]
    assert storage.list("a")[1].mtime > 1e9
    assert storage.list("nowhere") == []
    assert storage.exists("a/long")
    assert storage.exists("a")
    assert not storage.exists("a/longer")
    assert storage.read_if_exists("a/longer") is None
    with pytest.raises(StorageError, match="no such file"):
        storage.read_bytes("a/longer")


def test_delete_takes_files_and_trees_and_never_the_root(storage: Storage) -> None:
    storage.write_bytes("a/b/c", b"1")
    storage.write_bytes("a/d", b"2")
    storage.delete("a/d")
    assert not storage.exists("a/d")
    storage.delete("a")
    storage.delete("a")
    assert storage.list() == []
    with pytest.raises(StorageError, match="root"):
        storage.delete("")


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/x", "a//b", "a/", "./a", "a\0b", "a/.."])
def test_names_that_leave_the_root_are_refused(storage: Storage, name: str) -> None:
    for action in (storage.read_bytes, storage.delete, storage.exists, storage.list, storage.child, storage.create_dir):
        with pytest.raises(StorageError):
            action(name)
    with pytest.raises(StorageError):
        storage.write_bytes(name, b"")


def test_delete_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("1")
    storage = Storage(tmp_path / "root")
    storage.write_bytes("x", b"")
    (tmp_path / "root" / "link").symlink_to(outside)
    with pytest.raises(StorageError, match="outside"):
        storage.delete("link/kept")
    storage.delete("link")
    assert (outside / "kept").exists()
    assert not storage.exists("link")


@pytest.mark.parametrize(
    "uri", ["runs", "./runs", "", "az://container/x", "ftp://host/x", "file://host/x", "file:relative"]
)
def test_roots_that_are_no_place_are_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        Storage(uri)


def test_a_file_uri_is_a_local_directory(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/with%20space").child("x")
    storage.write_bytes("a", b"1")
    assert storage.is_local
    assert (tmp_path / "with space" / "x" / "a").read_bytes() == b"1"


def test_a_child_of_a_uri_keeps_its_query_and_messages_hide_secrets() -> None:
    storage = Storage("s3://KEY:s3cr3t@bucket/p?region=eu-1&endpoint_override=localhost:5000&secret_key=s3cr3t")
    child = storage.child("a b")
    assert not child.is_local
    assert child.uri == "s3://KEY:s3cr3t@bucket/p/a%20b?region=eu-1&endpoint_override=localhost:5000&secret_key=s3cr3t"
    shown = child.display + child.where("x") + repr(child)
    assert "s3cr3t" not in shown
    assert "KEY" not in shown
    assert "region=eu-1" in shown
    with pytest.raises(StorageError, match="not a local directory"):
        _ = child.local_path


def test_children_share_the_root(storage: Storage) -> None:
    storage.child("a").child("b/c").write_bytes("d", b"1")
    assert storage.read_bytes("a/b/c/d") == b"1"
    assert storage.child("") is storage


def test_trees_go_up_and_down(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"1")
    storage.upload_tree(source / "deep", "new/flat")
    assert storage.read_bytes("new/flat/file") == b"1"
    storage.upload_tree(source, "tree")
    assert storage.read_bytes("tree/deep/file") == b"1"
    storage.download_tree("tree", tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == b"1"


def test_a_directory_is_created_once(tmp_path: Path) -> None:
    for storage in (Storage(tmp_path / "bucket"), through_pyarrow(tmp_path)):
        assert storage.create_dir("a/new") == storage.is_local
        storage.write_bytes("a/new/file", b"")
        assert not storage.create_dir("a/new")


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("file", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match=f"no space at {tmp_path}/file"):
        storage.write_bytes("file", b"new")
    assert [entry.name for entry in storage.list()] == ["file"]
    assert storage.read_bytes("file") == b"old"


@pytest.mark.parametrize("storage", ["local", "s3"], indirect=True)
def test_who_reads_what_others_write_and_delete_gets_all_of_it_or_nothing(storage: Storage) -> None:
    lengths, ended = itertools.count(1), threading.Event()

    def content(length: int) -> bytes:
        return bytes([length % 251]) * length

    def change() -> None:
        while not ended.is_set():
            storage.write_bytes("file", content(next(lengths)))
            storage.write_bytes("file", content(next(lengths)))
            storage.delete("file")

    contents: set[bytes | None] = set()
    deadline = time.monotonic() + 30
    with ThreadPoolExecutor(2) as pool:
        changing = [pool.submit(change) for _ in range(2)]  # both delete it
        try:
            while len(contents) < 30 or None not in contents:
                assert time.monotonic() < deadline
                contents.add(storage.read_if_exists("file"))
        finally:
            ended.set()
        for one in changing:
            one.result()
    assert all(data == content(len(data)) for data in contents if data is not None)


@pytest.mark.parametrize("storage", ["local", "s3"], indirect=True)
def test_what_a_signal_raises_in_a_write_leaves_whole_content(storage: Storage) -> None:
    class Raised(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Raised

    contents = [bytes([65 + i]) * 1000 for i in range(2)]
    storage.write_bytes("file", contents[0])
    draw, before, stopped = random.Random(0), signal.signal(signal.SIGALRM, handler), 0
    try:
        for attempt in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, 0.02))
                storage.write_bytes("file", contents[attempt % 2])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Raised:
                stopped += 1
            assert storage.read_bytes("file") in contents
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert storage.is_local or stopped > 5
    assert [entry.name for entry in storage.list()] == ["file"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with tiny_disk(tmp_path, kib=64) as place:
        storage = Storage(place)
        storage.write_bytes("file", b"old")
        with pytest.raises(StorageFull, match=f"no space at {place}/file"):
            storage.write_bytes("file", b"n" * 200_000)
        assert storage.read_bytes("file") == b"old"
        with pytest.raises(StorageFull), storage.open_write("large") as file:
            file.write(b"n" * 200_000)


def test_errors_name_the_place(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("file", b"")
    for action in (lambda: storage.write_bytes("file/below", b""), lambda: storage.list("file")):
        with pytest.raises(StorageError, match=f"{tmp_path}/file"):
            action()


def test_check_writable_creates_nothing(tmp_path: Path) -> None:
    Storage(tmp_path / "a" / "b").check_writable()
    through_pyarrow(tmp_path / "c").check_writable()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is not a directory"):
        Storage(tmp_path / "file").check_writable()
    with pytest.raises(StorageError, match=r"/proc/"):
        Storage("/proc/nowhere").check_writable()


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_a_store_without_the_bucket_or_without_an_answer_is_refused(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"^s3://no-bucket/a/.*NO_SUCH_BUCKET"):
        Storage("s3://no-bucket/a").check_writable()
    # A silent server: pyarrow itself gives up after 99 s, and new connections to other servers wait for that.
    answers = threading.Event()
    monkeypatch.setattr(files, "_CHECK_S", 0.1)
    monkeypatch.setattr(Storage, "_probe", lambda self: answers.wait(60))
    with pytest.raises(StorageError, match=rf"^{re.escape(storage.uri)}: no answer in 0.1 s$"):
        storage.check_writable()
    answers.set()


# -- locks -------------------------------------------------------------------------------------------------------


def test_a_lock_names_its_owner_and_is_given_back(storage: Storage) -> None:
    with storage.lock("lock", {"run": "first-run"}) as held:
        held.check()
        with pytest.raises(StorageLocked, match=rf"in use by first-run \(host .+, pid {os.getpid()}, since 20"):
            storage.lock("lock", {"run": "second-run"}).acquire()
        assert len(storage.list("lock")) == 2
    with storage.lock("lock", {"run": "second-run"}):
        pass
    assert storage.list("lock") == []


_HOLDER = """
    import sys, time
    from raytrainer.errors import StorageLocked
    from raytrainer.storage import Storage
    storage, name = Storage(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        storage.lock("lock", {"run": name}).acquire()
    except StorageLocked as exc:
        print("refused", exc, flush=True)
    else:
        print("held", flush=True)
        sys.stdin.readline()
"""


def start_holder(root: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(_HOLDER), root, name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert read_line(process) == "ready"
    return process


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("storage", ["local", "s3"], indirect=True)
def test_of_processes_that_ask_at_once_one_wins_and_a_killed_owner_is_taken_over(storage: Storage) -> None:
    holders = [start_holder(storage.uri, f"run-{i}") for i in range(4)]
    try:
        for attempt in range(2):
            for holder in holders:
                tell(holder)
            answers = [read_line(holder) for holder in holders]
            assert sorted(answer.split()[0] for answer in answers) == ["held", *["refused"] * (len(holders) - 1)], (
                attempt
            )
            winner = [answer.split()[0] for answer in answers].index("held")
            holders[winner].send_signal(signal.SIGKILL)
            # Not reaped on purpose: a zombie owns nothing.
            os.waitid(os.P_PID, holders[winner].pid, os.WEXITED | os.WNOWAIT)
            for holder in holders:
                holder.kill()
                holder.wait()
            holders = [start_holder(storage.uri, f"run-{i}") for i in range(4)] if attempt == 0 else []
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    with storage.lock("lock", {"run": "last"}):
        assert len(storage.list("lock")) == 2  # nothing is left of the dead owners


def plant_lease(storage: Storage, name: str, **fields: Any) -> None:
    owner = {"run": "elsewhere", "host": "other", "pid": str(os.getpid())}
    lease = {"owner": owner, "machine": "another boot", "started": "1", **fields}
    storage.write_bytes(f"lock/{name}.json", json.dumps(lease).encode())
    storage.write_bytes(f"lock/{name}.held", b"")


def test_another_machines_lease_is_valid_as_long_as_its_heartbeat_is_fresh(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    plant_lease(storage, "a" * 32)
    with pytest.raises(StorageLocked, match="elsewhere"):
        storage.lock("lock", {"run": "mine"}).acquire()
    old = tmp_path / "lock" / ("a" * 32 + ".json")
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - 100))
    with pytest.raises(StorageLocked, match="elsewhere"):
        storage.lock("lock", {"run": "mine"}, limit_s=200).acquire()
    with storage.lock("lock", {"run": "mine"}):
        assert not old.exists()


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_a_stores_own_clock_says_how_old_a_lease_is(storage: Storage) -> None:
    """The store's clock counts whole seconds."""
    plant_lease(storage, "a" * 32)
    began, within = time.monotonic(), Within(10.0)
    while True:
        try:
            storage.lock("lock", {"run": "mine"}, limit_s=1.0).acquire().release()
            break
        except StorageLocked:
            within.check()
            time.sleep(0.05)
    assert time.monotonic() - began >= 1.0
    assert storage.list("lock") == []


def test_a_process_number_used_again_is_not_its_former_owner(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    plant_lease(storage, "a" * 32, machine=locks.machine(), started="1")
    with storage.lock("lock", {"run": "mine"}):
        pass


def test_an_unreadable_lease_is_respected_until_it_is_stale(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("lock/" + "b" * 32 + ".json", b"\x80\x04not json")
    storage.write_bytes("lock/" + "b" * 32 + ".held", b"")
    storage.write_bytes("lock/notes.txt", b"not a lease at all")
    with pytest.raises(StorageLocked, match="unreadable"):
        storage.lock("lock", {"run": "mine"}).acquire()
    os.utime(tmp_path / "lock" / ("b" * 32 + ".json"), (0, 0))
    with storage.lock("lock", {"run": "mine"}):
        pass


def test_a_heartbeat_renews_the_lease_and_notices_a_takeover(storage: Storage) -> None:
    held = storage.lock("lock", {"run": "mine"}, limit_s=0.06).acquire()
    lease = next(entry for entry in storage.list("lock") if entry.name.endswith(".json"))
    for _ in range(1000):
        if next(e for e in storage.list("lock") if e.name == lease.name).mtime > lease.mtime:
            break
        held._stop.wait(0.01)
    else:
        pytest.fail("no heartbeat in 10 s")
    assert held._thread is not None
    until = time.monotonic() + 10
    while held._thread.is_alive() and time.monotonic() < until:
        storage.delete(f"lock/{lease.name}")  # again, in case a heartbeat in progress has rewritten it
        held._thread.join(timeout=0.5)
    with pytest.raises(StorageLocked, match="taken over"):
        held.check()
    held.release()
    assert storage.list("lock") == []


def test_what_is_shown_of_a_place_is_found_again_with_its_password() -> None:
    root = "s3://KEY:secret@bucket/runs?region=eu&access_key=another"
    below = Storage(root).child("one/trials/0001")
    assert below.display == "s3://bucket/runs/one/trials/0001?region=eu&access_key=***"
    assert Storage.shown_as(below.display, root).uri == below.uri
    for other in ("s3://KEY:secret@other/runs", "s3://KEY:secret@bucket/runs/one/trials/00", "/runs", ""):
        assert Storage.shown_as(below.display, other).uri == below.display
    assert Storage.shown_as("/runs/one", "/runs").uri == "/runs/one"


def test_ray_gets_no_password() -> None:
    whole = Storage("s3://KEY:secret@bucket/runs/one?region=eu-west-1")
    arguments = whole.for_ray()
    assert arguments["storage_path"] == "bucket/runs/one"
    assert arguments["storage_filesystem"].region == "eu-west-1"
    assert Storage("s3://bucket/runs").for_ray() == {"storage_path": "s3://bucket/runs"}
