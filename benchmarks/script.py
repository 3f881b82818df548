"""Measures compiled scripts, beside the same written in C by hand: `python -m benchmarks.script`."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmexit.script.abi import context_offset, ffi
from vmexit.script.compile import CompiledScript, Compiler
from vmexit.script.runtime import Machine, Runtime

ROUNDS = 7

_C = f"""
#include <stdint.h>
#define FIELD(type, offset) (*(type *)(context + (offset)))
#define REGISTERS FIELD(uint64_t *, {context_offset("registers")})
#define GLOBALS FIELD(volatile uint64_t *, {context_offset("globals")})
"""


@dataclass(frozen=True)
class Case:
    """A script, what it is in C, and how often to run it."""

    name: str
    script: str
    c: str
    count: int


CASES = (
    Case("an empty script", ";", "uint32_t entry(char *context) { (void)context; return 0; }", 5_000_000),
    Case(
        "count one MSR",
        "if (@rcx == 0xc0000082) { .cnt = .cnt + 1; }",
        "uint32_t entry(char *context) { if (REGISTERS[1] == 0xc0000082) GLOBALS[0] = GLOBALS[0] + 1; return 0; }",
        5_000_000,
    ),
    Case(
        "fibonacci(30), iterative",
        "x = 0; y = 1; for (i = 0; i < @rbx; i++) { t = x + y; x = y; y = t; } .fib = x;",
        """uint32_t entry(char *context) {
            uint64_t x = 0, y = 1;
            for (uint64_t i = 0; i < REGISTERS[3]; i++) { uint64_t t = x + y; x = y; y = t; }
            GLOBALS[0] = x;
            return 0;
        }""",
        1_000_000,
    ),
    Case(
        "fibonacci(20), recursive",
        "int fib(int n) { if (n < 2) { return n; } return fib(n - 1) + fib(n - 2); } .fib = fib(0n20);",
        """static __attribute__((noipa)) int fib(int n) { if (n < 2) return n; return fib(n - 1) + fib(n - 2); }
        uint32_t entry(char *context) { GLOBALS[0] = fib(20); return 0; }""",
        500,
    ),
)

USUAL = """
struct Task { unsigned long flags; struct Task *next; int pid; char name[10]; };
int is_wanted(struct Task *task, int wanted) {
    if (task->pid == wanted && strcmp(task->name, "init") == 0) { return 1; }
    return 0;
}
if (@rcx == 0xc0000082 && $context != 10) {
    .count = .count + 1;
    for (int i = 0; i < 8; i++) {
        if (is_wanted((struct Task *)(@rdi + i * 40), 1)) { printf("%llx %s\\n", @rip, @rdi + 14); }
    }
} elsif (@rcx == 0x10) { $value = 0; } else { printf("%llx %llx\\n", $msr, $value); }
"""


def _built(source: str, directory: Path) -> Any:
    """The C version, loaded."""
    path = directory / "case.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=_C + source, text=True, check=True)
    mine = type(ffi)()
    mine.cdef("uint32_t entry(char *context);")
    library = mine.dlopen(str(path))
    return library, ffi.cast("const void *", int(mine.cast("uintptr_t", getattr(library, "entry"))))  # noqa: B009


class _Handmade:
    """C code in the place of a script's."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer

    def address(self, offset: int) -> Any:
        """Of the entry."""
        del offset
        return self.pointer


def _nanoseconds(run: Callable[[], None], count: int) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / count


def _run(runtime: Runtime, script: CompiledScript, count: int) -> float:
    machine = Machine(registers={1: 0xC0000082, 3: 30})
    return _nanoseconds(lambda: runtime.run(script, machine, lambda _: None, repeat=count), count)


def measure(case: Case) -> tuple[float, float]:
    """Nanoseconds a run: the script's and the C version's, medians of rounds in which they take turns."""
    ours, by_hand = [], []
    script = Compiler().compile(case.script)
    with tempfile.TemporaryDirectory() as directory:
        library, pointer = _built(case.c, Path(directory))
        runtime, other = Runtime(), Runtime()
        other._code[script] = _Handmade(pointer)  # type: ignore[assignment]
        for _ in range(ROUNDS):
            ours.append(_run(runtime, script, case.count))
            by_hand.append(_run(other, script, case.count))
        del library
    return statistics.median(ours), statistics.median(by_hand)


def compile_times(texts: Sequence[str]) -> list[float]:
    """Milliseconds of CPU time to compile each text, the median of new compilers, LLVM being loaded."""
    Compiler().compile(";")
    found = []
    for text in texts:
        rounds = []
        for _ in range(ROUNDS):
            start = time.process_time()
            Compiler().compile(text)
            rounds.append((time.process_time() - start) * 1000)
        found.append(statistics.median(rounds))
    return found


def main() -> None:
    """Print the tables."""
    print(f"{'nanoseconds a run':<28}{'script':>10}{'C by hand':>12}")
    for case in CASES:
        ours, by_hand = measure(case)
        print(f"{case.name:<28}{ours:>10.1f}{by_hand:>12.1f}")
    counting, usual = compile_times([CASES[1].script, USUAL])
    print(f"\nCPU time to compile: the counting script {counting:.1f} ms, one of {len(USUAL.splitlines())} lines {usual:.1f} ms")


if __name__ == "__main__":
    main()
