"""A guess at who called whom: every word of a stack that points right behind a call instruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmexit.guest.memory import PAGE, UnreadableError, VirtualMemory
from vmexit.guest.system import Frame

MOST_FRAMES = 128


def guesses(memory: VirtualMemory, sp: int, end: int, is_code: Callable[[int], bool]) -> Iterator[Frame]:
    """What looks like a return address, from ``sp`` to ``end``, as far as the stack can be read."""
    found = 0
    at = sp
    while at < end:
        length = min(PAGE - at % PAGE, end - at)
        try:
            words = memory.words(at, length // 8)
        except UnreadableError:
            return
        for index, word in enumerate(words):
            if is_code(word) and is_behind_call(memory, word):
                yield Frame(word, at + index * 8 + 8, is_guess=True)
                found += 1
                if found == MOST_FRAMES:
                    return
        at += length


def is_behind_call(memory: VirtualMemory, address: int) -> bool:
    """Whether a call instruction ends there: E8, or FF /2."""
    try:
        code = memory.read(address - 7, 7)
    except UnreadableError:
        return False
    if code[2] == 0xE8:
        return True
    # FF /2 with a register or memory operand, in each of the lengths that it has.
    return any(code[7 - length] == 0xFF and code[8 - length] >> 3 & 7 == 2 for length in (2, 3, 4, 6, 7))
