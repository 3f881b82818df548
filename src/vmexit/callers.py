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
    return wire.pack("frames", rsp=code.rsp, rbp=code.rbp, call=code.call, count=len(pieces)) + b"".join(pieces)


class Callers:
    """The addresses that the agent has told, each before the first trap that carries its number; each vCPU has its own numbers.

    Other threads may look up what the debugger's own has learned.
    """

    def __init__(self, vcpus: int) -> None:
        self._addresses: npt.NDArray[np.uint64] = np.zeros((vcpus, 1), np.uint64)

    def learn(self, records: Records) -> None:
        """Takes in records of Action.CALLER."""
        numbers = records["caller"].astype(np.intp)
        if not len(numbers):
            return
        addresses, most = self._addresses, int(numbers.max())
        if most >= addresses.shape[1]:
            grown = np.zeros((len(addresses), 2 * (most + 1)), np.uint64)
            grown[:, : addresses.shape[1]] = addresses
            addresses = grown
        addresses[records["vcpu"], numbers] = records["value"]
        self._addresses = addresses

    def of_all(self, records: Records) -> npt.NDArray[np.uint64]:
        """Where the functions with these instructions return to; 0: not known."""
        addresses = self._addresses
        # A number that was not told (the debugger came later) is not known.
        numbers = np.where(records["caller"] < addresses.shape[1], records["caller"], np.uint16(0))
        found: npt.NDArray[np.uint64] = addresses[records["vcpu"], numbers]
        return found

    def of(self, trap: Trap) -> int:
        """The same of one trap. RecordFlag.CALLER_GUESSED says whether it only looks as if it were."""
        addresses = self._addresses
        return int(addresses[trap.core, trap.caller_number]) if trap.caller_number < addresses.shape[1] else 0
