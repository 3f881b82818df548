/* What the two halves of the fake host share: its locks, its vCPUs' state of being, and what the plugin has registered. */
#ifndef FAKE_HOST_H
#define FAKE_HOST_H

#include "fake_guest.h"

#ifndef API
#define API 1
#endif
#ifndef INTERNALS
#define INTERNALS 1
#endif
#ifndef HALT
#define HALT 1
#endif

enum { NO_REGS, R_REGS, RW_REGS };
enum { RUN_STATE_PAUSED = 4 };

#define assert_that(condition) ((condition) ? (void)0 : die("assertion failed: %s", #condition))
#define LOAD(object) __atomic_load_n(&(object), __ATOMIC_ACQUIRE)
#define STORE(object, value) __atomic_store_n(&(object), value, __ATOMIC_RELEASE)

/* Nothing here is for the agent to find. */
#pragma GCC visibility push(hidden)

struct host {
    void (*vcpu_up)(uint64_t, unsigned);
    void (*vcpu_down)(uint64_t, unsigned);
    void (*translated)(uint64_t, struct qemu_plugin_tb *);
    void (*reset)(void *);
    void *reset_opaque;
    bool running;
    bool stop_requested;
    bool is_up[MOST_VCPUS];
    int wake_main; /* an eventfd */
    unsigned register_reads; /* that the agent has asked for, by whatever function */
};
extern struct host host;
extern __thread bool bql_held;
extern __thread bool in_vcpu_thread;

void lock(void);
void unlock(void);
/* Both with the big lock held: something about a vCPU has changed, and waiting for that. */
void tell_change(void);
void wait_for_change(void);
void kick(struct cpu *cpu);
/* Does what async_run_on_cpu was asked for, under the big lock, whatever current_cpu is. */
void do_work(struct cpu *cpu);
/* Halts every vCPU; not from a vCPU's own thread. */
void stop_all(void);

#pragma GCC visibility pop

/* QEMU's own, where it is exported. */
#if !INTERNALS
#pragma GCC visibility push(hidden)
#endif
extern __thread struct cpu *current_cpu;
#if !HALT
#pragma GCC visibility push(hidden)
#endif
int vm_stop(int state);
void vm_start(void);
#if !HALT
#pragma GCC visibility pop
#endif
#if !INTERNALS
#pragma GCC visibility pop
#endif

#endif
