"""The errors that a user is told about: what went wrong in one line and, for commands, where."""

from __future__ import annotations

import unicodedata

# Columns of a source line that are shown, the signs of a cut not counted.
_ROOM = 100
_TAB = 8
_CUT = "..."


class VmexitError(Exception):
    """Anything that a user is told in one line; `str()` of it is that line, fit for a terminal."""

    def __str__(self) -> str:
        return "".join(char if char.isprintable() else _escaped(char) for char in super().__str__())


class TargetError(VmexitError):
    """The target (QEMU or another VMM) cannot do what was asked, or has ended."""


class LinkError(VmexitError):
    """The connection to the agent cannot be made, has broken, or brought something that makes no sense."""


class NotKnownError(VmexitError):
    """Too little is known of the guest for what was asked, or not yet."""


class UsageError(VmexitError):
    """The arguments of the `vmexit` command make no sense."""


class CommandError(VmexitError):
    """A command that cannot be carried out, and which part of it is to blame.

    `line` is the whole command, which may span lines; `start` and `end` (exclusive) are offsets into it and
    are kept within it. `start` may be the line's length: something is missing there. `hint` says what to do.
    """

    def __init__(self, message: str, line: str, start: int, end: int, hint: str | None = None) -> None:
        # All of it goes to Exception so that the error can be copied and pickled.
        super().__init__(message, line, start, end, hint)
        self.message = message
        self.line = line
        self.start = max(0, min(start, len(line)))
        self.end = max(self.start, min(end, len(line)))
        self.hint = hint

    def __str__(self) -> str:
        text = self.message
        if self.hint:
            # A question, or a hint with parentheses of its own, would read badly between parentheses.
            apart = self.hint.endswith("?") or "(" in self.hint
            text += f": {self.hint}" if apart else f" ({self.hint})"
        return str(VmexitError(text))

    def render(self) -> str:
        """The message, then the source line with `^~~~` under the part to blame; no newline at the end.

        Of a command that spans lines only the line where that part starts is shown, and of a long line only
        the surroundings. Without a line there is only the message.
        """
        if not self.line.strip():
            return str(self)
        first = self.line.rfind("\n", 0, self.start) + 1
        last = self.line.find("\n", self.start)
        source = self.line[first : last if last >= 0 else len(self.line)].removesuffix("\r")
        start = min(self.start - first, len(source))
        shown, indent, width = _excerpt(source, start, self.end - first)
        # An empty mark, where something is missing, gets its caret all the same.
        return "\n".join((str(self), shown, " " * indent + "^" + "~" * (width - 1)))


def _excerpt(source: str, start: int, end: int) -> tuple[str, int, int]:
    """What to show of `source` around [start, end), the column of the mark in it, and its width."""
    # No more than this is ever shown, and a line may hold megabytes.
    left, right = max(0, start - _ROOM), start + _ROOM
    cells = _cells(source[left:right])
    widths = [width for _, width in cells]
    low, high = _window(widths, start - left, end - left)
    before = _CUT if left + low > 0 else ""
    after = _CUT if left + high < len(source) else ""
    shown = before + "".join(text for text, _ in cells[low:high]) + after
    indent = len(before) + sum(widths[low : start - left])
    return shown, indent, sum(widths[start - left : min(end - left, high)])


def _window(widths: list[int], start: int, end: int) -> tuple[int, int]:
    """Which cells, [low, high), to show: `start` and what fits around it in `_ROOM` columns."""
    low = high = start
    room = _ROOM
    # The mark comes first, but leaves some room for what is around it.
    while high < min(end, len(widths)) and room - widths[high] >= _ROOM // 3:
        room -= widths[high]
        high += 1
    grown = True
    while grown:
        grown = False
        if low > 0 and widths[low - 1] <= room:
            low -= 1
            room -= widths[low]
            grown = True
        if high < len(widths) and widths[high] <= room:
            room -= widths[high]
            high += 1
            grown = True
    return low, high


def _cells(source: str) -> list[tuple[str, int]]:
    """Each character as it is shown, and the columns that takes: tabs as spaces, unprintable ones escaped."""
    cells = []
    column = 0
    for char in source:
        if char == "\t":
            width = _TAB - column % _TAB
            text = " " * width
        elif not char.isprintable():
            text = _escaped(char)
            width = len(text)
        else:
            text = char
            width = _columns(char)
        cells.append((text, width))
        column += width
    return cells


def _columns(char: str) -> int:
    """Terminal columns of a printable character: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
