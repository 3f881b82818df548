"""Which Linux runs in a guest: by an image or a map that the user names, by kernels met before, or by its memory alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmexit.guest import paging
from vmexit.guest.linux import slide as slides
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.image import LINKED_AT, Image, ImageError, Part, parse_image, read_file
from vmexit.guest.linux.kallsyms import KallsymsError
from vmexit.guest.linux.profile import Profile, ProfileError, complete, parse_map, profile_of
from vmexit.guest.linux.running import Linux
from vmexit.guest.memory import LAST_ADDRESS, PAGE, Machine, PhysicalMemory, UnreadableError, VirtualMemory
from vmexit.guest.system import Help, NotRecognisedError

_MOST_IMAGE = 512 << 20
_PIECE = 1 << 20
_MAP_BANNER = b"Linux version "


@dataclass(frozen=True, slots=True)
class Recognised:
    """What was found."""

    linux: Linux
    source: str
    """Where symbols and types come from, in a few words."""
    remarks: tuple[str, ...] = ()
    """What was wrong with the help that was given; a line each."""


def recognise(
    machine: Machine, core: int = 0, *, given: Help | None = None, lstar: int | None = None, cache: Cache | None = None
) -> Recognised:
    """Looks at a halted machine (or at one whose vCPU ``core`` waits). Raises NotRecognisedError, VmexitErrors of the machine.

    ``lstar``: the address that the guest gives SYSCALL, where that is known; it saves a search. ``cache``: by default the
    user's own.
    """
    return _Search(machine, core, given or Help(), lstar, Cache() if cache is None else cache).run()


class _Search:
    def __init__(self, machine: Machine, core: int, given: Help, lstar: int | None, cache: Cache) -> None:
        self._machine = machine
        self._given = given
        self._lstar = lstar
        self._cache = cache
        self._physical = PhysicalMemory(machine)
        self._registers: Mapping[str, int] = machine.registers(core)
        self._remarks: list[str] = []

    def run(self) -> Recognised:
        if not paging.is_long_mode(self._registers["cr0"], self._registers["efer"]):
            raise NotRecognisedError("the guest's firmware or an early kernel: not in 64-bit mode yet, or a 32-bit system")
        try:
            linux, source = self._by_image() or self._by_map() or self._by_cache() or self._by_memory()
        except NotRecognisedError as error:
            error.remarks = tuple(self._remarks)
            raise
        return Recognised(linux, source, tuple(self._remarks))

    def _by_image(self) -> tuple[Linux, str] | None:
        path = self._given.image
        if path is None:
            return None
        try:
            content = read_file(path)
            key = self._cache.key_of(content)
            profile = self._cache.load(key)
            if profile is None:
                profile = profile_of(parse_image(content))
                self._cache.keep(key, profile)
        except (ImageError, KallsymsError, ProfileError) as error:
            self._remarks.append(f"{path} is of no use: {error}")
            return None
        linux = self._placed(profile)
        if linux is None:
            self._remarks.append(f"{path} is not the kernel that runs here (it is {profile.release})")
            return None
        return linux, str(path)

    def _by_map(self) -> tuple[Linux, str] | None:
        path = self._given.system_map
        if path is None:
            return None
        try:
            symbols = parse_map(read_file(path).decode("ascii", "replace"))
        except (ImageError, ProfileError) as error:
            self._remarks.append(f"{path} is of no use: {error}")
            return None
        banner_at = symbols.find("linux_banner") or 0
        found = slides.find(self._physical, self._registers, _MAP_BANNER, banner_at)
        if found is not None:
            placement, memory = found
            try:
                profile = complete(symbols, lambda address, length: _read_up_to(memory, address + placement.slide, length))
                linux = self._placed(profile)
            except ProfileError:
                linux = None
            if linux is not None and _fits(linux):
                return linux, str(path)
        self._remarks.append(f"{path} is not of the kernel that runs here")
        return None

    def _by_cache(self) -> tuple[Linux, str] | None:
        for known in self._cache.known():
            found = slides.find(self._physical, self._registers, known.banner, known.banner_at)
            profile = self._cache.load(known.key) if found else None
            linux = self._placed(profile, found[0].slide) if found and profile else None
            if linux:
                return linux, "a kernel met before"
        return None

    def _by_memory(self) -> tuple[Linux, str]:
        image = self._image_in_memory()
        try:
            profile = profile_of(image)
        except (KallsymsError, ProfileError) as error:
            raise NotRecognisedError(f"what is mapped where Linux lies cannot be understood: {error}") from None
        linux = self._placed(profile, image.parts[0].address - LINKED_AT)
        if linux is None:
            raise NotRecognisedError(
                "no Linux: the banner of what is mapped where its kernel would be has changed", is_other_system=True
            )
        # By banner: the same kernel gives the same profile, wherever it was read.
        self._cache.keep(self._cache.key_of(b"memory" + profile.banner), profile)
        return linux, "the guest's memory"

    def _image_in_memory(self) -> Image:
        """All that is mapped where kernel images lie. Raises NotRecognisedError."""
        levels = paging.levels_of(self._registers["cr4"])
        best: tuple[int, int, VirtualMemory] | None = None
        for root in slides.roots(self._registers):
            memory = VirtualMemory(self._physical, root, levels)
            extent = slides.image_extent(memory)
            if extent is not None and (best is None or extent[1] - extent[0] > best[1] - best[0]):
                best = (*extent, memory)
        if best is None or best[0] < LINKED_AT:
            raise NotRecognisedError("no Linux: nothing is mapped where its kernel would be", is_other_system=True)
        start, end, memory = best
        where = memory.translate(start)
        parts = []
        for at in range(where, where + min(end - start, _MOST_IMAGE), _PIECE):
            try:
                parts.append(self._machine.read_physical(at, _PIECE))
            except UnreadableError:
                break
        data = b"".join(parts)
        if b"Linux version " not in data:
            raise NotRecognisedError("no Linux: what is mapped where its kernel would be has no banner", is_other_system=True)
        return Image(data, [Part(start, 0, len(data))])

    def _placed(self, profile: Profile, slide: int | None = None) -> Linux | None:
        """The kernel where it runs; None: it does not. Raises NotRecognisedError where it has only begun to.

        ``slide``: where it may be found at once.
        """
        banner_at = profile.symbols.find("linux_banner")
        if banner_at is None:
            return None
        hint = slides.lstar_slide(profile, self._lstar) if slide is None else slide
        found = slides.find(self._physical, self._registers, profile.banner, banner_at, hint)
        if found is None:
            return None
        placement, _ = found
        try:
            memory = slides.kernel_memory(self._physical, profile, placement, paging.levels_of(self._registers["cr4"]))
        except ProfileError:
            return None
        if memory is None:
            raise NotRecognisedError(f"Linux {profile.release} that is still booting: its page tables are not ready yet")
        return Linux(profile, placement, memory)


def _fits(linux: Linux) -> bool:
    """Whether symbols other than the banner are where they should be: init_task is the first task of all."""
    try:
        task = linux.tasks.read(linux.profile.address("init_task") + linux.slide)
    except ProfileError:
        return False
    return task is not None and task.pid == 0 and task.comm.startswith("swapper")


def _read_up_to(memory: VirtualMemory, address: int, length: int) -> bytes:
    """What can be read of so many bytes."""
    data = b""
    while len(data) < length and address + len(data) <= LAST_ADDRESS:
        at = address + len(data)
        try:
            data += memory.read(at, min(length - len(data), PAGE - at % PAGE))
        except UnreadableError:
            break
    return data
