"""The rings of records in shared memory: draining them in order, and answering the questions of stopped vCPUs."""

import contextlib
import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vmexit.errors import LinkError
from vmexit.link import wire
from vmexit.link.wire import EventState

Records = npt.NDArray[np.void]
"""Records (wire.RECORD), rising by sequence number."""

_U64 = 8
_RECORD = wire.size("record")
_ASK = int(wire.Action.ASK)
_ACTION = wire.offset("record", "action")
_SEQUENCE = slice(wire.offset("record", "sequence"), wire.offset("record", "sequence") + _U64)
# numpy copies records with named fields field by field (40 ns each), and opaque ones as they are (3 ns).
_OPAQUE = np.dtype((np.void, _RECORD))


def joined(parts: Sequence[Records]) -> Records:
    """One array of all these records, in this order (np.concatenate would drop the gaps between their fields)."""
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    opaque = np.dtype((np.void, dtype.itemsize))
    return np.concatenate([part.view(opaque) for part in parts]).view(dtype)


# Of a record: MSR, event and vCPU in one number, and access, stage, action, flags, length and caller in another.
_ALIKE = np.dtype(
    {
        "names": ["what", "how"],
        "formats": ["<u8", "<u8"],
        "offsets": [wire.offset("record", "msr"), wire.offset("record", "access")],
        "itemsize": wire.size("record"),
    }
)


def are_alike(records: Records) -> bool:
    """Whether all (at least one) differ in time, place and value alone, as they mostly do where they come fastest."""
    parts = records.view(_ALIKE)
    what, how = parts["what"], parts["how"]
    if what[0] != what[-1] or how[0] != how[-1]:
        return False
    return len(records) <= 2 or bool((what == what[0]).all() and (how == how[0]).all())


