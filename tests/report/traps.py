"""Made-up records, and recordings of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vmexit.link.rings import Records
from vmexit.link.wire import RECORD, Access, Action, RecordFlag, Stage
from vmexit.report.fileformat import PROCESS_KNOWN
from vmexit.report.recorder import Recorder

START_NS = 5_000_000_000


def trap(msr: int, value: int, **fields: int) -> Mapping[str, int]:
    """A write of an MSR in stage pre by core 0; ``fields``: what is different, by their names in the record."""
    return {"msr": msr, "value": value, **fields}


def records_of(traps: Iterable[Mapping[str, int]], *, start: int = 0) -> Records:
    """Records a microsecond apart; ``start``: how many there were before."""
    rows = list(traps)
    records: Records = np.zeros(len(rows), RECORD)
    records["sequence"] = np.arange(start, start + len(rows))
    records["time_ns"] = START_NS + records["sequence"] * np.uint64(1000)
    usual = {
        "access": Access.WRMSR,
        "stage": Stage.PRE,
        "action": Action.RECORD,
        "event": 1,
        "length": 2,
        "rip": 0xFFFF_FFFF_8100_0000,
    }
    for name, value in usual.items():
        records[name] = int(value)
    for place, row in enumerate(rows):
        for name, value in row.items():
            records[name][place] = value
    return records


def of_process(pid: int, tid: int | None = None) -> dict[str, int]:
    """Fields of a trap that tells its process."""
    return {"process": pid, "thread": pid if tid is None else tid, "flags": PROCESS_KNOWN}


def record(path: Path, *parts: Records, info: Mapping[str, Any] | None = None, lost: int = 0, **how: Any) -> Path:
    """A recording of these, in blocks of at most 65,536.

    ``how``: ``name_of``, ``place_of`` and ``callers_of`` as Recorder has them; ``end=None``: it has no end.
    """
    recorder = Recorder(path)
    recorder.name_of = how.get("name_of")
    recorder.place_of = how.get("place_of", recorder.place_of)
    recorder.callers_of = how.get("callers_of")
    recorder.lost = lambda: lost
    recorder.begin(
        {
            "vmexit": "0.1.0",
            "machine": {"name": "QEMU 7.2.22", "vcpus": 2},
            "events": {"0": {"text": "!msrwrite"}},
            **(info or {}),
        }
    )
    for part in parts:
        recorder.add(part)
    recorder.close(how.get("end", {"reason": "the machine ended", "exit_status": 0}))
    return path


def boot() -> Records:
    """A few traps as a Linux makes them: EFER changes on both cores, LSTAR and MISC_ENABLE are written, one is skipped."""
    efer, lstar, misc = 0xC000_0080, 0xC000_0082, 0x1A0
    return records_of(
        [
            trap(efer, 0x500),
            trap(efer, 0xD01),
            trap(efer, 0x500, vcpu=1),
            trap(lstar, 0xFFFF_FFFF_8200_0080),
            trap(lstar, 0xFFFF_FFFF_8200_0080, vcpu=1),
            trap(misc, 0x1, access=int(Access.RDMSR), stage=int(Stage.POST)),
            trap(misc, 0x2222, flags=int(RecordFlag.SKIPPED)),
            trap(misc, 0x9, vcpu=0),
            trap(efer, 0xD01, vcpu=1),
        ]
    )
