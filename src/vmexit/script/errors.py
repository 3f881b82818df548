"""What goes wrong with a script: where in its text, what was expected, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from vmexit.errors import CommandError, VmexitError


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A text that a script is made of: the script itself or a file that it includes."""

    name: str
    """What the user knows it by: a path, or "script"."""
    text: str


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a source: ``text[start:end]``."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        """From 1."""
        return self.source.text.count("\n", 0, self.start) + 1

    @property
    def column(self) -> int:
        """From 1, in characters."""
        return self.start - self.source.text.rfind("\n", 0, self.start)

    def to(self, other: Place) -> Place:
        """From the start of this place to the end of another one, if both are in one source."""
        return Place(self.source, self.start, max(self.end, other.end)) if self.source is other.source else self


class _PlacedError(VmexitError):
    """An error with a place in a script."""

    def __init__(self, message: str, place: Place, hint: str | None = None) -> None:
        super().__init__(message, place, hint)
        self.message = message
        self.place = place
        self.hint = hint

    @property
    def line(self) -> int:
        """From 1."""
        return self.place.line

    @property
    def column(self) -> int:
        """From 1."""
        return self.place.column

    def _shown(self) -> CommandError:
        where = f"{self.place.source.name}:{self.line}:{self.column}: {self.message}"
        return CommandError(where, self.place.source.text, self.place.start, self.place.end, self.hint)

    def __str__(self) -> str:
        return str(self._shown())

    def render(self) -> str:
        """The message with file, line and column, then the source line with a caret under the part to blame."""
        return self._shown().render()


class UnknownGuestError(VmexitError):
    """The guest's symbols are not known (yet); the message says why."""


class ScriptError(_PlacedError):
    """A script that cannot be compiled."""


class ScriptRunError(_PlacedError):
    """A run of a script that was ended: what it tried, and where. What it had done and printed until then stays."""
