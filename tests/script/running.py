"""Compiling and running small scripts in the tests."""

from __future__ import annotations

from vmexit.script.compile import Compiler
from vmexit.script.errors import ScriptRunError
from vmexit.script.names import REGISTERS
from vmexit.script.runtime import Machine, Runtime

MEMORY = 0x1000
"""Where the test machine has a page of memory; "Hello" stands at its start, L"Wide" 0x100 bytes on."""


def machine(**registers: int) -> Machine:
    """A machine with some registers set and a page of memory."""
    page = bytearray(0x1000)
    page[:6] = b"Hello\0"
    page[0x100:0x10A] = "Wide\0".encode("utf-16-le")
    page[0x200:0x208] = (0x1122334455667788).to_bytes(8, "little")
    found = Machine(memory=[(MEMORY, page)])
    for name, value in registers.items():
        found.set_register(name, value)
    return found


class Session:
    """A compiler and a runtime that share their global variables."""

    def __init__(self, steps: int = 1_000_000) -> None:
        self.compiler = Compiler()
        self.runtime = Runtime(steps)

    def run(self, text: str, on: Machine | None = None) -> str:
        """What the script prints."""
        out = bytearray()
        self.runtime.run(self.compiler.compile(text), on or machine(), out.extend)
        return out.decode("utf-8", "backslashreplace")

    def fault(self, text: str, on: Machine | None = None) -> tuple[str, ScriptRunError]:
        """What the script prints before it is ended, and the reason."""
        out = bytearray()
        try:
            self.runtime.run(self.compiler.compile(text), on or machine(), out.extend)
        except ScriptRunError as fault:
            return out.decode("utf-8", "backslashreplace"), fault
        raise AssertionError(f"not ended: {text}")


def output(text: str, on: Machine | None = None) -> str:
    """What a script prints in a session of its own."""
    return Session().run(text, on)


def register(on: Machine, name: str) -> int:
    """A register of a machine, or a part of one."""
    found = REGISTERS[name]
    return found.extract(on.registers.get(found.number, 0))
