"""Where traps were called from: how the agent finds that on the guest's stack, and the addresses that its numbers stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vmexit.guest.system import CodeMap
from vmexit.link import wire
from vmexit.link.rings import Records

if TYPE_CHECKING:
    from vmexit.trap import Trap

_MOST_CODES = wire.constant("MAX_CODES")


def pack(code: CodeMap) -> bytes:
    """The struct vmexit_frames and its pieces; of pieces that overlap only the first, and no more than the agent takes."""
    pieces: list[bytes] = []
    end = -1
    for piece in sorted(code.pieces, key=lambda piece: piece.first):
        if piece.first <= end or piece.last < piece.first or len(pieces) == _MOST_CODES:
            continue
        end = piece.last
        pieces.append(
            wire.pack("code", first=piece.first, last=piece.last, places=piece.places, entries=piece.entries, count=piece.count)
        )
    head = wire.pack(
        "frames", rsp=code.rsp, rbp=code.rbp, call=code.call, frame_pointers=int(code.keeps_frame_pointers), count=len(pieces)
    )
    return head + b"".join(pieces)


class Callers:
    """The addresses that the agent has told, each before the first trap that carries its number; each vCPU has its own numbers.

    Other threads may look up what the debugger's own has learned.
    """

    def __init__(self) -> None:
        self._addresses: npt.NDArray[np.uint64] = np.zeros((1, 1), np.uint64)
        """By vCPU and number."""

    def learn(self, records: Records) -> None:
        """Takes in records of Action.CALLER."""
        if not len(records):
            return
        addresses, cores, numbers = self._addresses, records["vcpu"], records["caller"]
        wanted = int(cores.max()) + 1, int(numbers.max()) + 1
        if wanted[0] > addresses.shape[0] or wanted[1] > addresses.shape[1]:
            grown = np.zeros((max(wanted[0], addresses.shape[0]), max(2 * wanted[1], addresses.shape[1])), np.uint64)
            grown[: addresses.shape[0], : addresses.shape[1]] = addresses
            addresses = grown
        addresses[cores, numbers] = records["value"]
        self._addresses = addresses

    def of_all(self, records: Records) -> npt.NDArray[np.uint64]:
        """Where the functions with these instructions return to; 0: not known."""
        addresses, cores, numbers = self._addresses, records["vcpu"], records["caller"]
        told = (cores < addresses.shape[0]) & (numbers < addresses.shape[1])
        found: npt.NDArray[np.uint64] = addresses[np.where(told, cores, 0), np.where(told, numbers, 0)]
        return found

    def of(self, trap: Trap) -> int:
        """The same of one trap. RecordFlag.CALLER_GUESSED says whether it only looks as if it were."""
        addresses, core, number = self._addresses, trap.core, trap.caller_number
        return int(addresses[core, number]) if core < addresses.shape[0] and number < addresses.shape[1] else 0
