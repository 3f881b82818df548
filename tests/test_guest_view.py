"""What a debugger knows of its guest: real kernels, against what they say of themselves; and when it is looked at anew."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.commands.fakes import FakeDriver, Typist, linux_guest
from tests.guest.linux.fake_linux import RODATA, SLIDE, FakeLinux
from tests.machines import Output, linux_arguments, newer_kernel
from vmexit import Debugger, LiveTrap, StopReason
from vmexit.commands import registry
from vmexit.commands.session import Session
from vmexit.guest.linux.cache import Cache
from vmexit.guest.system import Help, NotRecognisedError, Task
from vmexit.guest_view import GuestView
from vmexit.link.client import RequestError
from vmexit.script.errors import UnknownGuestError
from vmexit.setup.kernel import Kernel, find_kernel
from vmexit.targets.qemu import Qemu

BOOT_S = 120
LSTAR, MISC_ENABLE = 0xC000_0082, 0x1A0

# The busy ones stay on their CPUs and in user space; the writer is the one that the guest says it is.
COMMANDS = """
    last=$(($(nproc) - 1))
    sleep 1000 &
    taskset $((1 << last)) sh -c 'echo "writer=$$"; printf "\\021\\021\\0\\0\\0\\0\\0\\0" |
        exec dd of=/dev/cpu/'$last'/msr bs=8 count=1 seek=416 oflag=seek_bytes conv=notrunc 2>/dev/null'
    echo "symbols=$(grep -v ']' /proc/kallsyms | md5sum)"
    grep '\\[' /proc/kallsyms | sed 's/^/module: /'
    sed 's/^/loaded: /' /proc/modules
    cat /proc/[0-9]*/stat | sed 's/^/task: /'
    echo "release=$(uname -r)"
    for cpu in $(seq 0 $last); do
        taskset $((1 << cpu)) sh -c 'echo "busy=$$"; while :; do :; done' &
    done
    echo ready
    sleep 1000
