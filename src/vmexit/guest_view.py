"""What a debugger knows of its guest: recognised when it is first asked for, and again when another has taken its place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from vmexit.errors import NotKnownError, VmexitError
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.recipe import is_kernel_pointer
from vmexit.guest.linux.running import Linux
from vmexit.guest.memory import UnreadableError
from vmexit.guest.recognise import recognise
from vmexit.guest.symbols import Place
from vmexit.guest.system import Frame, Help, NotRecognisedError, Recognised, System, Task
from vmexit.link.client import RequestError
from vmexit.link.wire import Status
from vmexit.script.errors import UnknownGuestError

if TYPE_CHECKING:
    from vmexit.debugger import Debugger

_PLAIN_SYMBOL = re.compile(r"[A-Za-z_.$?!*\[\]][\w.$!*?\[\]-]*")


class DebuggedMachine:
    """A debugger's machine as vmexit.guest reads it (guest.memory.Machine)."""

    def __init__(self, debugger: Debugger) -> None:
        self._debugger = debugger
        self.reader = 0
        """The vCPU that reads physical memory: any of a halted machine, otherwise one that waits."""

    @property
    def vcpus(self) -> int:
        """How many there are."""
        return self._debugger.target.vcpus

    def registers(self, core: int) -> Mapping[str, int]:
        """A vCPU's registers."""
        return self._debugger.registers(core)

    def read_physical(self, address: int, length: int) -> bytes:
        """Physical memory. Raises UnreadableError, and LinkError where the machine runs or is gone."""
        try:
            return self._debugger.read_memory(self.reader, address, length, physical=True)
        except RequestError as error:
            if error.status != Status.UNREADABLE:
                raise
            raise UnreadableError(address) from None


class Caller(NamedTuple):
    """Where a function returns to."""

    address: int
    place: Place | None
    """Its name."""
    is_guess: bool
    """It only looks as if it were: the word on the stack may be left from a call long ago."""

    def __str__(self) -> str:
        return f"{'? ' * self.is_guess}{self.place or f'{self.address:016x}'}"


