"""A Linux that runs in the guest: its symbols where they are now, its processes, its modules, its types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmexit.guest.linux.btf import Btf
from vmexit.guest.linux.image import KERNEL_MAP
from vmexit.guest.linux.modules import Module, read_module_symbols, read_modules
from vmexit.guest.linux.processes import Task, Tasks
from vmexit.guest.linux.profile import Profile, ProfileError
from vmexit.guest.linux.recipe import Recipe
from vmexit.guest.linux.slide import Placement, lstar_slide
from vmexit.guest.memory import UnreadableError, VirtualMemory
from vmexit.guest.naming import Naming
from vmexit.guest.symbols import KERNEL, Symbols

_OTHER_NAMES = ("nt", "vmlinux")
"""What else may stand before the ! of a symbol of the kernel's own; "nt" is what people type who know Windows."""
_CODE = (("_stext", "_etext"), ("_sinittext", "_einittext"))


class Linux(Naming[Module]):
    """One boot of a kernel. What is read of it holds for one stop of the machine: ``forget`` when it has run."""

    def __init__(self, profile: Profile, placement: Placement, memory: VirtualMemory) -> None:
        """``memory``: by the kernel's own page tables."""
        find = profile.symbols.find
        extent = ((find("_text") or 0) + placement.slide, (find("_end") or 0) + placement.slide)
        # Per-CPU variables are offsets into the area of each CPU; they do not move.
        super().__init__(KERNEL, _OTHER_NAMES, extent, profile.symbols.moved(placement.slide, KERNEL_MAP))
        self.profile = profile
        self.placement = placement
        self.memory = memory
        self.slide = placement.slide
        self.tasks = Tasks(profile, placement.slide, memory)
        self._code = [
            (start + self.slide, end + self.slide)
            for first, last in _CODE
            if (start := find(first)) is not None and (end := find(last)) is not None
        ]

    @property
    def built(self) -> str:
        """What the kernel says of its build."""
        return self.profile.version

    @property
    def types(self) -> Btf:
        """The kernel's types. Raises BtfError where it carries none."""
        return self.profile.btf

    def forget(self) -> None:
        """The machine has run, or somebody has changed its memory."""
        self.memory.forget()
        self.tasks.forget()
        self._forget_modules()

    def is_same(self, other: object) -> bool:
        """Whether two are one kernel at one place."""
        if not isinstance(other, Linux):
            return False
        return self.placement == other.placement and self.profile.banner == other.profile.banner

    def is_entered_at(self, lstar: int) -> bool:
        """Whether that is the address which this kernel gives SYSCALL."""
        return lstar_slide(self.profile, lstar) == self.slide

    def is_still_there(self) -> bool:
        """Whether this kernel is still in memory: it is not after a reset, nor after kexec."""
        at = self.profile.address("linux_banner") + self.slide
        try:
            return self.memory.read(at, len(self.profile.banner)) == self.profile.banner
        except UnreadableError:
            return False

    def describe(self) -> str:
        """One line: what runs, and how much is known of it."""
        modules = self.modules
        return (
            f"Linux {self.profile.release} x86_64, slide {self.slide:#x}, {self.symbol_count} symbols, "
            f"{len(modules)} module{'s' * (len(modules) != 1)}"
        )

    # ---- symbols ----

    def _read_modules(self) -> Iterable[Module]:
        try:
            return read_modules(self.profile, self.slide, self.memory)
        except ProfileError:
            return ()

    def _read_module_symbols(self, module: Module) -> Symbols:
        try:
            return read_module_symbols(self.profile, self.memory, module)
        except ProfileError:
            return Symbols.none()

    def is_code(self, address: int) -> bool:
        """Whether it can be the address of an instruction of the kernel's or of a module's."""
        in_kernel = any(start <= address < end for start, end in self._code)
        return in_kernel or self.module_at(address) is not None

    @property
    def code(self) -> list[tuple[int, int]]:
        """Where the kernel's own instructions begin and end."""
        return self._code

    # ---- processes ----

    @property
    def recipe(self) -> Recipe:
        """The way to a vCPU's task, for those who are at the trap itself. Raises ProfileError."""
        return self.tasks.recipe

    def current(self, core: int, registers: Mapping[str, int]) -> Task | None:
        """The thread that a vCPU executes; None: not known."""
        try:
            return self.tasks.current(core, registers)
        except ProfileError:
            return None
