/* See filter.h. What an MSR holds before it is written is the door's to tell. Of an MSR whose value the door does not know it is what the
 * guest wrote last there, as far as it was seen: on the same vCPU, by an event that wanted to know. */
#include "filter.h"

#include <stdlib.h>
#include <string.h>

/* MSRs that a vCPU's last writes are kept of, where the door does not know their values; a power of two. One more is one that always
 * changes. */
enum { SEEN = 256 };

/* trap.before.is */
enum { NOT_ASKED, NEVER_SEEN, LAST_WRITE, KNOWN };

struct seen {
    bool used;
    uint32_t msr;
    uint64_t value;
};

struct memory {
    /* Of the instruction that is carried out now, for its post stage. */
    struct {
        uint8_t is;
        uint32_t msr;
        uint64_t value;
    } before;
    struct seen seen[SEEN];
};

static struct memory *memories; /* by vCPU; there once an event has wanted to know changes */

bool filter_is_sound(const struct vmexit_event *event)
{
    if ((event->value & ~event->mask) != 0)
        return false;
    if (!(event->access & VMEXIT_RDMSR))
        return true;
    return event->changes == 0 && (event->mask == 0 || event->stages == VMEXIT_POST);
}

bool filters_prepare(const struct vmexit_event *events, size_t count)
{
    bool wanted = false;
    for (size_t i = 0; i < count; i++)
        wanted |= events[i].changes != 0;
    if (wanted && memories == NULL)
        __atomic_store_n(&memories, calloc(core_vcpus(), sizeof *memories), __ATOMIC_RELEASE);
    return !wanted || memories != NULL;
}

/* No vCPU is at a trap with events then. */
void filters_begin_session(void)
{
    if (memories)
        memset(memories, 0, core_vcpus() * sizeof *memories);
}

/* Where the last write of an MSR is kept, or would be; null: there is no room. */
static struct seen *place_of(struct memory *memory, uint32_t msr)
{
    for (unsigned i = 0; i < SEEN; i++) {
        struct seen *seen = &memory->seen[(msr * 2654435761u + i) % SEEN];
        if (!seen->used || seen->msr == msr)
            return seen;
    }
    return NULL;
}

static void ask(struct trap *trap, struct memory *memory)
{
    const bool is_past = trap->stage == VMEXIT_POST || trap->before.again;
    trap->before.msr = trap->msr;
    if (is_past && memory->before.msr == trap->msr) {
        trap->before.is = memory->before.is;
        trap->before.value = memory->before.value;
        return;
    }
    if (is_past) {
        trap->before.is = NEVER_SEEN;
    } else if (trap->door->peek_msr && trap->door->peek_msr(trap, trap->msr, &trap->before.value)) {
        trap->before.is = KNOWN;
    } else {
        const struct seen *seen = place_of(memory, trap->msr);
        trap->before.is = seen && seen->used ? LAST_WRITE : NEVER_SEEN;
        if (trap->before.is == LAST_WRITE)
            trap->before.value = seen->value;
    }
}

static bool has_changed(uint64_t changes, struct trap *trap)
{
    struct memory *all = __atomic_load_n(&memories, __ATOMIC_ACQUIRE);
    /* A callback may have sent the write to another MSR. */
    if (trap->before.is == NOT_ASKED || trap->before.msr != trap->msr)
        ask(trap, &all[trap->vcpu]);
    return trap->before.is == NEVER_SEEN || ((trap->value ^ trap->before.value) & changes) != 0;
}

bool filter_lets(const struct vmexit_event *event, struct trap *trap, unsigned stage)
{
    if (trap->access == VMEXIT_RDMSR && trap->stage == VMEXIT_PRE)
        return stage == VMEXIT_POST; /* which will look again, at what has been read */
    if (((trap->value ^ event->value) & event->mask) != 0)
        return false;
    return event->changes == 0 || has_changed(event->changes, trap);
}

void filter_note(struct trap *trap)
{
    if (trap->before.is == NOT_ASKED || trap->before.again || trap->before.msr != trap->msr)
        return;
    struct memory *memory = &memories[trap->vcpu];
    memory->before.is = trap->before.is;
    memory->before.msr = trap->msr;
    memory->before.value = trap->before.value;
    if (trap->before.is == KNOWN)
        return;
    struct seen *seen = place_of(memory, trap->msr);
    if (seen)
        *seen = (struct seen){.used = true, .msr = trap->msr, .value = trap->value};
}
