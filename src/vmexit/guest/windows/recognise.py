"""Which Windows runs in a guest: by its kernel's image in memory, and by a PDB that the user names or has named before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from vmexit.errors import VmexitError
from vmexit.guest import paging
from vmexit.guest.memory import Machine, PhysicalMemory
from vmexit.guest.store import Store
from vmexit.guest.system import Help, NotRecognisedError, Recognised
from vmexit.guest.windows import profile as profiles
from vmexit.guest.windows.locate import Kernel, find_kernel, kpcr_of
from vmexit.guest.windows.pdb import PdbError, read_pdb
from vmexit.guest.windows.profile import Profile
from vmexit.guest.windows.running import Windows
from vmexit.guest.windows.settle import ProcessesUnknownError
from vmexit.guest.windows.stack import Stacks


def recognise(machine: Machine, core: int, *, given: Help, lstar: int | None, store: Store) -> Recognised:
    """Looks at a halted machine, or at one whose vCPU ``core`` waits. Raises NotRecognisedError, VmexitErrors of the machine.

    ``lstar``: the address that the guest gives SYSCALL, where that is known; ``store``: where what PDBs say is kept.
    """
    in_long_mode = [own for own in _registers(machine, core) if paging.is_long_mode(own["cr0"], own["efer"])]
    if not in_long_mode:
        raise NotRecognisedError("no Windows: not in 64-bit mode")
    physical = PhysicalMemory(machine)
    kernel = next(filter(None, (find_kernel(physical, registers, lstar) for registers in in_long_mode)), None)
    if kernel is None:
        raise NotRecognisedError("no Windows: no ntoskrnl.exe lies below what GS or LSTAR leads to")
    remarks: list[str] = []
    profile, source = _profile(kernel, given, store, remarks)
    windows = Windows(kernel, profile)
    for registers in in_long_mode:
        for base in kpcr_of(windows.memory, registers):
            windows.add_processor(base)
    try:
        source += f"; where processes are: {windows.process_source}"
    except ProcessesUnknownError as error:
        remarks.append(str(error))
    return Recognised(windows, Stacks(windows), source, tuple(remarks))


def _registers(machine: Machine, core: int) -> Iterator[Mapping[str, int]]:
    """Those of the vCPU ``core``, and then of the others as far as they stand, too."""
    yield machine.registers(core)
    for each in range(machine.vcpus):
        if each != core:
            with contextlib.suppress(VmexitError):
                yield machine.registers(each)


def _profile(kernel: Kernel, given: Help, store: Store, remarks: list[str]) -> tuple[Profile | None, str]:
    """What a PDB says of the kernel, and where symbols come from."""
    record = kernel.image.codeview
    if given.pdb is not None:
        try:
            profile = read_pdb(given.pdb)
        except PdbError as error:
            remarks.append(f"{given.pdb} is of no use: {error}")
        else:
            if record is not None and profile.key == record.key:
                profiles.keep(store, profile)
                return profile, str(given.pdb)
            wanted = f"{record.file} {record.key}" if record else "not known"
            remarks.append(f"{given.pdb} is not of the kernel that runs here: it is {profile.key}, the kernel's is {wanted}")
    known = profiles.load(store, record.key) if record is not None else None
    return (known, "a PDB given before") if known else (None, "the guest's memory (exports)")
