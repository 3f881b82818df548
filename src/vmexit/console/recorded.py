"""Names of the places and threads that a recording tells of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmexit.link.rings import Records
from vmexit.names import TrapNames
from vmexit.report.facts import recorded_text
from vmexit.report.reader import Chunk, RecordingFile
from vmexit.trap import Trap

_MOST_CALLERS = 1 << 16


class RecordedNames(TrapNames):
    """As the recording has them; any text may stand there, and none of it reaches a terminal as it is."""

    def __init__(self, file: RecordingFile) -> None:
        self._info = file.info
        self._addresses: npt.NDArray[np.uint64] = np.zeros(1, np.uint64)
        """Of callers, by the numbers that ``records`` gave them."""

    def records(self, chunk: Chunk) -> Records:
        """A chunk as records, whose callers are known here until the next chunk's are."""
        records = chunk.records()
        addresses, which = np.unique(chunk["called_from"], return_inverse=True)
        self._addresses = np.concatenate((np.zeros(1, np.uint64), addresses[: _MOST_CALLERS - 1]))
        records["caller"] = np.where((chunk["called_from"] == 0) | (which >= _MOST_CALLERS - 1), 0, which + 1)
        return records

    def of(self, address: int) -> str:
        """Of one address."""
        return _shown(recorded_text(self._info, "symbols", f"{address:x}"))

    def thread_name(self, pid: int, tid: int) -> str:
        """That of its process."""
        return _shown(recorded_text(self._info, "processes", f"{pid}"))

    def callers(self, records: Records) -> npt.NDArray[np.uint64]:
        """Of records that ``records`` has given last."""
        found: npt.NDArray[np.uint64] = self._addresses[records["caller"]]
        return found

    def caller_of(self, trap: Trap) -> int:
        """The same of one."""
        return int(self._addresses[trap.caller_number])


def _shown(text: str) -> str:
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
