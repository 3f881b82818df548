"""A VMM's process that vmexit has started: what it writes, whether it lives, and how it is ended."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from vmexit.errors import TargetError
from vmexit.output import OutputReader

OutputTo = Callable[[str, bytes], None]
"""Called with "stdout" or "stderr" and what the VMM wrote there; from threads of their own."""

_QUIT_S = 3.0
_SETTLE_S = 0.3
"""At most: on a busy machine what is read takes its time, and who reads may itself wait for us where a guest prints very much."""


class Process:
    """A running VMM. What it says on standard error is kept back until ``started``: it may be why it does not start."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: OutputTo | None,
        stdin: int | None,
        pass_fds: Sequence[int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``output``: what gets standard output and error; None: they are the caller's own. ``environment``: what is added to it.

        Raises TargetError where it cannot be started.
        """
        self._output = output
        self._errors: list[bytes] = []
        self._starting = True
        self._starting_lock = threading.Lock()
        self._readers: list[OutputReader] = []
        self._end_told = False
        self._closed = False
        try:
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE if output is not None else None,
                stderr=subprocess.PIPE,
                pass_fds=pass_fds,
                env={**os.environ, **environment} if environment else None,
                # The terminal's Ctrl-C is for the debugger, not for the machine.
                start_new_session=True,
            )
        except OSError as error:
            raise TargetError(f"{command[0]} cannot be started: {error.strerror}") from None
        self.pidfd = os.pidfd_open(self._process.pid)
        """Readable once the process has ended."""
        if output is not None and self._process.stdout:
            self._readers.append(OutputReader(self._process.stdout, lambda data: output("stdout", data)))
        if self._process.stderr:
            self._readers.append(OutputReader(self._process.stderr, self._on_stderr))

    def _on_stderr(self, data: bytes) -> None:
        with self._starting_lock:
            if self._starting:
                self._errors.append(data)
                return
        if self._output is not None:
            self._output("stderr", data)
        else:
            with contextlib.suppress(OSError):
                os.write(2, data)

    def started(self) -> None:
        """What it has warned of so far was no reason not to start, so the user gets to see it."""
        with self._starting_lock:
            self._starting = False
        if self._errors:
            self._on_stderr(b"".join(self._errors))

    @property
    def said(self) -> str:
        """What it has written on standard error before it had started."""
        return b"".join(self._errors).decode(errors="replace")

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """0 to 255, or minus the number of the signal that ended it; None while it lives."""
        return self._process.poll()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and (left := deadline - time.monotonic()) > 0:
            select.select([self.pidfd], [], [], left)
        return self._process.returncode is not None

    def settle(self) -> None:
        """Has what it has written by now passed on, or most of it."""
        for reader in self._readers:
            reader.settle(_SETTLE_S)

    def has_ended(self) -> bool:
        """Whether it has ended since this was last asked; all that it has written is passed on then."""
        if self._process.poll() is None or self._end_told:
            return False
        self._end_told = True
        self._finish_output()
        return True

    def _finish_output(self) -> None:
        for reader in self._readers:
            reader.finish()

    def release(self) -> None:
        """Lets it live on, as nobody's child. Does nothing after ``close``, as ``close`` does nothing after this."""
        if not self._closed:
            self._closed = True
            self._process.returncode = 0  # Python would warn of a child that it has lost
            os.close(self.pidfd)

    def close(self, ask: Callable[[], bool]) -> None:
        """Ends it: by asking, by SIGTERM, by SIGKILL; ``ask`` says whether there is anything to wait for then.

        An exception in the meantime (Ctrl-C again) makes it SIGKILL at once.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._process.poll() is None and ask():
                self.wait(_QUIT_S)
            if self._process.poll() is None:
                self._process.terminate()
                self.wait(_QUIT_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._finish_output()
            os.close(self.pidfd)
