"""``vmexit eval``: what goes to standard output, what to standard error, and the exit status."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pytest

from vmexit.errors import UsageError
from vmexit.script.evaluate import add_arguments, main_eval


def evaluate(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    status = main_eval(parser.parse_args(arguments))
    sys.stdout.flush()
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()


Capture = pytest.CaptureFixture[bytes]


def test_script_on_the_command_line(capfdbinary: Capture) -> None:
    assert evaluate(capfdbinary, "-e", "print(1 + 2);") == (0, "3\n", "")


def test_scripts_share_globals_and_machine(capfdbinary: Capture) -> None:
    arguments = ("--reg", "rax=5", "-e", ".x = @rax; @rax = 7;", "-e", "print(.x); print(@rax);")
    assert evaluate(capfdbinary, *arguments) == (0, "5\n7\n", "")


def test_file(capfdbinary: Capture, tmp_path: Path) -> None:
    path = tmp_path / "script.ds"
    path.write_bytes(b'\xef\xbb\xbf? {\r\n  printf("%d\\n", 0n42);\r\n}\r\n')
    assert evaluate(capfdbinary, str(path)) == (0, "42\n", "")


def test_standard_input(capfdbinary: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"print(7);")))
    assert evaluate(capfdbinary, "-") == (0, "7\n", "")


def test_registers_and_memory(capfdbinary: Capture) -> None:
    arguments = (
        "--reg", "rcx=c0000082", "--reg", "@al=0n16", "--reg", "$context=5", "--reg", "zf=1",
        "--mem", "fffff800`00001000=48 65 6c6c6f00", "-e",
        'printf("%llx %llx %llx %d %s\\n", @rcx, @rax, $context, @zf, fffff800`00001000);',
    )  # fmt: skip
    assert evaluate(capfdbinary, *arguments) == (0, "c0000082 10 5 1 Hello\n", "")


def test_later_memory_covers_earlier(capfdbinary: Capture) -> None:
    arguments = ("--mem", "1000=0102", "--mem", "1001=09", "-e", "print(dw(1000));")
    assert evaluate(capfdbinary, *arguments) == (0, "901\n", "")


def test_compile_error(capfdbinary: Capture) -> None:
    status, out, err = evaluate(capfdbinary, "-e", "print(1);", "-e", "print(x);")
    assert (status, out) == (2, "")
    assert err == "-e 2:1:7: 'x' has no value yet (assign one first)\nprint(x);\n      ^\n"


def test_run_time_error_keeps_what_was_printed(capfdbinary: Capture) -> None:
    status, out, err = evaluate(capfdbinary, "-e", "print(1);\nprint(1 / 0);", "-e", "print(2);")
    assert (status, out) == (3, "1\n")
    assert err == "-e 1:2:9: division by zero\nprint(1 / 0);\n        ^\n"


def test_bytes_are_printed_as_they_are(capfdbinary: Capture) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main_eval(parser.parse_args(["-e", r'printf("\xff\x00");'])) == 0
    assert capfdbinary.readouterr().out == b"\xff"


def test_limits(capfdbinary: Capture) -> None:
    assert evaluate(capfdbinary, "--steps", "10", "-e", "for (i = 0; i < 10; i++) { } print(i);")[0] == 0
    assert evaluate(capfdbinary, "--steps", "f", "-e", "for (i = 0; i < 10; i++) { } print(i);")[0] == 3
    deep = "int run(int n) { if (n == 0) { return 0; } return run(n - 1) + 1 + poi(1000) * 0; } print(run(0n100));"
    assert evaluate(capfdbinary, "--mem", "1000=0000000000000000", "-e", deep)[0] == 0
    assert evaluate(capfdbinary, "--mem", "1000=0000000000000000", "--stack", "400", "-e", deep)[0] == 3
    assert evaluate(capfdbinary, "--buffer", "10", "-e", "*$buffer = 5; print(poi($buffer));") == (0, "5\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no script"),
        (("no-such-file.ds",), "cannot be read"),
        (("-e", "print(1);", "--reg", "rax"), "NAME=HEX"),
        (("-e", "print(1);", "--reg", "raxx=1"), "did you mean rax"),
        (("-e", "print(1);", "--reg", "rax=xyz"), "no number"),
        (("-e", "print(1);", "--reg", "al=100"), "does not fit"),
        (("-e", "print(1);", "--reg", "$time=1"), "cannot be given"),
        (("-e", "print(1);", "--mem", "1000"), "ADDR=HEXBYTES"),
        (("-e", "print(1);", "--mem", "1000=123"), "pairs"),
        (("-e", "print(1);", "--mem", "zz=12"), "no number"),
        (("-e", "print(1);", "--mem", "ffffffffffffffff=1212"), "beyond"),
        (("-e", "print(1);", "--buffer", "fffffff"), "at most"),
        (("-e", "print(1);", "--stack", "fffffff"), "at most"),
    ],
)
def test_wrong_usage(capfdbinary: Capture, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        evaluate(capfdbinary, *arguments)
    assert message in str(raised.value)
