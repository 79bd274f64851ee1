"""Counting requests to stop."""

import signal
import threading

import pytest

from minimind.signals import Interrupts, count_interrupts, raise_on_second


def test_signals_are_counted_and_handlers_restored() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with count_interrupts() as interrupts:
        assert interrupts.count == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.count == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_callback_gets_the_count() -> None:
    counts: list[int] = []
    with count_interrupts(counts.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert counts == [1, 2]


def test_second_signal_can_raise_keyboard_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), count_interrupts(raise_on_second) as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.count == 1
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.count == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_install_no_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    results: list[Interrupts] = []

    def work() -> None:
        with count_interrupts() as interrupts:
            results.append(interrupts)
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [Interrupts(0)]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_closed_terminal_is_counted_unless_nohup_ignores_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for handler, count in ((signal.SIG_IGN, 0), (signal.SIG_DFL, 1)):
            signal.signal(signal.SIGHUP, handler)
            with count_interrupts() as interrupts:
                signal.raise_signal(signal.SIGHUP)
            assert interrupts.count == count
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
