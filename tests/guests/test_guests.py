"""Boots each guest under plain QEMU, without vmexit, and checks what it says; and the guests' builder."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import build as builder
from . import expected
from .build import GuestBuildError, build, qemu_arguments, symbols
from .expected import Access

QEMU = "qemu-system-x86_64"
TIMEOUT = 60
"""Seconds for a guest that needs a tenth of one; subprocess.run kills it after that."""

DUMPED = {
    "rax": 0x1111111140000001,
    "rbx": 0x2222222222222222,
    "rcx": 0x33333333C0000081,
    "rdx": 0x4444444440000004,
    "rsi": 0x5555555555555555,
    "rdi": 0x6666666666666666,
    "rbp": 0x7777777777777777,
    "rsp": 0x8888888888888888,
    "r8": 0x9999999999999999,
    "r9": 0xAAAAAAAAAAAAAAAA,
    "r10": 0xBBBBBBBBBBBBBBBB,
    "r11": 0xCCCCCCCCCCCCCCCC,
    "r12": 0xDDDDDDDDDDDDDDDD,
    "r13": 0xEEEEEEEEEEEEEEEE,
    "r14": 0xFFFFFFFFFFFFFFFF,
    "r15": 0x0123456789ABCDEF,
    "rflags": 0x897,
    "msr": 0x4000000440000001,
}


@pytest.fixture(params=["tcg", "kvm"])
def accelerator(request: pytest.FixtureRequest) -> str:
    """Every test of a guest's behaviour is done on both."""
    if request.param == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is missing or not for this user")
    return str(request.param)


def boot(image: Path, vcpus: int = 1, accelerator: str = "tcg", cpu: str | None = None) -> tuple[list[str], int]:
    """Run a guest to its end, ``cpu`` being its model; give the lines that it printed and QEMU's exit status."""
    # Where KVM is itself emulated, the firmware of "pc" takes ten seconds.
    machine = "microvm" if accelerator == "kvm" else "pc"
    command = [QEMU, *qemu_arguments(image, vcpus, machine=machine), "-accel", accelerator]
    command += [] if cpu is None else ["-cpu", cpu]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout.splitlines(), done.returncode


def fields(line: str) -> dict[str, int]:
    """The `name=hex` words of a line."""
    return {name: int(digits, 16) for name, digits in re.findall(r"(\w+)=([0-9a-f]+)", line)}


@pytest.mark.parametrize("defines", [{"COUNT": 1}, {"COUNT": 1000, "HIGH": 0x7FFF, "MSR": "MSR_LSTAR"}])
def test_loop(defines: dict[str, int | str], accelerator: str) -> None:
    lines, status = boot(build("loop", **defines), accelerator=accelerator)
    count, high = int(defines["COUNT"]), int(defines.get("HIGH", 0x5A5A5A5A))
    assert lines == [f"sum={count * (count + 1) // 2:016x} last={high << 32 | 1:016x}"]
    assert status == builder.OK_STATUS


def test_sequence(accelerator: str) -> None:
    image = build("sequence")
    lines, status = boot(image, accelerator=accelerator)
    assert lines == [f"msr={msr:08x} value={value:016x}" for _, msr, value in expected.SEQUENCE]
    assert status == builder.OK_STATUS


def test_sequence_has_each_encoding() -> None:
    at = symbols(build("sequence"))
    lengths = {name: at[f"{name}_end"] - at[name] for name, _, _ in expected.SEQUENCE}
    longer = {
        "rex_w": 3,
        "rex": 3,
        "ds": 3,
        "data16": 3,
        "addr32": 3,
        "fs": 3,
        "data16_rex": 4,
        "longest": 15,
    }
    assert {name: length for name, length in lengths.items() if length != 2} == longer
    assert at["two_pages"] % 4096 == 4095


def test_fault(accelerator: str) -> None:
    lines, status = boot(build("fault", COUNT=5), accelerator=accelerator)
    assert [fields(line) for line in lines] == [
        {"faults": 5, "good": 0x0000000500000005},
        {"ring3": 10, "good": 0x0000000500000005},
    ]
    assert status == builder.OK_STATUS


