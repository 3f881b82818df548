"""Completes what is being typed: commands, options, their values, numbers of events, names of registers and MSRs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from vmexit.commands import registry
from vmexit.commands.session import Session
from vmexit.commands.tokens import tokenize

# What a name in the middle of a sum comes after.
_IN_A_SUM = re.compile(r"[-+=@]")


def candidates(session: Session, text: str) -> tuple[str, list[str]]:
    """The unfinished word at the end of ``text``, and all that it can become."""
    word = text[text.rfind(" ") + 1 :]
    before = [token.lower for token in tokenize(text[: len(text) - len(word)])]
    if not before:
        found: Iterable[str] = registry.names()
    else:
        command = registry.find(before[0])
        if command is None:
            return word, []
        *done, word = _IN_A_SUM.split(word)
        found = command.complete_word(session, [*before[1:], *(["="] if done else [])], word)
    return word, [name for name in found if name.startswith(word.lower())]


class CommandCompleter(Completer):
    """For prompt_toolkit."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What can stand at the cursor."""
        word, names = candidates(self._session, document.text_before_cursor)
        only_name = " " not in document.text_before_cursor.lstrip()
        for name in names:
            command = registry.find(name) if only_name else None
            yield Completion(name, -len(word), display_meta=command.INFO.summary if command else "")
