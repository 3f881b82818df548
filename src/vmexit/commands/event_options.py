"""The options that all commands share which make an event, as HyperDbg has them, and our own ``log``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmexit.commands import event_code, event_outputs
from vmexit.commands.command import Arguments, one_of
from vmexit.commands.session import Session
from vmexit.commands.tokens import U64_MAX, Token, TokenKind
from vmexit.debugger import State
from vmexit.errors import CommandError
from vmexit.events.event import Event, EventError
from vmexit.events.filters import FilterError, ValueFilter
from vmexit.link.wire import Action, Stage
from vmexit.script.compile import CompiledScript, read_source

_STAGES = {"pre": Stage.PRE, "post": Stage.POST, "all": Stage.ALL}
_CHOICES = {"imm": ("yes", "no"), "sc": ("on", "off"), "stage": tuple(_STAGES)}
_NUMBERS = {"core": "core number", "pid": "process ID", "buffer": "buffer size in bytes"}
_VALUES = ("value", "mask")
_BLOCKS = ("script", "condition", "code", "output")
_MACHINE_CODE = ("condition", "code")
_FILE = "file:"

OFFERED = tuple("asm buffer changed code condition core imm log mask output pid sc script stage value".split())
"""Those that can be used yet."""
ALL = (*_CHOICES, *_NUMBERS, *_VALUES, *_BLOCKS, "asm", "changed", "log")
TAKE_A_VALUE = (*_CHOICES, *_NUMBERS, *_VALUES)

USAGE = (
    "[value VALUE] [mask BITS] [changed] [core CORE] [imm yes|no] [sc on|off] [stage pre|post|all] [pid PID|all] [log] "
    "[script { SCRIPT }] "
    "[[asm] condition { CODE }] [[asm] code { CODE }] [buffer N] [output { NAME, ... }]"
)
PARAMETERS = (
    (
        "value VALUE",
        "Only accesses with this value; compared on the vCPU, before anything else is done. A read has its value in stage post.",
    ),
    ("mask BITS", "The bits that 'value' or 'changed' looks at; else all of them: 'mask 1 value 0' means bit 0 clear."),
    (
        "changed",
        "Only writes that change something: the value differs from what the MSR holds. Of an MSR whose value the machine does "
        "not tell it is the value that was last written to it on this core, and the first write counts as a change.",
    ),
    ("core CORE", "Only this vCPU, counted from 0; else all of them."),
    (
        "imm yes|no",
        "'no' lets what is printed be gathered and shown a moment later, which costs the guest less. A break stays as it is.",
    ),
    (
        "sc on|off",
        "'on' short-circuits: the instruction is not executed, the guest goes on behind it. Only in stage pre. Of several "
        "events the last one decides.",
    ),
    (
        "stage pre|post|all",
        "Before the instruction (pre, unless said otherwise), after it (post), or both. What was short-circuited or has faulted "
        "has no stage post. A machine that is only looked at ('vmexit watch', 'vmexit host') has no other, and it need not be "
        "named.",
    ),
    (
        "pid PID|all",
        "Only this process of the guest's (of the host's with 'vmexit host'), all its threads; as every number PID is "
        "hexadecimal, 0n1234 is decimal. Until the guest's processes are known the event waits. Without it the event is about "
        "the process that '.attach' has named, if any; 'all' means all of them even then.",
    ),
    (
        "script { SCRIPT }",
        "Runs a script at each trap, on the vCPU itself: the page on the script language tells what it can do. "
        "'script {file:PATH}' takes it from a file. The machine is halted only where the script says pause().",
    ),
    ("log", "Prints each trap and goes on. Without it, and without a script or code, the machine is halted at each."),
    (
        "condition { CODE }",
        "Machine code in hexadecimal that decides whether the event does anything: it gets the guest's registers (RCX) and the "
        "MSR (RDX), and leaves 0 in RAX for no.",
    ),
    (
        "code { CODE }",
        "Machine code that is run at each trap: it gets the buffer (RCX), the guest's registers (RDX) and the MSR (R8). The page "
        "on custom code tells what both can do. Together with a script it runs in the order given.",
    ),
    ("asm", "Before 'condition' or 'code': what is in the braces is assembly in Intel's syntax."),
    ("buffer N", "So many zeroed bytes that the event's code and script ($buffer) keep from trap to trap."),
    (
        "output { NAME, ... }",
        "What the script prints goes to these outputs, five at most, and not to the screen; so do the lines of 'log' and of "
        "breaks. The command 'output' creates and opens them. It does not go together with 'imm no'.",
    ),
)


@dataclass
class EventOptions:
    """What the options of a command line say."""

    core: int | None = None
    process: int | None = None
    all_processes: bool = False
    """'pid all': also where a process is attached."""
    value: int | None = None
    mask: int | None = None
    changed: bool = False
    immediate: bool = True
    short_circuit: bool = False
    stage: Stage = Stage.PRE
    log: bool = False
    script: Token | None = None
    """The braces with its text, or with ``file:`` and a path."""
    machine_code: dict[str, tuple[Token, bool]] = field(default_factory=dict)
    """Of ``condition`` and ``code``: the braces, and whether it is assembly."""
    buffer: int | None = None
    """Bytes."""
    output: Token | None = None
    """The braces with the names of its outputs."""
    rest: list[Token] = field(default_factory=list)
    """The tokens that are no option."""
    places: dict[str, tuple[Token, Token]] = field(default_factory=dict)
    """The first and last token of each option."""
    unavailable: CommandError | None = None
    """The first option that is well-formed but cannot be used yet."""

    @property
    def action(self) -> Action:
        """What the event does: without anything else to do, it breaks."""
        action = (Action.RECORD if self.log else Action(0)) | (Action.SCRIPT if self.script else Action(0))
        return action or Action.BREAK


def parse(arguments: Arguments) -> EventOptions:
    """Reads the options, in any order; of one that is repeated the last one counts.

    Raises CommandError for a value that is missing or wrong. What is no option is left to the command, and so is ``unavailable``:
    to be raised once all else is known to be right.
    """
    return _Parser(arguments).run()


class _Parser:
    """A walk along the arguments."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._left = list(arguments.tokens)
        self._found = EventOptions()

    def run(self) -> EventOptions:
        while self._left:
            token = self._left.pop(0)
            word = token.lower
            if token.kind is TokenKind.BLOCK:
                hint = f"before them stands {one_of(_BLOCKS)}"
                raise self._arguments.error("these braces belong to no option", token, hint=hint)
            if word in _BLOCKS:
                self._block(token)
            elif word in TAKE_A_VALUE:
                self._value(token)
            elif word == "changed":
                self._found.places["changed"] = (token, token)
                self._found.changed = True
            elif word == "asm":
                self._asm(token)
            elif word == "log":
                self._found.places["log"] = (token, token)
                self._found.log = True
            else:
                self._found.rest.append(token)
        return self._found

    def _value(self, keyword: Token) -> None:
        option = keyword.lower
        if not self._left:
            values = "|".join(_CHOICES.get(option, ("NUMBER",)))
            raise self._arguments.missing(f"a value for '{option}' is missing", f"{option} {values}")
        value = self._left.pop(0)
        self._found.places[option] = (keyword, value)
        match option:
            case "imm":
                self._found.immediate = self._choice(option, value) == "yes"
            case "sc":
                self._found.short_circuit = self._choice(option, value) == "on"
            case "stage":
                self._found.stage = _STAGES[self._choice(option, value)]
            case "pid" if value.lower == "all":
                self._found.process, self._found.all_processes = None, True
            case "value":
                self._found.value = self._arguments.number(value, "value of an MSR", U64_MAX)
            case "mask":
                self._found.mask = self._arguments.number(value, "mask of an MSR's bits", U64_MAX)
            case _:
                number = self._arguments.number(value, _NUMBERS[option])
                if option == "core":
                    self._found.core = number
                elif option == "pid":
                    self._found.process, self._found.all_processes = number, False
                elif option == "buffer":
                    self._found.buffer = number
                else:
                    self._refuse(f"'{option}' is not yet available", keyword, value)

    def _choice(self, option: str, value: Token) -> str:
        return self._arguments.choice(value, _CHOICES[option], f"value of '{option}'")

    def _block(self, keyword: Token, *, is_assembly: bool = False) -> None:
        option = keyword.lower
        # As in HyperDbg, other options may stand between the keyword and its braces.
        place = next((i for i, token in enumerate(self._left) if token.kind is TokenKind.BLOCK), None)
        if place is None:
            raise self._arguments.error(f"'{option}' needs something in braces behind it", keyword, hint=f"{option} {{ ... }}")
        block = self._left.pop(place)
        if not block.text.strip():
            raise self._arguments.error(f"the braces of '{option}' are empty", block)
        if option == "script":
            self._found.script = block
            self._found.places[option] = (keyword, block)
            return
        if option in _MACHINE_CODE:
            self._found.machine_code[option] = (block, is_assembly)
            self._found.places[option] = (keyword, block if place == 0 else keyword)
            return
        event_outputs.names(self._arguments, block)
        self._found.output = block
        self._found.places[option] = (keyword, block if place == 0 else keyword)

    def _asm(self, keyword: Token) -> None:
        if not self._left or self._left[0].lower not in _MACHINE_CODE:
            raise self._arguments.error("'asm' stands before 'code' or 'condition'", keyword)
        self._block(self._left.pop(0), is_assembly=True)

    def _refuse(self, message: str, first: Token, last: Token) -> None:
        if self._found.unavailable is None:
            self._found.unavailable = self._arguments.error(message, first, until=last)


