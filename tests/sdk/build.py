"""Compiles the C programs of these tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def compile_c(source: Path, target: Path) -> Path:
    """The program made of one source, which may include hyperdbg.h."""
    command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return target
