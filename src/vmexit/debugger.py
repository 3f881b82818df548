"""The debugger: the one object that a console, a file of commands or a Python program drives."""

from __future__ import annotations

import contextlib
import enum
import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Unpack

from vmexit.dispatch import Dispatch
from vmexit.errors import LinkError, TargetError, VmexitError
from vmexit.events.event import Callback, Event
from vmexit.events.table import EventTable
from vmexit.guest.disassembly import Mode, mode_of
from vmexit.guest.linux.recipe import Recipe
from vmexit.guest.system import CodeMap
from vmexit.guest_view import GuestView
from vmexit.hooks import HookOptions, Msr, make_event
from vmexit.lines import Columns
from vmexit.link.client import RequestError
from vmexit.link.rings import Records
from vmexit.link.wire import Access, Action, Status
from vmexit.names import Names
from vmexit.outputs import Outputs
from vmexit.outputs.kinds import Machine
from vmexit.program import Program, check
from vmexit.recognition import Recognition
from vmexit.script.compile import CompiledScript, Compiler
from vmexit.script.runtime import DEFAULT_STACK, DEFAULT_STEPS, Runtime, check_limits
from vmexit.targets.base import Notice, NoticeKind, Target
from vmexit.trap import Registers, Trap

# How long the debugger sleeps when nothing calls it: records that need not be seen at once wait no longer than this.
_POLL_S = 0.05
_HALT_S = 20.0
_SPIN_S = 0.0005
_RECORD = int(Action.RECORD)
_NOTICES_S = 0.01


class State(enum.Enum):
    """Of the machine."""

    RUNNING = "running"
    HALTED = "halted"
    ENDED = "ended"


class StopReason(enum.Enum):
    """Why a machine does not run."""

    START = "before its first instruction"
    BREAK = "an event broke"
    PAUSED = "it was paused"
    SHUTDOWN = "the guest has shut down"
    ENDED = "its VMM has ended"
    CONDITION = "the condition to run until has come true"
    TIMEOUT = "the time to run has passed"


@dataclass(frozen=True, slots=True)
class Stop:
    """A machine that has stopped, or ended."""

    reason: StopReason
    trap: Trap | None = None
    """What broke, with StopReason.BREAK."""
    exit_status: int | None = None
    """Of the VMM, with StopReason.ENDED; minus a signal's number if that ended it."""


class Overflow(enum.Enum):
    """What happens when records come faster than they are taken."""

    WAIT = "wait"
    """The vCPU waits; nothing is lost."""
    DROP = "drop"
    """Records are dropped and counted; questions and breaks are not."""


