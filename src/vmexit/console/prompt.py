"""The prompt that a person types at, with the machine's doings shown above it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.data_structures import Size
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output

from vmexit.commands import registry
from vmexit.commands.session import Session
from vmexit.commands.tokens import commands_of, is_complete
from vmexit.console.completion import CommandCompleter, candidates
from vmexit.console.feed import Feed
from vmexit.console.render import error_text
from vmexit.console.screen import OutputGoneError, Screen
from vmexit.debugger import State
from vmexit.errors import VmexitError

_POLL_S = 0.05
_JOIN_S = 2.0
_AT_ONCE = 4096

# What a guest may do to a terminal: colours stay, all else (moving the cursor, clearing) would tear the line being typed.
_COLOUR = r"\x1b\[[0-9;:]*m"
_CONTROL = re.compile(
    rf"({_COLOUR})|\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def harmless(text: str) -> str:
    """What a guest has written, as lines that can be shown above a prompt."""
    text = _CONTROL.sub(lambda match: match[1] or "", text.replace("\r\n", "\n").replace("\r", "\n"))
    return f"{text}\x1b[0m" if "\x1b" in text else text


class PromptScreen(Screen):
    """A terminal with, now and then, a prompt in its last line."""

    def __init__(self) -> None:
        super().__init__()
        self._errors_are_seen = os.isatty(self._err)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._app: Application[Any] | None = None

    def attach(self, app: Application[Any]) -> None:
        """From now on the prompt of this application may be there; called in its event loop."""
        self._app, self._loop_thread = app, threading.get_ident()
        self._loop = asyncio.get_running_loop()

    def detach(self) -> None:
        """It is over with the prompt."""
        self._loop = None

    def guest(self, stream: str, data: bytes) -> None:
        """Hands on what the machine has written, without what would confuse the terminal, as whole lines."""
        if stream == "stderr" and not self._errors_are_seen:
            super().guest(stream, data)
            return
        text = harmless(data.decode(errors="replace"))
        if text.strip("\n") or "\n" in text:
            self._deliver(self._err if stream == "stderr" else self._out, text if text.endswith("\n") else f"{text}\n")

    def _deliver(self, fd: int, text: str) -> None:
        """Writes above the prompt. In another thread than the event loop's it waits until that is done."""
        loop = self._loop
        if loop is None or threading.get_ident() == self._loop_thread or (fd == self._err and not self._errors_are_seen):
            self._write_above(fd, text)
            return
        job = _Job(lambda: self._write_above(fd, text))
        try:
            loop.call_soon_threadsafe(job.do)
        except RuntimeError:
            job.do()  # the loop is closed
        while not job.done.wait(_POLL_S):
            if self._loop is None:
                job.do()

    def _write_above(self, fd: int, text: str) -> None:
        app = self._app
        at_prompt = app is not None and app.is_running and threading.get_ident() == self._loop_thread
        with self._lock:
            if at_prompt and app is not None:
                app.renderer.erase()
            self._put_text(fd, text)
        if at_prompt and app is not None:
            app.invalidate()


class _Job:
    """Something that is done once, by whoever comes first."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._taken = False
        self.done = threading.Event()

    def do(self) -> None:
        """Does it unless somebody has begun with it."""
        with self._lock:
            if self._taken:
                return
            self._taken = True
        try:
            self._work()
        finally:
            self.done.set()


def _common_beginning(names: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(names, default=""), max(names, default="")
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))]


class _PrivateHistory(FileHistory):
    """What was typed, in a file of the user's alone. That it cannot be written is no reason to stop."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def history() -> History:
    """What was typed in this and earlier sessions: vmexit/history in $XDG_STATE_HOME or ~/.local/state."""
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "vmexit")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "history"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return _PrivateHistory(str(path))


def _terminal_size() -> Size:
    columns, rows = os.get_terminal_size(1)
    return Size(rows or 24, columns or 80)


class _MachineEndedError(Exception):
    """Ends the prompt."""


