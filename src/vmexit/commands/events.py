"""``events``: list, enable, disable and clear events, and decide on the instruction that the machine is stopped before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands import msr_sets
from vmexit.commands.command import Arguments, Command, Info, did_you_mean
from vmexit.commands.session import Session
from vmexit.events.event import Event

_ACTIONS = ("e", "d", "c", "sc")


class Events(Command):
    """Looks after events."""

    INFO = Info(
        names=("events",),
        usage=("events", "events e|d|c NUMBER|all", "events sc on|off"),
        summary="list, enable, disable or clear events, or short-circuit once",
        text="""Without arguments it lists the events: number, state, how often each was triggered, the command that
made it, and what its MSRs are called.

What is changed while the machine is halted holds from the next instruction on.""",
        parameters=(
            ("e|d|c", "Enables, disables, or clears (removes for good)."),
            ("NUMBER|all", "The event's number, or all of them."),
            (
                "sc on|off",
                "Whether the instruction that the current core is stopped before (stage pre) is skipped. This one execution "
                "only; the events' own 'sc' stays as it is.",
            ),
        ),
        examples=(
            ("events d 0", "event 0 is not triggered any more"),
            ("events c all", "removes all events"),
            ("events sc on", "skips the WRMSR that the machine is stopped before"),
        ),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        session.debugger.sync_events()
        if not arguments.tokens:
            session.emit(_table(session))
            return
        action, *rest = arguments.tokens
        word = action.lower
        if word not in _ACTIONS:
            raise arguments.error(
                f"'{action.text}' is nothing that can be done to events",
                action,
                hint=did_you_mean(word, _ACTIONS) or "e, d, c or sc; without any of them the events are listed",
            )
        if not rest:
            raise arguments.missing(f"'events {word}' needs {'on or off' if word == 'sc' else 'an event number or all'}")
        arguments.at_most(2)
        if word == "sc":
            skip = arguments.choice(rest[0], ("on", "off"), "value of 'sc'") == "on"
            session.check_halted(arguments)
            session.debugger.decide(skip)
            fate = "skipped" if skip else "executed"
            session.emit(f"the instruction that core {session.debugger.core:x} is stopped before will be {fate}")
            return
        for event in _named(session, arguments):
            if word == "c":
                session.debugger.clear(event)
            else:
                session.debugger.enable(event, word == "e")

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        if not before:
            return _ACTIONS
        if len(before) > 1:
            return ()
        if before[0] == "sc":
            return ("on", "off")
        return [*(f"{event.number:x}" for event in session.debugger.events), "all"]


def _named(session: Session, arguments: Arguments) -> list[Event]:
    """The events that the second argument names."""
    token = arguments.tokens[1]
    if token.lower == "all":
        return list(session.debugger.events)
    number = arguments.number(token, "event number")
    event = session.debugger.events.get(number)
    if event is None:
        numbers = " ".join(f"{event.number:x}" for event in session.debugger.events)
        raise arguments.error(
            f"there is no event {number:x}", token, hint=f"there are: {numbers}" if numbers else "there are none"
        )
    return [event]


def _process(session: Session, event: Event) -> str:
    """The process that it is about, and whether that one can be told from others yet."""
    if event.process is None:
        return ""
    waits = "" if session.debugger.knows_processes else "; waits: the guest's processes are not known yet"
    return f"  [process {event.process:x}{waits}]"


def _table(session: Session) -> str:
    events = list(session.debugger.events)
    if not events:
        return "no events"
    hits = [f"{session.debugger.hits(event):,}" for event in events]
    width = max(map(len, hits))
    lines = []
    for event, count in zip(events, hits, strict=True):
        state = "(enabled) " if event.enabled else "(disabled)"
        unit = "hit " if count == "1" else "hits"
        named = msr_sets.describe(event.msrs)
        what = "" if named == str(event.msrs) else f"  // {named}"
        faults = f"  [{event.faults:,} run{'s' * (event.faults != 1)} ended by an error]" if event.faults else ""
        way = f"  [{event.way}]" if event.way else ""
        process = _process(session, event)
        lines.append(
            f"{event.number:<4x} {state}  {count:>{width}} {unit}  {' '.join(event.text.split())}{what}{process}{way}{faults}"
        )
    return "\n".join(lines)
