/* What the files of the KVM door share: the virtual machine of this VMM, as far as its ioctls have told of it. */
#ifndef VMEXIT_KVM_H
#define VMEXIT_KVM_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "core.h"
#include "paging.h"
#include "script.h"

#pragma GCC visibility push(hidden)

#define KVM_MOST_VCPUS 1024
/* The wire's registers and those that only scripts name (script.h). */
#define KVM_REGISTERS (VMEXIT_SCRIPT_DR7 + 1)
/* MSRs of one vCPU that can be written while the machine is halted once. */
#define KVM_MOST_WRITES 64
/* In struct cpu.changed, beyond the registers. */
#define CHANGED_MSRS (UINT64_C(1) << 63)

/* The access that a vCPU has left KVM for, and that its VMM has to carry out because it asked KVM for it too. */
struct promise {
    bool pending; /* and there is something to do when it is carried out */
    bool wants_post;
    uint8_t access;
    uint32_t msr;
    uint32_t changed; /* registers that a callback has changed, which become the guest's only then */
    uint64_t rip;
    struct kvm_regs regs;
};

struct cpu {
    int fd; /* the VMM's */
    unsigned index; /* in the order in which they were made; the wire's number */
    struct kvm_run *run;
    pthread_t owner; /* the thread that runs it, once there is one */
    pid_t thread;
    bool passed; /* its thread has come through our ioctl */
    bool busy; /* its thread is in our ioctl, and is not halted there */
    uint64_t synced; /* what kvm_run.kvm_valid_regs says because we want it */
    int wake; /* an eventfd: the machine runs on */
    /* Registers that are changed when the vCPU enters the guest, and not before: its exit may be unfinished, and its VMM may set all
     * registers anew. A bit each; under kvm_lock. */
    uint64_t changed;
    uint64_t values[KVM_REGISTERS];
    struct {
        uint32_t msr;
        uint64_t value;
    } writes[KVM_MOST_WRITES]; /* of MSRs, likewise; CHANGED_MSRS says that there are any */
    unsigned write_count;
    struct promise promise;
};

extern struct vm {
    bool active; /* ioctls are looked at */
    int fd; /* the VMM's; -1: none yet */
    uint32_t run_bytes; /* of struct kvm_run, as mapped */
    bool has_sync_regs;
    bool has_sync_sregs;
    bool syncs_sregs; /* events ask for processes */
    bool is_armed; /* events want MSRs */
    bool is_parked; /* vCPUs do not enter the guest: where the agent itself halts the machine */
    bool is_silent; /* nor do they begin to, for a moment */
    unsigned count;
    struct cpu *cpus[KVM_MOST_VCPUS];
} vm;

/* The VM's own: its filter, its memory, what the debugger has changed. Taken for short. */
extern pthread_mutex_t kvm_lock;

/* ---- kvm.c ---- */

/* What a VMM is to call instead of the C library's ioctl. */
int kvm_ioctl(int fd, unsigned long request, ...);
/* The ioctl that nobody interposes: -1 and errno, or its result. */
int kvm_plain(int fd, unsigned long request, void *argument);
/* Takes in a VM's vCPU; null where memory is short or there are too many. */
struct cpu *kvm_add_cpu(int fd, struct kvm_run *run);
/* Finishes what the last exit has begun, without letting the guest run. False where that led to another exit, which is the VMM's. */
bool kvm_complete(struct cpu *cpu);
/* Prepares the rings, and begins to serve debuggers on that listening socket. */
bool kvm_serve(int listening);

/* ---- kvm_trap.c: what happens at a trap, and the door ---- */

extern struct door kvm_door;

/* Where the vCPU's thread goes on. */
enum next { INTO_GUEST, TO_VMM, TO_VMM_INTERRUPTED };

/* An access that the filter has kept from KVM: an event's, the VMM's, or one that was an event's until just now. */
enum next trap_on_msr_exit(struct cpu *cpu);
/* The VMM has carried out what was left to it. */
enum next trap_keep_promise(struct cpu *cpu);

/* ---- kvm_msrs.c: which MSR accesses leave the guest ---- */

/* The VMM's own ioctls on the VM: their result. */
int msrs_enable_cap(const struct kvm_enable_cap *capability);
int msrs_set_filter(const struct kvm_msr_filter *filter);
/* What a VMM is known to have set before the agent came. */
void msrs_assume(const struct kvm_msr_filter *filter, uint64_t reasons);
/* Lets leave what these events want, beside what the VMM wants. VMEXIT_OK or VMEXIT_UNAVAILABLE. */
int msrs_want(const struct vmexit_event *events, size_t count);
/* Whether the VMM's own filter keeps this access from KVM, and whether an exit for that reason (KVM_MSR_EXIT_REASON_...) is the VMM's. */
bool msrs_own_denies(uint32_t msr, bool write);
bool msrs_own_reason(uint64_t reason);

/* Whether the guest's WRMSR of this faults, though a VMM may set it: a read-only MSR, and long mode switched with paging on. */
bool msrs_refuse_guest(const struct cpu *cpu, uint32_t msr, uint64_t value);

