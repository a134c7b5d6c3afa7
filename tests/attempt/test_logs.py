"""Tests of the logs of driver and ranks, in local and remote storage: each attempt appends to the earlier logs."""

from __future__ import annotations

import pytest

from raytrainer.attempt import Logs
from raytrainer.progress import Display
from raytrainer.storage import Storage


@pytest.mark.parametrize("storage", ["local", "pyarrow"], indirect=True)
def test_attempts_follow_each_other(storage: Storage) -> None:
    for attempt in ("first", "second"):
        with Logs(storage, Display()) as logs:
            logs.text_of("driver", f"the {attempt} attempt")
            if attempt == "first":
                logs.text_of("rank-0", "of a rank that the second has not")
    assert storage.read_bytes("logs/driver.log").decode().splitlines() == ["the first attempt", "the second attempt"]
    assert storage.exists("logs/rank-0.log")
