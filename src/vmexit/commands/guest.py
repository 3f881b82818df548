"""``guest``: show which system runs in the guest, and help to recognise it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.session import Session
from vmexit.guest.system import NotRecognisedError

_FIELDS = {"image": "image", "map": "system_map", "pdb": "pdb"}
_CHOICES = (*_FIELDS, "again")


class Guest(Command):
    """Shows what runs in the guest."""

    INFO = Info(
        names=("guest",),
        usage=("guest", "guest image FILE", "guest map FILE", "guest pdb FILE", "guest again"),
        summary="show which system runs in the guest",
        text="""Shows the guest's kernel, where it lies, how many symbols and modules of it are known, where that comes from, and
what each core executes; or why nothing is known. The guest is recognised by its memory alone; nothing is installed in it. What
was found out about a kernel is kept in ~/.cache/vmexit, so that the next time takes a tenth of a second.

Where the guest alone is not enough, 'guest image' names its kernel image (bzImage or vmlinux), 'guest map' its System.map, and
'guest pdb' the PDB of a Windows kernel. A file of another kernel is noticed. 'guest again' looks anew.""",
        parameters=(("FILE", "A path; in double quotes where there is a space in it."),),
        examples=(("guest", "shows it"), ("guest again", "looks anew")),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        view = session.guest
        if arguments.tokens:
            choice = arguments.choice(arguments.tokens[0], _CHOICES, "kind of help")
            arguments.at_most(1 if choice == "again" else 2)
            if choice == "again":
                view.reset()
            else:
                if len(arguments.tokens) < 2:
                    raise arguments.missing("a file's name is missing")
                path = Path(arguments.tokens[1].text)
                if not path.is_file():
                    raise arguments.error(f"there is no file {path}", arguments.tokens[1])
                view.given = replace(view.given, **{_FIELDS[choice]: path})
        try:
            found = view.recognised
        except NotRecognisedError as error:
            session.emit("\n".join([str(error), *(f"note: {remark}" for remark in error.remarks)]))
            return
        lines = [found.system.describe(), f"from     {found.source}", f"built    {found.system.built}"]
        for core in range(session.debugger.target.vcpus):
            task = view.current(core)
            lines.append(f"core {core:<3x} {task or 'not known what it executes'}")
        session.emit("\n".join([*lines, *(f"note: {remark}" for remark in found.remarks)]))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return () if before else _CHOICES
