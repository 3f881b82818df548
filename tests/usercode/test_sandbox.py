"""The user's code in the emulator: how it is called, what it reaches, and that nothing gets out."""

import random
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.usercode.guests import KERNEL, PAGE, Pages
from vmexit.errors import VmexitError
from vmexit.usercode.buffer import MAX_BUFFER, Buffer
from vmexit.usercode.errors import CodeRunError
from vmexit.usercode.sandbox import Kind, Limits, Result, Sandbox

NAMES = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
VALUES = tuple(0x1111_1111_1111_1111 * n for n in range(16))

# The manual's examples, as printed there (how-to-create-a-condition 1 and 2, how-to-create-an-action).
PROCESS = "65488B042588010000488B80B8000000488B805004000048B9737663686F73742E4839C874054831C0EB0748C7C001000000C3"
COMPARE = "488B59104881FB0010000074054831C0EB0748C7C001000000C3"
CHANGE = "488B5A404881FB484442477402EB0848C7424048444232C3"


def condition(code: str, registers: Sequence[int] = VALUES, context: int = 0, guest: Pages | None = None) -> Result:
    return Sandbox(bytes.fromhex(code), Kind.CONDITION).run(registers, context, guest or Pages())


def action(
    code: str, registers: Sequence[int] = VALUES, context: int = 0, guest: Pages | None = None, buffer: Buffer | None = None
) -> Result:
    return Sandbox(bytes.fromhex(code), Kind.ACTION, buffer).run(registers, context, guest or Pages())


def ended(code: str, kind: Kind = Kind.ACTION, guest: Pages | None = None, limits: Limits | None = None) -> str:
    """Why a run of this code is ended."""
    with pytest.raises(CodeRunError) as why:
        Sandbox(bytes.fromhex(code), kind, None, limits or Limits(seconds=60)).run(VALUES, 0, guest or Pages())
    assert "\n" not in str(why.value)
    return str(why.value)


# ---- the manual's examples ----


@pytest.mark.parametrize(("name", "holds"), [(b"svchost.exe\0", True), (b"explorer.exe\0", False)])
def test_the_manuals_condition_on_the_name_of_the_process(name: bytes, holds: bool) -> None:
    pcr, thread, process = KERNEL, KERNEL + 0x1000, KERNEL + 0x2000
    guest = Pages(pcr, thread, process, gs=pcr)
    guest.put_u64(pcr + 0x188, thread + 0x80)
    guest.put_u64(thread + 0x80 + 0xB8, process + 0x100)
    guest.put(process + 0x100 + 0x450, name)
    assert bool(condition(PROCESS, guest=guest).rax) is holds
    assert guest.writes == []


@pytest.mark.parametrize(("rdx", "holds"), [(0x1000, True), (0x1001, False), (0x1_0000_1000, False)])
def test_the_manuals_condition_on_a_register(rdx: int, holds: bool) -> None:
    assert bool(condition(COMPARE, [*VALUES[:2], rdx, *VALUES[3:]]).rax) is holds


@pytest.mark.parametrize(("r8", "after"), [(0x47424448, 0x32424448), (5, 5)])
def test_the_manuals_code_that_changes_a_register(r8: int, after: int) -> None:
    registers = [*VALUES[:8], r8, *VALUES[9:]]
    assert action(CHANGE, registers).registers == (*VALUES[:8], after, *VALUES[9:])


# ---- how it is called ----


@pytest.mark.parametrize("number", range(16), ids=NAMES)
def test_every_register_goes_in_and_out_at_its_place(number: int) -> None:
    # mov rax, [rdx+n*8]; not qword ptr [rdx+n*8]
    result = action(f"488b42{number * 8:02x} 48f752{number * 8:02x}")
    assert result.rax == VALUES[number]
    changed = list(VALUES)
    changed[number] ^= 0xFFFF_FFFF_FFFF_FFFF
    assert result.registers == tuple(changed)


def test_a_condition_has_registers_in_rcx_and_context_in_rdx() -> None:
    assert condition("4889d0", context=0xC0000082).rax == 0xC0000082
    assert condition("488b4108").rax == VALUES[1]


def test_code_has_buffer_registers_and_context_in_rcx_rdx_and_r8() -> None:
    assert action("4c89c0", context=0xC0000082).rax == 0xC0000082
    assert action("4889c8").rax == 0
    assert action("488b01", buffer=Buffer(8)).rax == 0
    assert action("488b4208").rax == VALUES[1]


def test_rax_is_0_at_the_start_and_nothing_is_left_from_the_run_before() -> None:
    # lea rax, [rax+rbx+1]; mov rbx, rax; std; stc
    sandbox = Sandbox(bytes.fromhex("488d441801 4889c3 fd f9"), Kind.ACTION)
    assert [sandbox.run(VALUES, 0, Pages()).rax for _ in range(3)] == [1, 1, 1]


