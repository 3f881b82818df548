"""The command reference (docs/commands.md), made of what the commands say about themselves.

``python -m vmexit.commands.reference`` prints it.
"""

from __future__ import annotations

from vmexit.commands import registry
from vmexit.commands.command import Info

_HEAD = """\
# Commands

What can be typed at the prompt, given with `-x`, or stand in a file for `--script`. This page is made of the commands' own
help texts (`make docs`); `help COMMAND` shows the same.
"""


def markdown() -> str:
    """The whole page."""
    contents = [
        f"- [{', '.join(f'`{name}`' for name in info.names)}](#{_anchor(info)}): {info.summary}" for info in registry.infos()
    ]
    return "\n".join([_HEAD, *contents, "", *map(_section, registry.infos())])


def _anchor(info: Info) -> str:
    """As GitHub makes it of the heading: letters, digits, - and _ stay."""
    return "".join(char for char in _heading(info).lower().replace(" ", "-") if char.isalnum() or char in "-_")


def _heading(info: Info) -> str:
    return f"{info.name}: {info.summary}"


def _section(info: Info) -> str:
    usage = "\n".join(f"    {line}" for line in info.usage)
    parts = [f"## {_heading(info)}", usage, *(" ".join(paragraph.split()) for paragraph in info.text.split("\n\n"))]
    if info.parameters:
        parts.append("\n".join(f"- `{name}`: {' '.join(text.split())}" for name, text in info.parameters))
    if info.examples:
        rows = [f"| `{example}` | {text} |" for example, text in info.examples]
        parts.append("\n".join(["| example | what it does |", "|---|---|", *(row.replace("a|b", "a\\|b") for row in rows)]))
    if info.halted:
        parts.append("It needs a halted machine.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
