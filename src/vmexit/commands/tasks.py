"""``ps``, ``.process`` and ``.thread``: what the guest executes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmexit.commands.command import Arguments, Command, Info
from vmexit.commands.layout import address_text
from vmexit.commands.session import Session
from vmexit.guest.linux.recipe import HIGHEST_PID
from vmexit.guest.system import System, Task, TaskList

_HEAD = f"{'pid':>7} {'decimal':>9} {'parent':>7}  s  {'task':<17}  {'name':<15}  program"
_THREAD_HEAD = f"{'tid':>7} {'decimal':>9} {'pid':>7}  s  {'task':<17}  name"
_NUMBERS = "Numbers of processes and threads are hexadecimal like all others; 0n before one makes it decimal."


def _process_line(system: System, task: Task) -> str:
    parent = system.tasks.parent_id(task)
    program = "(kernel)" if task.is_kernel_thread else system.tasks.program(task) or ""
    return (
        f"{task.pid:>7x} {f'0n{task.pid}':>9} {f'{parent:x}' if parent is not None else '?':>7}  {system.tasks.state(task)}  "
        f"{address_text(task.address)}  {task.comm:<15}  {program}"
    ).rstrip()


def _thread_line(system: System, task: Task) -> str:
    numbers = f"{task.tid:>7x} {f'0n{task.tid}':>9} {task.pid:>7x}"
    return f"{numbers}  {system.tasks.state(task)}  {address_text(task.address)}  {task.comm}"


def _table(head: str, lines: Iterable[str], found: TaskList[Task]) -> str:
    broken = [f"the guest's list is not whole: {found.broken}"] if found.broken else []
    return "\n".join([head, *lines, *broken])


class Processes(Command):
    """Lists processes."""

    INFO = Info(
        names=("ps",),
        usage=("ps",),
        summary="list the guest's processes",
        text=f"""Lists the guest's processes: number, parent, state, the address of the kernel's structure for it (task_struct; of
Windows EPROCESS), name, and the path of the program within its file system. In Linux threads of the kernel's own are processes,
too, and the state is what the guest's own ps shows. In Windows only threads have a state: R running, r ready, s chosen to run
next, W waiting, t waiting for its stack, X ended.

{_NUMBERS}""",
        examples=(("ps", "lists them"),),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        arguments.at_most(0)
        system = session.guest.system
        found = system.tasks.processes()
        session.emit(_table(_HEAD, (_process_line(system, task) for task in found.tasks), found))


class Process(Command):
    """Shows a process."""

    INFO = Info(
        names=(".process", "process"),
        usage=(".process", ".process list", ".process pid PID"),
        summary="show a process of the guest's",
        text=f"""Shows the process that the current core executes, or that of a number, with its threads. 'list' does what
'ps' does. {_NUMBERS}""",
        parameters=(("PID", "A process; what the guest calls its PID."),),
        examples=((".process", "shows the one that runs"), (".process pid 1", "shows the first one")),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        system = session.guest.system
        if not arguments.tokens:
            task = session.guest.current()
            process = task and system.tasks.process_of(task)
            if not process:
                raise arguments.error(f"it is not known what core {session.debugger.core:x} executes", arguments.command)
        elif arguments.choice(arguments.tokens[0], ("list", "pid"), "way to name processes") == "list":
            arguments.at_most(1)
            Processes().run(session, Arguments(arguments.line, [arguments.command]))
            return
        else:
            pid = _number(arguments, "process number")
            process = system.tasks.find(pid)
            if process is None:
                raise arguments.error(f"there is no process {pid:x} (0n{pid})", arguments.tokens[1])
        threads = system.tasks.threads(process)
        lines = [_HEAD, _process_line(system, process)]
        if places := system.tasks.places(process):
            lines.append(", ".join(f"{what} at {address_text(address)}" for what, address in places))
        lines.append(_table(f"threads: {len(threads.tasks)}", (_thread_line(system, each) for each in threads.tasks), threads))
        session.emit("\n".join(lines))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        return () if before else ("list", "pid")


class Thread(Command):
    """Shows a thread."""

    INFO = Info(
        names=(".thread", "thread"),
        usage=(".thread", ".thread list [pid PID]", ".thread tid TID"),
        summary="show a thread of the guest's",
        text=f"""Shows the thread that the current core executes, or that of a number, with its kernel stack; or lists the threads
of the process that the current core executes, or of another one. {_NUMBERS}""",
        parameters=(("PID", "A process."), ("TID", "A thread; what the guest's gettid() says.")),
        examples=((".thread", "shows the one that runs"), (".thread list pid 1", "lists the threads of process 1")),
        halted=True,
    )

    def run(self, session: Session, arguments: Arguments) -> None:
        system = session.guest.system
        way = arguments.tokens and arguments.choice(arguments.tokens[0], ("list", "tid"), "way to name threads")
        if way == "list":
            self._list(session, arguments, system)
            return
        if way == "tid":
            tid = _number(arguments, "thread number")
            task = system.tasks.find_thread(tid)
            if task is None:
                raise arguments.error(f"there is no thread {tid:x} (0n{tid})", arguments.tokens[1])
        else:
            task = session.guest.current()
            if task is None:
                raise arguments.error(f"it is not known what core {session.debugger.core:x} executes", arguments.command)
        lines = [_THREAD_HEAD, _thread_line(system, task)]
        stack = system.tasks.stack(task)
        if stack is not None:
            lines.append(f"kernel stack from {address_text(stack[0])} to {address_text(stack[1])}")
        session.emit("\n".join(lines))

    def _list(self, session: Session, arguments: Arguments, system: System) -> None:
        arguments.at_most(3)
        if len(arguments.tokens) == 1:
            task = session.guest.current()
            process = task and system.tasks.find(task.pid)
            if not process:
                raise arguments.error(f"core {session.debugger.core:x} executes no process that is known", arguments.command)
        else:
            arguments.choice(arguments.tokens[1], ("pid",), "way to name a process")
            if len(arguments.tokens) < 3:
                raise arguments.missing("a process number is missing")
            pid = arguments.number(arguments.tokens[2], "process number", HIGHEST_PID)
            process = system.tasks.find(pid)
            if process is None:
                raise arguments.error(f"there is no process {pid:x} (0n{pid})", arguments.tokens[2])
        found = system.tasks.threads(process)
        session.emit(_table(_THREAD_HEAD, (_thread_line(system, task) for task in found.tasks), found))

    def complete(self, session: Session, before: Sequence[str]) -> Iterable[str]:
        if before == ["list"]:
            return ("pid",)
        return () if before else ("list", "tid")


def _number(arguments: Arguments, what: str) -> int:
    arguments.at_most(2)
    if len(arguments.tokens) < 2:
        raise arguments.missing(f"a {what} is missing")
    return arguments.number(arguments.tokens[1], what, HIGHEST_PID)
