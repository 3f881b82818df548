"""Shared memory as the agent lays it out."""

from __future__ import annotations

import mmap

from vmexit.link import wire


def header(vcpus: int, records: int, words: int = 64) -> dict[str, int]:
    """The fields of its struct vmexit_shared, for rings of so many records and words of text."""

    def behind(offset: int, size: int) -> int:
        return -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE

    records_offset = behind(wire.size("shared"), vcpus * wire.size("ring"))
    text_offset = behind(records_offset, vcpus * records * wire.size("record"))
    globals_offset = behind(text_offset, vcpus * words * 8)
    return {
        "magic": wire.MAGIC,
        "version": wire.VERSION,
        "vcpus": vcpus,
        "ring_records": records,
        "records_offset": records_offset,
        "text_offset": text_offset,
        "globals_offset": globals_offset,
        "ring_words": words,
        "size": behind(globals_offset, wire.MAX_GLOBALS * 8),
    }