def test_fault_says_when_nothing_faulted() -> None:
    lines, status = boot(build("fault", FAULT_MSR="MSR_LSTAR", FAULT_VALUE=0))
    assert fields(lines[0]) == {"faults": 0, "good": 0x0000000300000003}
    assert status == builder.FAILED_STATUS


@pytest.mark.parametrize("cores", [2, 4])
def test_smp(cores: int, accelerator: str) -> None:
    lines, status = boot(build("smp", COUNT=100, CORES=cores), cores, accelerator)
    assert lines == [f"core={core:02x} sum={5050 + (core * 100 << 32):016x} last={core << 32 | 1:016x}" for core in range(cores)]
    assert status == builder.OK_STATUS


def test_smp_misses_a_vcpu() -> None:
    lines, status = boot(build("smp", PATIENCE=1))
    assert lines == ["a vCPU is missing"]
    assert status == builder.ALONE_STATUS


def test_irq(accelerator: str) -> None:
    lines, status = boot(build("irq", COUNT=1000, IRQS=7), accelerator=accelerator)
    seen = fields(lines[0])
    assert seen["writes"] >= 1000
    assert seen["irqs"] >= 7
    assert seen["bad"] == 0
    assert status == builder.OK_STATUS


def test_irq_finds_writes_that_do_nothing() -> None:
    lines, status = boot(build("irq", COUNT=1000, IRQS=1, MSR=0x12345))  # TCG drops writes to MSRs unknown to it
    seen = fields(lines[0])
    assert seen["bad"] == seen["writes"] >= 1000
    assert status == builder.FAILED_STATUS


def test_selfcheck(accelerator: str) -> None:
    lines, status = boot(build("selfcheck"), accelerator=accelerator)
    assert lines == [f"ok {case}" for case in expected.SELFCHECK_CASES]
    assert status == builder.OK_STATUS


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        ("inc %r13", "bad none r13=eeeeeeeeeeeeeeef was=eeeeeeeeeeeeeeee"),
        ("not %eax", "bad none rax=00000000fffffffe was=1111111100000001"),
        ("lea -8(%rsp), %rsp", "bad none rsp=8888888888888880 was=8888888888888888"),
        ("cmc", "bad none rflags=00000000000008d6 was=00000000000008d7"),
        ("sti", "bad none rflags=0000000000000ad7 was=00000000000008d7"),
        ("rdmsr; inc %eax; wrmsr; dec %eax", "bad none msr=4000000400000002 was=4000000400000001"),
    ],
)
def test_selfcheck_finds_what_is_spoilt(spoil: str, found: str) -> None:
    lines, status = boot(build("selfcheck", SPOIL=spoil))
    assert found in lines
    assert "ok none" not in lines
    assert status == builder.FAILED_STATUS


def test_dump(accelerator: str) -> None:
    lines, status = boot(build("selfcheck", DUMP=1), accelerator=accelerator)
    assert lines == [*(f"{name}={value:016x}" for name, value in DUMPED.items()), "way=0"]
    assert status == builder.OK_STATUS


def test_dump_shows_another_way() -> None:
    lines, _ = boot(build("selfcheck", DUMP=1, SPOIL="jmp dump_detour"))
    assert lines[-1] == "way=1"


