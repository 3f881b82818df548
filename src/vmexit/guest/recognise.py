"""Which system runs in a guest: the way in to everything that is known of guests."""

from __future__ import annotations

from vmexit.guest.linux import recognise as linux_recognise
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.stack import Stacks
from vmexit.guest.memory import Machine
from vmexit.guest.store import Store
from vmexit.guest.system import Help, NotRecognisedError, Recognised
from vmexit.guest.windows import recognise as windows_recognise

_WINDOWS = "windows"


def recognise(
    machine: Machine, core: int = 0, *, given: Help | None = None, lstar: int | None = None, cache: Cache | None = None
) -> Recognised:
    """Looks at a halted machine (or at one whose vCPU ``core`` waits). Raises NotRecognisedError, VmexitErrors of the machine.

    ``lstar``: the address that the guest gives SYSCALL, where that is known; it saves a search. ``cache``: of Linux kernels, by
    default the user's own; what is kept of Windows lies beside it.
    """
    given = given or Help()
    cache = Cache() if cache is None else cache
    try:
        linux = linux_recognise.recognise(machine, core, given=given, lstar=lstar, cache=cache)
        return Recognised(linux.linux, Stacks(linux.linux), linux.source, linux.remarks)
    except NotRecognisedError as error:
        if not error.is_other_system:
            raise
        no_linux = error
    try:
        found = windows_recognise.recognise(
            machine, core, given=given, lstar=lstar, store=Store(cache.folder.with_name(_WINDOWS))
        )
    except NotRecognisedError as error:
        both = NotRecognisedError(f"{no_linux.reason}; {error.reason}")
        both.remarks = (*no_linux.remarks, *error.remarks)
        raise both from None
    return Recognised(found.system, found.stacks, found.source, (*no_linux.remarks, *found.remarks))
