"""A session from its start to its end: commands given beforehand, then a person, a pipe, or nobody."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vmexit.commands import registry
from vmexit.commands.session import Session
from vmexit.commands.tokens import commands_of
from vmexit.console.feed import Feed
from vmexit.console.guest_output import GuestOutput
from vmexit.console.interrupts import InterruptedCommandsError, Interrupts
from vmexit.console.record import EVERYTHING, RecordTo, Tape
from vmexit.console.render import error_text, exit_text
from vmexit.console.screen import Screen
from vmexit.debugger import Debugger, State, StopReason
from vmexit.errors import CommandError, TargetError, VmexitError
from vmexit.guest.system import Help
from vmexit.targets.attach import Attached
from vmexit.targets.base import Target
from vmexit.targets.kvm import Vmm
from vmexit.targets.process import OutputTo
from vmexit.targets.qemu import DEFAULT_QEMU, TCG, Qemu

_POLL_S = 0.05
_NAP_S = 0.01
_MORE_INPUT_S = 0.3
"""How long a pipe may take to bring another command when the machine has ended."""


@dataclass(frozen=True, slots=True)
class GivenCommand:
    """A command that was given on the command line or in a file."""

    text: str
    source: str
    """"-x", or the file's name."""
    line: int | None = None
    """In the file, from 1."""

    def place_of(self, error: VmexitError) -> str:
        """What stands before the error's message: "boot.vmx:3"."""
        if self.line is None:
            return self.source
        offset = self.text.count("\n", 0, error.start) if isinstance(error, CommandError) else 0
        return f"{self.source}:{self.line + offset}"


@dataclass(frozen=True, slots=True)
class Options:
    """What ``vmexit run`` or ``vmexit attach`` was told."""

    arguments: Sequence[str] = ()
    """The VMM's."""
    commands: Sequence[GivenCommand] = ()
    batch: bool = False
    qemu: str = DEFAULT_QEMU
    given: Help = field(default_factory=Help)
    """Files that help to recognise the guest."""
    recognises: bool = True
    """Whether it is recognised by itself."""
    accelerator: str = TCG
    vmm: str | None = None
    """Another VMM than QEMU."""
    pid: int | None = None
    """A VMM that runs already; then there are no arguments."""
    watch: bool = False
    """That VMM is only looked at, through the kernel's tracepoints; without a ``pid`` the live host is."""
    record: RecordTo | None = None
    """Traps go into a file; nobody types anything then (``batch``)."""

    @property
    def kind(self) -> str:
        """Which of run, attach, watch and host it is."""
        return ("host" if self.pid is None else "watch") if self.watch else "run" if self.pid is None else "attach"

    def target(self, output: OutputTo, stdin: int | None) -> Target:
        """The machine. Raises UsageError and TargetError, with the reason, where there is none to be had."""
        if self.watch:
            from vmexit.targets.tracefs import Host, Watched

            return Host() if self.pid is None else Watched(self.pid)
        if self.pid is not None:
            return Attached(self.pid)
        if self.vmm is not None:
            return Vmm(self.vmm, self.arguments, output=output, stdin=stdin)
        return Qemu(self.arguments, qemu=self.qemu, accelerator=self.accelerator, output=output, stdin=stdin)


def run(options: Options) -> int:
    """Runs a session; gives the exit status of vmexit. Of a machine that it has started nothing is left then.

    Raises UsageError and TargetError where there is no machine to be had, OutputGoneError, KeyboardInterrupt, TerminatedError.
    """
    has_person = not options.batch and os.isatty(0)
    has_prompt = has_person and os.isatty(1) and os.environ.get("TERM", "dumb") != "dumb"
    interrupts = Interrupts()
    with interrupts.handled(), contextlib.ExitStack() as held:
        tape = Tape(options.record) if options.record else None
        if tape is not None:
            held.callback(tape.close)
        screen = _prompt_screen() if has_prompt else Screen()
        # Nobody else reads a pipe in batch mode, so the guest may have it.
        stdin = None if options.batch and not os.isatty(0) else subprocess.DEVNULL
        output = GuestOutput()
        try:
            target = options.target(output, stdin)
        except VmexitError:
            while output.first_time() is not None:  # "-device help"
                screen.guest(*output.take())
            raise
        with Debugger(target) as debugger:
            try:
                if tape is not None:
                    tape.watch(debugger, target=options.kind, arguments=tuple(options.arguments))
                return _Run(options, target, debugger, screen, output, interrupts, has_person, has_prompt, tape).run()
            finally:
                output.release()


