"""A real Linux kernel: what it writes, and that what the debugger makes of it is what the kernel gets."""

from __future__ import annotations

import re

from tests.machines import linux
from vmexit import Action, LiveTrap, Stage, StopReason

LSTAR = 0xC000_0082
MISC_ENABLE = 0x1A0
BOOT_S = 120


def test_each_vcpu_writes_lstar_once_with_its_system_call_entry() -> None:
    commands = """
        grep -w entry_SYSCALL_64 /proc/kallsyms
        echo "lstar=$(read_msr 0 0xc0000082),$(read_msr 1 0xc0000082)"
    """
    with linux(commands) as (machine, output):
        event = machine.on_msr_write(LSTAR, stage=Stage.ALL)
        everything = machine.on_msr_write()
        stop = machine.run(timeout=BOOT_S)
        assert (stop.reason, stop.exit_status) == (StopReason.ENDED, 0), output.text
        entry = re.search(r"([0-9a-f]{16}) T entry_SYSCALL_64", output.text)
        assert entry, output.text
        address = int(entry[1], 16)
        assert event.recording is not None
        seen = [(trap.core, trap.stage, trap.value) for trap in event.recording]
        assert seen == [(core, stage, address) for core in (0, 1) for stage in (Stage.PRE, Stage.POST)]
        assert f"lstar={address:016x},{address:016x}" in output.text
        rows = {row.msr: row for row in machine.summary.rows() if row.event == everything.number}
        assert rows[LSTAR].count == 2 and rows[LSTAR].cores == {0, 1}
        # EFER, STAR, FMASK, PAT and the variable MTRRs are set up on both.
        assert all(rows[msr].cores == {0, 1} for msr in (0xC0000080, 0xC0000081, 0xC0000084, 0x277, 0x200))


def test_without_lstar_the_first_system_call_is_a_panic() -> None:
    with linux("echo never") as (machine, output):
        event = machine.on_msr_write(LSTAR, short_circuit=True)
        stop = machine.run(timeout=BOOT_S)
        assert stop.reason == StopReason.ENDED
        assert machine.hits(event) >= 1
        assert "Kernel panic" in output.text or "double fault" in output.text, output.text
        assert "never" not in output.text


def test_a_changed_value_is_what_the_guest_reads_back_and_a_blocked_one_is_not() -> None:
    commands = """
        write_msr 0 0x1a0 0000000000001111; echo "changed=$(read_msr 0 0x1a0)"
        write_msr 1 0x1a0 0000000000002222; echo "blocked=$(read_msr 1 0x1a0)"
    """

    def meddle(trap: LiveTrap) -> None:
        if trap.value == 0x1111:
            trap.value = 0x1234_5678_9ABC_DEF0
        elif trap.value == 0x2222:
            trap.skip()

    with linux(commands) as (machine, output):
        machine.on_msr_write(MISC_ENABLE, meddle)
        stop = machine.run(timeout=BOOT_S)
        assert stop.exit_status == 0, output.text
        assert "changed=123456789abcdef0" in output.text
        assert re.search(r"blocked=(?!0000000000002222)[0-9a-f]{16}", output.text), output.text


def test_booting_with_a_callback_on_every_write_and_read() -> None:
    with linux("echo alive") as (machine, output):
        seen: set[int] = set()
        for event in (
            machine.on_msr_write(range(1 << 32), lambda trap: seen.add(trap.msr), stage=Stage.ALL),
            machine.on_msr_read(range(1 << 32), lambda trap: seen.add(trap.msr), stage=Stage.ALL),
        ):
            assert event.action == Action.ASK
        stop = machine.run(timeout=BOOT_S)
        assert stop.exit_status == 0, output.text
        assert "alive" in output.text
        assert {LSTAR, 0xC0000080, 0xFE, 0x1B} <= seen
