"""Whose thread it is, by made-up and by real /proc/N/status."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from vmexit.targets.host_threads import HostThreads

STATUS = b"Name:\t%s\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t%d\nNgid:\t0\nPid:\t%d\n"


class Proc:
    """Threads that come and go."""

    def __init__(self) -> None:
        self.threads: dict[int, tuple[int, bytes]] = {}

    def read(self, thread: int) -> bytes:
        if thread not in self.threads:
            raise FileNotFoundError(thread)
        process, name = self.threads[thread]
        return STATUS % (name, process, thread)


def looked(threads: HostThreads, *numbers: int) -> list[int | None]:
    """The process of each; None: unknown."""
    processes, known = threads.processes(np.array(numbers, np.uint32))
    return [int(process) if is_known else None for process, is_known in zip(processes, known, strict=True)]


def test_threads_that_come_and_go() -> None:
    proc = Proc()
    threads = HostThreads(proc.read)
    proc.threads = {10: (10, b"main"), 11: (10, b"worker")}
    assert looked(threads, 11, 10, 12, 0, 11) == [10, 10, None, 0, 10]
    assert threads.name(10, 11) == "worker" and threads.name(10, 10) == "main" and threads.name(0, 0) == "idle"
    assert threads.name(12, 12) is None
    # It has ended.
    del proc.threads[11]
    assert looked(threads, 11) == [10] and threads.name(10, 11) == "worker"
    # Another has its number.
    proc.threads[11] = (11, b"other \xff")
    assert looked(threads, 11) == [11] and threads.name(10, 11) is None and threads.name(11, 11) == "other \ufffd"


def test_no_sense() -> None:
    threads = HostThreads(lambda thread: b"Name:\tx\n")
    assert looked(threads, 10) == [None]


def test_this_process() -> None:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(threading.get_native_id()))
    thread.start()
    thread.join()
    threads = HostThreads()
    assert looked(threads, os.getpid(), threading.get_native_id()) == [os.getpid()] * 2
    assert threads.name(os.getpid(), os.getpid()) == Path("/proc/self/comm").read_text(encoding="utf-8").rstrip("\n")