"""


@dataclass
class Boot:
    """A kernel that has booted and stands, and what was seen of it on the way."""

    debugger: Debugger
    view: GuestView
    output: Output
    cache: Cache
    kernel: Kernel
    lines: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    writer: Task | None = None
    callers: list[str] = field(default_factory=list)
    caller: str = ""


CONFIGURATIONS = {
    "plain": ("", [], 2, find_kernel),
    "isolated": ("pti=on", [], 2, find_kernel),
    "five-level": ("", ["-cpu", "max"], 2, find_kernel),
    "one-cpu": ("nokaslr", [], 1, find_kernel),
    # QEMU 7.2 does not get CMPXCHG16B right for 6.12 with two vCPUs.
    "newer": ("pti=on", ["-cpu", "qemu64,-cx16"], 2, newer_kernel),
}


@contextmanager
def booted(command_line: str, more: Sequence[str], vcpus: int, kernel: Kernel, cache: Cache) -> Iterator[Boot]:
    """Boots a kernel until it has said all that it is compared with."""
    output = Output()
    arguments = [*linux_arguments(COMMANDS, command_line=command_line, vcpus=vcpus, kernel=kernel), *more]
    with Debugger(Qemu(arguments, output=output)) as debugger:
        view = debugger.guest = GuestView(debugger, given=Help(image=kernel.image), cache=cache)
        boot = Boot(debugger, view, output, cache, kernel)
        debugger.recognition.on_line = boot.lines.append

        def on_lstar(trap: LiveTrap) -> None:
            if not boot.seen:
                boot.seen = [view.recognised.source, str(trap.task), str(trap.symbol)]

        def on_write(trap: LiveTrap) -> None:
            boot.writer = trap.task
            boot.callers = [str(view.name_of(frame.address)) for frame in trap.frames if not frame.is_guess]
            boot.caller = str(trap.caller)

        debugger.on_msr_write(LSTAR, on_lstar)
        debugger.on_msr_write(MISC_ENABLE, on_write)
        stop = debugger.run(until=lambda: "\nready" in output.text and output.text.count("busy=") == vcpus, timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, output.text
        yield boot


def check_recognised_when_it_sets_lstar(boot: Boot) -> None:
    (line,) = boot.lines
    source, task, place = boot.seen
    release = re.search(r"release=(\S+)", boot.output.text)
    assert release is not None
    assert re.fullmatch(rf"Linux {re.escape(release[1])} x86_64, slide 0x[0-9a-f]+, \d+ symbols, 0 modules", line)
    if boot.kernel.image == find_kernel().image or find_spec("zstandard"):
        assert source == str(boot.kernel.image)
    assert task == "swapper (process 0)" and re.fullmatch(r"native_write_msr\+0x[0-9a-f]+ \[kernel\]", place)


def check_every_symbol_is_the_guests_own(boot: Boot) -> None:
    linux = boot.view.linux
    text = "".join(
        f"{symbol.address:016x} {symbol.kind} {symbol.name}\n"
        for symbol, module in linux.search("kernel!*")
        if module == "kernel"
    )
    wanted = re.search(r"symbols=([0-9a-f]{32})", boot.output.text)
    assert wanted is not None and hashlib.md5(text.encode()).hexdigest() == wanted[1]


def check_modules_are_the_guests_own(boot: Boot) -> None:
    linux = boot.view.linux
    loaded = re.findall(r"^loaded: (\S+) \d+ .* 0x([0-9a-f]{16})", boot.output.text, re.MULTILINE)
    assert loaded
    assert {(module.name, module.base) for module in linux.modules} == {(name, int(base, 16)) for name, base in loaded}
    symbols = set(re.findall(r"^module: ([0-9a-f]+) (\S) (\S+)\s+\[(\S+)\]$", boot.output.text, re.MULTILINE))
    assert symbols
    assert {
        (f"{symbol.address:016x}", symbol.kind, symbol.name, module)
        for symbol, module in linux.search("*!*")
        if module != "kernel"
    } == symbols


def check_processes_are_the_guests_own(boot: Boot) -> None:
    linux = boot.view.linux
    found = linux.tasks.processes()
    assert found.broken is None
    tasks = {task.pid: task for task in found.tasks}
    said = re.findall(r"^task: (\d+) \((.*)\) (\S) (\d+)", boot.output.text, re.MULTILINE)
    assert len(said) > 30
    compared = 0
    for pid, name, _, parent in said:
        task = tasks.get(int(pid))
        if task is None:
            continue  # it has ended since
        compared += 1
        above = linux.tasks.parent(task)
        assert above is not None and above.pid == int(parent)
        # /proc makes longer names of the workers' own.
        assert task.comm == name if not name.startswith("kworker") and len(name) < 16 else name.startswith(task.comm[:15])
    assert compared > len(said) - 6
    init = tasks[1]
    assert (linux.tasks.state(init), linux.tasks.program(init)) == ("S", "/bin/busybox")
    assert tasks[2].is_kernel_thread and linux.tasks.program(tasks[2]) is None


def check_who_wrote_the_msr(boot: Boot) -> None:
    said = re.search(r"writer=(\d+)", boot.output.text)
    assert said is not None and boot.writer is not None
    assert boot.writer.comm == "dd"
    assert int(said[1]) <= boot.writer.pid <= int(said[1]) + 2
    assert boot.callers[0].startswith("native_write_msr")
    assert boot.caller == boot.callers[1]
    assert any(re.fullmatch(r"msr_write\+0x[0-9a-f]+ \[msr\]", caller) for caller in boot.callers)
    assert boot.callers[-1].startswith("entry_SYSCALL_64_after_hwframe+")


def check_who_runs_at_any_moment(boot: Boot) -> None:
    """At CPL 3 that is the one that never leaves its CPU; at CPL 0 the stack is its own, or that of an interrupt."""
    debugger, view = boot.debugger, boot.view
    busy = [int(pid) for pid in re.findall(r"busy=(\d+)", boot.output.text)]
    in_programs = 0
    slide = view.linux.slide
    for stop in range(100):
        if stop >= 8 and in_programs >= 6:
            break
        debugger.run(timeout=0.03)
        for core in range(debugger.target.vcpus):
            registers = debugger.registers(core)
            task = view.current(core)
            if registers["cs"] & 3:
                assert task is not None and task.pid in busy and task.comm == "sh", task
                in_programs += 1
            elif task is not None:
                assert task.pid == 0 or any(task.pid == each.pid for each in view.linux.tasks.processes().tasks)
            # By the page tables that the core happens to have, with what was found out before.
            anew = GuestView(debugger, cache=boot.cache)
            anew.recognise(core)
            assert anew.linux.slide == slide
    assert in_programs >= 6


def check_by_memory_alone(boot: Boot, tmp_path: Path) -> None:
    view = GuestView(boot.debugger, cache=Cache(tmp_path))
    assert view.recognised.source == "the guest's memory"
    assert view.linux.slide == boot.view.linux.slide
    assert list(view.linux.profile.symbols) == list(boot.view.linux.profile.symbols)
    assert view.linux.profile.offsets == boot.view.linux.profile.offsets


def check_by_a_system_map(boot: Boot, tmp_path: Path) -> None:
    path = tmp_path / "System.map"
    rows = boot.view.linux.profile.symbols
    path.write_text("".join(f"{symbol.address:016x} {symbol.kind} {symbol.name}\n" for symbol in rows))
    found = GuestView(boot.debugger, given=Help(system_map=path), cache=Cache(Path("/dev/null/nowhere"))).recognised
    assert (found.source, found.remarks) == (str(path), ())
    assert found.system.tasks.find(1) is not None


def check_what_the_commands_show(boot: Boot) -> None:
    shown: list[str] = []
    session = Session(boot.debugger, shown.append, FakeDriver(boot.debugger))

    def types(line: str) -> str:
        shown.clear()
        registry.execute(session, line)
        return "\n".join(shown)

    assert re.match(r"Linux \S+ x86_64, slide 0x[0-9a-f]+, \d+ symbols, \d+ modules?\nfrom     /", types("guest"))
    assert re.search(
        r"^      1       0n1       0  S  [0-9a-f]{8}`[0-9a-f]{8}  init             /bin/busybox$", types("ps"), re.MULTILINE
    )
    assert re.search(r"\d+  kernel$", types("lm"), re.MULTILINE) and types("lm").endswith(" msr")
    assert types("x kernel!native_write_msr").endswith("  t  kernel!native_write_msr")
    assert types("u native_write_msr l 1").startswith("native_write_msr [kernel]:\n")
    assert '= "swapper/0"' in types("dt task_struct.comm init_task")
    assert types("dt list_head").split("\n")[1:] == [
        "  +0x0000  next                          struct list_head *",
        "  +0x0008  prev                          struct list_head *",
    ]
    assert "init" in types(".process pid 1") and "threads: 1" in types(".process pid 1")
    assert len(types("k").split("\n")) >= 2


@pytest.mark.parametrize(("command_line", "more", "vcpus", "kernel"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_real_kernel_against_what_it_says_itself(
    command_line: str, more: list[str], vcpus: int, kernel: Callable[[], Kernel], tmp_path: Path
) -> None:
    """One test a kernel, for a boot takes longer than all that is then compared."""
    with booted(command_line, more, vcpus, kernel(), Cache(tmp_path / "given")) as boot:
        check_recognised_when_it_sets_lstar(boot)
        check_every_symbol_is_the_guests_own(boot)
        check_modules_are_the_guests_own(boot)
        check_processes_are_the_guests_own(boot)
        check_who_wrote_the_msr(boot)
        check_who_runs_at_any_moment(boot)
        check_by_memory_alone(boot, tmp_path)
        check_by_a_system_map(boot, tmp_path)
        check_what_the_commands_show(boot)


# ---- without a machine ----


@pytest.fixture
def typist() -> Iterator[Typist]:
    typist = Typist()
    yield typist
    typist.close()


def test_names_while_the_guest_runs_are_those_of_the_last_stop(typist: Typist) -> None:
    typist.boot(linux_guest())
    view, names = typist.debugger.guest, typist.debugger.names
    kernel = linux_guest().address(0x2002)
    inside = view.linux.address_of("msr!msr_open")
    assert inside is not None
    view.reset()
    assert view.known_name(kernel) is None and names.of(kernel) == ""
    assert [module.name for module in view.linux.modules] == ["msr"]
    typist.types("g")
    assert names.of(kernel) == "native_write_msr+0x2 [kernel]" == str(view.known_name(kernel))
    # The agent was told where the code of modules is; nothing has asked for their symbols.
    assert re.fullmatch(r"msr\+0x[0-9a-f]+ \[msr\]", names.of(inside))
    assert names.of(0x1000) == "" and view.symbol("msr!msr_open") is None
    typist.types("pause")
    typist.debugger.recognition.at_stop()
    typist.types("g")
    assert names.of(inside).startswith("msr_open") and view.symbol("msr!msr_open") == view.symbol("msr_open") != 0
    assert view.symbol("schedule") is None and view.symbol("not a name") is None
    view.reset()
    assert names.of(kernel) == names.of(inside) == ""
    with pytest.raises(UnknownGuestError, match=r"^the guest is not recognised yet$"):
        view.symbol("msr_open")


def test_many_names_at_once(typist: Typist) -> None:
    typist.boot(linux_guest())
    typist.types("guest")
    names = typist.debugger.names
    first, second = (linux_guest().address(offset) for offset in (0x2002, 0x2042))
    for addresses in ([first] * 3, [second, 0, first, second]):
        texts, which = names.of_all(np.array(addresses, np.uint64))
        assert [texts[index] for index in which] == [names.of(address) for address in addresses]


def test_it_is_looked_at_anew_at_each_stop(typist: Typist) -> None:
    typist.boot(linux_guest())
    view, debugger = typist.session.guest, typist.debugger
    linux = view.linux
    assert view.linux is linux and view.current() is not None
    typist.types("g")
    with pytest.raises(RequestError):
        view.current()
    typist.types("pause")
    assert view.linux is linux  # the same kernel, still there
    typist.put(0, gs_base=linux_guest().areas[0])
    view.at_trap(1)
    assert view.linux is linux
    typist.types("g")
    typist.types("pause")
    guest = FakeLinux()
    guest.write(guest.address(RODATA), b"Linux version 6.1.0-next ")
    for number, page in guest.pages.items():
        typist.link.pages[True, number] = bytes(page)
    assert view.linux is not linux
    assert view.linux.profile.release == "6.1.0-next"
    assert debugger.stop is not None


def test_what_was_not_known_is_not_asked_for_again_before_the_next_stop(typist: Typist) -> None:
    view = typist.session.guest
    with pytest.raises(NotRecognisedError) as first:
        view.linux  # noqa: B018 - asking is what is tested
    with pytest.raises(NotRecognisedError) as second:
        view.linux  # noqa: B018
    assert first.value is second.value
    assert view.known is None and view.current() is None and view.name_of(0) is None and view.label(0) is None
    assert view.address_of("schedule") is view.address_of("not a name") is None


def test_at_lstar_it_is_recognised_once_and_after_a_reset_again(typist: Typist) -> None:
    typist.boot(linux_guest())
    view = typist.session.guest
    line = f"Linux 6.1.0-fake-amd64 x86_64, slide {SLIDE:#x}, 1218 symbols, 1 module"
    entry = linux_guest().address(0x8080)
    assert view.at_lstar(0, entry) == line
    assert view.at_lstar(1, entry) is None
    next_boot = FakeLinux(slide=0x20_0000)
    typist.boot(next_boot)
    typist.debugger.guest = view
    typist.link.pages = {place: page for place, page in typist.link.pages.items() if place[0]}
    assert view.at_lstar(0, next_boot.address(0x8080)) == line.replace(f"{SLIDE:#x}", "0x200000").replace("1 module", "0 modules")
    typist.put(0, cr0=0)
    view.reset()
    assert view.at_lstar(0, 5) == (
        "the guest is not known: the guest's firmware or an early kernel: not in 64-bit mode yet, or a 32-bit system"
    )


def test_a_label_searches_nothing(typist: Typist) -> None:
    guest = linux_guest()
    typist.boot(guest)
    view = typist.session.guest
    assert view.label(guest.address(0x2000)) is None
    assert view.linux.slide == SLIDE
    assert view.label(guest.address(0x2001)) == "native_write_msr+0x1 [kernel]" and view.label(5) is None
