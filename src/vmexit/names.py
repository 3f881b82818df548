"""Names of the places that traps tell of: each looked up once, and also while the guest runs."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vmexit.link.rings import Records
from vmexit.link.wire import RecordFlag
from vmexit.trap import Trap

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

_MOST = 1 << 16


class TrapNames(abc.ABC):
    """Where traps are, what called it, and which thread executes it, in words."""

    @abc.abstractmethod
    def of(self, address: int) -> str:
        """What is at an address: "native_write_msr+0x4 [kernel]"; "" where that is not known."""

    @abc.abstractmethod
    def thread_name(self, pid: int, tid: int) -> str:
        """What a thread calls itself; "" where that is not known."""

    @abc.abstractmethod
    def callers(self, records: Records) -> npt.NDArray[np.uint64]:
        """Where the functions return to that the traps are in; 0: not known."""

    @abc.abstractmethod
    def caller_of(self, trap: Trap) -> int:
        """The same of one."""

    def caller(self, address: int, *, is_guess: bool) -> str:
        """What a function returns to, as a break tells it (guest_view.Caller); "": not known."""
        return f"{'? ' * is_guess}{self.of(address) or f'{address:016x}'}" if address else ""

    def origin(self, trap: Trap) -> str:
        """Where a trap is and what called it: "native_write_msr+0x4 [kernel] <- __switch_to+0x2d6 [kernel]"."""
        is_guess = bool(trap.flags & RecordFlag.CALLER_GUESSED)
        return _joined(self.of(trap.rip), self.caller(self.caller_of(trap), is_guess=is_guess))

    def origins(self, records: Records) -> tuple[list[str], npt.NDArray[np.intp]]:
        """The different ones of one record or more, and which of them each has."""
        places, place_of = self.of_all(records["rip"])
        if not records["caller"].any():
            return places, place_of
        callers, caller_of = np.unique(self.callers(records), return_inverse=True)
        guessed = (records["flags"] & RecordFlag.CALLER_GUESSED) != 0
        keys, which = np.unique((place_of * len(callers) + caller_of) * 2 + guessed, return_inverse=True)
        texts = []
        for key in keys.tolist():
            place, caller = divmod(key // 2, len(callers))
            texts.append(_joined(places[place], self.caller(int(callers[caller]), is_guess=bool(key % 2))))
        return texts, which

    def thread(self, pid: int, tid: int) -> str:
        """A thread by the numbers in a record: "pid 5e tid 5f worker"; its name as far as it was told."""
        name = self.thread_name(pid, tid)
        return f"pid {pid:x}{f' tid {tid:x}' if tid != pid else ''}{f' {name}' if name else ''}"

    def of_all(self, addresses: npt.NDArray[np.uint64]) -> tuple[list[str], npt.NDArray[np.intp]]:
        """The different names of one address or more, and which of them each has."""
        # Traps come from few places, and many in a row from the same.
        if (addresses == addresses[0]).all():
            return [self.of(int(addresses[0]))], np.zeros(len(addresses), np.intp)
        unique, which = np.unique(addresses, return_inverse=True)
        return [self.of(address) for address in unique.tolist()], which


class Names(TrapNames):
    """The names of a debugger's guest. Nothing is asked of the machine for them.

    Of modules it knows those that were loaded when the guest was last looked at, at a stop or by a callback.
    """

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self._texts: dict[int, str] = {}
        self._seen: object = None

    def of(self, address: int) -> str:
        """Of one address."""
        guest = self._debugger.guest
        if guest.seen is not self._seen or len(self._texts) >= _MOST:
            self._texts.clear()
            self._seen = guest.seen
        text = self._texts.get(address)
        if text is None:
            place = guest.known_name(address)
            text = self._texts[address] = _ascii(str(place)) if place else ""
        return text

    def thread_name(self, pid: int, tid: int) -> str:
        """As far as it was told."""
        return _ascii(self._debugger.thread_names.get(pid, tid) or "")

    def callers(self, records: Records) -> npt.NDArray[np.uint64]:
        """As the agent has told."""
        return self._debugger.callers.of_all(records)

    def caller_of(self, trap: Trap) -> int:
        """The same of one."""
        return self._debugger.callers.of(trap)


def _joined(place: str, caller: str) -> str:
    return " ".join(filter(None, (place, f"<- {caller}" if caller else "")))


def _ascii(text: str) -> str:
    """With nothing in it that is more than one byte in a table of lines."""
    return text if text.isascii() else text.encode("ascii", "backslashreplace").decode()
