"""Traps as lines of text: at the console, in the outputs that take lines, in reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from vmexit.link.rings import Records
from vmexit.link.wire import Access, RecordFlag, Stage
from vmexit.meaning import Meanings, has_value
from vmexit.names import TrapNames
from vmexit.trap import Trap, traps_of

_DIM, _YELLOW, _PLAIN = "\033[2m", "\033[33m", "\033[0m"

_Bytes = npt.NDArray[np.uint8]
_Texts = tuple[list[str], npt.NDArray[np.intp]]
"""Texts, and for each of some records which of them it has."""

STAGES = {Stage.PRE: "pre", Stage.POST: "post"}
ACCESSES = {Access.WRMSR: "wrmsr", Access.RDMSR: "rdmsr"}
_WHAT = {(stage, access): f"{STAGES[stage]:<4}  {ACCESSES[access]}" for stage in STAGES for access in ACCESSES}
_NO_VALUE = f"{'-':<16}"
_SHORT_CIRCUITED, _FAULTED = "short-circuited", "#GP"
_SECONDS = 5
"""Digits of the time before its point, at least."""
_CORE = 4
"""Columns of the core's number, which has up to four hexadecimal digits."""
_FIXED = len("  core  pre   wrmsr  c0000082  ffffffff81a00080  ffffffff8103f2b7")
"""Columns from behind the time to the end of RIP."""
_INDENT = 14
"""Of what does not fit into the line."""
_FEW = 50
"""Records that are sooner formatted one by one than all at once."""


def _table(texts: Iterable[str]) -> _Bytes:
    """Texts of the same length as rows of bytes."""
    return np.array([list(text.encode("ascii")) for text in texts], np.uint8)


_HEX = _table(f"{byte:02x}" for byte in range(256))
_DECIMALS = _table(f"{number:03}" for number in range(1000))


def _hex(values: npt.NDArray[np.unsignedinteger], size: int) -> _Bytes:
    """The values of ``size`` bytes each in hexadecimal, all digits."""
    in_bytes = values.astype(f">u{size}").view(np.uint8).reshape(len(values), size)
    return _HEX[in_bytes].reshape(len(values), 2 * size)


