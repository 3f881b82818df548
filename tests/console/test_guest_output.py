"""Tests of keeping what the machine prints."""

from __future__ import annotations

import threading
import time

from vmexit.console.guest_output import GuestOutput


def test_pieces_come_out_in_order_with_their_times() -> None:
    output = GuestOutput()
    assert output.first_time() is None
    before = time.monotonic_ns()
    output("stdout", b"one")
    between = time.monotonic_ns()
    output("stderr", b"two")
    first = output.first_time()
    assert first is not None and before <= first <= between
    assert output.take() == ("stdout", b"one")
    second = output.first_time()
    assert second is not None and second >= between
    assert output.take() == ("stderr", b"two")
    assert output.first_time() is None


def brought_by(output: GuestOutput, pieces: int) -> threading.Thread:
    """A thread that brings so many pieces of a megabyte."""

    def bring() -> None:
        for _ in range(pieces):
            output("stdout", bytes(1 << 20))

    thread = threading.Thread(target=bring)
    thread.start()
    return thread


def test_whoever_brings_too_much_waits() -> None:
    output = GuestOutput()
    thread = brought_by(output, 4)
    thread.join(0.2)
    assert thread.is_alive()
    for _ in range(4):
        while output.first_time() is None:
            time.sleep(0.01)
        output.take()
    thread.join(60)
    assert not thread.is_alive()


def test_nobody_waits_when_nobody_takes_any_more() -> None:
    output = GuestOutput()
    thread = brought_by(output, 4)
    thread.join(0.2)
    output.release()
    thread.join(60)
    assert not thread.is_alive()
