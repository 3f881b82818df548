/* Scripts in the debugger, without a machine or beside one. The debugger loads the agent's library into its own process for this, so that
 * a script means the same there and at a trap. */
#include <stdbool.h>
#include <string.h>

#include "script_run.h"

#define EXPORT __attribute__((visibility("default")))

typedef struct vmexit_script_context context_t;

static struct vmexit_eval *eval_of(const context_t *context) { return context->machine; }

static int get_register(context_t *context, unsigned number, uint64_t *value)
{
    if (number >= VMEXIT_SCRIPT_REGISTERS)
        return VMEXIT_FAULT_REGISTER;
    *value = eval_of(context)->registers[number];
    return 0;
}

static int set_register(context_t *context, unsigned number, uint64_t value)
{
    if (number >= VMEXIT_SCRIPT_REGISTERS)
        return VMEXIT_FAULT_REGISTER;
    eval_of(context)->registers[number] = value;
    return 0;
}

static uint8_t *memory_at(const struct vmexit_eval *eval, uint64_t address)
{
    /* The last one given counts where two overlap. */
    for (uint64_t i = eval->memory_count; i-- > 0;)
        if (address - eval->memory[i].address < eval->memory[i].length)
            return eval->memory[i].bytes + (address - eval->memory[i].address);
    return NULL;
}

static int memory(context_t *context, int physical, int write, uint64_t address, void *bytes, uint32_t length)
{
    uint8_t *ours = bytes;
    (void)physical;
    /* Twice, so that nothing is written where not all of it can be. */
    for (int copying = 0; copying < 2; copying++)
        for (uint32_t i = 0; i < length; i++) {
            uint8_t *there = memory_at(eval_of(context), address + i);
            if (there == NULL)
                return write ? VMEXIT_FAULT_WRITE : VMEXIT_FAULT_READ;
            if (copying && write)
                *there = ours[i];
            else if (copying)
                ours[i] = *there;
        }
    return 0;
}

static int translate(context_t *context, uint64_t address, uint64_t *translated)
{
    *translated = address;
    return memory_at(eval_of(context), address) ? 0 : VMEXIT_FAULT_READ;
}

static int print(context_t *context, const void *record, uint32_t size)
{
    struct vmexit_eval *eval = eval_of(context);
    if (size > eval->output_size - eval->output_used && eval->drain(eval) != 0)
        return VMEXIT_FAULT_OUTPUT;
    if (size > eval->output_size - eval->output_used)
        return VMEXIT_FAULT_OUTPUT;
    memcpy(eval->output + eval->output_used, record, size);
    eval->output_used += size;
    return 0;
}

static int flush(context_t *context)
{
    (void)context;
    return 0;
}

static const struct vmexit_script_host host = {
    .get_register = get_register,
    .set_register = set_register,
    .memory = memory,
    .to_physical = translate,
    .to_virtual = translate,
    .print = print,
    .flush = flush,
};

/* Runs a compiled script `repeat` times (to measure it) in a context that the caller has filled but for the host and what belongs to
 * it; the machine is a struct vmexit_eval. 0 or the fault. */
EXPORT uint32_t vmexit_script_eval(context_t *context, const void *entry, uint64_t steps, uint64_t repeat)
{
    uint32_t error = 0;
    script_entry run;
    memcpy(&run, &entry, sizeof run);
    const struct vmexit_script_host *live = eval_of(context)->live;
    struct vmexit_script_host chosen = live ? *live : host;
    chosen.print = print;
    chosen.flush = flush;
    context->host = &chosen;
    context->registers = eval_of(context)->registers;
    script_prepare(context);
    while (error == 0 && repeat-- > 0)
        error = script_run(context, run, steps);
    context->host = NULL;
    return error;
}

/* script_instruction_length, so that it can be tested by itself. */
EXPORT uint32_t vmexit_script_instruction_length(const uint8_t *bytes, uint64_t available, uint32_t bits)
{
    return script_instruction_length(bytes, (size_t)available, bits);
}
