/* Instructions whose events have acted, wholly or up to a break, and that have yet to execute: what has been done for them is not to be
 * done again when they come once more. */
#ifndef VMEXIT_HOLD_H
#define VMEXIT_HOLD_H

#include "core.h"

/* The instruction at `trap->rip` has yet to execute and its events have acted so far; it is told apart by RIP and `rsp`, because the
 * machine may take interrupts and move the task to another vCPU in between. `stopped`: the machine was halted before it, on this vCPU,
 * and the debugger may still decide about it. */
void hold_put(const struct trap *trap, uint64_t rsp, struct progress progress, bool stopped);
/* Whether there is any. */
extern unsigned hold_count __attribute__((visibility("hidden")));
static inline bool hold_any(void) { return __atomic_load_n(&hold_count, __ATOMIC_ACQUIRE) != 0; }
/* How far the events of this execution have come: PROGRESS_BEGIN where nothing is held. What was held is forgotten. */
struct progress hold_take(uint64_t rip, uint64_t rsp);
/* Skip the instruction that this vCPU is stopped before, or not; false where it is not stopped before one. */
bool hold_decide(unsigned vcpu, bool skip);
/* The debugger has changed a register of a vCPU: it may have moved away from the instruction, or moved its stack. */
void hold_follow(unsigned vcpu, unsigned number, uint64_t value);
/* A machine that is reset executes nothing of what it was about to. */
void hold_forget_all(void);

#endif
