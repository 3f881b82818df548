/* The commonest trap in as few instructions as can be: events that only record, before the instruction. A door inlines it.
 *
 * Whatever else there is to do (a question, a break, a post stage, a full ring, a debugger to be woken) is left to core_pre.
 */
#ifndef VMEXIT_QUICK_H
#define VMEXIT_QUICK_H

#include "clock.h"
#include "core_state.h"

#pragma GCC visibility push(hidden)

static inline uint64_t next_sequence(void)
{
    if (core.vcpu_count > 1)
        return __atomic_fetch_add(&core.sequence, 1, __ATOMIC_RELAXED);
    /* Only one thread writes it: without the lock prefix, which would wait until the record before has reached the cache. */
    uint64_t sequence = core.sequence;
    __atomic_store_n(&core.sequence, sequence + 1, __ATOMIC_RELAXED);
    return sequence;
}

/* The debugger has read the ring's records from another processor; to fetch them back takes a while, so it is begun some records
 * ahead. Processors that do not know the instruction take it for a NOP. */
static inline void fetch_back(const struct vcpu *vcpu)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" ::"m"(vcpu->records[(vcpu->head + 8) & core.ring_mask]));
#else
    (void)vcpu;
#endif
}

/* ---- what runs in the guest ---- */

static inline uint64_t task_number(const struct task *task)
{
    return task->found[VMEXIT_FOUND_PID] << 32 | (uint32_t)task->found[VMEXIT_FOUND_TID];
}

static inline void set_task(struct vmexit_record *record, const struct task *task)
{
    record->process = (uint32_t)task->found[VMEXIT_FOUND_PID];
    record->thread = (uint32_t)task->found[VMEXIT_FOUND_TID];
    record->flags |= task->is_known ? VMEXIT_PROCESS_KNOWN : 0;
}

static inline void set_caller(struct vmexit_record *record, const struct caller *caller)
{
    record->caller = caller->number;
    record->flags |= caller->number && caller->is_guess ? VMEXIT_CALLER_GUESSED : 0;
}

static inline uint64_t rbp_of_registers(void *registers) { return ((const uint64_t *)registers)[VMEXIT_RBP]; }

static inline bool rule_applies(const struct rule *rule, unsigned index, unsigned access, uint32_t msr)
{
    return msr - rule->first <= rule->span && (rule->access & access) && (rule->core == VMEXIT_ALL_CORES || rule->core == index);
}

/* What runs and what called it, where a rule that applies asks for it. False: the debugger has yet to be told the one's name, or where the
 * other is. */
static inline bool quick_task(const struct table *table, unsigned index, unsigned access, uint64_t rip, const uint64_t *registers,
                              const struct task **task, struct caller *caller)
{
    const uint32_t msr = (uint32_t)registers[VMEXIT_RCX];
    const uint64_t rsp = registers[VMEXIT_RSP];
    bool asks = false;
    for (const struct rule *rule = table->rules; rule != table->rules_end; rule++) {
        if (!rule->asks_for_task || !rule_applies(rule, index, access, msr))
            continue;
        if (!(*task)->is_known)
            *task = task_now(index, rsp);
        const bool is_its = rule->process == VMEXIT_ALL_PROCESSES || task_is_of(*task, rule->process);
        if ((*task)->is_known && !(*task)->is_told && is_its)
            return false;
        asks |= is_its;
    }
    if (asks)
        *caller = caller_find(index, rip, rsp, rbp_of_registers, (void *)registers);
    return caller->address == 0 || caller->number != 0;
}

/* Whether it is worth a try: a trap that is not quick should not pay for it. */
static inline bool quick_is_possible(void) { return __atomic_load_n(&core.may_be_quick, __ATOMIC_RELAXED); }

/* Does all that there is to do in stage pre, unless it returns false: then it has done nothing. `registers` begins with RAX, RCX, RDX,
 * RBX, RSP, RBP. */
static inline bool quick_pre(unsigned index, unsigned access, unsigned length, uint64_t rip, const uint64_t *registers)
{
    struct vcpu *vcpu = &core.vcpus[index];
    if (!core.has_membarrier)
        return false; /* what follows is table_enter without its fence */
    const struct table *table = __atomic_load_n(&core.table, __ATOMIC_ACQUIRE);
    __atomic_store_n(&vcpu->reading, table, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    struct vmexit_ring *ring = vcpu->ring;
    const uint32_t msr = (uint32_t)registers[VMEXIT_RCX];
    /* The ring may be in the making for the next debugger where there are no events: then it is not looked at. */
    bool is_quick = table == __atomic_load_n(&core.table, __ATOMIC_ACQUIRE) && msr != table->apart &&
                    (int64_t)(vcpu->head & core.half_mask) <= table->quick_half &&
                    vcpu->head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) <= table->quick_used;
    const struct task *task = &task_nobody;
    struct caller caller = {0};
    if (__builtin_expect(is_quick && table->asks_for_task, 0))
        is_quick = quick_task(table, index, access, rip, registers, &task, &caller);
    if (__builtin_expect(is_quick, 1)) {
        const uint64_t now = clock_now_by_tsc();
        for (const struct rule *rule = table->rules; rule != table->rules_end; rule++) {
            if (!rule_applies(rule, index, access, msr))
                continue;
            if (rule->process != VMEXIT_ALL_PROCESSES && !task_is_of(task, rule->process)) {
                rule += rule->others;
                continue;
            }
            __atomic_store_n(&ring->hits[rule->slot], ring->hits[rule->slot] + 1, __ATOMIC_RELAXED);
            fetch_back(vcpu);
            vcpu->records[vcpu->head & core.ring_mask] = (struct vmexit_record){
                .sequence = next_sequence(),
                .time_ns = now,
                .rip = rip,
                .rsp = registers[VMEXIT_RSP],
                .value = registers[VMEXIT_RDX] << 32 | (uint32_t)registers[VMEXIT_RAX],
                .msr = msr,
                .event = (uint16_t)rule->event,
                .vcpu = (uint16_t)index,
                .access = (uint8_t)access,
                .stage = VMEXIT_PRE,
                .action = VMEXIT_RECORD,
                .length = (uint8_t)length,
            };
            if (rule->asks_for_task) {
                set_task(&vcpu->records[vcpu->head & core.ring_mask], task);
                set_caller(&vcpu->records[vcpu->head & core.ring_mask], &caller);
            }
            __atomic_store_n(&ring->head, ++vcpu->head, __ATOMIC_RELEASE);
            rule += rule->others;
        }
    }
    __atomic_store_n(&vcpu->reading, NULL, __ATOMIC_RELEASE);
    return is_quick;
}

#pragma GCC visibility pop

#endif
