/* See hold.h. There are few at a time, mostly none, so they lie in an array behind a lock. */
#include "hold.h"

#include <string.h>

enum { HOLDS = 64 };

struct hold {
    bool used;
    bool stopped;
    unsigned vcpu;
    uint64_t rip;
    uint64_t rsp;
    struct progress progress;
};

unsigned hold_count;

static struct {
    char lock;
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
    __atomic_fetch_sub(&hold_count, 1, __ATOMIC_RELEASE);
}

/* Where all places are taken the oldest goes: its instruction would then be trapped once more. That takes 64 tasks that were each
 * preempted exactly here. */
void hold_put(const struct trap *trap, uint64_t rsp, struct progress progress, bool stopped)
{
    lock();
    struct hold *hold = NULL;
    for (unsigned i = 0; i < HOLDS && hold == NULL; i++)
        if (!holds.items[i].used)
            hold = &holds.items[i];
    if (hold == NULL)
        hold = &holds.items[holds.next++ % HOLDS];
    else
        __atomic_fetch_add(&hold_count, 1, __ATOMIC_RELEASE);
    *hold = (struct hold){
        .used = true, .stopped = stopped, .vcpu = trap->vcpu, .rip = trap->rip, .rsp = rsp, .progress = progress};
    unlock();
}

struct progress hold_take(uint64_t rip, uint64_t rsp)
{
    struct progress progress = PROGRESS_BEGIN;
    if (!hold_any())
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

static struct hold *stopped_on(unsigned vcpu)
{
    for (unsigned i = 0; i < HOLDS; i++)
        if (holds.items[i].used && holds.items[i].stopped && holds.items[i].vcpu == vcpu)
            return &holds.items[i];
    return NULL;
}

bool hold_decide(unsigned vcpu, bool skip)
{
    lock();
    struct hold *hold = stopped_on(vcpu);
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
    struct hold *hold = stopped_on(vcpu);
    if (hold && number == VMEXIT_RSP)
        hold->rsp = value;
    if (hold && number == VMEXIT_RIP && value != hold->rip)
        drop(hold);
    unlock();
}

void hold_forget_all(void)
{
    lock();
    memset(holds.items, 0, sizeof holds.items);
    __atomic_store_n(&hold_count, 0, __ATOMIC_RELEASE);
    unlock();
}