def test_hang(accelerator: str) -> None:
    machine = "microvm" if accelerator == "kvm" else "pc"
    command = [
        QEMU,
        *qemu_arguments(build("hang", SPIN=10, TICK=100), machine=machine),
        "-accel",
        accelerator,
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as qemu:
        try:
            assert qemu.stdout is not None
            assert [qemu.stdout.readline() for _ in range(3)] == [f"tick {count:016x}\n" for count in (100, 200, 300)]
            assert qemu.poll() is None
        finally:
            qemu.kill()


def test_alias(accelerator: str) -> None:
    image = build("alias")
    lines, status = boot(image, accelerator=accelerator)
    writes = [access for access in expected.alias(image) if access.kind == "wrmsr" and access.msr == expected.STAR]
    assert len({access.rip for access in writes}) == 3
    assert lines == [f"rip={access.rip:016x} value={access.value:016x}" for access in writes]
    assert status == builder.OK_STATUS


def test_unexpected_exception_is_told() -> None:
    image = build("loop", MSR=expected.PKRS)  # the upper half of its value is reserved
    lines, status = boot(image)
    assert lines == [f"exception=0d error=00000000 rip={symbols(image)['loop_wrmsr']:016x}"]
    assert status == builder.CRASHED_STATUS


def logs() -> Iterable[tuple[Path, list[Access]]]:
    """Each guest that `expected` describes, with what it says."""
    yield (image := build("loop", COUNT=3)), expected.loop(image, 3)
    yield (image := build("sequence")), expected.sequence(image)
    yield (image := build("fault")), expected.fault(image) + expected.fault_ring3(image)
    yield (image := build("smp")), [access for log in expected.smp(image) for access in log]
    yield (image := build("irq")), [access for log in expected.irq(image, 2, 2) for access in log]
    yield (image := build("selfcheck")), expected.selfcheck(image)
    yield (image := build("selfcheck", DUMP=1)), expected.dump(image)
    yield (image := build("alias")), expected.alias(image)


def test_expected_logs_name_all_msr_instructions_there_are() -> None:
    for image, log in logs():
        listing = subprocess.run(["objdump", "-d", str(image)], capture_output=True, text=True, check=True).stdout
        found = {
            (int(address, 16), kind) for address, kind in re.findall(r"^ *([0-9a-f]+):.*\b(wrmsr|rdmsr)\b", listing, re.MULTILINE)
        }
        own = range(symbols(image)["image_start"], symbols(image)["image_end"])
        assert {(access.rip, access.kind) for access in log if access.rip in own} == found, image


def test_build_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMEXIT_CACHE", str(tmp_path))
    image = build("loop", COUNT=5)
    assert image.parent == tmp_path / "guests"
    before = image.stat()
    assert build("loop", COUNT=5) == image
    after = image.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert build("loop", COUNT=6) != image
    assert build("loop") != image


def test_build_by_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMEXIT_CACHE", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        images = set(pool.map(lambda _: build("alias"), range(8)))
    assert len(images) == 1
    assert set((tmp_path / "guests").iterdir()) == images
    assert boot(images.pop())[1] == builder.OK_STATUS


def test_build_again_when_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loop.S", "boot.inc", "guest.ld"):
        (tmp_path / name).write_bytes((builder.HERE / name).read_bytes())
    monkeypatch.setattr(builder, "HERE", tmp_path)
    monkeypatch.setenv("VMEXIT_CACHE", str(tmp_path / "cache"))
    image = build("loop")
    for name in ("loop.S", "boot.inc", "guest.ld"):
        with (tmp_path / name).open("a") as source:
            source.write("\n")
        assert build("loop") != image, name
        image = build("loop")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMEXIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert builder.cache_folder() == Path("/somewhere/vmexit/guests")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert builder.cache_folder() == Path("/home/user/.cache/vmexit/guests")


def test_build_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMEXIT_CACHE", str(tmp_path))
    with pytest.raises(GuestBuildError, match=r"no guest 'lop'; there are: alias, .*loop"):
        build("lop")
    with pytest.raises(GuestBuildError, match="loop has no constant 'COUTN'; it has: COUNT, HIGH, MSR"):
        build("loop", COUTN=5)
    with pytest.raises(GuestBuildError, match="COUNT must be 1 to 0xffffffff"):
        build("loop", COUNT=0)
    assert list((tmp_path / "guests").iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestBuildError, match="gcc is missing"):
        build("loop")


def test_pages() -> None:
    lines, status = boot(build("pages", COUNT=3), cpu="max")
    patterns = {"huge": "1" * 16, "large": "2" * 16, "small": "3" * 16, "fixed": "8" * 16, "mixed": "5" * 8 + "4" * 8}
    assert lines == [
        f"tags={0x47424448 * 3:016x}",
        *(f"{name}={pattern}" for name, pattern in patterns.items()),
        "edge=7777777766666666",
    ]
    assert status == builder.OK_STATUS


def test_pages_needs_pages_of_1_gb() -> None:
    assert boot(build("pages"), cpu="qemu64") == (["no 1 GB pages"], builder.FAILED_STATUS)
