"""From the text of a script to something that can run: the one entry to the compiler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmexit.script.abi import constant
from vmexit.script.check import check
from vmexit.script.errors import Place, ScriptError, ScriptRunError, Source, UnknownGuestError
from vmexit.script.globals import GlobalTable
from vmexit.script.lexer import MAX_TEXT
from vmexit.script.parser import parse, parse_expression
from vmexit.script.printf import Format
from vmexit.script.typed import Global

_MAX_NATIVE_FRAME = constant("MAX_NATIVE_FRAME")
_KEPT = 128

_MESSAGES = {
    "DIVISION": "division by zero",
    "OVERFLOW": "the result of the division does not fit: the lowest number there is, by -1",
    "SHIFT": "a shift by {detail:d} bits: more than the type has",
    "INDEX": "there is no element {signed:d}",
    "FLOAT": "the result is no finite number",
    "CONVERSION": "the number does not fit the integer type",
    "DIFFERENCE": "these addresses are no whole number of elements apart",
    "READ": "{detail:#x} cannot be read",
    "WRITE": "{detail:#x} cannot be written",
    "STEPS": "the script takes too long: its budget of steps is spent",
    "STACK": "the functions call each other too deep",
    "MACHINE": "this needs a running machine, or one that can do it",
    "REGISTER": "this register cannot be reached here",
    "TEXT": "the text is too long for one print",
    "LOCK": "the lock at {detail:#x} was not to be had",
    "ATOMIC": "{detail:#x} is not the address of a variable",
    "LENGTH": "{detail:#x} bytes cannot be copied at once",
    "OUTPUT": "nobody takes the output any more",
    "EVENT": "there is no event {detail:x}",
    "SLEEP": "a script can sleep for {limit} microseconds at most",
}
_HINTS = {
    "STEPS": "an endless loop? settings script-steps gives it more",
    "STACK": "settings script-stack gives them more",
    "ATOMIC": "as in &.counter",
    "LOCK": "is it unlocked everywhere?",
}
_FAULTS = {constant(f"FAULT_{name}"): name for name in _MESSAGES}


@dataclass(frozen=True, eq=False, slots=True)
class CompiledScript:
    """A script as machine code, and what is needed to make sense of what it leaves behind."""

    source: Source
    code: bytes
    """Position independent; without relocations."""
    entry: int
    """Where in the code to begin."""
    constants: bytes
    """The segment VMEXIT_ARENA_CONSTANTS."""
    formats: tuple[Format, ...]
    """By the number in a print's record."""
    places: tuple[Place, ...]
    """By the number of a fault's place, less 1."""
    globals: tuple[Global, ...]
    """All that it uses."""
    symbols: Mapping[str, int]
    """The guest's symbols that it names, and their addresses when it was compiled."""
    registers: Place | None
    """Where it first names one of the 16 general registers; None: nowhere."""
    asks_process: bool
    """It wants to know the guest's process ($pid and its like)."""

    def fault(self, error: int, place: int, detail: int) -> ScriptRunError:
        """The error for the user, from what a failed run left in its context."""
        name = _FAULTS.get(error)
        signed = detail - (1 << 64) if detail >> 63 else detail
        text = f"fault {error}" if name is None else _MESSAGES[name]
        where = self.places[place - 1] if 0 < place <= len(self.places) else Place(self.source, 0, 0)
        return ScriptRunError(
            text.format(detail=detail, signed=signed, limit=constant("MAX_SLEEP")), where, _HINTS.get(name or "")
        )


def read_include(path: str, asking: Source) -> Source:
    """The file that a script includes: relative to the script's own directory, else to the current one. Raises OSError."""
    beside = Path(asking.name).parent / path
    chosen = beside if beside.is_file() else Path(path)
    return read_source(chosen)


def read_source(path: Path) -> Source:
    """A script's file. Raises OSError; bytes that are no UTF-8 stay as they are."""
    with path.open("rb") as file:
        data = file.read(4 * MAX_TEXT + 1)
    return Source(str(path), data.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))


def no_symbols(name: str) -> int | None:
    """Where there is no guest. Raises UnknownGuestError for what can only be a symbol."""
    if "!" in name:
        raise UnknownGuestError("there is no guest here")
    return None


class Compiler:
    """Compiles the scripts of a session, which share their global variables; a text that came before is not compiled again."""

    def __init__(self, symbol: Callable[[str], int | None] = no_symbols) -> None:
        self.globals = GlobalTable()
        self._symbol = symbol
        self._kept: OrderedDict[tuple[str, str, str], CompiledScript] = OrderedDict()

    def compile(self, text: str, name: str = "script", *, show: str = "") -> CompiledScript:
        """The compiled script; ScriptError where it is wrong. `name` is what messages call it, a path for one from a file.

        With `show` the text is one expression, and the script calls that built-in function with it: "print", "formats".
        """
        key = (text, name, show)
        kept = self._kept.get(key)
        if kept is not None and self._holds(kept):
            self._kept.move_to_end(key)
            return kept
        included: list[str] = []
        script = self._compile(Source(name, text), included, show)
        if not included:
            # What is included may have changed by the next time.
            self._kept[key] = script
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return script

    def _holds(self, script: CompiledScript) -> bool:
        """Whether what the script names still is what it was when it was compiled."""
        return self.has_same_symbols(script) and all(self.globals.get(variable.name) == variable for variable in script.globals)

    def has_same_symbols(self, script: CompiledScript) -> bool:
        """Whether the guest's symbols that the script names still are where they were when it was compiled."""
        try:
            return all(self._symbol(name) == address for name, address in script.symbols.items())
        except UnknownGuestError:
            return False

    def _compile(self, source: Source, included: list[str], show: str) -> CompiledScript:
        # LLVM takes a tenth of a second to load, which a debugger without scripts does not need.
        from vmexit.script.lower import ENTRY, lower
        from vmexit.script.native import NativeError, compile_module, triple_and_layout

        def read(path: str, asking: Source) -> Source:
            included.append(path)
            return read_include(path, asking)

        symbols: dict[str, int] = {}

        def symbol(name: str) -> int | None:
            address = self._symbol(name)
            if address is not None:
                symbols[name] = address
            return address

        parsed = parse_expression(source, symbol, show) if show else parse(source, read, symbol)
        program = check(parsed, self.globals, symbol)
        everything = Place(source, 0, 0)
        try:
            text, places = lower(program, *triple_and_layout())
            code = compile_module(text, ENTRY)
        except NativeError as error:
            raise ScriptError(str(error), everything) from None
        if code.frame > _MAX_NATIVE_FRAME:
            raise ScriptError(
                f"one function takes {code.frame} bytes of stack; {_MAX_NATIVE_FRAME} are there",
                everything,
                "make several functions of it, or use arrays",
            )
        self.globals.add({variable.name: variable for variable in program.globals})
        return CompiledScript(
            source,
            code.data,
            code.entry,
            program.constants,
            tuple(program.formats),
            tuple(places.places),
            tuple(program.globals),
            symbols,
            places.general,
            places.asks_process,
        )
