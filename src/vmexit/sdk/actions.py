"""The actions of an event that a program has made: one after the other, behind its condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmexit.debugger import Debugger
from vmexit.events.event import Callback, Event
from vmexit.link.wire import Action
from vmexit.trap import LiveTrap


@dataclass(frozen=True, slots=True)
class Step:
    """One action."""

    code: bytes | None = None
    """What it runs; None: it breaks."""
    buffer: int | None = None
    """Bytes that the code keeps."""


class Actions:
    """What an event does at a trap; it grows with each action that is added."""

    def __init__(self, debugger: Debugger, event: Event, condition: bytes | None, failures: Callable[[], int]) -> None:
        """``condition``: machine code that decides whether there is anything to do; ``failures``: how many disable the event."""
        self._debugger = debugger
        self._event = event
        self._condition = condition
        self._failures = failures
        self._skips = event.short_circuit
        self._steps: list[tuple[Step, Callback | None]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: Step, *, immediate: bool) -> None:
        """Adds one, and enables the event; or raises VmexitError, and nothing is changed."""
        event = self._event
        before = {name: getattr(event, name) for name in ("action", "callback", "script", "short_circuit", "way", "immediate")}
        steps = self._steps
        try:
            self._steps = self._made([*steps, (step, None)])
            event.immediate = immediate
            self._debugger.rework(event, enabled=True)
        except BaseException:
            self._steps = steps
            for name, was in before.items():
                setattr(event, name, was)
            raise

    def _made(self, steps: list[tuple[Step, Callback | None]]) -> list[tuple[Step, Callback | None]]:
        """Makes the event do all of them, in the vCPU's own thread where that can be."""
        # Unicorn takes a moment to load.
        from vmexit.coded import Coded, UserCode, lift_condition

        event = self._event
        event.callback, event.script, event.way = None, None, ""
        event.action, event.short_circuit = Action.BREAK, self._skips
        only_breaks = all(step.code is None for step, _ in steps)
        if only_breaks and (self._condition is None or lift_condition(self._debugger, UserCode(self._condition), event)):
            return steps
        made: list[tuple[Step, Callback | None]] = []
        for step, callback in steps:
            if callback is None:
                event.action = Action.BREAK if step.code is None else Action(0)
                event.short_circuit = self._skips
                code = UserCode(self._condition, step.code, step.buffer)
                code.check()
                callback = Coded(self._debugger, code, event, self._failures)
            made.append((step, callback))
        event.action, event.callback, event.way = Action.ASK, _Chain([callback for _, callback in made if callback]), "emulated"
        event.short_circuit = self._skips and self._condition is None
        return made


class _Chain:
    """Several callbacks, one after the other."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self._callbacks = callbacks

    def __call__(self, trap: LiveTrap) -> None:
        for callback in self._callbacks:
            callback(trap)
