/* Which thread of the guest a trapped vCPU executes: found in the guest's memory by the recipe that the debugger has given. */
#ifndef VMEXIT_TASK_H
#define VMEXIT_TASK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#pragma GCC visibility push(hidden)

struct task {
    bool is_known;
    bool is_told; /* the debugger has its name */
    uint64_t found[VMEXIT_FOUNDS]; /* by VMEXIT_FOUND_...; 0 where the recipe does not say */
    char name[VMEXIT_NAME_BYTES];
};

extern const struct task task_nobody;

/* What a door tells of a vCPU for this. */
struct task_registers {
    bool is_long; /* long mode: there are no recipes for any other */
    uint64_t gs_base;
};

/* The link's half. The message's payload, 0 bytes to forget the recipe; a wire status. */
int tasks_set_recipe(const void *recipe, size_t length);
/* A new debugger: nothing is known, and no name was told. */
void tasks_begin_session(void);

/* The guest begins anew: what was seen of its vCPUs holds no more. Never waits. */
void tasks_distrust(void);
/* Some of the guest's memory is about to leave this process, or has moved in it: no vCPU reads it where it was once this returns. Not on a
 * thread that holds what a door's find_page waits for. */
void tasks_forget_memory(void);

/* On the vCPU's own thread at a trap: the thread that runs, or one that is not known. Holds until it is asked for again. `rsp` is the
 * guest's. */
const struct task *task_now(unsigned vcpu, uint64_t rsp);
/* The debugger has been told the thread's name. */
void task_told(unsigned vcpu);

/* Reading any of the guest's memory by the recipe's page tables, on the vCPU's own thread at a trap. False: there is no recipe. What
 * `serial` gives changes whenever what was read may no longer be there. What lies between the two calls must be short. */
bool task_begin_reading(unsigned vcpu, uint64_t *serial);
void task_end_reading(unsigned vcpu);
/* False where any of it is not mapped, or is not memory that lies in this process. */
bool task_read(unsigned vcpu, uint64_t address, void *bytes, uint32_t length);

/* All three at once, for 8 bytes within a page; false for others, too. */
bool task_read_word(unsigned vcpu, uint64_t address, uint64_t *value, uint64_t *serial);

static inline bool task_is_of(const struct task *task, uint32_t process)
{
    return task->is_known && task->found[VMEXIT_FOUND_PID] == process;
}

#pragma GCC visibility pop

#endif
