"""Outputs with real peers, under the load of a real guest's traps, some of them killed in mid-stream."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machines import guest
from tests.outputs.peers import SCRIPT, STAR, Peer, finish, lines, need_root, peers, wait_until
from vmexit import Debugger, Overflow, VmexitError
from vmexit.outputs import OutputState

COUNT = 20_000
DIES_AFTER = 30_000
"""Bytes of 340,000."""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: a socket's has 107 bytes at most."""
    return tmp_path_factory.mktemp("o")


def forward(debugger: Debugger, kind: str, *address: str) -> None:
    """Everything goes to one output, "out"."""
    debugger.outputs.create("out", kind, *address)
    debugger.outputs.open("out")
    debugger.on_msr_write(STAR, script=SCRIPT, outputs=("out",))


def check_counts(debugger: Debugger, sent: int, dropped: int = 0) -> None:
    """After the debugger was closed."""
    output = debugger.outputs["out"]
    assert (output.state, output.sent, output.waiting, output.dropped) == (OutputState.CLOSED, sent, 0, dropped)


@pytest.mark.parametrize("kind", ["tcp", "unix", "fifo"])
class TestPeers:
    """What reads from a pipe or serves a socket."""

    @staticmethod
    def start(kind: str, folder: Path, make: object, **options: object) -> tuple[Peer, str]:
        address = {"tcp": "0", "unix": str(folder / "s"), "fifo": str(folder / "p")}[kind]
        if kind == "fifo":
            os.mkfifo(address)
        peer: Peer = make(kind, address, folder / "first", **options)  # type: ignore[operator]
        return peer, f"127.0.0.1:{peer.address}" if kind == "tcp" else address

    def test_gets_everything_in_order(self, kind: str, folder: Path) -> None:
        with peers() as make, guest("loop", COUNT=COUNT) as (debugger, _, _):
            peer, address = self.start(kind, folder, make)
            forward(debugger, "namedpipe" if kind == "fifo" else kind, address)
            finish(debugger)
            debugger.close()
            wait_until(lambda: len(peer.got) >= COUNT * 17, "all of it")
            assert peer.got.splitlines() == lines(COUNT)
            check_counts(debugger, COUNT)

    def test_another_one_goes_on_where_one_was_killed(self, kind: str, folder: Path) -> None:
        with peers() as make, guest("loop", COUNT=COUNT) as (debugger, _, _):
            first, address = self.start(kind, folder, make, dies_after=DIES_AFTER)
            forward(debugger, "namedpipe" if kind == "fifo" else kind, address)
            debugger.run(until=lambda: first.process.poll() is not None, timeout=60)
            first.await_death()
            second = make(kind, first.address if kind == "tcp" else address, folder / "second")
            finish(debugger)
            debugger.close()
            last = lines(COUNT)[-1]
            wait_until(lambda: second.got.endswith(last + b"\n"), "the last line")
            one, two = first.got.splitlines(), second.got.splitlines()
            if kind == "fifo":  # what the first had not read stayed in the pipe
                assert (first.got + second.got).splitlines() == lines(COUNT)
                check_counts(debugger, COUNT)
                return
            # Each whole line is in one of them, in order; what the first may not have read is in both.
            whole = one if first.got.endswith(b"\n") else one[:-1]
            assert whole == lines(COUNT)[: len(whole)]
            assert two == lines(COUNT)[-len(two) :]
            missing = COUNT - len(whole) - len(two)
            if kind == "unix":
                assert missing <= 0
            else:  # TCP's word is only that the peer's kernel had it: 4 KB of it, as the kernel counts, were not read
                assert missing <= 64 * 1024 // 17
            check_counts(debugger, COUNT)

    def test_a_slow_one_makes_the_guest_wait(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmexit.outputs.output._MOST_BYTES", 100_000)
        with peers() as make, guest("loop", COUNT=30_000) as (debugger, _, _):
            peer, address = self.start(kind, folder, make, size=65536, pause=0.05)
            forward(debugger, "namedpipe" if kind == "fifo" else kind, address)
            # A reader that has not opened its pipe yet is one that never was there, for which no guest waits.
            wait_until(lambda: debugger.outputs["out"].trouble is None, "the reader")
            finish(debugger)
            debugger.close()
            wait_until(lambda: len(peer.got) >= 30_000 * 17, "all of it")
            assert peer.got.splitlines() == lines(30_000)
            check_counts(debugger, 30_000)

    def test_one_that_takes_nothing_costs_what_was_said(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmexit.outputs.output._MOST_BYTES", 100_000)
        monkeypatch.setattr("vmexit.outputs.outputs._FLUSH_S", 0.2)
        count = 60_000
        with peers() as make, guest("loop", COUNT=count) as (debugger, _, _):
            _, address = self.start(kind, folder, make, size=1, pause=3600.0)
            debugger.set_overflow(Overflow.DROP)
            forward(debugger, "namedpipe" if kind == "fifo" else kind, address)
            finish(debugger)
            debugger.outputs.finish(0.2)
            output = debugger.outputs["out"]
            assert output.dropped > 0 and output.waiting == 0
            # The agent may have dropped some, too, if the rings were full.
            assert output.sent + output.dropped + debugger.dropped() == count
            assert "not delivered" in "".join(debugger.outputs.news())


def test_nobody_there_does_not_stop_the_guest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmexit.outputs.output._MOST_BYTES", 100_000)
    with guest("loop", COUNT=COUNT) as (debugger, _, _):
        output = debugger.outputs.create("out", "unix", str(folder / "nobody"))
        debugger.outputs.open("out")
        assert output.trouble == "No such file or directory" and output.state is OutputState.OPENED
        debugger.on_msr_write(STAR, script=SCRIPT, outputs=("out",))
        finish(debugger)
        debugger.outputs.finish(0.1)
        check_counts(debugger, 0, COUNT)


def test_a_server_that_comes_later(folder: Path) -> None:
    with peers() as make, guest("loop", COUNT=COUNT) as (debugger, _, _):
        forward(debugger, "unix", str(folder / "s"))
        assert debugger.outputs["out"].trouble
        debugger.run(until=lambda: debugger.outputs["out"].waiting > 1000, timeout=60)
        peer = make("unix", str(folder / "s"), folder / "got")
        finish(debugger)
        debugger.close()
        wait_until(lambda: len(peer.got) >= COUNT * 17, "all of it")
        assert peer.got.splitlines() == lines(COUNT)
        check_counts(debugger, COUNT)


@contextlib.contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system with so much room."""
    need_root()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "vmexit-test", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class TestFiles:
    """Files, and disks that are full."""

    def test_a_full_disk_and_room_again(self, folder: Path) -> None:
        with small_file_system(folder, "200k") as disk, guest("loop", COUNT=COUNT) as (debugger, _, _):
            (disk / "ballast").write_bytes(bytes(100_000))
            forward(debugger, "file", str(disk / "log"))
            finish(debugger)
            output = debugger.outputs["out"]
            wait_until(lambda: output.trouble == "No space left on device", "the trouble")
            # Each further attempt writes half a line, and takes it back.
            wait_until(lambda: output.sent + output.waiting == COUNT, "each of them to be sent or to wait")
            wait_until(
                lambda: (disk / "log").read_bytes() == b"".join(line + b"\n" for line in lines(COUNT)[: output.sent]),
                "whole lines, those that were sent",
            )
            assert 0 < output.sent < COUNT
            wait_until(lambda: any("No space left" in line for line in debugger.outputs.news()), "what the user is told")
            (disk / "ballast").unlink()
            subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
            wait_until(lambda: output.waiting == 0, "everything to be written")
            debugger.close()
            assert (disk / "log").read_bytes().splitlines() == lines(COUNT)
            check_counts(debugger, COUNT)

    def test_a_disk_that_stays_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vmexit.outputs.output._MOST_BYTES", 100_000)
        with guest("loop", COUNT=COUNT) as (debugger, _, _):
            forward(debugger, "file", "/dev/full")
            started = time.monotonic()
            finish(debugger)
            debugger.outputs.finish(0.1)
            assert time.monotonic() - started < 60
            check_counts(debugger, 0, COUNT)

    def test_a_file_is_appended_to(self, folder: Path) -> None:
        path = folder / "log"
        path.write_bytes(b"before\n")
        with guest("loop", COUNT=10) as (debugger, _, _):
            forward(debugger, "file", str(path))
            finish(debugger)
        assert path.read_bytes().splitlines() == [b"before", *lines(10)]

    def test_a_file_that_was_renamed_is_made_again(self, folder: Path) -> None:
        path = folder / "log"
        with guest("loop", COUNT=COUNT) as (debugger, _, _):
            forward(debugger, "file", str(path))
            output = debugger.outputs["out"]
            debugger.run(until=lambda: output.sent > 100, timeout=60)
            path.rename(folder / "old")
            wait_until(path.exists, "a new file")
            finish(debugger)
            debugger.close()
            assert ((folder / "old").read_bytes() + path.read_bytes()).splitlines() == lines(COUNT)
            check_counts(debugger, COUNT)

    def test_a_file_that_cannot_be_written_to_is_refused(self, folder: Path) -> None:
        with guest("loop", COUNT=1) as (debugger, _, _):
            for address, what in ((folder, "is a folder"), (folder / "no" / "log", "there is no folder")):
                with pytest.raises(VmexitError, match=what):
                    debugger.outputs.create("out", "file", str(address))