def test_there_is_a_stack_and_functions_can_be_called() -> None:
    # push 5; call f; pop rcx; ret; f: mov rax, [rsp+8]; ret
    assert action("6a05 e802000000 59c3 488b442408 c3").rax == 5


# ---- the buffer ----


def test_the_buffer_is_zeroed_kept_and_shared() -> None:
    buffer = Buffer(0x10)
    counting = bytes.fromhex("48ff01 488b01")  # inc qword ptr [rcx]; mov rax, [rcx]
    first, second = Sandbox(counting, Kind.ACTION, buffer), Sandbox(counting, Kind.ACTION, buffer)
    assert [sandbox.run(VALUES, 0, Pages()).rax for sandbox in (first, second, first)] == [1, 2, 3]
    assert bytes(buffer) == struct.pack("<QQ", 3, 0)


def test_the_buffer_outlives_a_run_that_was_ended() -> None:
    buffer = Buffer(8)
    sandbox = Sandbox(bytes.fromhex("48ff01 488b00"), Kind.ACTION, buffer)  # inc qword ptr [rcx]; mov rax, [rax]
    for _ in range(2):
        with pytest.raises(CodeRunError, match="page 0"):
            sandbox.run(VALUES, 0, Pages())
    assert bytes(buffer) == struct.pack("<Q", 2)


@pytest.mark.parametrize("size", [0, -1, MAX_BUFFER + 1, 1 << 70])
def test_a_buffer_of_no_or_absurd_size_is_refused(size: int) -> None:
    with pytest.raises(VmexitError, match="a buffer has 1 to"):
        Buffer(size)


# ---- the guest's memory ----


def test_what_is_written_goes_back_byte_by_byte() -> None:
    guest = Pages(KERNEL)
    guest.put(KERNEL, bytes(range(64)))
    # mov rax, KERNEL; mov byte ptr [rax+1], 0xaa; mov word ptr [rax+8], 0xbbbb; mov byte ptr [rax+20], 20 (as it is)
    action("48b8000000 00 00f8ffff c64001aa 66c74008bbbb c6401414", guest=guest)
    assert guest.writes == [(KERNEL + 1, b"\xaa"), (KERNEL + 8, b"\xbb\xbb")]


def test_an_access_across_two_pages() -> None:
    guest = Pages(KERNEL, KERNEL + PAGE)
    guest.put(KERNEL + PAGE - 4, b"abcd")
    guest.put(KERNEL + PAGE, b"efgh")
    # mov rcx, KERNEL+ffc; mov rax, [rcx]; not qword ptr [rcx]
    result = action("48b9fc0f000000f8ffff 488b01 48f711", guest=guest)
    assert result.rax.to_bytes(8, "little") == b"abcdefgh"
    assert b"".join(data for _, data in guest.writes) == bytes(byte ^ 0xFF for byte in b"abcdefgh")
    assert [address for address, _ in guest.writes] == [KERNEL + PAGE - 4, KERNEL + PAGE]


def test_memory_is_read_anew_at_each_run() -> None:
    guest = Pages(KERNEL)
    sandbox = Sandbox(bytes.fromhex("48a1 00000000 00f8ffff".replace(" ", "")), Kind.CONDITION)
    for value in (1, 2, 3):
        guest.put_u64(KERNEL, value)
        assert sandbox.run(VALUES, 0, guest).rax == value
    assert guest.reads == [KERNEL] * 3


def test_a_run_that_is_ended_changes_no_memory() -> None:
    guest = Pages(KERNEL)
    # mov rax, KERNEL; mov [rax], rax; mov rax, [0]
    assert "page 0" in ended("48b80000000000f8ffff 488900 488b042500000000", guest=guest)
    assert guest.writes == []


def test_fs_and_gs_are_the_guests() -> None:
    guest = Pages(KERNEL, KERNEL + PAGE, fs=KERNEL, gs=KERNEL + PAGE)
    guest.put_u64(KERNEL + 8, 0xF5)
    guest.put_u64(KERNEL + PAGE + 8, 0x65)
    assert condition("64488b042508000000", guest=guest).rax == 0xF5
    assert condition("65488b042508000000", guest=guest).rax == 0x65


