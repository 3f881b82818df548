"""The guest is recognised by itself: when its kernel sets LSTAR, when vmexit comes to it, and again after a reboot."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.fakes import Typist, linux_guest, record
from tests.guest.linux.fake_linux import RODATA, SLIDE, FakeLinux
from tests.machines import Output, linux_arguments
from vmexit import Debugger, LiveTrap, StopReason, Trap
from vmexit.debugger import State
from vmexit.errors import VmexitError
from vmexit.guest_view import GuestView
from vmexit.link import wire
from vmexit.link.wire import Action, Capability
from vmexit.recognition import LSTAR
from vmexit.script.errors import ScriptError
from vmexit.setup.kernel import find_kernel
from vmexit.targets.base import Notice, NoticeKind, OnlyLooks
from vmexit.targets.qemu import Qemu

ENTRY = 0x8080
LINE = f"Linux 6.1.0-fake-amd64 x86_64, slide {SLIDE:#x}, 1218 symbols, 1 module"
UNKNOWN = "the guest is not known: the guest's firmware or an early kernel: not in 64-bit mode yet, or a 32-bit system"
BOOT_S = 240


class Watched:
    """A session on a fake machine, and the lines that recognition gives."""

    def __init__(self) -> None:
        self.typist = Typist()
        self.debugger = self.typist.debugger
        self.lines: list[str] = []
        self.sequence = 0
        self.debugger.recognition.on_line = self.lines.append

    def boots(self, guest: FakeLinux) -> None:
        self.typist.link.pages.clear()
        self.typist.boot(guest)

    def asks(self, value: int, core: int = 0) -> None:
        """A vCPU waits at its WRMSR of LSTAR until the debugger has answered."""
        self.typist.target.is_asking = True
        self.put(event=-1, action=Action.ASK, value=value, core=core)
        self.debugger.pump()
        self.typist.target.is_asking = False
        assert self.typist.link.rings.answered[-1] == (core, self.sequence - 1)

    def put(self, **fields: int) -> None:
        self.typist.link.rings.records.append(record(self.sequence, **fields))  # type: ignore[arg-type]
        self.sequence += 1

    @property
    def is_watched(self) -> bool:
        """Whether the agent asks."""
        return len(self.typist.link.own) == 1


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.typist.close()


@pytest.fixture
def running(watched: Watched) -> Watched:
    """With the made-up Linux in its memory."""
    watched.boots(linux_guest())
    watched.typist.types("g")
    return watched


def test_the_agent_asks_from_when_the_machine_runs(watched: Watched) -> None:
    assert not watched.is_watched
    watched.typist.types("g")
    assert watched.is_watched and not watched.typist.link.events
    watched.typist.types("!msrwrite log")
    assert watched.is_watched and len(watched.typist.link.events) == 1


def test_a_kernel_that_sets_lstar_is_recognised_once(running: Watched) -> None:
    running.asks(linux_guest().address(ENTRY))
    running.asks(linux_guest().address(ENTRY), core=1)
    assert running.lines == [LINE] and running.debugger.recognition.line == LINE
    assert running.debugger.guest.is_known and running.is_watched
    running.typist.types("pause")
    assert running.typist.types("guest").split("\n")[0] == LINE


def test_the_agent_learns_where_code_is_and_of_new_modules(running: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = running.typist.link.codes
    assert codes == []
    running.asks(linux_guest().address(ENTRY))
    size, head = wire.size("code"), wire.size("frames")
    first = codes[-1]
    assert len(codes) == 1 and len(first) > head + size
    running.typist.types("pause")
    running.debugger.recognition.at_stop()
    assert codes == [first]
    linux = running.debugger.guest.linux
    monkeypatch.setattr(linux, "_read_modules", list)
    running.typist.types("g")
    running.typist.types("pause")
    running.debugger.recognition.at_stop()
    assert len(codes) == 2 and len(codes[-1]) == len(first) - size
    running.typist.types("g")
    running.typist.target.pending.append(Notice(NoticeKind.RESET))
    running.debugger.pump()
    assert codes[2:] == [b""]


def test_nobody_sees_the_question(running: Watched) -> None:
    running.typist.types("!msrwrite log")
    got: list[Trap] = []
    running.debugger.listeners.append(got.extend)
    running.put(value=1)
    running.put(event=-1, action=Action.ASK, value=linux_guest().address(ENTRY))
    running.put(value=2)
    running.typist.target.is_asking = True
    running.debugger.pump()
    running.put(value=3)
    running.debugger.pump()
    assert [(trap.sequence, trap.value, trap.event) for trap in got] == [(0, 1, 0), (1, 2, 0), (2, 3, 0)]
    assert running.debugger.summary.total == 3
    assert running.typist.types("events").count("\n") == 0
    assert running.lines == [LINE]


def test_a_callback_of_the_same_instruction_is_answered_under_its_own_number(running: Watched) -> None:
    seen: list[tuple[int, object, object]] = []

    def on_write(trap: LiveTrap) -> None:
        seen.append((trap.sequence, str(trap.symbol), str(trap.task)))

    running.debugger.on_msr_write(LSTAR, on_write)
    running.put(event=-1, action=Action.ASK, value=linux_guest().address(ENTRY))
    running.put(action=Action.ASK, rip=linux_guest().address(0x2002))
    running.typist.target.is_asking = True
    running.debugger.pump()
    assert running.typist.link.rings.answered == [(0, 0), (0, 1)]
    assert seen == [(0, "native_write_msr+0x2 [kernel]", "worker (process 94, thread 95)")]


def test_what_is_unknown_is_told_once_and_not_asked_for_ever(watched: Watched) -> None:
    watched.typist.types("g")
    for _ in range(3):
        watched.asks(1)
    assert watched.lines == [UNKNOWN] and watched.is_watched
    for value in range(2, 5):
        watched.asks(value)
    assert watched.lines == [UNKNOWN] and not watched.is_watched
    watched.typist.target.pending.append(Notice(NoticeKind.RESET))
    watched.debugger.pump()
    assert watched.is_watched


def test_a_guest_that_sets_lstar_all_the_time_is_left_alone(running: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmexit.recognition._MOST_ASKED", 3)
    for _ in range(3):
        assert running.is_watched
        running.asks(linux_guest().address(ENTRY))
    assert not running.is_watched and running.lines == [LINE]


def test_another_way_of_syscall_is_no_other_kernel(running: Watched) -> None:
    running.asks(linux_guest().address(ENTRY))
    running.asks(linux_guest().address(ENTRY) + 0x100)
    assert running.lines == [LINE] and running.debugger.guest.is_known


def test_after_a_reset_it_is_recognised_anew(running: Watched) -> None:
    running.asks(linux_guest().address(ENTRY))
    running.typist.target.pending.append(Notice(NoticeKind.RESET))
    running.debugger.pump()
    assert not running.debugger.guest.is_known and running.debugger.names.of(linux_guest().address(0x2002)) == ""
    next_boot = FakeLinux(slide=0x20_0000)
    view = running.debugger.guest
    running.boots(next_boot)
    running.debugger.guest = view
    running.asks(next_boot.address(ENTRY))
    assert running.lines == [LINE, LINE.replace(f"{SLIDE:#x}", "0x200000").replace("1 module", "0 modules")]


def test_a_kernel_that_has_replaced_another_without_a_reset(running: Watched) -> None:
    """As kexec does it; the one of before is still in memory."""
    running.asks(linux_guest().address(ENTRY))
    next_boot = FakeLinux(slide=0x20_0000)
    next_boot.write(next_boot.address(RODATA), b"Linux version 6.1.0-next ")
    view = running.debugger.guest
    running.typist.boot(next_boot)
    running.debugger.guest = view
    running.asks(next_boot.address(ENTRY))
    assert running.lines[1].startswith("Linux 6.1.0-next x86_64, slide 0x200000, ")


def test_it_can_be_switched_off(running: Watched) -> None:
    assert running.typist.types("settings recognition").split()[:2] == ["recognition", "on"]
    running.typist.types("settings recognition off")
    assert not running.is_watched
    running.typist.types("pause")
    running.debugger.recognition.at_stop()
    assert not running.debugger.guest.is_known
    running.typist.types("settings recognition on")
    assert running.is_watched


def test_where_the_agent_cannot_ask_it_is_recognised_at_a_stop(watched: Watched) -> None:
    watched.typist.link.capabilities = Capability.RECORD | Capability.MEMORY
    watched.boots(linux_guest())
    watched.typist.types("g")
    assert not watched.is_watched
    watched.typist.types("pause")
    watched.debugger.recognition.at_stop()
    watched.debugger.recognition.at_stop()
    assert watched.lines == [LINE]


def test_what_is_only_looked_at_is_left_alone(watched: Watched) -> None:
    watched.typist.target.only_looks = OnlyLooks("it is a picture", ())
    watched.boots(linux_guest())
    watched.typist.types("g")
    watched.debugger.recognition.at_attach()
    watched.debugger.recognition.at_stop()
    assert not watched.is_watched and not watched.lines


@pytest.mark.parametrize("error", [VmexitError("the link is gone"), IndexError("oops")])
def test_a_failure_is_a_line(running: Watched, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(GuestView, "at_lstar", fail)
    running.asks(1)
    assert len(running.lines) == 1
    assert running.lines[0].startswith("the guest is not known: ") and str(error) in running.lines[0]
    assert "\n" not in running.lines[0]


@pytest.mark.parametrize("ran", [True, False])
def test_a_machine_that_was_found(watched: Watched, ran: bool) -> None:
    watched.boots(linux_guest())
    debugger = watched.debugger
    if ran:
        debugger.go()
    stops: list[object] = []
    debugger.on_stop = stops.append
    debugger.recognition.at_attach()
    assert watched.lines == [LINE] and not stops and watched.is_watched
    assert debugger.state is (State.RUNNING if ran else State.HALTED)
    assert debugger.on_stop is not None


# ---- symbols in scripts ----


def test_scripts_name_symbols(running: Watched) -> None:
    running.asks(linux_guest().address(ENTRY))
    address = linux_guest().address(0x2000)
    for name in ("native_write_msr", "kernel!native_write_msr", "nt!native_write_msr"):
        assert f"{address:x}" in running.typist.types(f"? {name}")
    running.typist.types("!msrwrite c0000082 script { x = poi(native_write_msr); }")
    (event,) = running.debugger.events
    assert event.script is not None and event.script.symbols == {"native_write_msr": address}
    assert "msr!msr_open" not in event.script.symbols


def test_a_variable_goes_before_a_symbol(running: Watched) -> None:
    running.asks(linux_guest().address(ENTRY))
    assert running.typist.types('? native_write_msr = 5; printf("%d", native_write_msr);') == "5"


def test_symbols_before_the_guest_is_known(watched: Watched) -> None:
    watched.typist.types("g")
    for text, column in (("poi(kernel!jiffies)", 4), ("poi(jiffies)", 4)):
        with pytest.raises(ScriptError) as raised:
            watched.debugger.compiler.compile(f"print({text});")
        assert "the guest is not recognised yet" in str(raised.value)
        assert raised.value.place.start == column + len("print(")
    with pytest.raises(ScriptError, match="'jiffies' has no value yet"):
        watched.debugger.compiler.compile("print(jiffies);")


def test_an_unknown_symbol_of_a_known_guest(running: Watched) -> None:
    running.asks(linux_guest().address(ENTRY))
    with pytest.raises(ScriptError) as raised:
        running.debugger.compiler.compile("x = 1; print(kernel!nothing);")
    assert raised.value.render().split("\n")[1:] == ["x = 1; print(kernel!nothing);", "             ^~~~~~~~~~~~~~"]


def test_scripts_follow_their_symbols(running: Watched) -> None:
    """What was compiled for one boot would read anything in the next."""
    running.asks(linux_guest().address(ENTRY))
    running.typist.types("!msrwrite c0000082 script { x = poi(native_write_msr); }")
    running.typist.types("!msrwrite c0000083 script { x = 5; }")
    running.typist.types("pause")
    running.typist.types("!msrwrite c0000084 script { x = poi(msr!msr_open); }")
    running.typist.types("g")
    first, second, third = running.debugger.events
    unchanged = second.script
    running.typist.target.pending.append(Notice(NoticeKind.RESET))
    running.debugger.pump()
    next_boot = FakeLinux(slide=0x20_0000)
    view = running.debugger.guest
    running.boots(next_boot)
    running.debugger.guest = view
    running.asks(next_boot.address(ENTRY))
    assert first.script is not None and first.script.symbols == {"native_write_msr": next_boot.address(0x2000)}
    assert second.script is unchanged and first.enabled and second.enabled
    assert not third.enabled
    assert running.lines[2] == "event 2 is disabled: its script names symbols that are not known any more"


# ---- real kernels ----

REBOOTING = "echo up; reboot -f"
KEXEC = Path(__file__).parent / "kexec.c"


def recognised(arguments: list[str], count: int) -> list[str]:
    """Boots until so many kernels have been recognised, one after the other; gives the lines."""
    output = Output()
    lines: list[str] = []
    with Debugger(Qemu(arguments, output=output)) as debugger:
        debugger.recognition.on_line = lines.append
        debugger.on_msr_write(LSTAR)
        stop = debugger.run(until=lambda: len(lines) >= count, timeout=BOOT_S)
        assert stop.reason == StopReason.CONDITION, (lines, output.text)
        assert debugger.guest.known is not None
        debugger.run(timeout=0.5)
    return lines


def test_a_real_kernel_is_recognised_again_after_a_reboot() -> None:
    arguments = [argument for argument in linux_arguments(REBOOTING) if argument != "-no-reboot"]
    first, second = recognised(arguments, 2)
    assert first.startswith("Linux ") and first.endswith(" symbols, 0 modules")
    # Only where it lies is another, or by chance the same.
    assert [part for part in first.split(", ") if "slide" not in part] == [
        part for part in second.split(", ") if "slide" not in part
    ]


def test_a_real_kernel_is_recognised_again_after_kexec(tmp_path: Path) -> None:
    """No reset comes in between, and the first kernel's memory may still be what it was."""
    program = tmp_path / "kexec"
    subprocess.run(
        ["gcc", "-O1", "-ffreestanding", "-fno-tree-loop-distribute-patterns", "-static", "-nostdlib", "-o", program, KEXEC],
        check=True,
    )
    commands = "kexec /vmlinuz 'console=ttyS0 quiet nokaslr panic=-1'; echo \"kexec=$?\""
    arguments = linux_arguments(commands, vcpus=1, files={"bin/kexec": program, "vmlinuz": find_kernel().image})
    first, second = recognised(arguments, 2)
    assert first.startswith("Linux ") and ", slide 0x0, " not in first
    assert second == f"{first.split(', ')[0]}, slide 0x0, {first.split(', ')[2]}, 0 modules"