class Columns:
    """Traps as lines: in fixed columns time in seconds, core, stage, instruction, MSR, value and RIP; then whether it was
    skipped, what MSR and value mean, the name of the place that RIP is, what called it and the thread, as far as these are known.

    What does not fit into the ``width`` of a terminal goes into a second line, which is indented.
    """

    def __init__(self, started_ns: int | None = None, *, colour: bool = False, names: TrapNames | None = None) -> None:
        """``started_ns``: what time is counted from (Trap.time_ns); None: from the first trap. ``names``: None: no names."""
        self.width: int | None = None
        """Columns that there are; None: any number."""
        self._names = names
        self._started_ns = started_ns
        self._dim, self._mark, self._plain = (_DIM, _YELLOW, _PLAIN) if colour else ("", "", "")
        self._meanings = Meanings()

    def heading(self) -> str:
        """What stands above the columns."""
        return f"{'seconds':>{_SECONDS + 7}}  {'core':<{_CORE}}  {'stage':<5} {'':<5}  {'MSR':<8}  {'value':<16}  RIP"

    def line(self, trap: Trap) -> str:
        """One trap; no newline at the end."""
        microseconds = max(0, trap.time_ns - self._start(trap.time_ns)) // 1000
        time = f"{microseconds // 1_000_000:{_SECONDS}}.{microseconds % 1_000_000:06}"
        what = _WHAT[trap.stage, trap.access]
        mark = _SHORT_CIRCUITED if trap.skipped else _FAULTED if trap.flags & RecordFlag.FAULTED else ""
        tail = self._tail(len(time), mark, self._meanings.of(trap), *self._origin(trap))
        time = f"{self._dim}{time}{self._plain}"
        return f"{time}  {trap.core:<{_CORE}x}  {what}  {trap.msr:08x}  {value_text(trap)}  {_rip_text(trap)}{tail}"

    def _origin(self, trap: Trap) -> tuple[str, ...]:
        """Where it comes from: the place, and the thread where the record tells."""
        if self._names is None:
            return ()
        thread = self._names.thread(trap.pid, trap.tid) if trap.flags & RecordFlag.PROCESS_KNOWN else ""
        return self._names.origin(trap), thread

    def _threads(self, names: TrapNames, records: Records) -> _Texts:
        """The different threads of records, and which of them each has."""
        known = (records["flags"] & RecordFlag.PROCESS_KNOWN) != 0
        if not known.any():
            return [""], np.zeros(len(records), np.intp)
        # As no thread has such a number, 0 stands for those that are not known.
        keys = np.where(known, (records["process"].astype(np.uint64) << np.uint64(32) | records["thread"]) + np.uint64(1), 0)
        unique, which = np.unique(keys, return_inverse=True)
        texts = [names.thread((key - 1) >> 32, (key - 1) & 0xFFFF_FFFF) if key else "" for key in unique.tolist()]
        return texts, which

    def _tail(self, time_width: int, mark: str, *others: str) -> str:
        """What comes behind RIP; ``mark`` is the part that is to be coloured."""
        used, tail = time_width + _FIXED, ""
        for text in (mark, *others):
            if not text:
                continue
            before = "  "
            if self.width is not None and used + len(before) + len(text) > self.width:
                used, before = 0, f"\n{' ' * _INDENT}"
            used += len(before.lstrip("\n")) + len(text)
            tail += self._part(before, text, is_mark=text is mark)
        return tail

    def lines(self, records: Records) -> str:
        """All of them, each with a newline at the end.

        Of many, a line takes some hundred nanoseconds (formatting each by itself takes twice as long at least), and some
        microseconds where its value is another each time and has fields to be explained.
        """
        count = len(records)
        if count < _FEW:
            return "".join(f"{self.line(trap)}\n" for trap in traps_of(records))
        cores, core_of = np.unique(records["vcpu"], return_inverse=True)
        whats = list(_WHAT)
        what_of = (records["stage"].astype(np.intp) - 1) * 2 + records["access"].astype(np.intp) - 1
        values = _hex(records["value"], 8)
        values[what_of == whats.index((Stage.PRE, Access.RDMSR))] = _table([_NO_VALUE])
        rips = _hex(records["rip"], 8)
        rips[(records["rip"] == 0) & (records["length"] == 0) & (records["stage"] == Stage.POST)] = _table([_NO_VALUE])
        times = self._times(records["time_ns"])
        parts: list[str | _Bytes] = [
            self._dim,
            times,
            f"{self._plain}  ",
            _table(f"{core:<{_CORE}x}" for core in cores.tolist())[core_of],
            "  ",
            _table(_WHAT.values())[what_of],
            "  ",
            _hex(records["msr"], 4),
            "  ",
            values,
            "  ",
            rips,
        ]
        columns = self._columns(records)
        # Where nothing has to fit, each part is looked up by itself; else each different end of a line is made once.
        for texts, text_of in columns if self.width is None else [self._tails(columns, times.shape[1])]:
            if width := max(map(len, texts)):
                # What is shorter than the longest is filled up with NULs, which are taken out in the end.
                parts.append(_table(text.ljust(width, "\0") for text in texts)[text_of])
        parts.append("\n")
        arrays = [
            np.broadcast_to(_table([part]), (count, len(part))) if isinstance(part, str) else part for part in parts if len(part)
        ]
        return np.concatenate(arrays, axis=1).tobytes().translate(None, b"\0").decode("ascii")

    def _columns(self, records: Records) -> list[_Texts]:
        """What the ends of the lines are made of; where nothing has to fit, as it stands there."""
        skipped, faulted = ((records["flags"] & flag) != 0 for flag in (RecordFlag.SKIPPED, RecordFlag.FAULTED))
        columns = [
            (["", _FAULTED, _SHORT_CIRCUITED], np.where(skipped, 2, faulted.astype(np.intp))),
            self._meanings.of_all(records),
        ]
        if self._names:
            columns += [self._names.origins(records), self._threads(self._names, records)]
        if self.width is not None:
            return columns
        return [
            ([self._part("  ", text, is_mark=number == 0) if text else "" for text in texts], text_of)
            for number, (texts, text_of) in enumerate(columns)
        ]

    def _tails(self, columns: Sequence[_Texts], time_width: int) -> _Texts:
        """The different ends of lines, and which of them each has."""
        combined = np.zeros(len(columns[0][1]), np.intp)
        for texts, which in columns:
            combined = combined * len(texts) + which
        unique, tail_of = np.unique(combined, return_inverse=True)
        tails = []
        for number in unique.tolist():
            chosen: list[str] = []
            rest = number
            for texts, _ in reversed(columns):
                rest, index = divmod(rest, len(texts))
                chosen.insert(0, texts[index])
            tails.append(self._tail(time_width, *chosen))
        return tails, tail_of

    def _part(self, before: str, text: str, *, is_mark: bool) -> str:
        return f"{self._mark}{before}{text}{self._plain}" if is_mark else f"{before}{text}"

    def _start(self, first_ns: int) -> int:
        if self._started_ns is None:
            self._started_ns = first_ns
        return self._started_ns

    def _times(self, times_ns: npt.NDArray[np.uint64]) -> _Bytes:
        start = self._start(int(times_ns[0]))
        microseconds = np.maximum(times_ns, np.uint64(start)) - np.uint64(start)
        microseconds //= np.uint64(1000)
        seconds, fraction = np.divmod(microseconds, np.uint64(1_000_000))
        width = max(_SECONDS, len(str(int(seconds.max()))))
        whole = np.empty((len(seconds), width), np.uint8)
        for place in range(width):
            power = np.uint64(10 ** (width - 1 - place))
            digit = seconds // power
            shown = (digit > 0) | (power == 1)
            whole[:, place] = np.where(shown, digit % np.uint64(10) + np.uint64(ord("0")), np.uint64(ord(" ")))
        point = np.full((len(seconds), 1), ord("."), np.uint8)
        thousands, units = np.divmod(fraction.astype(np.intp), 1000)
        return np.concatenate((whole, point, _DECIMALS[thousands], _DECIMALS[units]), axis=1)


def value_text(trap: Trap) -> str:
    """EDX:EAX, unless it is what a read is about to replace."""
    return f"{trap.value:016x}" if has_value(trap.access, trap.stage) else _NO_VALUE


def _rip_text(trap: Trap) -> str:
    """Where the instruction is, which a tracepoint does not tell."""
    return _NO_VALUE if not trap.rip and not trap.length and trap.stage == Stage.POST else f"{trap.rip:016x}"