class Interactive:
    """The prompt; commands are carried out in a thread of their own, and another one lets the debugger work."""

    def __init__(self, session: Session, screen: PromptScreen, feed: Feed) -> None:
        self._session = session
        self._debugger = session.debugger
        self._screen = screen
        self._feed = feed
        self._leaving = False
        self._woken = threading.Event()
        """Ctrl-C was pressed since the last command was entered."""
        self._has_told = False
        session.driver = self
        session.emit = self._emit
        self._prompt: PromptSession[str] = PromptSession(
            message=self._message,
            multiline=Condition(lambda: not is_complete(self._prompt.default_buffer.text)),
            prompt_continuation="... ",
            completer=CommandCompleter(session),
            complete_while_typing=False,
            history=history(),
            key_bindings=self._keys(),
            # Asking the terminal where its cursor is would bring the answers in among what is typed.
            output=Vt100_Output(sys.stdout, _terminal_size, term=os.environ.get("TERM"), enable_cpr=False),
            color_depth=None if screen.colour else ColorDepth.DEPTH_1_BIT,
        )

    def run(self) -> None:
        """Until the person leaves or the machine ends."""
        # Nothing may write to the terminal behind the prompt's back.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        asyncio.run(self._run())

    def _emit(self, text: str) -> None:
        """Shows what a command says; a long text piece by piece, so that Ctrl-C can end it."""
        while text:
            if self._woken.is_set():
                self._screen.write("... interrupted")
                return
            end = text.find("\n", _AT_ONCE) + 1 or len(text)
            self._screen.write(text[:end])
            text = text[end:]

    # ---- driving ----

    def go(self) -> None:
        """Lets the machine run."""
        self._debugger.go()
        if not self._has_told and self._debugger.state is State.RUNNING:
            self._has_told = True
            self._session.emit("the machine runs; Ctrl-C halts it")

    def pause(self) -> None:
        """Asks the machine to halt; that it has is told as every stop."""
        self._feed.hurry()
        self._debugger.pause()

    def sleep(self, seconds: float) -> None:
        """Waits, but no longer than to the next Ctrl-C."""
        self._woken.wait(min(seconds, threading.TIMEOUT_MAX))

    def leave(self) -> None:
        """Ends the session."""
        self._leaving = True

    def clear(self) -> None:
        """Clears the screen."""
        self._screen.clear()

    # ---- the prompt ----

    def _message(self) -> FormattedText:
        core = f"{self._debugger.core:x}: " if self._debugger.state is State.HALTED else ""
        return FormattedText([("bold" if self._screen.colour else "", f"{core}vmexit> ")])

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            self._on_interrupt()

        @keys.add("tab")
        def _(event: KeyPressEvent) -> None:
            self._complete(event.current_buffer)

        return keys

    def _complete(self, buffer: Buffer) -> None:
        """Inserts what is certain; offers a choice only where there is one."""
        if buffer.complete_state:
            buffer.complete_next()
            return
        word, names = candidates(self._session, buffer.document.text_before_cursor)
        certain = f"{names[0]} " if len(names) == 1 else _common_beginning(names)
        if len(certain) > len(word):
            buffer.delete_before_cursor(len(word))
            buffer.insert_text(certain)
        elif len(names) > 1:
            buffer.start_completion()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self._show_unexpected(context.get("exception")))
        with contextlib.suppress(ValueError, RuntimeError):
            loop.add_signal_handler(2, self._on_interrupt)
        self._screen.attach(self._prompt.app)
        worker = threading.Thread(target=self._let_work, args=(loop,), name="vmexit-work", daemon=True)
        worker.start()
        try:
            while not self._leaving:
                await self._read_and_carry_out()
        except (EOFError, _MachineEndedError):
            pass
        finally:
            self._leaving = True
            self._woken.set()
            self._screen.detach()
            worker.join(_JOIN_S)

    async def _read_and_carry_out(self) -> None:
        if self._debugger.state is State.ENDED:
            raise _MachineEndedError
        text = await self._prompt.prompt_async(handle_sigint=False, set_exception_handler=False)
        done = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._carry_out, args=(text, done), name="vmexit-command", daemon=True).start()
        await done

    def _carry_out(self, text: str, done: asyncio.Future[None]) -> None:
        """Carries out what was typed or pasted, in a thread of its own."""
        self._woken.clear()
        try:
            for _, command in commands_of(text.split("\n")):
                registry.execute(self._session, command)
                if self._leaving or self._woken.is_set():
                    break
        except VmexitError as error:
            self._screen.error(error_text(error, colour=self._screen.colour))
        except OutputGoneError:
            self._leaving = True
        except Exception as error:
            self._show_unexpected(error)
        finally:
            with contextlib.suppress(RuntimeError):
                done.get_loop().call_soon_threadsafe(lambda: None if done.done() else done.set_result(None))

    def _show_unexpected(self, error: BaseException | None) -> None:
        if error is not None:
            self._screen.error(
                error_text(VmexitError(f"internal error: {type(error).__name__}: {error}"), colour=self._screen.colour)
            )

    def _on_interrupt(self) -> None:
        """Ctrl-C: halts a machine that runs, else drops the line being typed. In the event loop."""
        self._woken.set()
        if self._feed.is_busy:
            self._feed.hurry()
        if self._debugger.state is State.RUNNING:
            # It has to wait for the debugger, which may wait for the loop to show something.
            threading.Thread(target=self._halt, name="vmexit-halt", daemon=True).start()
        elif self._prompt.app.is_running:
            self._prompt.default_buffer.reset()
        else:
            self._screen.ask("\n")  # the terminal has shown ^C

    def _halt(self) -> None:
        try:
            self.pause()
        except VmexitError as error:
            self._screen.error(error_text(error, colour=self._screen.colour))

    # ---- the machine ----

    def _let_work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Lets the debugger work and shows what comes, in a thread of its own."""
        shown: object = None
        try:
            while not self._leaving and self._debugger.state is not State.ENDED:
                try:
                    self._feed.work(_POLL_S)
                except VmexitError as error:
                    self._screen.error(error_text(error, colour=self._screen.colour))
                state = (self._debugger.state, self._debugger.core)
                if state != shown:
                    shown = state
                    self._prompt.app.invalidate()
        except OutputGoneError:
            pass
        except Exception as error:
            self._show_unexpected(error)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._end_prompt)

    def _end_prompt(self) -> None:
        """The machine has ended: there is nothing left to type."""
        app = self._prompt.app
        self._leaving = True
        self._woken.set()
        if app.is_running and not app.is_done:
            app.erase_when_done = True
            app.exit(exception=_MachineEndedError)
