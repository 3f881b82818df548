"""What an MSR is: its names, its fields, and what a value of it says."""

from vmexit.msr.fields import Decoded, Field, changes, decode
from vmexit.msr.table import VENDORS, Msr, address_of, at, beginning, everything, find, similar

__all__ = [
    "VENDORS",
    "Decoded",
    "Field",
    "Msr",
    "address_of",
    "at",
    "beginning",
    "changes",
    "decode",
    "everything",
    "find",
    "similar",
]
