"""Signals to the launching process, here sent to this one: which of them end it, with which exit code, and which do not
count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import Stopped


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_each_signal_has_its_code(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, Interrupts():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) == before


def test_further_hangups_do_not_force_the_end() -> None:
    """A shell sends a hangup to its jobs when it gets one, and the kernel sends another when the shell ends."""
    with Interrupts() as interrupts:
        interrupts.deferred = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert (interrupts.count, interrupts.exit_code) == (1, 129)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)  # another kind of signal forces the end
        assert interrupts.exit_code == 129


def test_a_hangup_that_is_ignored_at_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        interrupts.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupts.requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("ignored", [True, False])
def test_the_program_itself_takes_a_hangup_unless_nohup_started_it(ignored: bool) -> None:
    program = """
import os, signal, sys
from raytrainer import __main__, cli
def main():
    os.kill(os.getpid(), signal.SIGHUP)
    return 7
cli.main = main
__main__.entry()
"""
    handling = signal.SIG_IGN if ignored else signal.SIG_DFL
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, handling)
    )
    assert ended.returncode == (7 if ignored else 129)


def test_what_ray_starts_does_not_get_a_hangup_and_ours_is_taken_afterwards() -> None:
    from raytrainer.ray_internals.cluster import _our_signals

    with Interrupts() as interrupts:
        interrupts.deferred = True
        with _our_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            child = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True, text=True, check=True)
            assert int(child.stdout.split()[1], 16) & 1 << (signal.SIGHUP - 1)
        assert interrupts.exit_code == 129
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
