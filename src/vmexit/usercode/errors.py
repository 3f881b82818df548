"""What is wrong with the user's machine code, before it runs or while it does."""

from __future__ import annotations

from vmexit.errors import VmexitError


class CodeError(VmexitError):
    """Text that is no machine code or does not assemble; ``start`` and ``end`` (exclusive) are offsets into that text."""

    def __init__(self, message: str, start: int = 0, end: int | None = None) -> None:
        super().__init__(message)
        self.start = start
        self.end = end


class CodeRunError(VmexitError):
    """A run that was ended: why, and at which instruction."""
