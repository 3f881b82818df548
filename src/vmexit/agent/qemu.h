/* Reaching into the QEMU that the agent is loaded into: registers, memory, halting; by its plugin interface where that can, by its
 * exported internals where not. */
#ifndef VMEXIT_QEMU_H
#define VMEXIT_QEMU_H

#include <stdbool.h>
#include <stdint.h>

#include "qemu_plugin.h"

enum { RFLAGS_VM = 1 << 17, CR0_PE = 1 };
enum { RUN_STATE_PAUSED = 4 }; /* QEMU, qapi/run-state.json */

/* The newest plugin API version that both this QEMU and the agent know; found without help, before QEMU looks at the plugin. */
unsigned qemu_api(void);
/* VMEXIT_CAN_... */
uint32_t qemu_capabilities(void);
enum qemu_plugin_cb_flags qemu_callback_flags(void);
bool qemu_init(unsigned vcpus);
/* From the callback of a vCPU that comes up: fetches what later reads need. */
void qemu_vcpu_up(unsigned vcpu);
void qemu_vcpu_down(unsigned vcpu);
/* QEMU's object of the vCPU; null while the vCPU is not there or the internals are out of reach. */
void *qemu_cpu(unsigned vcpu);
/* The vCPU that this thread runs now, whose registers can be read; false where QEMU does not say, and `vcpu` is left as it is. What it
 * held is looked at first. */
bool qemu_current_vcpu(unsigned *vcpu);

/* One register by its wire number (VMEXIT_RAX ...), in a callback on the vCPU's own thread. Inside a callback from translated code
 * RIP is that of some earlier instruction of the block, and the status flags are stale. */
uint64_t qemu_read_register(unsigned vcpu, unsigned number);
void qemu_write_register(unsigned vcpu, unsigned number, uint64_t value);
/* The same by the internals, where the plugin interface does not reach: on another thread while the vCPU stands still, or on its own
 * between two blocks. */
uint64_t qemu_peek_register(unsigned vcpu, unsigned number);
void qemu_poke_register(unsigned vcpu, unsigned number, uint64_t value);
/* RFLAGS with the status flags that the translator keeps apart while a vCPU executes. */
uint64_t qemu_read_rflags(unsigned vcpu);
void qemu_write_rflags(unsigned vcpu, uint64_t value);

/* Whether the vCPU's state, an array that begins with the general registers in encoding order, is where `candidate` points; in a
 * callback, where it can be compared with what is read the slow way. From then on qemu_env gives the state, until then null. */
bool qemu_prove_env(unsigned vcpu, const uint64_t *candidate);
uint64_t *qemu_env(unsigned vcpu);
/* Where RIP is in that array. */
extern unsigned qemu_env_rip_index __attribute__((visibility("hidden")));
static inline const uint64_t *qemu_env_rip(const uint64_t *env)
{
    return env + __atomic_load_n(&qemu_env_rip_index, __ATOMIC_RELAXED);
}

/* In that array, in bytes behind RIP, are the segments, ES, CS, SS, DS, FS, GS; so long is each, and that far into it its base. */
enum { ENV_SEGMENTS_BYTE = 56, SEGMENT_BYTES = 24, SEGMENT_BASE_BYTE = 8 };

/* Those of script.h beyond them (GDTR ... DR7), on the vCPU's own thread. False: out of reach in this QEMU. */
bool qemu_read_system_register(unsigned vcpu, unsigned number, uint64_t *value);
bool qemu_write_system_register(unsigned vcpu, unsigned number, uint64_t value);

bool qemu_access_memory(unsigned vcpu, bool physical, bool write, uint64_t address, void *bytes, uint32_t length);

/* qemu_task.c: for a door's functions of these names (core.h). A page is never given back. */
struct task_registers;
bool qemu_task_registers(unsigned vcpu, struct task_registers *registers);
bool qemu_kernel_gs_base(unsigned vcpu, uint64_t *base);
const uint8_t *qemu_find_page(uint64_t physical);
bool qemu_read_physical(uint64_t physical, void *bytes, uint32_t length);

bool qemu_is_running(void);
/* Whether the following can be called: on a thread of the agent's, or before the machine begins. */
bool qemu_can_halt(void);
/* Asks QEMU to pause the machine; it does so in a moment. */
void qemu_halt(void);
/* Waits for a pause that was asked for, and lets the machine run. */
void qemu_resume(void);
/* From now on this is called, by a thread of QEMU's, whenever the machine begins to run or is halted, whoever wanted it. */
void qemu_watch_state(void (*told)(bool running));
void qemu_lock(void);
void qemu_unlock(void);

#endif
