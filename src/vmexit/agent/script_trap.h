/* Scripts at traps: those that the debugger has added, and running one in a trapping vCPU's thread. */
#ifndef VMEXIT_SCRIPT_TRAP_H
#define VMEXIT_SCRIPT_TRAP_H

#include "core.h"
#include "script_run.h"

struct script;

/* The link's half. A wire status; the files (that of $buffer may be -1) stay the caller's to close. */
int scripts_add(const struct vmexit_script_file *file, int fd, int buffer_fd);
int scripts_set_limits(uint64_t steps, uint32_t stack);
/* The script with that number; null: there is none. */
const struct script *scripts_find(uint32_t number);
/* Unmaps the scripts that are not needed. */
void scripts_forget_unless(bool (*is_needed)(const struct script *script));
/* A new debugger: its global variables begin at 0, its limits are the usual ones. */
void scripts_begin_session(void);

/* The trap's half. Runs the script of an event that has been triggered. True: it wants the machine halted here. */
bool scripts_run(struct trap *trap, const struct vmexit_event *event, const struct script *script, struct progress *progress);
/* Runs the condition of an event that has been triggered: whether it leaves RAX other than 0. The guest does not see that. */
bool scripts_hold(struct trap *trap, const struct vmexit_event *event, const struct script *condition, struct progress *progress);

#endif
