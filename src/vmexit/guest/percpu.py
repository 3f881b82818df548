"""Which of the kernel's per-CPU areas belongs to which vCPU: GS says it, but a program can give its own GS any value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from vmexit.guest import paging


class Areas:
    """What has been found out of a kernel's areas. They stay what they are once the kernel is up."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def base(
        self, core: int, registers: Mapping[str, int], bases: Collection[int], owns_stack: Callable[[int], bool]
    ) -> int | None:
        """The area of a vCPU, one of ``bases``, which the kernel itself has handed out; None: its registers do not say.

        It is remembered from a moment when there was no doubt: at CPL 3 it is in KERNEL_GS_BASE; at CPL 0 it is the only one of
        the two that is an area. A program that gives its own GS the address of another CPU's area makes both look right; then
        ``owns_stack`` has to be true of one of them: whether the thread there owns the stack that RSP points into.
        """
        if not paging.is_long_mode(registers["cr0"], registers["efer"]):
            return None
        kernel, other = registers["gs_base"], registers["kernel_gs_base"]
        found = {base for base in bases if base} & ({other} if registers["cs"] & 3 else {kernel, other})
        known = self._known.get(core)
        if known in bases:
            return known if known in found else None
        if len(found) == 1:
            (base,) = found
            self._known[core] = base
            return base
        owners = [base for base in found if owns_stack(base)]
        return owners[0] if len(owners) == 1 else None
