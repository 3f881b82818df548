"""The words that the language knows: registers and what part each is, pseudo-registers, keywords."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from vmexit.guest import registers
from vmexit.guest.registers import Register
from vmexit.script.abi import constant
from vmexit.script.types import CHAR, LITERAL, Pointer, Type

KEYWORDS = frozenset({"if", "elsif", "else", "while", "do", "for", "break", "continue", "return", "sizeof", "struct", "typedef"})

# Those of script.h, which are asked for one at a time.
_ONLY_HERE = ("gdtr", "idtr", "ldtr", "tr", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
# Names that only work behind an @, because HyperDbg does not have them: a variable may be called so.
_ONLY_WITH_SIGN = frozenset({"fs_base", "gs_base", "kernel_gs_base", "efer"} | {f"r{number}b" for number in range(8, 16)})


def _all_registers() -> dict[str, Register]:
    found = dict(registers.ALL)
    for number in range(8, 16):
        found[f"r{number}h"] = Register(f"r{number}h", number, f"r{number}", 8, 8)
    for name in _ONLY_HERE:
        found[name] = Register(name, constant(f"SCRIPT_{name.upper()}"), name)
    return found


REGISTERS: Mapping[str, Register] = MappingProxyType(_all_registers())
"""All that can stand behind an @; numbers are those of the wire, and of script.h beyond it."""

BARE_REGISTERS = frozenset(REGISTERS) - _ONLY_WITH_SIGN
"""Those that are registers without the @ too."""

_TEXT = Pointer(CHAR)
PSEUDO: Mapping[str, Type] = MappingProxyType(
    {
        "context": LITERAL,
        "event_stage": LITERAL,
        "event_id": LITERAL,
        "event_tag": LITERAL,
        "core": LITERAL,
        "ip": LITERAL,
        "rip": LITERAL,
        "msr": LITERAL,
        "value": LITERAL,
        "fault": LITERAL,
        "buffer": LITERAL,
        "pid": LITERAL,
        "tid": LITERAL,
        "pname": _TEXT,
        "proc": LITERAL,
        "thread": LITERAL,
        "peb": LITERAL,
        "teb": LITERAL,
        "date": _TEXT,
        "time": _TEXT,
    }
)
"""Pseudo-registers and their types."""
OF_PROCESSES = frozenset({"pid", "tid", "pname", "proc", "thread", "peb", "teb"})
"""Those that tell which process and thread of the guest runs."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint with the known word that is most like `word`, if any is."""
    known = list(known)
    if word.lower() in known:
        return f"in lower case: {word.lower()}"
    # Of short words nearly all are alike.
    near = difflib.get_close_matches(word, known, 1, 0.6) if len(word) > 2 else []
    return f"did you mean {near[0]}?" if near else None
