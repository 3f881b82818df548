"""Recognises the guest without being asked: when its kernel sets LSTAR, and when the debugger comes to one that runs already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmexit.errors import LinkError, VmexitError
from vmexit.events.event import Event
from vmexit.events.msrs import MsrSet
from vmexit.link.wire import Access, Action, Capability
from vmexit.script.errors import ScriptError

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

LSTAR = 0xC000_0082
OWN = 0
"""The number on the wire of the debugger's own event, by which the agent asks."""

_NEEDED = Capability.READ | Capability.MEMORY
_MOST_FAILURES = 4
_MOST_ASKED = 256
"""So often the agent asks between two boots. A kernel writes LSTAR once a vCPU, and when it wakes up. One that does so all the
time is not to be slowed down."""


class Recognition:
    """Watches for the moment at which a kernel can be recognised first: where it says where SYSCALL is to go.

    The agent is asked for that by an event that no list shows, that has no number, and that is counted nowhere. Once it has been
    of no use it is taken away until the machine is reset.
    """

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self.on_line: Callable[[str], None] | None = None
        """Called with one line when something was found, and when nothing was."""
        self.line = ""
        """The last of these."""
        self.listeners: list[Callable[[], None]] = []
        """Called when another system is known than before, or none, while the guest can be looked at."""
        self._enabled = True
        self._event = Event(access=Access.WRMSR, msrs=MsrSet.of(LSTAR), action=Action.ASK, callback=lambda _: None, text="LSTAR")
        self._failed_at: set[int] = set()
        self._asked = 0

    @property
    def enabled(self) -> bool:
        """Whether the guest is recognised by itself; a command that needs it recognises it in any case."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self.reset()

    def reset(self) -> None:
        """Something else may begin to run now."""
        self._failed_at.clear()
        self._asked = 0
        self.watch()

    def watch(self) -> None:
        """Has the agent ask, where it can and that is wanted; else no longer."""
        can = self._debugger.target.only_looks is None and not _NEEDED & ~self._debugger.target.link.capabilities
        useful = len(self._failed_at) < _MOST_FAILURES and self._asked < _MOST_ASKED
        # Where the machine is gone, that comes out elsewhere.
        with contextlib.suppress(LinkError):
            self._debugger.set_own_event(self._event if can and useful and self._enabled else None)

    def at_lstar(self, core: int, value: int) -> None:
        """A vCPU waits at its WRMSR of LSTAR."""
        view = self._debugger.guest
        self._asked += 1
        line = None if value in self._failed_at else _safely(lambda: view.at_lstar(core, value))
        if view.is_known:
            self._failed_at.clear()
        else:
            self._failed_at.add(value)
        self._tell(line)
        self.watch()

    def at_stop(self) -> None:
        """The machine has stopped: a kernel may be there that could not be recognised before, and other modules."""
        view = self._debugger.guest
        if not self._enabled or self._debugger.target.only_looks is not None or not self._debugger.is_alive:
            return
        was_known = view.is_known
        try:
            view.look_at_modules()
            if view.is_known and not was_known:
                self._tell(view.summary())
        except VmexitError:
            pass  # somebody has let it run on

    def at_attach(self) -> None:
        """The debugger has come to a machine in the midst of its life. One that runs is halted for a moment."""
        debugger = self._debugger
        if not self._enabled or debugger.target.only_looks is not None or not debugger.is_alive:
            return
        ran = debugger.is_running
        # Nobody is told of a halt that is over at once.
        on_stop, debugger.on_stop = debugger.on_stop, None
        try:
            debugger.wait_until_halted()
            self._tell(_safely(debugger.guest.summary))
        finally:
            debugger.on_stop = on_stop
        if not debugger.is_alive:
            return
        self.watch()
        if ran:
            debugger.go()

    def _tell(self, line: str | None) -> None:
        """A line that says something new."""
        if line is None or (line == self.line and not self._debugger.guest.is_known):
            return
        self.line = line
        self._say(line)
        self._compile_anew()
        for listener in list(self.listeners):
            listener()

    def _say(self, line: str) -> None:
        if self.on_line is not None:
            self.on_line(line)

    def _compile_anew(self) -> None:
        """The scripts of events that name symbols: these are elsewhere now."""
        debugger = self._debugger
        for event in debugger.events:
            script = event.script
            if script is None or debugger.compiler.has_same_symbols(script):
                continue
            try:
                event.script = debugger.compiler.compile(script.source.text, script.source.name)
                debugger.enable(event, event.enabled)
            except ScriptError:
                event.script = script
                debugger.enable(event, False)
                self._say(f"event {event.number:x} is disabled: its script names symbols that are not known any more")


def _safely(look: Callable[[], str | None]) -> str | None:
    """What looking at the guest comes to. Whatever goes wrong: a session must not end because of it."""
    try:
        return look()
    except VmexitError as error:
        return f"the guest is not known: {error}"
    except Exception as error:
        return f"the guest is not known: looking at it has failed ({type(error).__name__}: {error})"