class Debugger:
    """Drives one machine.

    Thread-safe, with one exception: only one thread at a time may let it work (``run``, ``traps``, ``pump``). Callbacks and
    listeners are called by that thread. Methods that ask the machine for something raise LinkError or TargetError when it is
    gone.
    """

    def __init__(self, target: Target) -> None:
        """Takes over the target, and closes it with itself: what vmexit has started is ended then, what it has found goes on."""
        self.target = target
        self.events = EventTable()
        self.lock = threading.RLock()
        self.state = State.HALTED
        self.stop: Stop | None = Stop(StopReason.START)
        self.core = 0
        """The vCPU that registers and memory are taken from unless another is named."""
        self.on_stop: Callable[[Stop], None] | None = None
        """Called when a running machine has stopped or ended."""
        self.on_notice: Callable[[Notice], None] | None = None
        """Called for what the machine tells of itself and that is no stop: a reset, a panic."""
        self.outputs = Outputs(self._told_of, lambda: self.overflow is Overflow.WAIT)
        """Where results go besides: files, sockets, modules ... An event names those that are its own."""
        self.at_close: list[Callable[[], None]] = []
        """Called once, before the debugger lets go of the machine; not under its lock."""
        self.guest = GuestView(self)
        """What is known of the system that runs in the guest."""
        self.names = Names(self)
        self.recognition = Recognition(self)
        self.compiler = Compiler(lambda name: self.guest.symbol(name))
        """Of the session's scripts, which share their global variables."""
        self.script_steps = DEFAULT_STEPS
        self.script_stack = DEFAULT_STACK
        """What a run may take; see set_script_limits."""
        self.attached: int | None = None
        """The process that events are about which are made without naming one; None: all of them."""
        self.code_failures = 16
        """So many runs of an event's machine code that fail in a row disable it; 0: none do."""
        self.started_ns: int | None = None
        """When the machine first ran, by the clock of Trap.time_ns; None: it has not."""
        self.overflow = Overflow.DROP if target.only_looks else Overflow.WAIT
        self._evaluating: Runtime | None = None
        self._columns: Columns | None = None
        self._rings = target.link.rings
        self._program = Program(target.link, self.events)
        self._dispatch = Dispatch(self, self._program, self._rings)
        self.summary = self._dispatch.summary
        """The MSRs of all traps so far, and of each how often, by which cores and with which values."""
        self.callers = self._dispatch.callers
        """Where the functions return to that traps were in."""
        self.thread_names = self._dispatch.thread_names
        """Of the guest's threads that traps have named."""
        self.listeners = self._dispatch.listeners
        self.record_listeners = self._dispatch.record_listeners
        self.print_listeners = self._dispatch.print_listeners
        self.tell_records = self._dispatch.tell_records
        self._shut_down = False
        self._halting = False
        self._look_for_notices = 0.0
        if target.found_running is not None:
            self._note_start()
            self.stop = None if target.found_running else Stop(StopReason.PAUSED)
            self.state = State.RUNNING if target.found_running else State.HALTED

    # ---- coming and going ----

    def __enter__(self) -> Debugger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def detach(self) -> None:
        """Lets go of the machine, which runs on by itself. Another debugger can attach to it."""
        with self.lock:
            self._check_alive()
            self._take_rest()
            self.state = State.ENDED
            self.target.detach()
        self.outputs.finish()

    def close(self) -> None:
        """Ends a machine that vmexit has started, and nothing of it is left behind; lets go of any other.

        Outputs have some seconds to deliver what is waiting; what is left they count.
        """
        while self.at_close:
            self.at_close.pop()()
        with self.lock:
            self._take_rest()
            self.state = State.ENDED
            self.target.close()
        self.outputs.finish()

    def _take_rest(self) -> None:
        """What outputs are still to be told."""
        if self.state != State.ENDED and len(self.outputs):
            with contextlib.suppress(VmexitError):
                self._drain()

    def _told_of(self) -> Machine:
        """What outputs are told of the machine."""
        return Machine(self.target.name, self.target.pid or 0, self._lines, self.names)

    def _lines(self, records: Records) -> str:
        """Traps as lines of text, as the console has them."""
        if self._columns is None:
            self._columns = Columns(self.started_ns, names=self.names)
        return self._columns.lines(records)

    # ---- events ----

    def add(self, event: Event) -> Event:
        """Takes in an event; it holds from the next instruction on. Raises VmexitError, with the reason, if it cannot be."""
        with self.lock:
            self._check(event)
            self.events.add(event)
            self._rings.clear_hits(event.slot)
            try:
                self.outputs.join(event)
                self._push()
            except BaseException:
                self.outputs.leave(event)
                self.events.remove(event)
                raise
        return event

    def _check(self, event: Event) -> None:
        event.check()
        self._check_alive()
        target = self.target
        check(event, target.link.capabilities, target.vcpus, target.name, target.untrappable, target.only_looks)

    def on_msr_write(self, msr: Msr = None, callback: Callback | None = None, **options: Unpack[HookOptions]) -> Event:
        """Traps WRMSR: calls ``callback`` with each, runs a script or code, or all of it; else records it (hooks.HookOptions).

        Raises VmexitError where it cannot be, ScriptError and CodeError (two of these) for text that is no script or no code.
        """
        return self.add(make_event(self, Access.WRMSR, msr, callback, options))

    def on_msr_read(self, msr: Msr = None, callback: Callback | None = None, **options: Unpack[HookOptions]) -> Event:
        """Traps RDMSR; as on_msr_write. What was read is to be seen, and changed, in Stage.POST."""
        return self.add(make_event(self, Access.RDMSR, msr, callback, options))

    def enable(self, event: Event, enabled: bool = True) -> None:
        """Enables or disables an event, from the next instruction on."""
        with self.lock:
            self._program.sync()
            self._check_present(event)
            was, event.enabled = event.enabled, enabled
            try:
                self._push()
            except BaseException:
                event.enabled = was
                raise

    def rework(self, event: Event, **changes: object) -> None:
        """Makes an event another (action, callback, enabled, ...), from the next instruction on; or raises, and leaves it."""
        with self.lock:
            self._program.sync()
            self._check_present(event)
            before = {name: getattr(event, name) for name in changes}
            try:
                for name, change in changes.items():
                    setattr(event, name, change)
                self._check(event)
                self._push()
            except BaseException:
                for name, was in before.items():
                    setattr(event, name, was)
                raise

    def clear(self, event: Event) -> None:
        """Removes an event for good, from the next instruction on."""
        with self.lock:
            self._program.sync()
            self._check_present(event)
            self.events.remove(event)
            self._push()

    def _check_present(self, event: Event) -> None:
        if event.number not in self.events:
            raise VmexitError(f"there is no event {event.number:x} any more: it has been cleared")

    def hits(self, event: Event) -> int:
        """How often the event has been triggered."""
        return self._rings.hits(event.slot)

    def dropped(self) -> int:
        """Records that were dropped for want of room (Overflow.DROP)."""
        return self._rings.counters()[0]

    def waits(self) -> int:
        """How often a vCPU had to wait for room."""
        return self._rings.counters()[1]

    def set_overflow(self, overflow: Overflow) -> None:
        """Chooses what happens when records come faster than they are taken."""
        with self.lock:
            self.target.link.set_overflow(overflow == Overflow.DROP)
            self.overflow = overflow

    def set_script_limits(self, steps: int | None = None, stack: int | None = None) -> None:
        """Chooses what a run of a script may take: steps (turns of loops, calls, 64 bytes copied), bytes of the native stack.

        Holds from the next run on. Raises VmexitError for what makes no sense.
        """
        steps = self.script_steps if steps is None else steps
        stack = self.script_stack if stack is None else stack
        check_limits(steps, stack)
        with self.lock:
            if self.state != State.ENDED:
                self.target.link.set_script_limits(steps, stack)
            self.script_steps, self.script_stack = steps, stack

    def evaluate(self, script: str | CompiledScript) -> bytes:
        """Runs a script in the debugger, beside the machine, and gives what it prints.

        It shares its global variables with the scripts of events. Its registers and memory are those of the current core of a
        halted machine. Raises ScriptError for one that does not compile, ScriptRunError for a run that is ended.
        """
        printed = bytearray()
        self.run_script(self.compiler.compile(script) if isinstance(script, str) else script, printed.extend)
        return bytes(printed)

    def run_script(self, script: CompiledScript, write: Callable[[bytes], None]) -> None:
        """The same, with what it prints handed to ``write`` some of it at a time; also where the run is ended."""
        from vmexit.evaluation import evaluate

        evaluate(self, self._runtime, script, write)

    @property
    def _runtime(self) -> Runtime:
        if self._evaluating is None:
            self._evaluating = Runtime()
        return self._evaluating

    @property
    def knows_processes(self) -> bool:
        """Whether traps can tell which process of the guest executes them; until then events about one process wait."""
        return self._program.knows_processes or (self.target.only_looks is not None and self.target.only_looks.names_processes)

    def set_recipe(self, recipe: Recipe | None) -> None:
        """Says how to find the guest's current thread at a trap, or that this is not known any more (guest_view does)."""
        with self.lock:
            if self.state != State.ENDED and self.target.only_looks is None:
                self._program.set_recipe(recipe)

    def set_code(self, code: CodeMap | None) -> None:
        """Says how to find the caller of a function at a trap, or that this is not known any more (guest_view does)."""
        with self.lock:
            if self.state != State.ENDED and self.target.only_looks is None:
                self._program.set_code(code)

    def sync_events(self) -> None:
        """Takes over what scripts have made of the events (event_enable, event_disable, event_clear); ``pump`` does so, too."""
        with self.lock:
            self._program.sync()

    def set_own_event(self, event: Event | None) -> None:
        """The event by which the debugger itself asks (recognition); None: it does not."""
        with self.lock:
            if self._program.own is not event:
                self._program.own = event
                self._push()

    def _push(self) -> None:
        if self.state != State.ENDED:
            self._program.push()

    @property
    def is_running(self) -> bool:
        """Whether the machine runs."""
        return self.state == State.RUNNING

    @property
    def is_alive(self) -> bool:
        """Whether there is a machine."""
        return self.state != State.ENDED

    def _check_alive(self) -> None:
        if self.state == State.ENDED:
            raise TargetError("the machine has ended")

    # ---- registers and memory of a halted machine ----

    def registers(self, core: int | None = None) -> Registers:
        """A vCPU's registers, to be read and written while the machine is halted. Raises RequestError while it runs."""
        core = self._existing(core)
        with self.lock:
            self._check_alive()
            values = self.target.link.registers(core)

        def write(number: int, value: int) -> None:
            with self.lock:
                self.target.link.set_register(core, number, value)

        return Registers(values, write)

    def read_memory(self, core: int | None, address: int, length: int, *, physical: bool = False) -> bytes:
        """Guest memory by that vCPU's page tables. Raises RequestError while the machine runs, and for what is not mapped."""
        core = self._existing(core)
        with self.lock:
            self._check_alive()
            return self.target.link.read_memory(core, address, length, physical=physical)

    def write_memory(self, core: int | None, address: int, data: bytes, *, physical: bool = False) -> None:
        """Changes guest memory, read-only pages included."""
        core = self._existing(core)
        with self.lock:
            self._check_alive()
            self.target.link.write_memory(core, address, data, physical=physical)
            self.guest.forget()

    def read_msr(self, msr: int | str, core: int | None = None) -> int:
        """What RDMSR would give on that vCPU of a halted machine. Raises MsrError where it would fault, or nothing is known."""
        from vmexit.msr_access import read_msr

        return read_msr(self, msr, self._existing(core))

    def write_msr(self, msr: int | str, value: int, core: int | None = None) -> None:
        """Does what WRMSR would do on that vCPU of a halted machine. Raises MsrError where it would fault."""
        from vmexit.msr_access import write_msr

        write_msr(self, msr, value, self._existing(core))

    def code_mode(self, core: int | None = None) -> Mode:
        """How wide the code is that a vCPU executes, as far as CR0 and EFER tell (disassembly.mode_of)."""
        registers = self.registers(core)
        return mode_of(registers["cr0"], registers["efer"])

    def _existing(self, core: int | None) -> int:
        core = self.core if core is None else core
        if not 0 <= core < self.target.vcpus:
            raise VmexitError(f"there is no core {core:x}; this machine has {self.target.vcpus:x}")
        return core

    def decide(self, skip: bool) -> None:
        """Short-circuits, or executes after all, the instruction that the current core is stopped before."""
        with self.lock:
            self._check_alive()
            try:
                self.target.link.decide(self.core, skip)
            except RequestError as error:
                if error.status != Status.REFUSED:
                    raise
                raise VmexitError(
                    f"core {self.core:x} is not stopped before a trapped instruction (stage pre); there is nothing to decide"
                ) from None

    # ---- running ----

    def go(self) -> None:
        """Lets a halted machine run, or shows the next vCPU that has stopped at the same time. Does not wait.

        Where two vCPUs came to a break at once the machine is halted once; the second break becomes the next stop,
        before anything has run, unless its event has been disabled or cleared since.
        """
        with self.lock:
            self._check_alive()
            if self.state == State.RUNNING:
                return
            while self._dispatch.breaks:
                trap = self._dispatch.breaks.popleft()
                event = self.events.get(trap.event)
                if event is not None and event.enabled:
                    self._stopped(Stop(StopReason.BREAK, trap))
                    return
            if self._shut_down:
                raise TargetError("the guest has shut down; all that is left is to end it (.exit)")
            self.recognition.watch()
            self._note_start()
            self._halting = False
            self.state = State.RUNNING
            self.stop = None
            try:
                self.target.resume()
            except LinkError:
                pass  # it has ended in the meantime, which comes out when the debugger is let work
            except BaseException:
                self.state = State.HALTED
                self.stop = Stop(StopReason.PAUSED)
                raise

    def _note_start(self) -> None:
        if self.started_ns is None:
            self.started_ns = time.monotonic_ns()

    def pause(self) -> None:
        """Asks a running machine to halt. Does not wait: the stop comes while the debugger is let work."""
        with self.lock:
            self._check_alive()
            if self.state == State.RUNNING and not self._halting:
                self._halting = True
                self.target.halt()

    def run(self, until: Callable[[], bool] | None = None, timeout: float | None = None) -> Stop:
        """Lets the machine run until it stops, ends, ``until()`` is true, or ``timeout`` seconds have passed; gives which.

        The machine is halted when this returns. ``until`` is asked after each batch of records. An exception of a callback (and
        Ctrl-C) comes out of here; the machine then stands at the instruction that the callback was called for, which has not been
        executed yet (stage pre) and is unchanged.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.go()
        reason = None
        try:
            while self.state == State.RUNNING:
                if until is not None and until():
                    reason = StopReason.CONDITION
                    break
                left = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
                if left <= 0:
                    reason = StopReason.TIMEOUT
                    break
                self.pump(left)
        finally:
            self.wait_until_halted()
        assert self.stop is not None
        if reason is not None and self.stop.reason == StopReason.PAUSED:
            self.stop = Stop(reason)
        return self.stop

    def traps(self, timeout: float | None = None) -> Iterator[Trap]:
        """Lets the machine run and gives each record as it comes, until the machine stops, ends, or the time has passed.

        The machine is halted when the iteration ends, also by ``break``. A slow consumer slows the machine; nothing is lost.
        """
        batch: list[Trap] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        self.listeners.append(batch.extend)
        try:
            self.go()
            while self.state == State.RUNNING and (deadline is None or time.monotonic() < deadline):
                self.pump(_POLL_S if deadline is None else min(_POLL_S, max(0.0, deadline - time.monotonic())))
                yield from batch
                batch.clear()
        finally:
            self.wait_until_halted()
            self.listeners.remove(batch.extend)
        yield from batch

    def wait_until_halted(self) -> None:
        """Halts the machine if it runs, and works until it stands. Raises TargetError if it does not."""
        deadline = time.monotonic() + _HALT_S
        while self.state == State.RUNNING:
            self.pause()
            if time.monotonic() > deadline:
                raise TargetError(f"the machine did not halt within {_HALT_S:g} s")
            self.pump(_POLL_S)

    def pump(self, timeout: float = 0.0) -> None:
        """Works: takes what the machine has sent, calls callbacks and listeners, waits up to ``timeout`` seconds for more.

        An exception of a callback or listener comes out of here, once everything that was there is dealt with.
        """
        with self.lock:
            worked = self._work(patient=timeout > 0)
        if timeout > 0 and not worked and self.state != State.ENDED:
            if self._is_held_back():
                self.outputs.wait_for_room(min(timeout, _POLL_S))
            elif not self._is_called_soon():
                self._sleep(timeout)
            with self.lock:
                self._work()
        self._dispatch.raise_error()

    def _is_called_soon(self) -> bool:
        """Looks a moment for the next question after one was answered: that often comes before one could sleep and be woken."""
        if not self._dispatch.answered:
            return False
        self._dispatch.answered = False
        deadline = time.monotonic() + _SPIN_S
        while not self.target.link.closed and time.monotonic() < deadline:
            if self._rings.calls():
                return True
        return False

    def _sleep(self, timeout: float) -> None:
        link = self.target.link
        with self.lock:
            watched = self.target.filenos()
            if not link.closed:
                if not self._rings.before_sleep():
                    return
                watched += [self._rings.wake_fd, link.fileno()]
        try:
            select.select(watched, [], [], min(timeout, _POLL_S))
        except (OSError, ValueError):
            return  # closed by another thread in the meantime
        finally:
            with self.lock:
                if not link.closed:
                    self._rings.after_sleep()

    def _work(self, *, patient: bool = False) -> bool:
        """Deals with what is there; whether any of it was more than records, which nobody waits for.

        ``patient``: such records stay where they are for now, since many at a time cost little more than few.
        """
        if self.state == State.ENDED:
            return False
        # Where an output is full and nothing may be lost, the rings fill up too, and the vCPUs wait.
        stay = (patient and not self._rings.calls()) or self._is_held_back()
        actions = 0 if stay else self._drain()
        is_more = bool(actions & ~_RECORD)
        # Looking for notices takes some system calls, too many for every question.
        now = time.monotonic()
        if actions and now < self._look_for_notices:
            return is_more
        self._look_for_notices = now + _NOTICES_S
        self._program.sync()
        self._take_link_notices()
        notices = self.target.notices()
        for notice in notices:
            self._on_target_notice(notice)
        return is_more or bool(notices)

    def _is_held_back(self) -> bool:
        return self.state == State.RUNNING and not self._halting and self.outputs.hold_back()

    def _drain(self, *, final: bool = False) -> int:
        """Deals with the records that are there; their actions (Action), all together."""
        if self.target.link.closed:
            return 0
        question = self._rings.drain_question()
        if question is not None:
            return self._dispatch.take_question(question)
        records = self._rings.drain(final=final)
        return self._dispatch.take(records) if len(records) else 0

    def _take_link_notices(self) -> None:
        if self.target.link.closed:
            return
        try:
            self.target.link.handle_notices()
        except LinkError:
            self._link_is_gone()

    def _link_is_gone(self) -> None:
        """The VMM has ended or is about to; what it has left in the rings still counts."""
        self._drain(final=True)
        self.target.link.close()

    # ---- stops ----

    def _on_target_notice(self, notice: Notice) -> None:
        if notice.kind == NoticeKind.STOPPED:
            self._on_stopped()
        elif notice.kind == NoticeKind.RESUMED:
            self._on_resumed()
        elif notice.kind == NoticeKind.ENDED:
            self._on_ended()
        elif notice.kind == NoticeKind.SHUTDOWN:
            self._shut_down = True
            self._drain()  # the traps of before it
            self._notify(notice)
        else:
            self._dispatch.breaks.clear()
            if notice.kind == NoticeKind.RESET:
                with contextlib.suppress(LinkError):  # it has ended, which comes out elsewhere
                    self.guest.reset()
                self.recognition.reset()
            self._notify(notice)

    def _notify(self, notice: Notice) -> None:
        if self.on_notice is not None:
            with self._dispatch.keeping_errors():
                self.on_notice(notice)

    def _on_stopped(self) -> None:
        if self.state != State.RUNNING:
            return
        # A vCPU leaves its record before it halts the machine.
        self._drain()
        if self._shut_down:
            self._stopped(Stop(StopReason.SHUTDOWN))
        elif self._dispatch.breaks:
            self._stopped(Stop(StopReason.BREAK, self._dispatch.breaks.popleft()))
        else:
            self._stopped(Stop(StopReason.PAUSED))

    def _on_resumed(self) -> None:
        """By somebody else: another monitor, gdb. The debugger's own orders have changed the state already."""
        if self.state == State.HALTED:
            self._note_start()
            self._dispatch.breaks.clear()
            self.state = State.RUNNING
            self.stop = None

    def _on_ended(self) -> None:
        if not self.target.link.closed:
            self._link_is_gone()
        self._stopped(Stop(StopReason.ENDED, exit_status=self.target.exit_status))

    def _stopped(self, stop: Stop) -> None:
        self.state = State.ENDED if stop.reason == StopReason.ENDED else State.HALTED
        self.stop = stop
        if stop.trap is not None:
            self.core = stop.trap.core
        if self.on_stop is not None:
            with self._dispatch.keeping_errors():
                self.on_stop(stop)