class GuestView:
    """The guest of one debugger. To be asked while the machine is halted, or by a callback, for its own vCPU."""

    def __init__(self, debugger: Debugger, *, given: Help | None = None, cache: Cache | None = None) -> None:
        """``given``: what helps to recognise it; ``cache``: by default the user's own."""
        self._debugger = debugger
        self._machine = DebuggedMachine(debugger)
        self._cache = Cache() if cache is None else cache
        self._given = given or Help()
        self._found: Recognised | None = None
        self._failed: NotRecognisedError | None = None
        self._coded: object = None
        """The modules that the agent knows the code of."""
        self._callback: object = None
        """Stands for the callback that asks, as a Stop does for a machine that is halted."""
        self._read_at: object = None
        """The stop or callback that what has been read belongs to."""

    @property
    def given(self) -> Help:
        """What the user has given to help."""
        return self._given

    @given.setter
    def given(self, given: Help) -> None:
        self._given = given
        self.reset()

    def reset(self) -> None:
        """Another system may be running now: it is recognised anew when it is next asked for."""
        self._found = self._failed = None
        self._debugger.set_recipe(None)
        self._debugger.set_code(None)

    def _tell_agent(self) -> None:
        """Has the agent know which process runs, as soon as the kernel has come so far that it can be known."""
        recipe = None
        if self._found is not None:
            with contextlib.suppress(NotKnownError):
                recipe = self._found.system.recipe
        # An agent that does not take it does without; everything else is known all the same.
        with contextlib.suppress(RequestError):
            self._debugger.set_recipe(recipe)
        self._tell_code()

    def _tell_code(self) -> None:
        """Has the agent know how to find callers, in modules as in the kernel itself."""
        with contextlib.suppress(RequestError):
            self._debugger.set_code(None if self._found is None else self._found.stacks.code_map())
        self._coded = None if self._found is None else self._found.system.seen_modules

    def look_at_modules(self) -> None:
        """Takes note of the modules that are loaded now, for what is to be known while the guest runs. Raises LinkError."""
        system = self.known
        if system is None:
            return
        system.look_at_modules()
        if system.seen_modules != self._coded:
            self._tell_code()

    def forget(self) -> None:
        """Memory has changed: nothing of it that was read before counts any more."""
        self._read_at = None
        if self._found is not None:
            self._found.system.forget()

    def at_trap(self, core: int) -> None:
        """A callback may be about to ask, while its vCPU waits and the others run: what was read before counts no more."""
        self._callback = object()
        self._machine.reader = core

    def after_trap(self) -> None:
        """The callback has returned, and its vCPU goes on."""
        self._callback = None

    @property
    def _now(self) -> object:
        return self._callback if self._debugger.stop is None else self._debugger.stop

    def _core(self, core: int | None) -> int:
        """The vCPU that is meant: of a halted machine any, else the one that waits."""
        if core is not None:
            return core
        return self._machine.reader if self._debugger.stop is None else self._debugger.core

    def recognise(self, core: int | None = None, *, lstar: int | None = None) -> Recognised:
        """Recognises the guest anew, by the vCPU ``core``. Raises NotRecognisedError, LinkError.

        ``lstar``: what the guest has just given, or is about to give, IA32_LSTAR; its kernel is complete by then.
        """
        self._found = self._failed = None
        self._read_at = self._now
        try:
            self._found = recognise(self._machine, self._core(core), given=self._given, lstar=lstar, cache=self._cache)
        except NotRecognisedError as error:
            self._failed = error
            raise
        finally:
            self._tell_agent()
        return self._found

    def at_lstar(self, core: int, lstar: int) -> str | None:
        """To be called while a vCPU waits at its WRMSR of IA32_LSTAR: the moment that a kernel can be recognised first.

        Gives a line for the user, what was found or why nothing; None where the kernel that is known does it on another vCPU.
        Raises LinkError.
        """
        self.at_trap(core)
        self.forget()
        before = self._found
        if before is not None and before.system.is_entered_at(lstar) and before.system.is_still_there():
            self._tell_agent()
            return None
        try:
            found = self.recognise(core, lstar=lstar)
        except NotRecognisedError as error:
            return "; ".join((str(error), *error.remarks))
        if before is not None and before.system.is_same(found.system):
            return None  # which gives SYSCALL another way than its own
        return "; ".join((found.system.describe(), *found.remarks))

    @property
    def is_known(self) -> bool:
        """Whether something has been recognised, and nothing has been heard of its end; the machine is not looked at for that."""
        return self._found is not None

    @property
    def seen(self) -> object:
        """Another object whenever known_name may give other names than before; None: it gives none."""
        return None if self._found is None else self._found.system.seen_modules

    def summary(self) -> str:
        """One line: what runs, or why nothing is known. Raises LinkError."""
        try:
            found = self.recognised
        except NotRecognisedError as error:
            return "; ".join((str(error), *error.remarks))
        return "; ".join((found.system.describe(), *found.remarks))

    @property
    def recognised(self) -> Recognised:
        """What runs now. Raises NotRecognisedError, which says why nothing is known, and LinkError where the machine is gone."""
        is_new = self._read_at is None or self._read_at is not self._now
        self._read_at = self._now
        if self._found is not None:
            if not is_new:
                return self._found
            self._found.system.forget()
            if self._found.system.is_still_there():
                if not self._debugger.knows_processes:
                    self._tell_agent()
                elif self._found.system.seen_modules != self._coded:
                    self._tell_code()
                return self._found
        elif self._failed is not None and not is_new:
            raise self._failed
        return self.recognise()

    @property
    def system(self) -> System:
        """The system that runs now. Raises as ``recognised`` does."""
        return self.recognised.system

    @property
    def linux(self) -> Linux:
        """The Linux that runs now. Raises as ``recognised`` does, also where it is another system."""
        system = self.system
        if not isinstance(system, Linux):
            raise NotRecognisedError(f"no Linux: it is {system.describe()}")
        return system

    @property
    def known(self) -> System | None:
        """The system, or None where nothing is known. Raises LinkError."""
        try:
            return self.system
        except NotRecognisedError:
            return None

    # ---- what is asked most ----

    def read_kernel(self, address: int, length: int) -> bytes | None:
        """The kernel's memory by its own page tables, where the guest is known already: a program's may leave it out."""
        if self._found is None or not is_kernel_pointer(address & ~7):
            return None
        try:
            return self.system.memory.read(address, length)
        except (NotRecognisedError, UnreadableError):
            return None

    def known_name(self, address: int) -> Place | None:
        """The name of an address as far as it is known without looking at the guest, which may run."""
        return None if self._found is None else self._found.system.known_name(address)

    def symbol(self, name: str) -> int | None:
        """The address of a symbol for a script, also while the guest runs; None: there is none of that name.

        Raises UnknownGuestError where it cannot be told.
        """
        if not _PLAIN_SYMBOL.fullmatch(name):
            return None
        if self._debugger.is_running and self._callback is None:
            if self._found is None:
                raise UnknownGuestError("the guest is not recognised yet")
            return self._found.system.known_address(name)
        try:
            return self.system.address_of(name)
        except NotRecognisedError as error:
            raise UnknownGuestError(f"the guest is not recognised yet: {error.reason}") from None
        except VmexitError:
            raise UnknownGuestError("the guest is not recognised yet") from None

    def label(self, address: int) -> str | None:
        """The name of an address where the guest is known already; nothing is searched for that alone."""
        if self._found is None:
            return None
        place = self.name_of(address)
        return str(place) if place else None

    def name_of(self, address: int) -> Place | None:
        """What lies at an address: "native_write_msr+0x4 [kernel]". None: nothing that is known."""
        system = self.known
        return system.name_of(address) if system else None

    def address_of(self, name: str) -> int | None:
        """Of a symbol: "schedule", "kernel!schedule", "nt!schedule", "msr!msr_write"; None: nothing that is known."""
        if not _PLAIN_SYMBOL.fullmatch(name):
            return None
        system = self.known
        return system.address_of(name) if system else None

    def current(self, core: int | None = None) -> Task | None:
        """The thread that a vCPU (by default the current one) executes; None: not known."""
        system = self.known
        core = self._core(core)
        return system.current(core, self._machine.registers(core)) if system else None

    def frames(self, core: int | None = None) -> list[Frame]:
        """Who called whom on a vCPU. Raises NotRecognisedError."""
        return list(self.recognised.stacks.frames(self._machine.registers(self._core(core))))

    def caller(self, core: int | None = None) -> Caller | None:
        """What the function that a vCPU executes returns to; None: not known."""
        try:
            stacks = self.recognised.stacks
        except NotRecognisedError:
            return None
        frames = stacks.frames(self._machine.registers(self._core(core)))
        found = next(islice(frames, 1, None), None)
        return Caller(found.address, self.name_of(found.address), found.is_guess) if found else None
