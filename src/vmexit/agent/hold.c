/* See hold.h. There are few at a time, mostly none, so they lie in an array behind a lock. */
#include "hold.h"

enum { HOLDS = 64 };

struct hold {
    bool used;
    unsigned vcpu;
    uint64_t rip;
    uint64_t rsp;
    struct progress progress;
};

static struct {
    char lock;
    unsigned count;
    unsigned next;
    struct hold items[HOLDS];
} holds;

static void lock(void)
{
    while (__atomic_test_and_set(&holds.lock, __ATOMIC_ACQUIRE))
        ;
}

static void unlock(void) { __atomic_clear(&holds.lock, __ATOMIC_RELEASE); }

static void drop(struct hold *hold)
{
    hold->used = false;
    __atomic_fetch_sub(&holds.count, 1, __ATOMIC_RELEASE);
}

/* Where all places are taken the oldest goes: its instruction would then be trapped once more. */
void hold_put(const struct trap *trap, uint64_t rsp, struct progress progress)
{
    lock();
    struct hold *hold = NULL;
    for (unsigned i = 0; i < HOLDS && hold == NULL; i++)
        if (!holds.items[i].used)
            hold = &holds.items[i];
    if (hold == NULL)
        hold = &holds.items[holds.next++ % HOLDS];
    else
        __atomic_fetch_add(&holds.count, 1, __ATOMIC_RELEASE);
    *hold = (struct hold){.used = true, .vcpu = trap->vcpu, .rip = trap->rip, .rsp = rsp, .progress = progress};
    unlock();
}

struct progress hold_take(uint64_t rip, uint64_t rsp)
{
    struct progress progress = PROGRESS_BEGIN;
    if (__atomic_load_n(&holds.count, __ATOMIC_ACQUIRE) == 0)
        return progress;
    lock();
    for (unsigned i = 0; i < HOLDS; i++)
        if (holds.items[i].used && holds.items[i].rip == rip && holds.items[i].rsp == rsp) {
            progress = holds.items[i].progress;
            drop(&holds.items[i]);
            break;
        }
    unlock();
    return progress;
}

static struct hold *of_vcpu(unsigned vcpu)
{
    for (unsigned i = 0; i < HOLDS; i++)
        if (holds.items[i].used && holds.items[i].vcpu == vcpu)
            return &holds.items[i];
    return NULL;
}

bool hold_decide(unsigned vcpu, bool skip)
{
    lock();
    struct hold *hold = of_vcpu(vcpu);
    if (hold) {
        hold->progress.skip = skip;
        hold->progress.decided = true;
    }
    unlock();
    return hold != NULL;
}

void hold_follow(unsigned vcpu, unsigned number, uint64_t value)
{
    lock();
    struct hold *hold = of_vcpu(vcpu);
    if (hold && number == VMEXIT_RSP)
        hold->rsp = value;
    if (hold && number == VMEXIT_RIP && value != hold->rip)
        drop(hold);
    unlock();
}
