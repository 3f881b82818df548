"""Conditions as scripts: which are, and that they mean what they mean in the sandbox."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.usercode.guests import Pages
from vmexit.script.compile import Compiler
from vmexit.script.names import REGISTERS
from vmexit.script.runtime import Machine, Runtime
from vmexit.usercode.assemble import assemble
from vmexit.usercode.instructions import decoded
from vmexit.usercode.lift import lift
from vmexit.usercode.sandbox import Kind, Sandbox

NAMES = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
COMPARE = "488B59104881FB0010000074054831C0EB0748C7C001000000C3"
PROCESS = "65488B042588010000488B80B8000000488B805004000048B9737663686F73742E4839C874054831C0EB0748C7C001000000C3"

# What the random programs are made of; a jump over some of those that follow comes in between.
POOL = """
mov rax, [rcx]; mov rbx, [rcx+0x10]; mov eax, [rcx+8]; mov eax, [rcx+0x14]; mov ax, [rcx+0x1a]; mov al, [rcx+0x23]
movzx eax, byte ptr [rcx+0x31]; movzx edx, word ptr [rcx+0x3e]; mov rsi, [rcx+0x78]; mov rdx, rax; mov ebx, edx; mov bx, ax
mov bl, al; mov r9b, dl; mov rax, 0x8000000000000000; mov eax, 0xffffffff; mov rbx, -1; mov al, 0x80; mov r8, rdx
cmp rax, rbx; cmp eax, ebx; cmp ax, bx; cmp al, bl; cmp rax, 0x1000; cmp eax, -1; cmp edx, 0xc0000082; cmp al, 0x7f
cmp rbx, [rcx+0x10]; cmp dword ptr [rcx+8], 5; cmp rsi, rdx; test rax, rax; test eax, ebx; test al, al; test al, 0x80
test dword ptr [rcx+0x28], 0x80000000; and rax, rbx; and eax, 0xff; or rax, rdx; or al, 1; xor rax, rbx; xor eax, eax
xor rbx, rbx; sub rax, rbx; sub eax, 1; sub bl, al; add rax, rdx; add eax, 0x7fffffff; nop; add al, bl; sub rdx, rdx
sete al; setne bl; setb al; setbe cl; seta al; setl al; setge bl; setg al; setle al; sets al; setns dl; setae r9b
movzx eax, al; movzx ebx, bl; mov rax, rbx
"""


@cache
def pool() -> list[bytes]:
    code = assemble(POOL)
    found, at = [], 0
    while at < len(code):
        size = decoded(code, at).size
        found.append(code[at : at + size])
        at += size
    return found


RUNTIME = Runtime()


def by_script(code: bytes, registers: list[int], context: int) -> bool | None:
    """What the lifted condition says; None where it is not lifted."""
    lifted = lift(code)
    if lifted is None:
        return None
    script = Compiler().compile(f'{lifted.setup} if ({lifted.expression}) {{ printf("yes"); }}')
    machine = Machine(
        registers={REGISTERS[name].number: value for name, value in zip(NAMES, registers, strict=True)},
        values={"context": context},
    )
    out = bytearray()
    RUNTIME.run(script, machine, out.extend)
    return bool(out)


def emulated(code: bytes, registers: list[int], context: int) -> bool:
    return bool(Sandbox(code, Kind.CONDITION).run(registers, context, Pages()).rax)


@pytest.mark.parametrize("rdx", [0x1000, 0x1001, 0x1_0000_1000, 0xFFFF_FFFF_0000_1000])
def test_the_manuals_condition_on_a_register(rdx: int) -> None:
    registers = [0, 0, rdx, *range(13)]
    assert by_script(bytes.fromhex(COMPARE), registers, 0) is (rdx == 0x1000)


@pytest.mark.parametrize(
    "text",
    [
        "mov rax, [rcx]",
        "cmp edx, 0xc0000082; sete al",
        "mov eax, [rcx]; and eax, 1",
        "mov rbx, [rcx+0x40]; test rbx, rbx; jns no; mov eax, 1; no:; nop",
        "nop; nop",
        "mov eax, 1; ret; ud2",
    ],
)
def test_common_conditions_are_lifted(text: str) -> None:
    assert lift(assemble(text)) is not None


@pytest.mark.parametrize(
    "code",
    [
        bytes.fromhex(PROCESS),
        bytes.fromhex("ebfe"),  # a loop
        bytes.fromhex("488901"),  # mov [rcx], rax
        bytes.fromhex("488b00"),  # by what is no pointer
        bytes.fromhex("488b8180000000"),  # behind the registers
        bytes.fromhex("488b4101"),  # across two fields
        bytes.fromhex("50 58"),
        bytes.fromhex("4889e0"),
        bytes.fromhex("4839c8"),  # compares the pointer itself
        bytes.fromhex("89c8"),  # half of the pointer
        bytes.fromhex("7401 90"),  # flags that nothing has set
        bytes.fromhex("4801c0 7401 90"),  # flags of an addition
        bytes.fromhex("0fa2"),
        bytes.fromhex("0f30"),
        bytes.fromhex("06"),
        bytes.fromhex("eb40"),
        bytes.fromhex("88e0"),  # ah
        bytes.fromhex("666690 66c3"),
        bytes.fromhex("8b01 67 8b01"),
    ],
)
def test_what_is_left_to_the_sandbox(code: bytes) -> None:
    if lift(code) is not None:
        pytest.fail(f"{code.hex(' ')} was lifted")


INTERESTING = st.sampled_from([0, 1, 5, 0x7F, 0x80, 0xFF, 0x1000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1])
WORDS = st.one_of(INTERESTING, st.integers(0, (1 << 64) - 1))


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """Straight code with jumps forward over some of what follows."""
    code = b""
    for piece in draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=12)):
        instructions = pool()
        if piece % 5 == 4:
            over = b"".join(instructions[(piece * factor) % len(instructions)] for factor in (3, 7)[: 1 + piece % 2])
            conditions = (2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15)
            jump = 0xEB if piece % 11 == 0 else 0x70 | conditions[piece % len(conditions)]
            code += bytes((jump, len(over))) + over
        else:
            code += instructions[piece % len(instructions)]
    return code


@settings(max_examples=250, deadline=None)
@given(
    programs(),
    st.lists(st.lists(WORDS, min_size=16, max_size=16), min_size=1, max_size=4),
    st.sampled_from((0xC0000082, 0, 0x10)),
)
def test_a_lifted_condition_means_what_it_means_in_the_sandbox(code: bytes, rows: list[list[int]], context: int) -> None:
    for registers in rows:
        lifted = by_script(code, registers, context)
        if lifted is None:
            return
        assert lifted == emulated(code, registers, context), code.hex(" ")


def test_most_of_the_pools_instructions_are_lifted() -> None:
    # Behind a comparison, which SETcc needs.
    not_lifted = [code.hex(" ") for code in pool() if lift(bytes.fromhex("39d0") + code) is None]
    assert not_lifted == [bytes.fromhex("0f96c1").hex(" ")], "only 'setbe cl', which changes the pointer"
