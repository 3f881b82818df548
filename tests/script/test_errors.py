"""What a wrong script is told: the message, its line and column, and the hint."""

import pickle

import pytest

from tests.script.running import Session, machine
from vmexit.script.compile import Compiler
from vmexit.script.errors import ScriptError

WRONG = [
    ("", 1, 1, "empty"),
    ("  \n\t", 2, 2, "empty"),
    ("x = ;", 1, 5, "a value expected"),
    ("x = 1", 1, 6, "';' expected"),
    ("{ x = 1 }", 1, 8, "';' expected"),
    ("x = 1 y = 2;", 1, 7, "expected"),
    ("print(1;", 1, 8, "',' or ')'"),
    ("print(1)", 1, 9, "';' expected"),
    ("print 1;", 1, 7, "'(' expected"),
    ("{ print(1);", 1, 12, "'}' expected"),
    ("print(1); }", 1, 11, "a value expected"),
    ("/* abc", 1, 1, "does not end"),
    ('printf("abc);', 1, 8, "does not end"),
    (r'printf("\q");', 1, 9, "no escape"),
    (r'printf("\x123");', 1, 9, "1 to 2"),
    (r'printf("\x");', 1, 9, "1 to 2"),
    (r'x = wcslen(L"\x12345");', 1, 14, "1 to 4"),
    ("print('a');", 1, 7, "means nothing"),
    ("print(#);", 1, 7, "means nothing"),
    ("print(1 ? 2 : 3);", 1, 9, "',' or ')'"),
    ("print(0X10);", 1, 7, "prefixes are"),
    ("print(0N10);", 1, 7, "prefixes are"),
    ("print(0n1a);", 1, 7, "no decimal number"),
    ("print(0y12);", 1, 7, "no binary number"),
    ("print(0o8);", 1, 7, "no octal number"),
    ("print(1xyz);", 1, 7, "no hexadecimal number"),
    ("print(1.5e3);", 1, 7, "neither exponent"),
    ("print(1f.5);", 1, 7, "decimal digits"),
    ("x = 1" + "0" * 400 + ".0;", 1, 5, "out of range"),
    ("x = 0." + "0" * 400 + "1;", 1, 5, "out of range"),
    ("print(@RAX);", 1, 7, "in lower case: rax"),
    ("print(@raxx);", 1, 7, "did you mean rax"),
    ("print($PID);", 1, 7, "in lower case: pid"),
    ("print($arg1);", 1, 7, ".script"),
    ("print(@);", 1, 7, "missing behind '@'"),
    ("IF (1) { }", 1, 1, "in lower case: if"),
    ("Printf(1);", 1, 1, "in lower case: printf"),
    ("print(nt!Foo);", 1, 7, "symbol 'nt!Foo' is not known"),
    ("print(x);", 1, 7, "'x' has no value yet"),
    ("x += 1;", 1, 1, "'x' has no value yet"),
    ("x++;", 1, 1, "'x' has no value yet"),
    ("counter = 1; print(countr);", 1, 20, "did you mean counter"),
    ("print(.x);", 1, 7, "'.x' is never assigned"),
    ("if (.x) { }", 1, 5, "'.x' is never assigned"),
    ("int fun() { return x; } x = 1;", 1, 20, "'x' has no value"),
    ("x = 1; 5 = x;", 1, 8, "this is a value"),
    ("x + 1;", 1, 1, "does nothing with it"),
    ("x == 1;", 1, 1, "does nothing with it"),
    ("x = (y = 5);", 1, 8, "a statement of its own"),
    ("if (x = 5) { }", 1, 7, "to compare, write =="),
    ("if (1) print(1);", 1, 8, "'{' expected"),
    ("if 1 { }", 1, 4, "'(' expected"),
    ("if () { }", 1, 5, "a condition expected"),
    ("while () { }", 1, 8, "a condition expected"),
    ("else { }", 1, 1, "without an 'if'"),
    ("elsif (1) { }", 1, 1, "without an 'if'"),
    ("break;", 1, 1, "outside of a loop"),
    ("continue;", 1, 1, "outside of a loop"),
    ("while (1) { } break;", 1, 15, "outside of a loop"),
    ("do { } while (0)", 1, 17, "';' expected"),
    ("do { }", 1, 7, "'while' expected"),
    ("a = 0;", 1, 1, "this is a value"),
    ("int a = 0;", 1, 5, "'a' is a hexadecimal number"),
    ("int id = 0;", 1, 5, "'id' is a register"),
    ("int if = 0;", 1, 5, "has a meaning"),
    ("int print = 0;", 1, 5, "has a meaning"),
    ("int = 5;", 1, 5, "a variable's name expected"),
    ("long double x = 1;", 1, 1, "'long double' is no type"),
    ("unsigned float x = 1;", 1, 1, "is no type"),
    ("long long long x = 1;", 1, 1, "is no type"),
    ("signed unsigned x = 1;", 1, 1, "is no type"),
    ("void x = 1;", 1, 6, "cannot be void"),
    ("int x[0];", 1, 7, "from 1 to"),
    ("int x[];", 1, 5, "number of elements is missing"),
    ("int x[y];", 1, 7, "number of elements expected"),
    ("int x[2] = {1, 2, 3};", 1, 19, "more values"),
    ("int x[2] = 5;", 1, 12, "between braces"),
    ("int x[2]; x = 5;", 1, 11, "as a whole"),
    ('char x[2] = "abc";', 1, 13, "too long"),
    ("int x[20000];", 1, 1, "take 0x80000 bytes"),
    ("int x = {1, 2};", 1, 9, "one value"),
    ("x = 1; x[0] = 2;", 1, 8, "has no elements"),
    ("int v[2]; v[1.5] = 1;", 1, 13, "an index is an integer"),
    ("struct P { int x; }; struct P p; print(p);", 1, 40, "name a member"),
    ("struct P { int x; }; struct P p; p.y = 1;", 1, 34, "no member 'y'"),
    ("struct P { int xyz; }; struct P p; p.xyy = 1;", 1, 36, "did you mean xyz"),
    ("struct P { int x; }; struct P p; p->x = 1;", 1, 34, "name a member"),
    ("struct P { int x; }; struct P *p = 0; p.x = 1;", 1, 39, "write ->"),
    ("struct P { int x; int x; };", 1, 23, "a member 'x' already"),
    ("struct P { }; ", 1, 12, "needs a member"),
    ("struct P { int x; }; struct P { int x; };", 1, 29, "is there already"),
    ("struct P p;", 1, 10, "is not defined here"),
    ("struct P { struct P p; };", 1, 21, "is not defined here"),
    ("struct P { int x; }; struct P p; struct Q { int x; }; struct Q q; p = q;", 1, 71, "struct P expected"),
    ("typedef int t; typedef int t;", 1, 28, "a type 't' already"),
    ("typedef int print;", 1, 13, "has a meaning"),
    ("int main() { }", 1, 5, "is 'main'"),
    ("int fun() { } int fun() { }", 1, 19, "a function 'fun' already"),
    ("int fun(int x, int x) { }", 1, 20, "a parameter 'x' already"),
    ("int fun(x) { }", 1, 9, "a parameter's type"),
    ("if (1) { int fun() { } }", 1, 10, "outside of all other braces"),
    ("int fun(int x) { return x; } print(fun());", 1, 36, "takes 1 argument, not 0"),
    ("int fun() { return; }", 1, 13, "returns a value"),
    ("void fun() { return 1; }", 1, 21, "returns no value"),
    ("void fun() { } print(fun());", 1, 22, "has no value"),
    ("print(print(1));", 1, 7, "has no value"),
    ("return 5;", 1, 8, "returns no value"),
    ("fun();", 1, 1, "no function 'fun'"),
    ("int fun() { return 1; } x = fun;", 1, 29, "'fun' is a function"),
    ("print(1, 2);", 1, 1, "takes 1 argument, not 2"),
    ("print(strlen());", 1, 7, "takes 1 argument, not 0"),
    ('print(strlen(L"x"));', 1, 14, "without L"),
    ('print(wcslen("x"));', 1, 14, "wide string"),
    ("printf(x);", 1, 8, "a string between quotes"),
    ('printf("%d");', 1, 8, "wants 1 argument, not 0"),
    ('printf("%d", 1, 2);', 1, 8, "wants 1 argument, not 2"),
    ('printf("abc", 1);', 1, 8, "wants 0 arguments, not 1"),
    ('printf("%f", 1);', 1, 14, "cast it: (double)"),
    ('printf("%d", 1.5);', 1, 14, "(long)"),
    ('printf("%s", 1.5);', 1, 14, "a string or its address"),
    ("print(1.5 % 2);", 1, 11, "makes no sense with double"),
    ("print(1.5 << 2);", 1, 11, "makes no sense"),
    ("print(1.5 & 1);", 1, 11, "makes no sense"),
    ("print(~1.5);", 1, 7, "makes no sense"),
    ("print(poi(1.5));", 1, 11, "cast it: (long)"),
    ("print(*1.5);", 1, 7, "is no address"),
    ("char *p = 1.5;", 1, 11, "cannot become"),
    ("int x = 1; char *p = x;", 1, 22, "cast it"),
    ("char *p = 0; int x = p;", 1, 22, "does not fit"),
    ("void *p = 0; print(*p);", 1, 20, "is not known"),
    ("char *p = 0; print(p * 2);", 1, 22, "makes no sense with an address"),
    ("char *p = 0; int *q = 0; print(p - q);", 1, 34, "different things"),
    ("print(&5);", 1, 8, "this is a value"),
    ("print(&$value);", 1, 7, "has no address"),
    ("$pid = 5;", 1, 1, "can only be read"),
    ("$context = 5;", 1, 1, "can only be read"),
    ("int .x[3];", 1, 5, "holds one number"),
    ("int .x = 1; char .x = 2;", 1, 18, "is declared as int already"),
    ("event_inject(0, 3);", 1, 1, "it would need a target that can inject"),
    ("event_inject_error_code(3, e, 2);", 1, 1, "it would need"),
    ("event_trace_step();", 1, 1, "every instruction"),
    ("x = lbr_check();", 1, 5, "branches"),
    ("lbr_restore_by_filter(1);", 1, 1, "branches"),
    ('#include "no such file";', 1, 10, "cannot be read"),
    ('if (1) { #include "x"; }', 1, 10, "outside of all braces"),
    ("#include x", 1, 10, "between quotes"),
    ("print(1);\nprint(2);\n  print(y);", 3, 9, "'y' has no value"),
    ("print(1);\r\n\tprint(y);\r\n", 2, 8, "'y' has no value"),
    ("print(x.y);", 1, 7, "'x' has no value"),
    ("x = 1; print(x.y);", 1, 14, "has no members"),
    ("x = 1; print(x->y);", 1, 14, "no pointer to a struct"),
    ("print(sizeof(void));", 1, 14, "void has no value"),
    ("for (;;) { } for (i = 0; i < 3) { }", 1, 31, "';' expected"),
    ("x = 5--3;", 1, 6, "expected"),
    ("x = --5;", 1, 5, "a statement of its own"),
    ("spinlock_lock(5.5);", 1, 15, "cast it"),
    ("(" * 200 + "1" + ")" * 200 + ";", 1, 65, "nested more than"),
    ("{" * 200, 1, 130, "nested more than"),
    ("x = " + "-" * 1 + " - " * 200 + "1;", 1, 385, "nested more than"),
]


