"""A task that is told to end unwinds its step."""

from __future__ import annotations

import os
import signal

import pytest

from cellferry.orchestration.cancellation import Cancelled, unwinding_when_cancelled


def end_oneself(number: int, seen: list[str], *, again: bool = False) -> None:
    with unwinding_when_cancelled():
        try:
            os.kill(os.getpid(), number)
            seen.append("went on")
        finally:
            if again:
                os.kill(os.getpid(), number)
            seen.append("unwound")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unwinds_the_block(number: signal.Signals) -> None:
    seen: list[str] = []
    with pytest.raises(Cancelled, match=number.name):
        end_oneself(number, seen)
    assert seen == ["unwound"]


def test_a_second_signal_does_not_interrupt_the_unwinding() -> None:
    seen: list[str] = []
    with pytest.raises(Cancelled):
        end_oneself(signal.SIGTERM, seen, again=True)
    assert seen == ["unwound"]


def test_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with unwinding_when_cancelled():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
