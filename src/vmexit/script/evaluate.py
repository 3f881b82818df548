"""``vmexit eval``: compiles scripts and runs them without any machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vmexit.errors import UsageError
from vmexit.script.compile import CompiledScript, Compiler, read_source
from vmexit.script.errors import ScriptError, ScriptRunError, Source
from vmexit.script.lexer import Kind, is_hex_word, tokens_of
from vmexit.script.names import REGISTERS, did_you_mean
from vmexit.script.runtime import DEFAULT_STACK, DEFAULT_STEPS, Machine, Runtime

COMPILE_STATUS = 2
FAULT_STATUS = 3
_MAX_STACK = 1 << 20
_VALUES = ("context", "core", "event_id", "event_tag", "event_stage", "fault", "rip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vmexit eval``."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="the script; - reads it from standard input")
    parser.add_argument("-e", dest="scripts", action="append", metavar="SCRIPT", help="run this script; can be repeated")
    parser.add_argument(
        "--reg", dest="registers", action="append", metavar="NAME=HEX", help="a register, or a pseudo-register as $context"
    )
    parser.add_argument(
        "--mem", dest="memory", action="append", metavar="ADDR=HEXBYTES", help="memory at an address, virtual and physical alike"
    )
    parser.add_argument("--buffer", metavar="BYTES", help="the size of $buffer (hexadecimal)")
    parser.add_argument(
        "--steps", metavar="COUNT", help=f"turns of loops and calls that a run may take (default 0n{DEFAULT_STEPS})"
    )
    parser.add_argument("--stack", metavar="BYTES", help=f"stack that functions may take (default {DEFAULT_STACK:#x})")


def main_eval(args: argparse.Namespace) -> int:
    """Carry out ``vmexit eval``: 0, or 2 for a script that does not compile, 3 for one that is ended while it runs.

    Only what the scripts print goes to standard output. Raises UsageError for arguments that make no sense.
    """
    sources = _sources(args)
    machine = _machine(args)
    steps = _number(args.steps, "--steps") if args.steps else DEFAULT_STEPS
    stack = _number(args.stack, "--stack") if args.stack else DEFAULT_STACK
    if stack > _MAX_STACK:
        raise UsageError(f"--stack can be {_MAX_STACK:x} at most")
    compiler = Compiler()
    try:
        # All of them first: with one that is wrong, none runs.
        scripts = [compiler.compile(source.text, source.name) for source in sources]
    except ScriptError as error:
        print(error.render(), file=sys.stderr)
        return COMPILE_STATUS
    return _run(scripts, machine, Runtime(steps, stack))


def _run(scripts: list[CompiledScript], machine: Machine, runtime: Runtime) -> int:
    out = sys.stdout.buffer

    def write(data: bytes) -> None:
        out.write(data)

    try:
        for script in scripts:
            runtime.run(script, machine, write)
    except ScriptRunError as fault:
        out.flush()
        print(fault.render(), file=sys.stderr)
        return FAULT_STATUS
    finally:
        out.flush()
    return 0


def _sources(args: argparse.Namespace) -> list[Source]:
    count = len(args.scripts or [])
    sources = [Source("-e" if count == 1 else f"-e {number}", text) for number, text in enumerate(args.scripts or [], 1)]
    if args.file == "-":
        sources.append(Source("<standard input>", sys.stdin.buffer.read().decode("utf-8", "surrogateescape")))
    elif args.file is not None:
        try:
            sources.append(read_source(Path(args.file)))
        except OSError as error:
            raise UsageError(f"{args.file} cannot be read: {error.strerror}") from None
    if not sources:
        raise UsageError("no script: give a FILE, - for standard input, or -e SCRIPT")
    return sources


def _machine(args: argparse.Namespace) -> Machine:
    machine = Machine()
    for given in args.registers or []:
        name, value = _split(given, "--reg", "NAME=HEX")
        _set(machine, name, _number(value, given), given)
    for given in args.memory or []:
        address, digits = _split(given, "--mem", "ADDR=HEXBYTES")
        try:
            data = bytearray.fromhex(digits.replace("`", ""))
        except ValueError:
            raise UsageError(f"'{given}': memory is given as pairs of hexadecimal digits") from None
        start = _number(address, given)
        if start + len(data) > 1 << 64:
            raise UsageError(f"'{given}': it goes beyond the last address")
        machine.memory.append((start, data))
    if args.buffer:
        size = _number(args.buffer, "--buffer")
        if size > 1 << 20:
            raise UsageError("--buffer can be 100000 at most")
        machine.buffer = bytearray(size)
    return machine


def _set(machine: Machine, name: str, value: int, given: str) -> None:
    if name.startswith("$"):
        if name[1:] not in _VALUES:
            raise UsageError(f"'{given}': {name} cannot be given; these can: {', '.join('$' + value for value in _VALUES)}")
        machine.values[name[1:]] = value
        return
    name = name.removeprefix("@")
    if name not in REGISTERS:
        hint = did_you_mean(name, REGISTERS)
        raise UsageError(f"'{given}': there is no register '{name}'" + (f" ({hint})" if hint else ""))
    try:
        machine.set_register(name, value)
    except ValueError as error:
        raise UsageError(f"'{given}': {error}") from None


def _split(given: str, option: str, form: str) -> tuple[str, str]:
    name, sign, value = given.partition("=")
    if not sign or not name:
        raise UsageError(f"{option} takes {form}, not '{given}'")
    return name, value


def _number(text: str, given: str) -> int:
    """A number as a script writes it."""
    try:
        tokens = tokens_of(Source("", text))
    except ScriptError:
        tokens = []
    if len(tokens) == 2:
        token = tokens[0]
        if token.kind is Kind.NUMBER:
            return int(token.value)
        if token.kind is Kind.WORD and is_hex_word(token.text) and len(token.text) <= 16:
            return int(token.text, 16)
    raise UsageError(f"'{given}': '{text}' is no number")
