/* Running compiled scripts: what the agent's other files and script_eval.c need of script.c. */
#ifndef VMEXIT_SCRIPT_RUN_H
#define VMEXIT_SCRIPT_RUN_H

#include <stddef.h>
#include <stdint.h>

#include "script.h"
#include "wire.h"

typedef uint32_t (*script_entry)(struct vmexit_script_context *context);

/* Readies a context of zeroes, whose registers, host, segments of constants, globals, stack and buffer, record and budgets the caller
 * has set: once; runs may follow each other. */
void script_prepare(struct vmexit_script_context *context);
/* What $pname gives; `size` bytes at most VMEXIT_NAME_BYTES, with or without a 0 at the end. */
void script_set_name(struct vmexit_script_context *context, const char *name, size_t size);
/* Runs a script in a readied context with that many steps. 0 or the fault, which context->place and detail say more about; what the
 * script has done until then stays, but locks that it holds are let go of. */
uint32_t script_run(struct vmexit_script_context *context, script_entry entry, uint64_t steps);
/* script_length.c: bytes of the x86 instruction at the start of `bytes`; 0 where there is none or it is cut off. `bits` is 64 or 32. */
unsigned script_instruction_length(const uint8_t *bytes, size_t available, unsigned bits);

#endif
