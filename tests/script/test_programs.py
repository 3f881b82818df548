"""Whole programs: sorting, strings, structures in the guest's memory, recursion, includes, and what HyperDbg's manual shows."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.script.running import Session, machine, output, register
from vmexit.script.compile import Compiler
from vmexit.script.errors import ScriptError
from vmexit.script.runtime import Machine


def test_bubble_sort() -> None:
    assert (
        output("""
        void sort(int *v, int n) {
            for (int i = 0; i < n; i++) {
                for (int j = 0; j < n - 1 - i; j++) {
                    if (v[j] > v[j + 1]) { int t = v[j]; v[j] = v[j + 1]; v[j + 1] = t; }
                }
            }
        }
        int v[8] = {5, -3, 0n99, 0, 7, 7, -100, 2};
        sort(v, 8);
        for (int i = 0; i < 8; i++) { printf("%d ", v[i]); }
    """)
        == "-256 -3 0 2 5 7 7 99 "
    )


def test_quick_sort() -> None:
    assert (
        output("""
        void sort(long *v, long from, long to) {
            if (from >= to) { return; }
            long pivot = v[(from + to) / 2];
            long i = from, j = to;
            while (i <= j) {
                while (v[i] < pivot) { i++; }
                while (v[j] > pivot) { j--; }
                if (i <= j) { long t = v[i]; v[i] = v[j]; v[j] = t; i++; j--; }
            }
            sort(v, from, j);
            sort(v, i, to);
        }
        long v[40];
        x = 0n12345;
        for (int i = 0; i < 40; i++) { x = (x * 0n1103515245 + 0n12345) % 0n2147483648; v[i] = x % 0n1000; }
        sort(v, 0, 3f);
        ok = 1;
        for (int i = 1; i < 40; i++) { ok = ok && v[i - 1] <= v[i]; }
        print(ok);
    """)
        == "1\n"
    )


def test_sieve() -> None:
    assert (
        output("""
        char sieve[100];
        count = 0;
        for (int i = 2; i < 100; i++) {
            if (!sieve[i]) { count++; for (int j = i * 2; j < 100; j += i) { sieve[j] = 1; } }
        }
        printf("%lld", count);
    """)
        == "54"
    )


def test_matrix_product() -> None:
    assert (
        output("""
        int x_[2][3] = {{1, 2, 3}, {4, 5, 6}};
        int y_[3][2] = {{7, 8}, {9, 0n10}, {0n11, 0n12}};
        int z_[2][2];
        for (int i = 0; i < 2; i++) {
            for (int j = 0; j < 2; j++) {
                for (int k = 0; k < 3; k++) { z_[i][j] += x_[i][k] * y_[k][j]; }
            }
        }
        printf("%d %d %d %d", z_[0][0], z_[0][1], z_[1][0], z_[1][1]);
    """)
        == "58 64 139 154"
    )


def test_reverse_a_string() -> None:
    assert (
        output("""
        void reverse(char *s) {
            n = strlen(s);
            for (int i = 0; i < n / 2; i++) { char t = s[i]; s[i] = s[n - 1 - i]; s[n - 1 - i] = t; }
        }
        char text[20] = "machine code";
        reverse(text);
        printf("%s", text);
    """)
        == "edoc enihcam"
    )


def test_recursion() -> None:
    assert (
        output("""
        unsigned long gcd(unsigned long x, unsigned long y) { if (y == 0) { return x; } return gcd(y, x % y); }
        int ack(int m, int n) {
            if (m == 0) { return n + 1; }
            if (n == 0) { return ack(m - 1, 1); }
            return ack(m - 1, ack(m, n - 1));
        }
        void hanoi(int n, int from, int to, int via) {
            if (n == 0) { return; }
            hanoi(n - 1, from, via, to);
            .moves++;
            hanoi(n - 1, via, to, from);
        }
        hanoi(0n10, 1, 3, 2);
        printf("%lld %d %lld", gcd(0n1071, 0n462), ack(2, 3), .moves);
    """)
        == "21 9 1023"
    )


def test_fibonacci_as_in_the_manual() -> None:
    assert (
        output("""? {
      int my_func(int varn) {
        int varf0 = 0;
        int varf1 = 1;
        int varfn = 0; //comment
        if (varn == 0) { return varf0; }
        if (varn == 1) { return varf1; }
        int i = 0;
        for (i = 2; i <= varn; i++) { varfn = varf0 + varf1; varf0 = varf1; varf1 = varfn; }
        return varfn;
      }
      printf("%d", my_func(9));
    }""")
        == "34"
    )


def test_functions_as_in_the_manual() -> None:
    assert (
        output("""? {
      int my_func1(int var1) { result = var1 + 1; printf("my_func1 %d\\n", result); return result; }
      int my_func2(int var1) { result = var1 * 2; printf("my_func2 %d\\n", result); return result; }
      int my_func3(int var1) { result = var1 * 2; printf("my_func3 %d\\n", result); return result; }
      int my_func4(int var1) {
        result = my_func1(var1) + my_func2(var1) + my_func3(var1);
        printf("my_func4 %d\\n", result);
        return result;
      }
      printf("%d\\n", my_func4(2));
    }""")
        == "my_func1 3\nmy_func2 4\nmy_func3 4\nmy_func4 11\n11\n"
    )


def test_linked_list_in_guest_memory() -> None:
    """struct list_head-like: next, value. The list is the guest's; nothing of it is the script's."""
    memory = bytearray(0x1000)
    places = [0x100, 0x940, 0x220, 0xF00]
    for index, place in enumerate(places):
        following = 0xFFFF880000000000 + places[index + 1] if index + 1 < len(places) else 0
        memory[place : place + 16] = struct.pack("<QQ", following, index * 11)
    on = Machine(memory=[(0xFFFF880000000000, memory)])
    on.set_register("rdi", 0xFFFF880000000000 + places[0])
    assert (
        output(
            """
        struct Node { struct Node *next; unsigned long value; };
        struct Node *node = (struct Node *)@rdi;
        sum = 0;
        while (node) {
            printf("%lld ", node->value);
            sum += node->value;
            node->value = 0;
            node = node->next;
        }
        printf("= %lld", sum);
    """,
            on,
        )
        == "0 11 22 33 = 66"
    )
    assert memory[0xF08:0xF10] == bytes(8)


def test_block_a_write_as_an_event_would() -> None:
    on = machine(rcx=0xC0000082, rax=0x12345678, rdx=0xFFFFFFFF)
    Session().run("if ($msr == c0000082 && $value == ffffffff12345678) { $value = 0; @rcx = 10; }", on)
    assert (register(on, "rax"), register(on, "rdx"), register(on, "rcx")) == (0, 0, 0x10)


def test_globals_outlive_a_script() -> None:
    session = Session()
    session.run(".count = 0;")
    for _ in range(5):
        session.run("if (1) { .count = .count + 1; }")
    assert session.run("print(.count);") == "5\n"


def test_globals_keep_their_type() -> None:
    session = Session()
    session.run("unsigned char .byte_ = ff;")
    assert session.run(".byte_++; print(.byte_);") == "0\n"
    session.run(".byte_ = -1;")
    assert session.run("long .byte_; print(.byte_);") == "ff\n"


def test_identical_scripts_are_compiled_once() -> None:
    compiler = Compiler()
    assert compiler.compile(".x = 1;") is compiler.compile(".x = 1;")
    assert compiler.compile(".x = 1;") is not compiler.compile(".x = 2;")
    kept = compiler.compile("print(.x);")
    compiler.compile("char .x = 1;")
    assert compiler.compile("print(.x);") is not kept


def test_include(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "fib.ds").write_text(
        "? {\r\n int fib(int n) { if (n < 2) { return n; } return fib(n-1) + fib(n-2); }\r\n}\r\n"
    )
    (tmp_path / "two.ds").write_text('#include "lib/fib.ds"\nint twice(int n) { return 2 * fib(n); }')
    main = tmp_path / "main.ds"
    main.write_text('? { #include "lib/fib.ds";\n#include "two.ds"\n#include "two.ds"\nprint(twice(9)); }')
    session = Session()
    out = bytearray()
    session.runtime.run(session.compiler.compile(main.read_text(), str(main)), machine(), out.extend)
    assert out == b"44\n"


def test_error_in_an_included_file(tmp_path: Path) -> None:
    (tmp_path / "bad.ds").write_text("int fun() {\n  return nothing;\n}")
    with pytest.raises(ScriptError) as raised:
        Compiler().compile('#include "bad.ds"\nprint(fun());', str(tmp_path / "main.ds"))
    assert raised.value.place.source.name == str(tmp_path / "bad.ds")
    assert (raised.value.line, raised.value.column) == (2, 10)


def test_changed_include_is_seen(tmp_path: Path) -> None:
    included = tmp_path / "value.ds"
    session = Session()
    for value in ("1", "2"):
        included.write_text(f"value = {value};")
        assert session.run(f'#include "{included}"\nprint(value);') == f"{value}\n"


def test_symbols() -> None:
    compiler = Compiler({"nt!KeBugCheck": 0xFFFFF80012345678}.get)
    session = Session()
    session.compiler = compiler
    assert session.run("print(nt!KeBugCheck + 8);") == "fffff80012345680\n"


def test_much_output_in_order() -> None:
    text = 'for (i = 0; i < 0n20000; i++) { printf("%lld line with some text %s\\n", i, "and a string"); }'
    assert output(text) == "".join(f"{i} line with some text and a string\n" for i in range(20000))


def test_output_that_fails_ends_the_run() -> None:
    session = Session()
    script = session.compiler.compile('for (;;) { printf("%s", "text"); }')

    def refuse(_: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        session.runtime.run(script, machine(), refuse)


def test_buffer() -> None:
    on = machine()
    on.buffer = bytearray(16)
    session = Session()
    assert session.run('memcpy($buffer, 1000, 6); printf("%s", $buffer);', on) == "Hello"
    assert on.buffer[:6] == b"Hello\0"
    assert "cannot be written" in str(session.fault("eq($buffer, 1); *($buffer + 0n16) = 1;", on)[1])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "struct VariableTypePair { int left; unsigned short right; }; "
            'printf("char=%lld\\nstruct=%lld\\n", sizeof(char), sizeof(struct VariableTypePair));',
            "char=1\nstruct=8\n",
        ),
        (
            'implicit_variable = 0xffffffffffffffff; printf("value=%llu\\n", implicit_variable); '
            'if (implicit_variable > 0) { printf("implicit variable is unsigned\\n"); }',
            "value=18446744073709551615\nimplicit variable is unsigned\n",
        ),
        (
            "float floatAdd = 11.5 + 0.5; float floatSub = 11.5 - 0.5; double negativeZero = -0.0; "
            "if (floatAdd > floatSub && floatSub >= 11.0 && floatSub < floatAdd && floatSub <= 11.0 && "
            'floatAdd != floatSub && negativeZero == 0.0)\n{ printf("successful\\n"); } else { printf("failed\\n"); }',
            "successful\n",
        ),
        ('int sum = 0; for (int i = 1; i <= 5; i++) { sum += i; } printf("sum of 1..5 = %d\\n", sum);', "sum of 1..5 = 15\n"),
        ('x = 55; do { printf("x = %x\\n", x); x = x - 53; } while (x != 2);', "x = 55\n"),
        ('for (i = 0; i < 2 ; i++) { for (j = 0; j < 2; j++) { printf("%d, %d\\n", i, j); } }', "0, 0\n0, 1\n1, 0\n1, 1\n"),
        (
            'IsEditApplied = eq(1300, 0x12345678deadbeef); if (IsEditApplied == 1) { printf("changes are applied.\\n"); }',
            "changes are applied.\n",
        ),
        (
            ".my_lock = 0; .my_counter = 0; spinlock_lock(&.my_lock); .my_counter = .my_counter + 1; "
            'printf("called %llx times\\n", .my_counter); spinlock_unlock(&.my_lock);',
            "called 1 times\n",
        ),
        ("@ebx = @rdx | 0xfffff550 + @edx; print(@ebx);", "fffff550\n"),
        ("if (poi(@rcx + 0x10) == ffff7080deadbeef && @rdx != 55 || $pid == 4) { print(1); } else { print(2); }", "2\n"),
    ],
)
def test_as_in_the_manual(text: str, shown: str) -> None:
    assert output(text, machine(rcx=0x1000)) == shown
