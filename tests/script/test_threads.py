"""One script on two threads at once, as on two vCPUs: locals are each run's own, globals are shared."""

from __future__ import annotations

import threading

import pytest

from tests.script.running import machine
from vmexit.script.compile import CompiledScript, Compiler
from vmexit.script.errors import ScriptRunError
from vmexit.script.runtime import Runtime

STEPS = 1 << 40


def run_twice(script: CompiledScript) -> tuple[Runtime, list[bytearray]]:
    """Run the script in two threads whose runtimes have the same globals; what each printed."""
    runtimes = [Runtime(STEPS), Runtime(STEPS)]
    runtimes[1].globals = runtimes[0].globals
    outputs = [bytearray(), bytearray()]
    failures: list[BaseException] = []
    ready = threading.Barrier(2)

    def run(index: int) -> None:
        ready.wait()
        try:
            runtimes[index].run(script, machine(), outputs[index].extend)
        except ScriptRunError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return runtimes[0], outputs


def printed(runtime: Runtime, compiler: Compiler, text: str) -> str:
    out = bytearray()
    runtime.run(compiler.compile(text), machine(), out.extend)
    return out.decode()


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("interlocked_increment(&.n);", 1_000_000),
        ("interlocked_exchange_add(&.n, 1);", 200_000),
        ("do { old = .n; } while (interlocked_compare_exchange(&.n, old + 1, old) != old);", 100_000),
        ("spinlock_lock(&.lock); .n = .n + 1; spinlock_unlock(&.lock);", 20_000),
    ],
)
def test_nothing_is_lost(body: str, count: int) -> None:
    compiler = Compiler()
    script = compiler.compile(f"for (i = 0; i < 0n{count}; i++) {{ {body} }} print(i);")
    runtime, outputs = run_twice(script)
    assert outputs == [f"{count:x}\n".encode()] * 2
    assert printed(runtime, compiler, "print(.n);") == f"{2 * count:x}\n"


def test_a_global_written_elsewhere_is_seen() -> None:
    compiler = Compiler()
    text = "me = interlocked_increment(&.here); while (.here != 2) { } print(me);"
    _, outputs = run_twice(compiler.compile(text))
    assert sorted(outputs) == [b"1\n", b"2\n"]


def test_locals_are_each_runs_own() -> None:
    text = """
        int v[8]; x = 0; p = &x; me = interlocked_increment(&.who);
        for (i = 0; i < 0n100000; i++) { v[i % 8] += me; x = x + me; if (*p != x) { print(dead); } }
        printf("%lld %lld", x / me, v[3] / me);
    """
    _, outputs = run_twice(Compiler().compile(text))
    assert outputs == [b"100000 12500"] * 2
