"""The current thread at traps of guests that KVM runs: of bare-metal ones, whose threads the tests have put there."""

from __future__ import annotations

import pytest

from tests.bare_task import CALLER, KERNEL, NAME, PID, TID, lay_out, lay_out_caller
from tests.guests.build import OK_STATUS, build
from tests.machines import Output, need_kvm
from tests.vmm import build_vmm, vmm_arguments
from vmexit import Debugger, Stage, StopReason, Trap
from vmexit.link.wire import RecordFlag
from vmexit.targets.kvm import Vmm

STAR = 0xC000_0081
COUNT = 50


@pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
def test_who_writes(stage: Stage) -> None:
    need_kvm()
    with Debugger(Vmm(str(build_vmm()), vmm_arguments(build("loop", COUNT=COUNT), 1), output=Output())) as debugger:
        event = debugger.on_msr_write(STAR, with_process=True, stage=stage)
        mine = debugger.on_msr_write(STAR, pid=PID, stage=stage)
        other = debugger.on_msr_write(STAR, pid=TID, stage=stage)
        script = f"if ($pid == {PID:x} && $tid == {TID:x}) {{ .n = .n + strlen($pname); }}"
        debugger.on_msr_write(STAR, script=script, stage=stage)
        start = debugger.on_msr_write(STAR, lambda trap: trap.halt())
        assert debugger.run(timeout=60).reason == StopReason.BREAK
        before = debugger.hits(event)
        recipe = lay_out(debugger)
        debugger.clear(start)
        debugger.set_recipe(recipe)
        stop = debugger.run(timeout=60)
        assert (stop.reason, stop.exit_status) == (StopReason.ENDED, OK_STATUS)
        assert event.recording is not None
        traps: list[Trap] = list(event.recording)
        assert len(traps) == COUNT
        ids = [(trap.pid, trap.tid, RecordFlag.PROCESS_KNOWN in trap.flags) for trap in traps]
        assert ids == [(0, 0, False)] * before + [(PID, TID, True)] * (COUNT - before)
        assert debugger.thread_names.get(PID, TID) == NAME
        assert (debugger.hits(mine), debugger.hits(other)) == (COUNT - before, 0)
        assert int(debugger.evaluate("print(.n);"), 16) == len(NAME) * (COUNT - before)


@pytest.mark.parametrize("stage", [Stage.PRE, Stage.POST])
def test_what_called_it(stage: Stage) -> None:
    need_kvm()
    with Debugger(Vmm(str(build_vmm()), vmm_arguments(build("loop", COUNT=COUNT), 1), output=Output())) as debugger:
        event = debugger.on_msr_write(STAR, with_process=True, stage=stage)
        silent = debugger.on_msr_write(STAR, stage=stage)
        halting = debugger.on_msr_write(STAR, lambda trap: trap.halt())
        assert debugger.run(timeout=60).reason == StopReason.BREAK
        assert event.recording is not None and silent.recording is not None

        def callers() -> list[int]:
            """Of the traps of one round, as it is halted again: in stage post the one before's."""
            before = len(event.recording or ())
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            return [debugger.callers.of(trap) for trap in list(event.recording or ())[before:]]

        debugger.set_recipe(lay_out(debugger))
        code = lay_out_caller(debugger)
        assert callers() == [0]
        debugger.set_code(code)
        assert [callers(), callers()] == [[CALLER], [CALLER]]
        for rbp in (KERNEL + 0x1B00, 0, 1 << 63, (1 << 64) - 8, KERNEL + 0x1FF9):
            debugger.registers(0)["rbp"] = rbp
            assert callers() == [0]
        debugger.registers(0)["rbp"] = KERNEL + 0x1A00
        debugger.clear(halting)
        stop = debugger.run(timeout=60)
        assert (stop.reason, stop.exit_status) == (StopReason.ENDED, OK_STATUS)
        assert [debugger.callers.of(trap) for trap in event.recording][-10:] == [CALLER] * 10
        assert {trap.caller_number for trap in silent.recording} == {0}


def test_a_guest_that_lies() -> None:
    need_kvm()
    with Debugger(Vmm(str(build_vmm()), vmm_arguments(build("loop", COUNT=COUNT), 1), output=Output())) as debugger:
        event = debugger.on_msr_write(STAR, with_process=True)
        debugger.on_msr_write(STAR, lambda trap: trap.halt())
        debugger.run(timeout=60)
        recipe = lay_out(debugger)
        debugger.set_recipe(recipe)
        root = recipe.root + (recipe.bases[0] >> 39 & 511) * 8
        # Nowhere, at the end of memory, where it leads to itself, and where it was.
        places = [1 << 40, 64 << 20, (64 << 20) - 0x1000, recipe.root, recipe.root + 0x1000]
        known = []
        for place in places:
            debugger.write_memory(0, root, (place | 1).to_bytes(8, "little"), physical=True)
            assert debugger.run(timeout=60).reason == StopReason.BREAK
            assert event.recording is not None
            known.append(RecordFlag.PROCESS_KNOWN in list(event.recording)[-1].flags)
        assert known == [False, False, False, False, True]
