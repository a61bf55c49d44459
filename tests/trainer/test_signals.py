"""The first signal sets a flag; the second one ends the process."""

import os
import signal
import subprocess
import sys

import pytest

from trainer.signals import StopRequest


@pytest.mark.parametrize("signum", StopRequest.SIGNALS)
def test_a_signal_sets_the_flag_and_interrupts_nothing(signum):
    with StopRequest() as stop:
        assert not stop
        assert stop.exit_code == 0
        os.kill(os.getpid(), signum)
        assert stop
        assert stop.exit_code == 128 + signum
        assert str(stop) == signum.name


def test_a_signal_to_any_process_counts_from_the_second_poll_in_all():
    """The other process gets a signal after its second poll."""
    of_the_other, waits = [0, 0, signal.SIGUSR1], []

    def start_max(value):
        other = of_the_other.pop(0)
        return lambda: waits.append(value) or max(value, other)

    with StopRequest(start_max) as stop:
        assert [stop.poll() for _ in range(3)] == [False] * 3
        assert stop.poll()
        assert stop.poll()  # starts nothing
    assert stop.signum == signal.SIGUSR1
    assert len(waits) == 3


def test_a_clean_end_leaves_no_decision_under_way():
    waits = []
    with StopRequest(lambda value: lambda: waits.append(value) or value) as stop:
        stop.poll()
    assert waits == [0]


def test_an_error_does_not_wait_for_the_other_processes():
    def fail(stop):
        with stop:
            stop.poll()
            raise KeyError

    with pytest.raises(KeyError):
        fail(StopRequest(lambda value: lambda: pytest.fail("waited")))


def test_the_former_handlers_are_back_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_closed_terminal_or_a_scheduler_may_signal_twice_and_then_send_sigterm(signum):
    with StopRequest() as stop:
        for each in (signum, signum, signal.SIGTERM):
            os.kill(os.getpid(), each)
        assert str(stop) == signum.name


def test_a_sighup_that_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from trainer.signals import StopRequest\n"
        "with StopRequest():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=20, check=False)
    assert done.returncode == 128 + signal.SIGTERM
