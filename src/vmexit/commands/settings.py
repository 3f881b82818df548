"""``settings``: show and change preferences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.commands.tokens import U64_MAX, TokenKind
from vmexit.debugger import Overflow
from vmexit.guest.disassembly import Syntax


@dataclass(frozen=True, slots=True)
class _Setting:
    meaning: str
    values: tuple[str, ...]
    """Those to choose from; empty: it takes a number."""
    get: Callable[[Session], str]
    put: Callable[[Session, str], None]
    takes: str = "NUMBER"
    """What stands for a value that is not chosen; other than a number it is taken as it is."""


def _put_overflow(session: Session, value: str) -> None:
    session.debugger.set_overflow(Overflow(value))


def _put_syntax(session: Session, value: str) -> None:
    session.settings.syntax = Syntax(value)


def _put_steps(session: Session, value: str) -> None:
    session.debugger.set_script_limits(steps=int(value))


def _put_stack(session: Session, value: str) -> None:
    session.debugger.set_script_limits(stack=int(value))


def _put_failures(session: Session, value: str) -> None:
    session.debugger.code_failures = int(value)


def _put_sdk_socket(session: Session, value: str) -> None:
    from vmexit.sdk.serving import serve_at

    serve_at(session, None if value.lower() == "off" else value)


def _put_recognition(session: Session, value: str) -> None:
    session.debugger.recognition.enabled = value == "on"


_SETTINGS: Mapping[str, _Setting] = {
    "code-failures": _Setting(
        "how many runs of an event's machine code that are ended in a row disable the event; 0: none do",
        (),
        lambda session: f"{session.debugger.code_failures:x}",
        _put_failures,
    ),
    "overflow": _Setting(
        "what a vCPU does when traps come faster than they can be shown: wait, or drop them (they are counted)",
        tuple(value.value for value in Overflow),
        lambda session: session.debugger.overflow.value,
        _put_overflow,
    ),
    "recognition": _Setting(
        "whether the guest's system is recognised by itself as soon as it runs, which takes up to a second of one core's time",
        ("on", "off"),
        lambda session: "on" if session.debugger.recognition.enabled else "off",
        _put_recognition,
    ),
    "script-stack": _Setting(
        "bytes of stack that the functions of a script may take",
        (),
        lambda session: f"{session.debugger.script_stack:x}",
        _put_stack,
    ),
    "script-steps": _Setting(
        "turns of loops, calls, and 64 bytes copied, that one run of a script may take",
        (),
        lambda session: f"{session.debugger.script_steps:x}",
        _put_steps,
    ),
    "sdk-socket": _Setting(
        "where programs register events in HyperDbg's binary form: the path of a socket, or off",
        (),
        lambda session: "off" if session.sdk is None else str(session.sdk.path),
        _put_sdk_socket,
        "PATH|off",
    ),
    "syntax": _Setting(
        "how instructions are written",
        tuple(value.value for value in Syntax),
        lambda session: session.settings.syntax.value,
        _put_syntax,
    ),
}


def _choice(setting: _Setting) -> str:
    return "|".join(setting.values) or setting.takes


class ChangeSettings(Command):
    """Shows and changes preferences."""

    INFO = Info(
        names=("settings",),
        usage=("settings", "settings NAME", "settings NAME VALUE"),
        summary="show or change preferences",
        text="Shows all settings or one of them, or changes one for the rest of the session.",
        parameters=tuple(
            (f"{name} {_choice(setting)}", f"{setting.meaning}.".capitalize()) for name, setting in _SETTINGS.items()
        ),
        examples=(("settings syntax att", "AT&T's way of writing instructions"),),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(2)
        if not arguments.tokens:
            session.emit("\n".join(_line(session, name) for name in _SETTINGS))
            return
        name = arguments.choice(arguments.tokens[0], tuple(_SETTINGS), "setting")
        setting = _SETTINGS[name]
        if len(arguments.tokens) == 2:
            setting.put(session, _value(arguments, name, setting))
        session.emit(_line(session, name))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        if not before:
            return _SETTINGS
        if before[0] == "sdk-socket":
            return ("off",) if len(before) == 1 else ()
        return _SETTINGS[before[0]].values if len(before) == 1 and before[0] in _SETTINGS else ()


def _value(arguments: Arguments, name: str, setting: _Setting) -> str:
    token = arguments.tokens[1]
    if setting.takes != "NUMBER":
        if token.kind is TokenKind.BLOCK or not token.text:
            raise arguments.error(f"'{name}' takes {setting.takes.replace('|', ' or ')}", token)
        return token.text
    if setting.values:
        return arguments.choice(token, setting.values, f"value of '{name}'")
    return str(arguments.number(token, f"value of '{name}'", U64_MAX))


def _line(session: Session, name: str) -> str:
    setting = _SETTINGS[name]
    return f"{name:<13} {setting.get(session):<6} ({_choice(setting)}) {setting.meaning}"
