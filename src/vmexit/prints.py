"""What scripts print at traps: from the text in the rings to bytes, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vmexit.link.rings import Records, Rings
from vmexit.link.wire import Action
from vmexit.script.compile import CompiledScript
from vmexit.script.errors import ScriptRunError
from vmexit.script.printf import Format, render

_WORD = 8


@dataclass(frozen=True, slots=True)
class Printed:
    """What the script of one event has printed, at one trap or at several in a row; or why a run of it was ended."""

    event: int
    """The number of the event."""
    core: int
    """The vCPU, of the first print."""
    time_ns: int
    """Of the first one; the host's CLOCK_MONOTONIC."""
    text: bytes
    fault: ScriptRunError | None = None
    """Why the run was ended; then there is no text."""
    parts: Sequence[bytes] = ()
    """The text of each print by itself; none for what no script has printed."""


def printed(records: Records, rings: Rings, scripts: Mapping[int, CompiledScript]) -> Iterator[Printed]:
    """What these records (Action.PRINT, FAULT) tell, in their order. ``scripts``: by the number that the agent knows them by."""
    headers = rings.text(records, 0, 1)[:, 0]
    is_fault = records["action"] == Action.FAULT
    texts = _texts(records, headers, is_fault, rings, scripts)
    start = 0
    for end in _ends(records, is_fault):
        first = records[start]
        event, core, time_ns = int(first["event"]) - 1, int(first["vcpu"]), int(first["time_ns"])
        if is_fault[start]:
            place, detail = rings.text(records[start:end], 1, 2)[0].tolist()
            fault = scripts[int(first["script"])].fault(int(headers[start]) >> 32, place, detail)
            yield Printed(event, core, time_ns, b"", fault)
        else:
            parts = texts[start:end]
            yield Printed(event, core, time_ns, b"".join(parts), None, parts)
        start = end


def _ends(records: Records, is_fault: npt.NDArray[np.bool_]) -> list[int]:
    """Where the runs end of prints of one event. A fault stands alone."""
    breaks = (records["event"][1:] != records["event"][:-1]) | is_fault[1:] | is_fault[:-1]
    return [*(np.flatnonzero(breaks) + 1).tolist(), len(records)]


def _texts(
    records: Records,
    headers: npt.NDArray[np.uint64],
    is_fault: npt.NDArray[np.bool_],
    rings: Rings,
    scripts: Mapping[int, CompiledScript],
) -> list[bytes]:
    """The text of each print; empty for a fault."""
    texts = [b""] * len(records)
    # The number of the format is the header's upper half.
    formats = (headers >> np.uint64(32)) | records["script"].astype(np.uint64) << np.uint64(32)
    for key in np.unique(formats[~is_fault]).tolist():
        places = np.flatnonzero((formats == key) & ~is_fault)
        format_ = scripts[key >> 32].formats[key & 0xFFFF_FFFF]
        mine = records[places]
        if (quick := _plain(format_)) is not None:
            made = quick.render(rings.text(mine, 1, len(quick.columns)))
        else:
            words = (headers[places] & np.uint64(0xFFFF_FFFF)) // np.uint64(_WORD)
            made = [render(format_, rings.text(mine[i : i + 1], 1, size - 1).tobytes()) for i, size in enumerate(words.tolist())]
        if len(made) == len(texts):
            return made
        for place, text in zip(places.tolist(), made, strict=True):
            texts[place] = text
    return texts


@dataclass(frozen=True, slots=True)
class _Plain:
    """A format whose arguments are integers and nothing that Python's own formatting does in another way: many prints at once."""

    template: bytes
    columns: tuple[tuple[int, bool], ...]
    """Of each argument: how many bits count, and whether they are signed."""

    def render(self, rows: npt.NDArray[np.uint64]) -> list[bytes]:
        """The texts of many prints from their slots, a row each."""
        if not self.columns:
            return [self.template % ()] * len(rows)
        columns = []
        for (bits, signed), column in zip(self.columns, rows.T, strict=True):
            unused = np.uint64(64 - bits)
            shifted = column << unused
            columns.append((shifted.view(np.int64) >> unused.view(np.int64) if signed else shifted >> unused).tolist())
        template = self.template
        return [template % row for row in zip(*columns, strict=True)]


@lru_cache
def _plain(format_: Format) -> _Plain | None:
    """The same format, if it is one of those."""
    template = bytearray()
    columns = []
    for part in format_.parts:
        if isinstance(part, bytes):
            if b"\0" in part:
                return None
            template += part.replace(b"%", b"%%")
            continue
        if part.letter not in "diuxX" or part.star_width or part.star_precision or "#" in part.flags:
            return None
        if part.precision is not None and (part.precision == 0 or "0" in part.flags):
            return None
        width = "" if part.width is None else str(part.width)
        precision = "" if part.precision is None else f".{part.precision}"
        signed = part.letter in "di"
        flags = part.flags if signed else part.flags.replace("+", "").replace(" ", "")
        template += f"%{flags}{width}{precision}{'d' if part.letter in 'diu' else part.letter}".encode()
        columns.append((part.bits, signed))
    return _Plain(bytes(template), tuple(columns))
