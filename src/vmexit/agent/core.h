/* What happens at a trap, whichever door it came through: which events match, what they do, and the records they leave. */
#ifndef VMEXIT_CORE_H
#define VMEXIT_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "caller.h"
#include "task.h"
#include "wire.h"

/* A vCPU thread stopped at (stage pre) or right after (stage post) a WRMSR or RDMSR. Lives on that thread's stack. */
struct trap {
    const struct door *door;
    void *place; /* the door's own: where in the VMM the thread is */
    unsigned vcpu;
    uint8_t access;
    uint8_t stage;
    uint8_t length;
    uint8_t flags;
    bool wants_post;
    uint64_t rip; /* of the instruction */
    uint64_t rsp;
    uint32_t msr; /* ECX */
    uint64_t value; /* EDX:EAX */
    struct {
        uint8_t is; /* what filter.c knows of it */
        bool again; /* the events of the pre stage have acted: the instruction comes once more */
        uint32_t msr;
        uint64_t value;
    } before; /* what the MSR held before the instruction */
    const struct task *task; /* what runs, once somebody has asked */
    struct caller caller; /* likewise */
    bool has_caller; /* somebody has asked */
};

/* How far the events of the pre stage have come with one execution of one instruction; survives a break in between. */
struct progress {
    uint32_t after; /* events up to this id have acted; 0: none has */
    uint32_t limit; /* events above this id were made too late for it */
    bool skip; /* what the last one that acted says of short-circuiting */
    bool decided; /* the person at the break has said so; events that come later no longer change it */
};

#define PROGRESS_BEGIN ((struct progress){.after = 0, .limit = UINT32_MAX})
#define PROGRESS_DONE UINT32_MAX /* progress.after when every event has acted */

/* What a way into a VMM has to offer. What takes a trap is called in the trapping vCPU's thread, the rest in the link's. */
struct door {
    const char *name;
    uint32_t capabilities; /* VMEXIT_CAN_... */
    uint32_t plugin_api;
    /* Gives and takes the first VMEXIT_ASKED_REGISTERS registers; `changed` has a bit for each that is to be written. */
    void (*get_asked)(struct trap *trap, uint64_t *registers);
    void (*set_asked)(struct trap *trap, const uint64_t *registers, uint32_t changed);
    /* For scripts. The 16 general registers, as given and taken above; what is not changed costs nothing. */
    void (*get_general)(struct trap *trap, uint64_t *registers);
    void (*set_general)(struct trap *trap, const uint64_t *registers, uint32_t changed);
    /* Where they are, if they lie in that order and can be changed there. May be null, and may give null. */
    uint64_t *(*general_in_place)(struct trap *trap);
    /* Any other register, by its number in script.h, and memory. False: it cannot be reached, or there is none. */
    bool (*read_register)(struct trap *trap, unsigned number, uint64_t *value);
    bool (*write_register)(struct trap *trap, unsigned number, uint64_t value);
    bool (*reach_memory)(struct trap *trap, bool physical, bool write, uint64_t address, void *bytes, uint32_t length);
    bool (*to_physical)(struct trap *trap, uint64_t address, uint64_t *physical);
    bool (*to_virtual)(struct trap *trap, uint64_t physical, uint64_t *address);
    /* What an MSR of the trapping vCPU holds. False: not to be known. */
    bool (*peek_msr)(struct trap *trap, uint32_t msr, uint64_t *value);

    /* For the way to the current thread (task.h), on the vCPU's own thread at a trap. What GS leads to; KERNEL_GS_BASE, which is asked for
     * seldom; where a page of physical memory is in this process, if it may be read there until tasks_forget_memory (null: it may not); and
     * reading memory in any other way. All null: this door knows no way. */
    bool (*get_task_registers)(unsigned vcpu, struct task_registers *registers);
    bool (*get_kernel_gs_base)(unsigned vcpu, uint64_t *base);
    const uint8_t *(*find_page)(uint64_t physical);
    bool (*read_physical)(uint64_t physical, void *bytes, uint32_t length);

