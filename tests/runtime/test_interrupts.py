"""Ctrl-C waits for what would be worse done by half."""

import signal
import threading

import pytest

from bagel_opt.runtime.interrupts import uninterrupted


@pytest.mark.parametrize(("times", "finished"), [(1, True), (2, False)])
def test_the_first_comes_afterwards_and_a_second_at_once(times, finished):
    before, done = signal.getsignal(signal.SIGINT), []

    def work():
        with uninterrupted():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            done.append(times)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert bool(done) == finished
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_signals():
    done = []

    def work():
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
