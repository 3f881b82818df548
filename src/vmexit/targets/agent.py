"""How the agent gets into a VMM that vmexit starts, and where it is spoken to."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from vmexit.errors import TargetError
from vmexit.setup.elf import ElfError, read_elf

SOCKET_PREFIX = "vmexit-"
"""What the abstract names of the agent's sockets begin with (kvm_attach.c too)."""


def agent_path() -> Path:
    """The compiled agent. Raises TargetError where the package was not built."""
    path = Path(str(resources.files("vmexit.agent") / "agent.so"))
    if not path.is_file():
        raise TargetError(f"the agent is not built: {path} is missing; reinstall with 'pip install .' (needs gcc)")
    return path


def listening_socket() -> socket.socket:
    """A socket that the agent is to take over.

    Its name is abstract: it goes when the VMM does, and a later debugger finds it (targets.attach). The agent turns away
    everybody but root and the VMM's own user.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listening.bind(f"\0{SOCKET_PREFIX}{secrets.token_hex(8)}")
        listening.listen()
    except OSError as error:
        listening.close()
        raise TargetError(f"no socket for the agent: {error.strerror}") from None
    return listening


def preloaded(program: str, link_fd: int, *, waits: bool = False) -> Mapping[str, str]:
    """What is added to the environment of a VMM that has the agent preloaded.

    ``waits``: it does not let the machine run before a debugger does. Raises TargetError for a program that cannot have anything
    preloaded.
    """
    check_preloadable(program)
    agent = str(agent_path())
    if any(separator in agent for separator in ": "):
        raise TargetError(f"{agent}: a path with a blank or a colon cannot be preloaded (ld.so); install vmexit elsewhere")
    before = os.environ.get("LD_PRELOAD", "")
    return {
        "LD_PRELOAD": f"{agent}:{before}" if before else agent,
        "VMEXIT_AGENT": f"link={link_fd}{',wait' if waits else ''}",
    }


def check_preloadable(program: str) -> None:
    """Raises TargetError for a program that the dynamic linker does not load, or not with anything preloaded."""
    path = Path(program)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return  # a script: what it starts is what counts
        elf = read_elf(path)
        is_setuid = bool(path.stat().st_mode & 0o6000)
    except (OSError, ElfError):
        return
    if elf.static:
        raise TargetError(
            f"{program} is linked statically: nothing can be loaded into it; use a build that is linked dynamically"
        )
    if is_setuid and os.geteuid() != path.stat().st_uid:
        raise TargetError(
            f"{program} runs with another user's rights (setuid): nothing can be preloaded; run vmexit as that user"
        )