def _prompt_screen() -> Screen:
    # The library for prompts takes a while to load.
    from vmexit.console.prompt import PromptScreen

    return PromptScreen()


class _Run:
    """One session. It drives commands that nobody types while the machine runs."""

    def __init__(
        self,
        options: Options,
        target: Target,
        debugger: Debugger,
        screen: Screen,
        output: GuestOutput,
        interrupts: Interrupts,
        has_person: bool,
        has_prompt: bool,
        tape: Tape | None = None,
    ) -> None:
        self._tape = tape
        self._options = options
        self._target = target
        self._debugger = debugger
        self._screen = screen
        self._interrupts = interrupts
        self._has_person = has_person
        self._has_prompt = has_prompt
        self._session = Session(debugger, screen.write, self)
        self._session.guest.given = options.given
        if not options.recognises:
            debugger.recognition.enabled = False
        self._session.records = tape is not None
        self._output = output
        self._feed = Feed(self._session, screen, output, shows_records=tape is None)
        self._leaving = False
        self._was_interrupted = False
        interrupts.on_noted = self._feed.hurry
        interrupts.are_noted = has_person or tape is not None
        interrupts.ends_are_noted = tape is not None

    # ---- driving ----

    def go(self) -> None:
        """Lets the machine run and waits until it halts, which one that is only looked at never does by itself."""
        self._debugger.go()
        if self._target.only_looks is None:
            self._work_while(lambda: self._debugger.state is State.RUNNING)

    def pause(self) -> None:
        """Halts the machine and waits for that."""
        self._debugger.pause()
        self._work_while(lambda: self._debugger.state is State.RUNNING)

    def sleep(self, seconds: float) -> None:
        """Waits."""
        deadline = time.monotonic() + seconds
        self._work_while(lambda: time.monotonic() < deadline)

    def leave(self) -> None:
        """Ends the session."""
        self._leaving = True

    def clear(self) -> None:
        """Clears the screen."""
        self._screen.clear()

    def _work_while(self, goes_on: Callable[[], bool]) -> None:
        """Shows what happens until that is over, or until Ctrl-C has halted the machine (InterruptedCommandsError)."""
        while goes_on() and not self._interrupts.noted:
            if self._debugger.state is State.RUNNING:
                self._feed.work(_POLL_S)
            else:
                time.sleep(_NAP_S)
        self._feed.flush()
        if self._interrupts.noted:
            if self._debugger.state is State.RUNNING:
                self._debugger.pause()
            while self._debugger.state is State.RUNNING:
                self._feed.work(_POLL_S)
            self._interrupts.noted = False
            raise InterruptedCommandsError

    # ---- the session ----

    def run(self) -> int:
        """All of it; gives the exit status."""
        try:
            if self._target.found_running is not None:
                self._debugger.recognition.at_attach()
                self._feed.flush()
            if not self._carry_out_given():
                return 1
            if self._tape is not None:
                self._start_recording()
            if (self._options.commands or self._options.batch) and not self._leaving and not self._target.wants_halted:
                self._start()
        except InterruptedCommandsError:
            self._screen.error("interrupted: the commands that were still to come are left out")
            self._leaving = self._was_interrupted = self._tape is not None
        if not self._leaving and self._debugger.state is not State.ENDED:
            if self._options.batch:
                self._go_to_the_end()
            elif self._has_prompt:
                self._type()
            else:
                self._read()
        return self._end()

    def _start_recording(self) -> None:
        """Every write is wanted where nothing else is; says how it is ended."""
        assert self._tape is not None
        if not len(self._debugger.events) and not self._leaving:
            registry.execute(self._session, EVERYTHING)
        self._tape.begin()
        if os.isatty(2):
            self._screen.error("recording; Ctrl-C ends it")

    def _start(self) -> None:
        if self._debugger.started_ns is None:
            self._debugger.go()

    def _carry_out_given(self) -> bool:
        """Whether all commands that were given have worked."""
        for command in self._options.commands:
            try:
                registry.execute(self._session, command.text)
            except VmexitError as error:
                self._screen.error(error_text(error, command.place_of(error), colour=self._screen.colour))
                return False
            finally:
                self._feed.flush()
            if self._leaving:
                break
        return True

    def _go_to_the_end(self) -> None:
        """Without anybody to ask: what breaks is shown and goes on."""
        debugger = self._debugger
        if self._options.batch and debugger.state is State.HALTED and debugger.started_ns is None:
            self._screen.error("the machine is halted, as -S asks for; it runs once another monitor continues it")
        while debugger.state is not State.ENDED:
            self._feed.work(_POLL_S)
            if self._tape is not None and (self._interrupts.noted or self._tape.is_over):
                self._take_the_rest()
                return
            # Where two vCPUs have stopped at once, the first ``go`` only brings the second stop.
            while (stop := debugger.stop) is not None and stop.reason is StopReason.BREAK:
                debugger.go()
                self._feed.flush()
            if stop is not None and stop.reason is StopReason.SHUTDOWN:
                return

    def _take_the_rest(self) -> None:
        """Nothing that has happened up to now is to be missing: the machine is halted, and all records are taken."""
        self._leaving, self._was_interrupted = True, self._interrupts.noted
        with contextlib.suppress(TargetError):  # it does not halt: what is there is there
            self._debugger.wait_until_halted()
        self._feed.flush()

    def _type(self) -> None:
        """A person types at the prompt."""
        from vmexit.console.prompt import Interactive, PromptScreen

        assert isinstance(self._screen, PromptScreen)
        self._hint()
        Interactive(self._session, self._screen, self._feed).run()

    def _hint(self) -> None:
        if self._target.only_looks is not None:
            if not self._options.commands:
                what = "'!msrwrite log' prints what is written, '!msrread log' what is read; 'help' lists the commands"
                self._screen.write(f"{self._target.name}, only looked at: {what}")
        elif self._debugger.started_ns is None:
            self._screen.write("the machine is halted before its first instruction; 'g' starts it, 'help' lists the commands")

    def _read(self) -> None:
        """Commands come line by line, from a pipe or from a terminal that is not good enough for a prompt."""
        lines = _Lines()
        if self._has_person:
            self._hint()
        asked = False
        while not self._leaving:
            if self._has_person and not asked:
                self._screen.ask("" if self._debugger.state is State.RUNNING else f"{self._debugger.core:x}: vmexit> ")
                asked = True
            try:
                if self._debugger.state is State.RUNNING:
                    self._work_while(lambda: self._debugger.state is State.RUNNING and not lines.are_there)
                command = lines.next(_POLL_S if self._debugger.state is not State.ENDED else _MORE_INPUT_S)
                if command is None:
                    break
                asked = False
                registry.execute(self._session, command)
            except queue.Empty:
                if self._debugger.state is State.ENDED:
                    return
                self._notice_the_end()
            except InterruptedCommandsError:
                asked = False
            except VmexitError as error:
                self._screen.error(error_text(error, colour=self._screen.colour))
            finally:
                self._feed.flush()
        if not self._leaving and self._debugger.started_ns is not None and self._debugger.state is not State.ENDED:
            # Nothing more will come: there is nobody to stop for.
            with contextlib.suppress(VmexitError):
                self._debugger.go()
            self._go_to_the_end()

    def _notice_the_end(self) -> None:
        """A halted machine can end too, and somebody else can let it run."""
        self._feed.work()
        self._interrupts.noted = False  # there was nothing to halt

    def _end(self) -> int:
        """Says how it ended; gives the exit status."""
        reason = self._debugger.stop.reason if self._debugger.stop is not None else None
        has_ended = reason is StopReason.ENDED  # and was not let go of
        has_shut_down = reason is StopReason.SHUTDOWN
        self._feed.finish()
        # From here on Ctrl-C means that it is to be over at once.
        self._interrupts.are_noted = False
        self._output.release()
        self._debugger.close()
        self._feed.flush()
        if self._tape is not None:
            self._screen.error(self._tape.end(self._why(), self._target.exit_status if has_ended else None))
            self._interrupts.raise_noted_end()
        if not has_ended and not (has_shut_down and not self._leaving):
            return 0
        status = self._target.exit_status
        self._screen.error(exit_text(status, self._target.vmm))
        return 0 if status is None else status if status >= 0 else 128 - status

    def _why(self) -> str:
        """Why a recording ends."""
        stop = self._debugger.stop
        if stop is not None and stop.reason is StopReason.ENDED:
            return "the machine ended"
        if stop is not None and stop.reason is StopReason.SHUTDOWN and not self._leaving:
            return "the guest shut down"
        return "interrupted" if self._was_interrupted else "the recording was ended"


class _Lines:
    """Reads commands from standard input in a thread of its own."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="vmexit-stdin", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), open(0, encoding="utf-8", errors="replace", closefd=False) as stdin:
            for _, command in commands_of(stdin):
                self._commands.put(command)
        self._commands.put(None)

    @property
    def are_there(self) -> bool:
        """Whether there is a command, or the end."""
        return not self._commands.empty()

    def next(self, timeout: float) -> str | None:
        """The next command; None at the end. Raises queue.Empty when none comes in time."""
        return self._commands.get(timeout=timeout)
