"""What a PDB says of a kernel: where the members lie that vmexit reads, and its symbols; and the place where that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vmexit.guest.linux.btf import Btf, BtfError
from vmexit.guest.store import Store, arrays_of, symbols_of
from vmexit.guest.symbols import Symbols

_FORMAT = 2
"""To be raised whenever what is kept, or what it means, changes."""


@dataclass(frozen=True)
class Profile:
    """A kernel as its PDB has it."""

    key: str
    """GUID and age, as symbol servers write them."""
    offsets: Mapping[str, int]
    symbols: Symbols
    """As RVAs."""
    types_data: bytes = b""
    """Its types in BTF, the form that Linux has; empty: it has none."""

    @cached_property
    def types(self) -> Btf:
        """Its types. Raises BtfError where it has none."""
        if not self.types_data:
            raise BtfError("the kernel's PDB has no types")
        return Btf(self.types_data)


def load(store: Store, key: str) -> Profile | None:
    """What was kept of the PDB with that key."""
    found = store.load(key, _FORMAT)
    if found is None:
        return None
    head, arrays = found
    try:
        symbols = symbols_of(arrays)
        offsets = {str(name): int(value) for name, value in head["offsets"].items()}
        types = arrays["types"].tobytes()
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return Profile(key, offsets, symbols, types)


def keep(store: Store, profile: Profile) -> None:
    """Keeps it for the next session, which needs no PDB then; does nothing where that is not possible."""
    arrays = {**arrays_of(profile.symbols), "types": np.frombuffer(profile.types_data, np.uint8)}
    store.keep(profile.key, _FORMAT, {"offsets": dict(profile.offsets)}, arrays)