def fit(session: Session, options: EventOptions) -> tuple[int, ...]:
    """Makes the stage, where none was named, the only one that a target has that merely looks on; and what is to be recorded.

    Gives the MSRs that are left out there besides, where none is named. An event that names no process is about the attached one.
    """
    if session.records and options.action == Action.BREAK and "code" not in options.machine_code:
        options.log = True
    if options.process is None and not options.all_processes:
        options.process = session.debugger.attached
    looks = session.debugger.target.only_looks
    if looks is None:
        return ()
    if "stage" not in options.places:
        options.stage = Stage.POST
    return looks.noise


def value_filter(arguments: Arguments, options: EventOptions) -> ValueFilter | None:
    """What ``value``, ``mask`` and ``changed`` say. Raises CommandError, at the one that is to blame."""
    try:
        return ValueFilter.of(options.value, options.mask, options.changed)
    except FilterError as error:
        first, last = options.places[error.option]
        raise arguments.error(str(error), first, until=last) from None


def compiled_script(session: Session, arguments: Arguments, options: EventOptions) -> CompiledScript | None:
    """The event's script, if it has one. Raises ScriptError for a wrong one, CommandError for a file that cannot be read."""
    block = options.script
    if block is None:
        return None
    if not block.text.startswith(_FILE):
        return session.debugger.compiler.compile(block.text)
    path = block.text.removeprefix(_FILE).strip()
    try:
        source = read_source(Path(path))
    except OSError as error:
        raise arguments.error(f"the script file '{path}' cannot be read: {error.strerror}", block) from None
    return session.debugger.compiler.compile(source.text, source.name)


