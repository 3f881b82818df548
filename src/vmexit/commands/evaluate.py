"""``?`` and ``print``: evaluate expressions and run scripts beside the machine."""

from __future__ import annotations

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.script.compile import CompiledScript, Compiler
from vmexit.script.errors import ScriptError


class Evaluate(Command):
    """Runs a script, or shows what an expression is."""

    INFO = Info(
        names=("?", "eval"),
        usage=("? EXPRESSION", "? STATEMENTS"),
        summary="evaluate an expression or run a script",
        text="""Shows the value of an expression, or runs statements, in the script language. Several lines stand in braces.

The script shares its global variables (.name) with the scripts of events. Registers and memory are those of the current core ('~'
changes it) and can be changed; for them the machine has to be halted.""",
        parameters=(
            ("EXPRESSION", "Shown in hexadecimal."),
            ("STATEMENTS", "They end in ';' or '}', but for a single one, where that can be left out."),
        ),
        examples=(
            ("? 0n1000 * 4", "calculates"),
            ("? @rax = @rax | 1", "changes a register"),
            ('? printf("%llx %s\\n", @cr3, $time);', "prints"),
            ("? { .writes = 0; .reads = 0; }", "gives global variables a value"),
        ),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        _run(session, _compiled(session.debugger.compiler, _text(arguments, "an expression or a script")))


class Print(Command):
    """Shows what an expression is."""

    INFO = Info(
        names=("print",),
        usage=("print EXPRESSION",),
        summary="show the value of an expression",
        text="The same as '?' with print(EXPRESSION): in hexadecimal, or as a floating-point number.",
        parameters=(("EXPRESSION", "In the script language: numbers, registers (@rax), memory (poi(@rsp)), variables (.name)."),),
        examples=(("print .writes", "shows a global variable of the scripts"), ("print dq(@rsp + 8)", "shows 8 bytes of memory")),
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        text = _text(arguments, "an expression")
        _run(session, session.debugger.compiler.compile(text, show="print"))


def _text(arguments: Arguments, what: str) -> str:
    """All that was typed behind the command's name, comments and braces included."""
    text = arguments.line[arguments.command.end :]
    if not text.strip():
        raise arguments.missing(f"'{arguments.name}' needs {what}")
    return text


def _compiled(compiler: Compiler, text: str) -> CompiledScript:
    """Statements, or an expression to be shown. Of two ways to be wrong, the one that got further is told."""
    if text.rstrip().endswith((";", "}")):
        return compiler.compile(text)
    try:
        return compiler.compile(text, show="formats")
    except ScriptError as error:
        try:
            return compiler.compile(f"{text};")
        except ScriptError as other:
            raise max(error, other, key=lambda each: each.place.start) from None


def _run(session: Session, script: CompiledScript) -> None:
    printed = bytearray()
    try:
        session.debugger.run_script(script, printed.extend)
    finally:
        if printed:
            session.emit(printed.decode("utf-8", "replace").removesuffix("\n"))
