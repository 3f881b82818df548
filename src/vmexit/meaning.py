"""What is shown of an MSR besides numbers: its name, and what its value says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmexit import msr
from vmexit.link.rings import Records
from vmexit.link.wire import Access, Stage
from vmexit.msr import Msr
from vmexit.trap import Trap

_MOST = 16384
"""Values whose meaning is kept, so that it need not be made again for each trap."""


def has_value(access: int, stage: int) -> bool:
    """Whether a trap has a value: before an RDMSR, EDX:EAX is only what it is about to replace."""
    return not (access == Access.RDMSR and stage == Stage.PRE)


class Meanings:
    """The name of an MSR and what a value of it says, "EFER SCE LME LMA NXE"; "" for an MSR that nothing is known of."""

    def __init__(self) -> None:
        self._msrs: dict[int, Msr | None] = {}
        self._texts: dict[tuple[int, int], str] = {}

    def _msr(self, address: int) -> Msr | None:
        if address not in self._msrs:
            if len(self._msrs) >= _MOST:
                self._msrs.clear()
            self._msrs[address] = msr.find(address)
        return self._msrs[address]

    def name(self, address: int) -> str:
        """Its name alone."""
        found = self._msr(address)
        return found.name if found else ""

    def text(self, address: int, value: int) -> str:
        """Its name and what the value says."""
        found = self._msr(address)
        if found is None or not found.fields:
            return found.name if found else ""
        key = (address, value)
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= _MOST:
                self._texts.clear()
            text = self._texts[key] = " ".join((found.name, *found.words(value)))
        return text

    def of(self, trap: Trap) -> str:
        """What a trap's MSR and value mean."""
        return self.text(trap.msr, trap.value) if has_value(trap.access, trap.stage) else self.name(trap.msr)

    def of_all(self, records: Records) -> tuple[list[str], npt.NDArray[np.intp]]:
        """The different meanings of records, and which of them each record has.

        Costs little more than sorting the MSRs, and the values of those that have fields; each different value is explained once.
        """
        addresses, which = np.unique(records["msr"], return_inverse=True)
        found = [self._msr(address) for address in addresses.tolist()]
        # First the names alone ...
        texts = [one.name if one else "" for one in found]
        chosen = which
        told = (records["access"] != Access.RDMSR) | (records["stage"] != Stage.PRE)
        for number, one in enumerate(found):
            if one is None or not one.fields:
                continue
            # ... then, where there are fields, what the values say.
            these = np.flatnonzero((which == number) & told)
            values, value_of = np.unique(records["value"][these], return_inverse=True)
            chosen[these] = value_of + len(texts)
            texts += [self.text(one.address, value) for value in values.tolist()]
        return texts, chosen