def outputs(session: Session, arguments: Arguments, options: EventOptions) -> tuple[str, ...]:
    """The names of the event's outputs. Raises CommandError for one that cannot be used."""
    block = options.output
    return () if block is None else event_outputs.check(session, arguments, block, options.immediate)


def make(session: Session, arguments: Arguments, options: EventOptions, event: Event) -> Event:
    """Hands the event to the debugger. Raises CommandError, at the option that is to blame, where it is refused."""
    try:
        event.check()
        if options.machine_code or options.buffer is not None:
            event_code.attach(session, arguments, options, event)
        if event.process is not None and not session.debugger.knows_processes and session.debugger.state is State.HALTED:
            session.guest.known  # noqa: B018 - the processes are known with the guest
        return session.debugger.add(event)
    except EventError as error:
        first, last = options.places.get(error.option, (arguments.command, arguments.command))
        raise arguments.error(str(error), first, until=last) from None


def complete(session: Session, before: Sequence[str]) -> Iterable[str]:
    """What can follow these arguments."""
    last = before[-1] if before else ""
    if last in _CHOICES:
        return _CHOICES[last]
    if last == "core":
        return [f"{core:x}" for core in range(session.debugger.target.vcpus)]
    if last == "pid":
        return ["all"]
    if last in (*_NUMBERS, *_VALUES):
        return ()
    return [option for option in OFFERED if option not in before]


def others(before: Sequence[str]) -> list[str]:
    """Which of these arguments, in lower case, are neither options nor their values."""
    return [
        word
        for place, word in enumerate(before)
        if word not in ALL and (place == 0 or before[place - 1] not in (*TAKE_A_VALUE, *_BLOCKS))
    ]


def description(options: EventOptions) -> str:
    """How the options read in a sentence: "stage pre, all cores"."""
    stage = next(name for name, stage in _STAGES.items() if stage == options.stage)
    parts = [f"stage {stage}", "all cores" if options.core is None else f"core {options.core:x}"]
    if options.process is not None:
        parts.append(f"process {options.process:x} (0n{options.process})")
    if options.changed:
        parts.append("what changes" if options.mask is None else f"what changes in {options.mask:x}")
    if options.value is not None:
        parts.append(f"value {options.value:x}" if options.mask is None else f"value {options.value:x} in {options.mask:x}")
    if options.short_circuit:
        parts.append("short-circuited")
    return ", ".join(parts)
