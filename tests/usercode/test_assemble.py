"""Assembly: the manual's examples byte by byte, and text that LLVM or we refuse."""

import pytest

from vmexit.usercode.assemble import assemble
from vmexit.usercode.errors import CodeError

# how-to-create-a-condition, example 3, and how-to-create-an-action, as printed there.
COMPARE = """
		mov rbx , [rcx+0x10];
		cmp rbx, 0x1000;
		je ReturnTrue;

		xor rax,rax;
		jmp Return;

		ReturnTrue:
		mov rax, 0x1;

		Return:
		ret;
"""
CHANGE = """
		mov    rbx, QWORD PTR [rdx+0x40];
		cmp    rbx, 0x47424448;

		je     ChangeIt;
		jmp    Return;

		ChangeIt:
		mov    QWORD PTR [rdx+0x40], 0x32424448;

		Return:
		ret;
"""


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (COMPARE, "488B59104881FB0010000074054831C0EB0748C7C001000000C3"),
        (CHANGE, "488B5A404881FB484442477402EB0848C7424048444232C3"),
        (" nop; nop; nop; nop; ", "90909090"),
        ("mov rax, gs:[0x188]", "65488b042588010000"),
        ("mov eax, 10 # ten", "b80a000000"),
        ("jmp .L1; .L1: nop", "eb0090"),
        ("lea rax, [rip + data]; data: .quad 5", "488d05000000000500000000000000"),
        ("call inner\ninner: ret", "e800000000c3"),
    ],
)
def test_what_it_makes(text: str, code: str) -> None:
    assert assemble(text) == bytes.fromhex(code)


@pytest.mark.parametrize(
    ("text", "message", "blamed"),
    [
        ("nop;\n  foo bar", "invalid instruction mnemonic 'foo'", "f"),
        ("je Nowhere", "there is no label 'Nowhere'", "Nowhere"),
        ("mov rax, [data]; data: .quad 5", "the address of a label", None),
        ("X: nop; X: nop", "already defined", None),
        ("lea rax, [rcx", "a bracket is left open", "lea rax, [rcx"),
        ("mov eax, 1 nop", "unknown token", None),
        ("# nothing", "no instruction", None),
        ('x: .incbin "/etc/passwd"', "has no place in assembly", '"'),
        (".rept 1000000; nop", "the directive .rept is not available", "."),
        ("a: b: .FILL 9", "the directive .FILL is not available", "."),
        ("X = 5", "symbols cannot be given values", "="),
        ("nop é", "has no place in assembly", "é"),
        (".byte 0\n" * 0x10001, "too long", None),
    ],
)
def test_what_it_refuses(text: str, message: str, blamed: str | None) -> None:
    with pytest.raises(CodeError) as refused:
        assemble(text)
    assert message in str(refused.value)
    assert 0 <= refused.value.start <= len(text)
    if blamed is not None:
        assert text[refused.value.start :].startswith(blamed)


def test_an_assembler_that_cannot_be_started_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(CodeError, match="cannot be started: No such file"):
        assemble("nop")