enum carried { CARRIED_OUT, FAULTED, LEFT_TO_VMM };
/* Carries an access out as the guest's own, and says so in `run->msr` for when the vCPU enters the guest. */
enum carried msrs_carry_out(struct cpu *cpu, bool write, uint32_t msr, uint64_t value);

/* ---- kvm_state.c: registers and memory ---- */

/* The first VMEXIT_ASKED_REGISTERS wire registers are in struct kvm_regs. */
uint64_t *state_register(struct kvm_regs *regs, unsigned number);
/* The registers as they are after an exit. */
void state_get_regs(struct cpu *cpu, struct kvm_regs *regs);
/* Sets them, and keeps a fault that is about to reach the guest: KVM_SET_REGS drops it. */
bool state_set_regs(const struct cpu *cpu, const struct kvm_regs *regs);
bool state_get_msr(const struct cpu *cpu, uint32_t msr, uint64_t *value);
bool state_set_msr(const struct cpu *cpu, uint32_t msr, uint64_t value);
/* The registers with these numbers (a bit each) of a vCPU that is not in the guest, into their places; as they will be when it enters. */
bool state_get(struct cpu *cpu, uint64_t wanted, uint64_t *registers);
/* False for a value that the processor does not take. Only where no exit is unfinished. */
bool state_would_take(struct cpu *cpu, unsigned number, uint64_t value);
/* Changes a register when the vCPU enters the guest. */
void state_change(struct cpu *cpu, unsigned number, uint64_t value);
/* On the vCPU's own thread, with no exit unfinished: it is about to enter. */
void state_apply(struct cpu *cpu);
/* The VMM's own ioctl on the VM: its result. */
int state_set_memory(unsigned long request, const struct kvm_userspace_memory_region *region);
bool state_has_memory(void);
/* A slot that the VMM has set up before; under the lock. */
void state_know_memory(uint32_t number, uint64_t first, uint64_t size, uint64_t address);
/* Physical memory; virtual memory by way of what state_get_paging gives. */
bool state_access_memory(bool write, uint64_t address, void *bytes, uint32_t length);
bool state_get_paging(struct cpu *cpu, struct paging *paging);

/* ---- kvm_access.c: MSRs that the debugger reads and writes ---- */

/* At a trap or while the vCPU stands still. False: there is no such MSR, or the VMM has it and not KVM. */
bool access_peek_msr(struct cpu *cpu, uint32_t msr, uint64_t *value);
/* Only while it stands still, with no exit unfinished: now, and once more when it enters the guest, because its VMM may set all MSRs anew.
 * VMEXIT_OK, VMEXIT_NO_MSR, VMEXIT_NO_VALUE, VMEXIT_UNAVAILABLE: too many at once. */
int access_write_msr(struct cpu *cpu, uint32_t msr, uint64_t value);
/* As state_apply, which calls it. */
void access_apply(struct cpu *cpu);
/* Where a page of physical memory is in this process; null where it cannot be read there. */
const uint8_t *state_find_page(uint64_t physical);

/* ---- kvm_task.c: the door's functions for the way to the current thread (core.h) ---- */

/* msrs_want, and what these events need beside. */
int task_set_events(const struct vmexit_event *events, size_t count);
bool task_get_registers(unsigned vcpu, struct task_registers *registers);
bool task_get_kernel_gs_base(unsigned vcpu, uint64_t *base);
bool task_read_physical(uint64_t physical, void *bytes, uint32_t length);

/* ---- kvm_halt.c: halting the machine ---- */

/* On the link's thread, when it begins. */
void halt_prepare(void);
/* A thread has begun to run a vCPU. */
void halt_adopt(struct cpu *cpu);
/* On a vCPU's thread, for a break. True: its KVM_RUN is to return to the VMM, as if a signal had come. */
bool halt_here(struct cpu *cpu);
/* On the vCPU's thread, between two entries: sleeps while the machine is halted. False: KVM_RUN is to return, as above. */
bool halt_sleep(struct cpu *cpu);
bool halt_is_running(void);
/* On the link's thread. VMEXIT_OK, VMEXIT_UNAVAILABLE. */
int halt_set(bool halted);
/* Lets a machine run whose debugger is gone. */
void halt_resume(void);
/* The machine does not run until a debugger lets it. */
void halt_at_start(void);
/* While no debugger is there: has every vCPU leave the guest, and takes the lock, so that the VMM changes nothing. False: they do not. */
bool halt_begin_silence(void);
void halt_end_silence(void);
/* On a vCPU's thread: until it is over. */
void halt_wait_for_silence_to_end(void);
/* A mask that the VMM sets for KVM_RUN, without the signal that fetches vCPUs out of the guest. */
void halt_amend_mask(uint8_t *mask, uint32_t bytes);

/* ---- kvm_slots.c ---- */

/* Finds the slots that the VMM has set up before the agent came, if it can; `device` is the VMM's /dev/kvm, or -1. */
void slots_find(int device);

#pragma GCC visibility pop

#endif