    /* The link's thread has begun. */
    void (*enter_thread)(void);
    /* Each of these answers a wire status (VMEXIT_OK, VMEXIT_RUNNING ...). */
    int (*get_registers)(unsigned vcpu, uint64_t *registers);
    int (*get_register)(unsigned vcpu, unsigned number, uint64_t *value); /* these, or one of script.h */
    int (*set_register)(unsigned vcpu, unsigned number, uint64_t value);
    int (*access_memory)(unsigned vcpu, bool physical, bool write, uint64_t address, void *bytes, uint32_t length);
    int (*access_msr)(unsigned vcpu, bool write, uint32_t msr, uint64_t *value);
    int (*translate)(unsigned vcpu, bool to_virtual, uint64_t address, uint64_t *translated);
    int (*decide)(unsigned vcpu, bool skip);
    /* Lets a machine run that the debugger had halted and can no longer let run itself. */
    void (*resume)(void);

    /* The following may be null. The events are these from now on; a vCPU's thread says so where a script has enabled one. */
    int (*set_events)(const struct vmexit_event *events, size_t count);
    /* Halts the machine or lets it run; each time that it does, whoever wanted it, the door calls link_announce_machine. */
    int (*set_halted)(bool halted);
    bool (*is_running)(void);
};

/* Prepares `vcpus` rings; once, before the first trap. False where memory is short. */
bool core_init(const struct door *door, unsigned vcpus);
const struct door *core_door(void);
unsigned core_vcpus(void);
int core_shared_fd(void);
int core_debugger_eventfd(void);
/* The eventfd that the vCPU sleeps on; -1 until the vCPU has come up. */
int core_vcpu_eventfd(unsigned vcpu);
void core_vcpu_up(unsigned vcpu);
/* True while the vCPU waits for the debugger's answer: then its registers may be read from another thread. */
bool core_is_asking(unsigned vcpu);
/* True while the vCPU waits for the debugger, for an answer or for room. */
bool core_is_waiting(unsigned vcpu);

/* The link's half: replace all events, choose what a full ring does, and let go when the debugger is gone. */
int core_set_events(const struct vmexit_event *events, size_t count, uint64_t changes);
void core_set_overflow_drop(bool drop);
/* Gives the sequence number of the first record that the new debugger will see. */
uint64_t core_attach(void);
void core_detach(void);

/* The trap's half. First a test of a few instructions, then the events themselves. */
/* For each value of an MSR's lowest 16 bits the accesses that any event wants of any MSR that ends so. */
extern uint8_t core_interest[1 << 16] __attribute__((visibility("hidden")));

/* Whether any event could want this access to this MSR (it may say yes for nothing, never no for something). */
static inline bool core_wants(unsigned access, uint32_t msr)
{
    return __atomic_load_n(&core_interest[msr & 0xffff], __ATOMIC_RELAXED) & access;
}

enum verdict { CARRY_OUT, SKIP, STOP };

/* What a script at a trap needs of the events: to leave text for the debugger (VMEXIT_PRINT, VMEXIT_FAULT; false: nobody takes it), and
 * to change an event from here on (VMEXIT_STATE_...; false: there is none of that id). */
void trap_follow(struct trap *trap, const uint64_t *registers, uint32_t changed); /* some of the 16 general ones are others now */
bool core_leave_text(struct trap *trap, const struct vmexit_event *event, unsigned action, const struct vmexit_text *text);
bool core_change_event(const struct trap *trap, uint32_t id, unsigned state);
uint64_t *core_script_globals(void);

/* What the guest executes at this trap. */
const struct task *trap_task(struct trap *trap);

/* Lets every matching event of the pre stage act, from `progress` on. STOP: the machine has to halt before the instruction; call
 * again with the same progress when it goes on. CARRY_OUT: `trap->wants_post` says whether core_post is to be called. */
enum verdict core_pre(struct trap *trap, struct progress *progress);
/* Lets every matching event of the post stage act. STOP or CARRY_OUT. */
enum verdict core_post(struct trap *trap);

/* link.c */
bool link_is_listening(int fd);
bool link_start(int listening_fd);
void link_announce_vcpu(unsigned vcpu);
void link_announce_machine(bool running);
/* The door has halted the machine for a break: resume it if the debugger dies. */
void link_machine_held(void);

#endif