@pytest.mark.parametrize(("script", "line", "column", "message"), WRONG)
def test_wrong_script(script: str, line: int, column: int, message: str) -> None:
    with pytest.raises(ScriptError) as raised:
        Compiler().compile(script)
    error = raised.value
    assert message in str(error)
    assert (error.line, error.column) == (line, column), str(error)
    assert f"script:{line}:{column}: " in error.render()


def test_render() -> None:
    with pytest.raises(ScriptError) as raised:
        Compiler().compile("x = 1;\n  print(countr + x);\n", "my.ds")
    assert raised.value.render() == (
        "my.ds:2:9: 'countr' has no value yet (assign one first)\n  print(countr + x);\n        ^~~~~~"
    )


def test_errors_can_be_pickled() -> None:
    with pytest.raises(ScriptError) as raised:
        Compiler().compile("print(y);")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


ENDED = [
    ("print(1); print(1 / 0); print(2);", "1\n", 1, 19, "division by zero"),
    ("x = 0; print(5 % x);", "", 1, 16, "division by zero"),
    ("print(8000000000000000 / -1);", "", 1, 24, "does not fit"),
    ("print(8000000000000000 % -1);", "", 1, 24, "does not fit"),
    ("int x = 80000000; int y = -1; print(x / y);", "", 1, 39, "does not fit"),
    ("x = 40; print(1 << x);", "", 1, 17, "a shift by 64 bits"),
    ("print(1 >> -1);", "", 1, 9, "a shift by"),
    ("int x = 1; int y = 20; print(x << y);", "", 1, 32, "a shift by 32 bits"),
    ("x = 5; x /= 0;", "", 1, 8, "division by zero"),
    ("x = 5; x <<= 40;", "", 1, 8, "a shift by 64 bits"),
    ("int v[3]; i = 3; v[i] = 1;", "", 1, 18, "no element 3"),
    ("int v[3]; int i = -1; print(v[i]);", "", 1, 29, "no element -1"),
    ("int v[2][2]; v[0][2] = 1;", "", 1, 14, "no element 2"),
    ("struct P { int v[2]; }; struct P p; struct P *q = &p; q->v[2] = 1;", "", 1, 55, "no element 2"),
    ("print(poi(9000));", "", 1, 7, "0x9000 cannot be read"),
    ("print(poi(1ff9));", "", 1, 7, "0x1ff9 cannot be read"),
    ("print(poi(0));", "", 1, 7, "0x0 cannot be read"),
    ("print(*9000);", "", 1, 7, "cannot be read"),
    ("*9000 = 1;", "", 1, 1, "0x9000 cannot be written"),
    ('char *p = "abc"; *p = 1;', "", 1, 18, "cannot be written"),
    ("eq(&.x, 1); memcpy(1000, 9000, 1);", "", 1, 13, "0x9000 cannot be read"),
    ("memcpy(9000, 1000, 1);", "", 1, 1, "0x9000 cannot be written"),
    ("memcpy(1000, 1000, 0);", "", 1, 1, "bytes cannot be copied"),
    ("memcpy(1000, 1000, 100000000);", "", 1, 1, "bytes cannot be copied"),
    ('printf("%s", 9000);', "", 1, 1, "0x9000 cannot be read"),
    ('printf("a"); printf("b%s", 9000);', "a", 1, 14, "0x9000 cannot be read"),
    ("print(1.0 / 0.0);", "", 1, 11, "no finite number"),
    ("print(0.0 / 0);", "", 1, 11, "no finite number"),
    ("double x = 1" + "0" * 300 + ".0; x = x * x;", "", 1, 323, "no finite number"),
    ("float x = 1" + "0" * 39 + ".0;", "", 1, 11, "no finite number"),
    ("int x = 2147483648.0;", "", 1, 9, "does not fit the integer"),
    ("int x = -2147483649.0;", "", 1, 9, "does not fit"),
    ("print((unsigned long)-1.0);", "", 1, 22, "does not fit"),
    ("print((long)9223372036854775808.0);", "", 1, 13, "does not fit"),
    ("print((unsigned long)18446744073709551616.0);", "", 1, 22, "does not fit"),
    ("print((char)128.0);", "", 1, 13, "does not fit"),
    ("int *p = (int *)1001; int *q = (int *)1000; print(p - q);", "", 1, 53, "no whole number"),
    ("while (1) { }", "", 1, 1, "budget of steps"),
    ("x = 0; for (;;) { x++; }", "", 1, 8, "budget of steps"),
    ("do { } while (1);", "", 1, 1, "budget of steps"),
    ("int run(int n) { return run(n) + 1; } print(run(1));", "", 1, 5, "too deep"),
    ("int run(int n) { int v[100]; return run(n + v[0]) + 1; } print(run(1));", "", 1, 5, "too deep"),
    ("pause();", "", 1, 1, "a running machine"),
    ("event_sc(1);", "", 1, 1, "a running machine"),
    ("print(1); event_enable(1); print(2);", "1\n", 1, 11, "a running machine"),
    ("event_disable(1);", "", 1, 1, "a running machine"),
    ("event_clear(1);", "", 1, 1, "a running machine"),
    ("microsleep(0n1000001);", "", 1, 1, "1000000 microseconds"),
    ("print(interlocked_increment(1000));", "", 1, 7, "not the address of a variable"),
    ("long x = 5; print(interlocked_increment((char *)&x + 1));", "", 1, 19, "not the address"),
    ("spinlock_lock(&.l); spinlock_lock(&.l);", "", 1, 21, "was not to be had"),
    ("print(1);\n\nint z = 0;\nprint(1 % z);", "1\n", 4, 9, "division by zero"),
    ("int deep(int n) { if (n == 0) { return 1 / n; } return deep(n - 1); } print(deep(5));", "", 1, 42, "division by zero"),
    ("struct P { int x; }; struct P *p = 0; print(p->x);", "", 1, 45, "0x0 cannot be read"),
]


@pytest.mark.parametrize(("script", "printed", "line", "column", "message"), ENDED)
def test_ended_run(script: str, printed: str, line: int, column: int, message: str) -> None:
    out, error = Session().fault(script, machine())
    assert message in str(error)
    assert out == printed
    assert (error.line, error.column) == (line, column), str(error)


def test_what_an_ended_run_did_stays() -> None:
    session = Session()
    session.fault(".x = 5; eb(1000, 41); .y = 1 / 0;")
    assert session.run("print(.x); print(.y);") == "5\n0\n"


def test_an_ended_run_lets_go_of_its_locks() -> None:
    session = Session()
    session.fault("spinlock_lock(&.lock); x = 1 / 0;")
    assert session.run("print(.lock);") == "0\n"
    # One that ends well keeps it.
    session.run("spinlock_lock(&.lock);")
    assert session.run("print(.lock);") == "1\n"


def test_a_script_that_does_not_compile_defines_nothing() -> None:
    session = Session()
    with pytest.raises(ScriptError):
        session.run(".fresh = 1; print(x);")
    with pytest.raises(ScriptError, match="never assigned"):
        session.run("print(.fresh);")
