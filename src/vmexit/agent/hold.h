/* Instructions that a machine was halted before: what has been done for them and is not to be done again when they come once more. */
#ifndef VMEXIT_HOLD_H
#define VMEXIT_HOLD_H

#include "core.h"

/* The instruction at `trap->rip` has yet to execute and its events have acted so far; it is told apart by RIP and `rsp`, because the
 * machine may take interrupts and move the task to another vCPU in between. */
void hold_put(const struct trap *trap, uint64_t rsp, struct progress progress);
/* How far the events of this execution have come: PROGRESS_BEGIN where nothing is held. What was held is forgotten. */
struct progress hold_take(uint64_t rip, uint64_t rsp);
/* Skip the instruction that this vCPU is stopped before, or not; false where it is not stopped before one. */
bool hold_decide(unsigned vcpu, bool skip);
/* The debugger has changed a register of a vCPU: it may have moved away from the instruction, or moved its stack. */
void hold_follow(unsigned vcpu, unsigned number, uint64_t value);

#endif