class Rings:
    """The shared memory of one link. Not thread-safe: one thread drains and answers."""

    def __init__(self, memory: mmap.mmap, wake_fd: int, first_sequence: int) -> None:
        """``wake_fd``: the eventfd that the agent writes when records are there and the debugger sleeps.

        Raises LinkError where the memory does not look as the agent lays it out.
        """
        header = wire.unpack("shared", memory[: wire.size("shared")])
        rings_end = wire.size("shared") + header.vcpus * wire.size("ring")
        records_end = header.records_offset + header.vcpus * header.ring_records * wire.size("record")
        text_end = header.text_offset + header.vcpus * header.ring_words * _U64
        globals_end = header.globals_offset + wire.MAX_GLOBALS * _U64
        is_sound = rings_end <= header.records_offset and records_end <= header.text_offset and text_end <= header.globals_offset
        is_sound &= globals_end <= header.size <= len(memory)
        if header.magic != wire.MAGIC or header.version != wire.VERSION or not is_sound:
            raise LinkError("the agent's shared memory is not what this version of vmexit expects")
        self.vcpus: int = header.vcpus
        self.wake_fd = wake_fd
        self._memory = memory
        self._words = memoryview(memory).cast("Q")
        self._sleeping = wire.offset("shared", "sleeping") // _U64
        self._capacity: int = header.ring_records
        first, stride = wire.size("shared"), wire.size("ring")
        self._rings = [(first + stride * i) // _U64 for i in range(self.vcpus)]
        self._rings_end = (first + stride * self.vcpus) // _U64
        self._records_start: int = header.records_offset
        self._records: list[npt.NDArray[np.void]] = [
            np.frombuffer(
                memory,
                _OPAQUE,
                self._capacity,
                header.records_offset + i * self._capacity * _RECORD,
            )
            for i in range(self.vcpus)
        ]
        self._text = np.frombuffer(memory, np.uint64, header.vcpus * header.ring_words, header.text_offset)
        self._text = self._text.reshape(header.vcpus, header.ring_words)
        self._capacity_words: int = header.ring_words
        self.globals: npt.NDArray[np.uint64] = np.frombuffer(memory, np.uint64, wire.MAX_GLOBALS, header.globals_offset)
        """The scripts' global variables, by their index; they can be written."""
        self._changes = wire.offset("shared", "changes") // _U64
        self._states = wire.offset("shared", "states")
        self._text_head = wire.offset("ring", "text_head") // _U64
        self._text_tail = wire.offset("ring", "text_tail") // _U64
        self._head = wire.offset("ring", "head") // _U64
        self._tail = wire.offset("ring", "tail") // _U64
        self._urgent = wire.offset("ring", "urgent") // _U64
        self._waiting = wire.offset("ring", "waiting") // _U64
        self._hits = wire.offset("ring", "hits") // _U64
        question = wire.offset("ring", "question")
        self._answered = (question + wire.offset("question", "answered")) // _U64
        self._registers = (question + wire.offset("question", "registers")) // _U64
        self._verdict = (question + wire.offset("question", "changed")) // _U64
        self._vcpu_fds: dict[int, int] = {}
        self._next = first_sequence
        self._early: Records = np.empty(0, wire.RECORD)

    def close(self) -> None:
        """Lets go of the shared memory and the eventfds. The counters can still be read."""
        words = self._words
        # Another thread may be reading them.
        self._words = memoryview(bytearray(words[: self._rings_end])).cast("Q")
        words.release()
        self._records.clear()
        self.globals = self.globals.copy()
        self._text = np.zeros((0, 1), np.uint64)
        # An exception that came out of here (Ctrl-C) may still hold views; with the last of them the memory goes.
        with contextlib.suppress(BufferError):
            self._memory.close()
        for fd in [self.wake_fd, *self._vcpu_fds.values()]:
            os.close(fd)
        self._vcpu_fds.clear()

    def vcpu_up(self, vcpu: int, fd: int) -> None:
        """Takes the eventfd that this vCPU sleeps on; the rings own it from now on."""
        old = self._vcpu_fds.pop(vcpu, None)
        if old is not None:
            os.close(old)
        self._vcpu_fds[vcpu] = fd

    @property
    def vcpus_up(self) -> int:
        """The vCPUs that have come up and told so; of the ``vcpus`` that there may be."""
        return len(self._vcpu_fds)

    def _wake(self, vcpu: int) -> None:
        fd = self._vcpu_fds.get(vcpu)
        if fd is not None:
            os.eventfd_write(fd, 1)

    def _take(self, vcpu: int) -> Records | None:
        """Copies what one ring holds, makes room, and wakes its vCPU if that waits for room."""
        words, base = self._words, self._rings[vcpu]
        head, tail = words[base + self._head], words[base + self._tail]
        if head == tail:
            return None
        start, stop = tail % self._capacity, head % self._capacity
        ring = self._records[vcpu]
        taken = ring[start:stop].copy() if start < stop else np.concatenate((ring[start:], ring[:stop]))
        words[base + self._tail] = head
        if words[base + self._waiting] == wire.WAITS_FOR_ROOM:
            self._wake(vcpu)
        return taken.view(wire.RECORD)

    def drain(self, *, final: bool = False) -> Records:
        """All records that are there, in the global order and without a gap.

        A record whose predecessor is still being written waits for the next call; with ``final`` (the writer is gone) nothing
        waits.
        """
        parts = [part for part in map(self._take, range(self.vcpus)) if part is not None]
        if not parts and not (final and len(self._early)):
            return self._early[:0]
        if len(parts) == 1 and not len(self._early) and self._follows(parts[0]):
            self._next += len(parts[0])
            return parts[0]
        merged = joined((self._early, *parts))
        merged = merged.take(np.argsort(merged["sequence"], kind="stable"))
        # What comes before is of a trap of before this debugger.
        merged = merged[np.searchsorted(merged["sequence"], np.uint64(self._next)) :]
        if final or not len(merged) or self._follows(merged):
            ready = len(merged)
        else:
            in_place = merged["sequence"] == np.arange(self._next, self._next + len(merged), dtype=np.uint64)
            ready = len(merged) if in_place.all() else int(np.argmin(in_place))
        self._early = merged[ready:].copy()
        self._next += ready
        return merged[:ready]

    def drain_question(self) -> bytearray | None:
        """The same where one question is all that is there, but the record's bytes; None: nothing is there, or something else.

        A vCPU waits for the answer, and for one record numpy would take its time.
        """
        found = None
        for vcpu, base in enumerate(self._rings):
            waiting = self._words[base + self._head] - self._words[base + self._tail]
            if waiting:
                if waiting != 1 or found is not None:
                    return None
                found = vcpu
        if found is None or len(self._early):
            return None
        base = self._rings[found]
        tail = self._words[base + self._tail]
        start = self._records_start + (found * self._capacity + tail % self._capacity) * _RECORD
        record = bytearray(self._memory[start : start + _RECORD])
        if record[_ACTION] != _ASK or int.from_bytes(record[_SEQUENCE], "little") != self._next:
            return None
        self._words[base + self._tail] = tail + 1
        self._next += 1
        return record

    def _follows(self, records: Records) -> bool:
        first, last = int(records["sequence"][0]), int(records["sequence"][-1])
        return first == self._next and last - first == len(records) - 1

    def _calls(self, base: int) -> bool:
        """Whether a ring holds something to be seen at once, or is filling up."""
        words = self._words
        tail = words[base + self._tail]
        if words[base + self._urgent] > tail or words[base + self._head] - tail >= self._capacity // 2:
            return True
        words_used: int = words[base + self._text_head] - words[base + self._text_tail]
        return words_used >= self._capacity_words // 2

    def calls(self) -> bool:
        """Whether there is something to be seen at once, or a ring is filling up."""
        return any(map(self._calls, self._rings))

    def before_sleep(self) -> bool:
        """To be called before waiting for ``wake_fd``; False: there is something to drain now, do not wait.

        The agent writes ``wake_fd`` for what should be seen at once and for a ring that is half full. The rest is to be drained
        every so often: taking few records at a time would make both processors pass the ring's memory to and fro.
        """
        self._words[self._sleeping] = 1
        if self.calls():
            self._words[self._sleeping] = 0
            return False
        return True

    def after_sleep(self) -> None:
        """To be called when the wait is over."""
        self._words[self._sleeping] = 0
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)

    def text(self, records: Records, start: int, words: int) -> npt.NDArray[np.uint64]:
        """Of what each of these records (Action.PRINT, FAULT) has left as text, so many words from that one on; a row each."""
        mask = np.uint32(self._text.shape[1] - 1)
        places = (records["text"][:, np.newaxis] + np.arange(start, start + words, dtype=np.uint32)) & mask
        found: npt.NDArray[np.uint64] = self._text[records["vcpu"][:, np.newaxis], places]
        return found

    def release_text(self, records: Records) -> None:
        """Makes room: the text of these records, all that drain() has given, is no longer needed."""
        if not len(self._text):
            return
        for vcpu in np.unique(records["vcpu"]).tolist():
            last = records[np.flatnonzero(records["vcpu"] == vcpu)[-1:]]
            size = int(self.text(last, 0, 1)[0, 0]) & 0xFFFF_FFFF
            base = self._rings[vcpu]
            tail = self._words[base + self._text_tail]
            self._words[base + self._text_tail] = tail + ((int(last["text"][0]) + size // _U64 - tail) & 0xFFFF_FFFF)
            if self._words[base + self._waiting] == wire.WAITS_FOR_ROOM:
                self._wake(vcpu)

    @property
    def changes(self) -> int:
        """How often scripts have enabled, disabled or cleared events."""
        return self._words[self._changes]

    def state(self, slot: int) -> EventState | None:
        """What scripts have made of the event with this slot since events were last set; None: nothing."""
        value = self._words[(self._states + slot) // _U64] >> (self._states + slot) % _U64 * 8 & 0xFF
        return EventState(value) if value else None

    def question_registers(self, vcpu: int) -> list[int]:
        """The registers (16 general, RIP, RFLAGS) of a vCPU whose ASK record was drained and is not answered yet."""
        start = self._rings[vcpu] + self._registers
        return self._words[start : start + wire.ASKED_REGISTERS].tolist()

    def answer(
        self,
        vcpu: int,
        sequence: int,
        registers: Sequence[int],
        changed: int,
        skip: bool,
        halt: bool = False,
        script: bool = False,
        again: bool = False,
    ) -> None:
        """Answers the question with this sequence number and lets the vCPU go on.

        ``changed``: bit n set = the guest gets ``registers[n]``. ``skip``: the instruction's short-circuit state. ``halt``: the
        machine halts here; a record with Action.BREAK follows. Of an event with EventFlag.ASK_FIRST, ``script``: its script runs
        now; ``again``: then a question follows, with RecordFlag.AGAIN.
        """
        words, base = self._words, self._rings[vcpu]
        if changed:
            start = base + self._registers
            for number, value in enumerate(registers):
                words[start + number] = value
        words[base + self._verdict] = changed | int(skip) << 32 | int(halt) << 40 | int(script) << 48 | int(again) << 56
        words[base + self._answered] = sequence + 1
        # The vCPU says that it sleeps, then looks for the answer once more. Should each miss the other's word all the same
        # (Python has no fence), it looks again a tenth of a second later.
        if words[base + self._waiting]:
            self._wake(vcpu)

    def hits(self, slot: int) -> int:
        """How often the event with this slot has been triggered, over all vCPUs."""
        return sum(self._words[base + self._hits + slot] for base in self._rings)

    def clear_hits(self, slot: int) -> None:
        """Starts counting anew for an event that takes over the slot."""
        for base in self._rings:
            self._words[base + self._hits + slot] = 0

    def counters(self) -> tuple[int, int]:
        """(records dropped for want of room, times that a vCPU waited for room), over all vCPUs."""
        dropped, waits = wire.offset("ring", "dropped") // _U64, wire.offset("ring", "waits") // _U64
        words = self._words
        return sum(words[base + dropped] for base in self._rings), sum(words[base + waits] for base in self._rings)