# ---- hostile code ----


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("ebfe", "+0: jmp 0: it has not returned after 100,000 instructions"),
        ("90 f390 ebfc", "it has not returned after 100,000 instructions"),
        ("488b042500000000", "+0: mov rax, qword ptr [0]: it reads in page 0, which is not mapped in the guest"),
        ("48890425 00100000", "it writes in page 1000, which is not mapped in the guest"),
        ("48b80000000000000080 488900", "it writes in page 8000000000000000, which is not mapped"),
        ("90 0f30", "+1: wrmsr: this instruction is not allowed here"),
        ("90 0f32", "+1: rdmsr: this instruction is not allowed here"),
        ("f4", "+0: hlt: this instruction is not allowed here"),
        ("fa", "+0: cli: this instruction is not allowed here"),
        ("0f22d8", "this instruction is not allowed here"),
        ("0f20c0", "this instruction is not allowed here"),
        ("e664", "this instruction is not allowed here"),
        ("f36e", "this instruction is not allowed here"),
        ("cc", "+0: int3: this instruction is not allowed here"),
        ("cd80", "this instruction is not allowed here"),
        ("0f05", "+0: syscall: this instruction is not allowed here"),
        ("0fa2", "+0: cpuid: this instruction is not allowed here"),
        ("0f01f8", "+0: swapgs: this instruction is not allowed here"),
        ("8ed8", "this instruction is not allowed here"),
        ("eb01 b8 0f30", "+3: wrmsr: this instruction is not allowed here"),
        ("0f0b", "+0: ud2: the emulator does not know this instruction"),
        ("06", "+0: (no instruction: 06 c3): the emulator does not know this instruction"),
        ("31c0 f7f0", "+2: div eax: this instruction faults"),
        ("ffe0", "it jumps out of its own code"),
        ("6a00 c3", "it jumps out of its own code"),
        ("48b80000000000f8ffff ffe0", "it jumps out of its own code"),
        ("eb40", "it runs on behind its own end"),
        ("48b8", "it runs on behind its own end"),
        ("488d05f9ffffff c60090", "+7: mov byte ptr [rax], 0x90: it writes to its own code"),
        ("50 ebfd", "+0: push rax: it writes beside its stack, registers or buffer"),
        ("58 ebfd", "+0: pop rax: it reads beside its stack, registers or buffer"),
        ("488b8200100000", "it reads beside its stack, registers or buffer"),
        ("c5fc77", "the emulator does not know this instruction"),
    ],
)
def test_hostile_code_is_ended_with_the_reason_and_the_place(code: str, why: str) -> None:
    assert why in ended(code, guest=Pages(KERNEL))


def test_writes_through_all_of_memory_are_ended() -> None:
    class Endless(Pages):
        def read_memory(self, address: int, length: int) -> bytes:
            return bytes(length)

    guest = Endless()
    # mov rdi, KERNEL; mov rcx, -1; rep stosq
    huge = "48bf0000000000f8ffff 48c7c1ffffffff f348ab"
    assert "touches more than 100 pages of guest memory" in ended(huge, guest=guest, limits=Limits(pages=100, seconds=60))
    assert "rep stosq qword ptr [rdi], rax: it has not returned after 100,000 instructions" in ended(huge, guest=guest)
    assert guest.writes == []


def test_a_run_that_takes_too_long_is_ended() -> None:
    assert "it takes longer than 0 s" in ended("488b0425 00100000", guest=Pages(0x1000), limits=Limits(seconds=0))


def test_memory_that_cannot_be_written_ends_the_run() -> None:
    class ReadOnly(Pages):
        def write_memory(self, address: int, data: bytes) -> None:
            raise VmexitError("read only")

    assert "guest memory at 1008 cannot be written" in ended("ff042508100000", guest=ReadOnly(0x1000))


def test_after_a_run_that_was_ended_the_next_one_is_right() -> None:
    # mov eax, 20h; mov rcx, [rcx]; xor edx, edx; div rcx
    sandbox = Sandbox(bytes.fromhex("b820000000 488b09 31d2 48f7f1"), Kind.CONDITION)
    for divisor, quotient in ((4, 8), (0, None), (2, 16)):
        registers = [divisor, *VALUES[1:]]
        if quotient is None:
            with pytest.raises(CodeRunError, match="faults"):
                sandbox.run(registers, 0, Pages())
        else:
            assert sandbox.run(registers, 0, Pages()).rax == quotient


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.sampled_from(Kind), st.randoms(use_true_random=False))
def test_random_code_ends_well_or_with_one_line(code: bytes, kind: Kind, dice: random.Random) -> None:
    guest = Pages(KERNEL, 0)
    registers = [dice.choice((0, KERNEL, dice.getrandbits(64))) for _ in range(16)]
    try:
        result = Sandbox(code, kind, limits=Limits(instructions=2000, seconds=60)).run(registers, 0xC0000082, guest)
    except CodeRunError as error:
        message = str(error)
    else:
        message = "-"
        assert len(result.registers) == 16
    assert message and "\n" not in message
    assert message == "-" or guest.writes == []
