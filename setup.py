"""Builds the agent: a plain shared library for QEMU to load, tied to no Python version.

Everything else about the package is in pyproject.toml.  CC, CFLAGS and LDFLAGS are heeded.  CFLAGS comes
last: `CFLAGS=-Wno-error pip install .` gets past a warning that only a newer compiler knows.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AGENT = Path("src", "vmexit", "agent")
C_FLAGS = ["-std=c11", "-O2", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
LIBRARIES = ["-pthread", "-ldl"]


class BuildAgent(build_ext):
    """Compiles with the flags above alone.

    setuptools would add those that Python itself was built with, which differ from one Python to the next and
    are meant for extension modules; the agent is none.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """vmexit.agent.agent -> vmexit/agent/agent.so, without the tag that names a Python version."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link in one go; raise CompileError with one line beside the compiler's own output."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A QEMU may have the old library mapped: a new file takes its name, the old one is not written into.
        fresh = target.with_name(target.name + ".new")
        compiler = shlex.split(os.environ.get("CC", "gcc"))
        command = [
            *compiler,
            *C_FLAGS,
            *shlex.split(os.environ.get("CFLAGS", "")),
            "-shared",
            *ext.sources,
            *shlex.split(os.environ.get("LDFLAGS", "")),
            *LIBRARIES,
            "-o",
            str(fresh),
        ]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise CompileError(f"no C compiler ({compiler[0]}) to build the agent with: install gcc and libc6-dev") from None
        except subprocess.CalledProcessError as error:
            fresh.unlink(missing_ok=True)
            raise CompileError(f"the agent does not compile ({compiler[0]}: exit {error.returncode})") from None
        fresh.replace(target)


class TagWheel(bdist_wheel):
    """The wheel holds machine code but fits every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python tag, ABI tag, platform tag."""
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    ext_modules=[
        Extension(
            "vmexit.agent.agent",
            sources=sorted(str(path) for path in AGENT.glob("*.c")),
            depends=sorted(str(path) for path in AGENT.glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildAgent, "bdist_wheel": TagWheel},
)
