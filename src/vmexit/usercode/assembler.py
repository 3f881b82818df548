"""Assembles standard input and writes the object file to standard output: a program of its own, run by assemble.py."""

from __future__ import annotations

import resource
import sys

_CPU_S = 10
_BYTES = 4 << 30
_TRIPLE = "x86_64-unknown-none-elf"


def main() -> None:
    """LLVM ends this process, with its message on standard error, where the text is wrong."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import llvmlite.binding as llvm  # type: ignore[import-untyped]

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    lines = [".intel_syntax noprefix", *sys.stdin.read().split("\n")]
    module = [f'target triple = "{_TRIPLE}"', *(f'module asm "{_quoted(line)}"' for line in lines)]
    machine = llvm.Target.from_triple(_TRIPLE).create_target_machine()
    sys.stdout.buffer.write(machine.emit_object(llvm.parse_assembly("\n".join(module))))


def _quoted(line: str) -> str:
    return "".join(char if char.isalnum() or char == " " else f"\\{ord(char):02X}" for char in line)


if __name__ == "__main__":
    main()
