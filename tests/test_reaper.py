"""The reaper kills the given processes when its owner is killed, and nothing when it is dismissed."""

from __future__ import annotations

import subprocess
import sys

from raytrainer.core.reaper import Reaper

OWNER = """
import sys
from raytrainer.core.reaper import Reaper
reaper = Reaper([int(sys.argv[1])])
print("ready", flush=True)
sys.stdin.read()
"""


def test_kills_when_its_owner_is_killed() -> None:
    victim = subprocess.Popen(["sleep", "60"])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(victim.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    assert victim.poll() is None
    owner.kill()
    owner.communicate()
    assert victim.wait(10) == -9


def test_a_dismissed_reaper_kills_no_process() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    reaper = Reaper([bystander.pid])
    reaper.dismiss()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
