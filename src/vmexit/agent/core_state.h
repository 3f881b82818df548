/* What core.c, table.c and quick.h share: the events as a trap reads them, the vCPUs, and the one state of the agent. */
#ifndef VMEXIT_CORE_STATE_H
#define VMEXIT_CORE_STATE_H

#include <pthread.h>

#include "core.h"

#pragma GCC visibility push(hidden)

/* A range of MSRs of an event that is enabled. */
struct rule {
    uint32_t first;
    uint32_t span; /* the last one less the first one */
    uint32_t core;
    uint32_t event; /* its id */
    uint32_t slot;
    uint16_t access;
    uint16_t others; /* ranges of the same event that follow */
    uint32_t process;
    bool asks_for_task;
};

struct table {
    struct table *retired; /* the next older one that a vCPU may still be reading */
    /* Up to which fill of the ring, and of the half that is being filled, a trap is quick: so that all the records fit that it may
     * leave, and none makes a half full. quick_half is -1 where the events do more than to record, or there are none. */
    uint64_t quick_used;
    int64_t quick_half;
    uint64_t apart; /* the MSR of the debugger's own event, which is no quick matter; beyond 32 bits where there is none */
    bool asks_for_task; /* one of the events does */
    bool has_post; /* one of them has a stage post */
    const struct rule *rules_end;
    struct rule *rules;
    size_t count;
    uint32_t last_id;
    const struct script **scripts; /* of each event, or null; behind them all, the conditions likewise */
    struct vmexit_event events[]; /* and the rules behind them */
};

struct vcpu {
    /* The table that this vCPU reads at the moment, so that it is not freed; null outside of a trap. */
    const struct table *reading;
    struct vmexit_ring *ring;
    struct vmexit_record *records;
    uint64_t head; /* the ring's, kept where the debugger cannot write */
    uint64_t *text;
    uint64_t text_head;
    int eventfd;
    bool asking; /* waits for an answer */
    char line[64 - 4 * sizeof(void *) - 2 * sizeof(uint64_t) - sizeof(int) - sizeof(bool)];
};

extern struct core {
    const struct door *door;
    struct vmexit_shared *shared;
    struct vmexit_shared layout; /* what stands at the start of the shared memory when a debugger comes */
    struct vcpu *vcpus;
    unsigned vcpu_count;
    uint64_t ring_mask;
    uint64_t half_mask; /* of half a ring */
    uint64_t text_mask; /* in words */
    int shared_fd;
    int debugger_eventfd;
    struct table *table;
    struct table *retired;
    pthread_mutex_t change_lock; /* held to change the table's events, or the table for another */
    uint64_t changes; /* vmexit_shared.changes */
    uint64_t sequence; /* of the next record */
    uint32_t session; /* odd while a debugger is attached, and another number for each one */
    bool drop;
    bool has_membarrier;
    bool may_be_quick; /* the table's events may only record (quick.h looks at the table itself) */
} core;

/* Of an event in a table: a script may be changing them. */
static inline unsigned flags_of(const struct vmexit_event *event) { return __atomic_load_n(&event->flags, __ATOMIC_RELAXED); }

static inline bool event_asks_for_task(const struct vmexit_event *event)
{
    return event->process != VMEXIT_ALL_PROCESSES || (flags_of(event) & VMEXIT_WITH_PROCESS);
}

/* Takes the current table for reading: says that it is read, then looks again. With a barrier between the two, either the link's
 * thread sees that this vCPU reads the table and keeps it, or this vCPU sees the newer one and tries again. The barrier is the link
 * thread's membarrier(2), which costs a trap nothing; a fence here where the kernel has none. */
static inline const struct table *table_enter(struct vcpu *vcpu)
{
    for (;;) {
        struct table *table = __atomic_load_n(&core.table, __ATOMIC_ACQUIRE);
        __atomic_store_n(&vcpu->reading, table, __ATOMIC_RELAXED);
        if (core.has_membarrier)
            __atomic_signal_fence(__ATOMIC_SEQ_CST);
        else
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
        /* It may be another table at the same address by now, which is as good: hence the acquire here too. */
        if (table == __atomic_load_n(&core.table, __ATOMIC_ACQUIRE))
            return table;
    }
}

static inline void table_leave(struct vcpu *vcpu)
{
    __atomic_store_n(&vcpu->reading, NULL, __ATOMIC_RELEASE);
}

/* table.c, beside core_set_events and core_change_event: no events for the start, and again when the debugger is gone. */
bool tables_prepare(void);
void tables_clear(void);
/* Frees the tables and scripts that no vCPU reads any more; core.retired is null when that were all. */
void tables_free_retired(void);

#pragma GCC visibility pop

#endif
