/* The table of events: made of what the debugger sends, exchanged while vCPUs read it, changed by scripts. See core_state.h. */
#define _GNU_SOURCE
#include "clock.h"
#include "core_state.h"
#include "filter.h"
#include "script_trap.h"

#include <linux/membarrier.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* vmexit_event.flags, here only: a script has cleared it. */
enum { CLEARED = 0x80 };

uint8_t core_interest[1 << 16];

static struct table *no_events;

/* ---- tables that nobody reads any more ---- */

static bool table_is_read(const struct table *table)
{
    for (unsigned i = 0; i < core.vcpu_count; i++)
        if (__atomic_load_n(&core.vcpus[i].reading, __ATOMIC_SEQ_CST) == table)
            return true;
    return false;
}

static void free_table(struct table *table)
{
    free(table->scripts);
    free(table);
}

static bool table_runs(const struct table *table, const struct script *script)
{
    for (size_t i = 0; i < 2 * table->count; i++)
        if (table->scripts[i] == script)
            return true;
    return false;
}

static bool is_script_needed(const struct script *script)
{
    for (const struct table *table = core.retired; table != NULL; table = table->retired)
        if (table_runs(table, script))
            return true;
    return table_runs(core.table, script);
}

void tables_free_retired(void)
{
    if (core.has_membarrier)
        syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
    struct table **link = &core.retired;
    while (*link != NULL) {
        struct table *table = *link;
        if (table_is_read(table)) {
            link = &table->retired;
            continue;
        }
        *link = table->retired;
        free_table(table);
    }
    scripts_forget_unless(is_script_needed);
}

/* ---- making one ---- */

/* An event of the debugger's own for a single MSR. It asks hardly ever, and must not make the traps of all other MSRs slow. */
static bool is_apart(const struct vmexit_event *event)
{
    return event->id == 0 && event->range_count == 1 && event->ranges[0].first == event->ranges[0].last;
}

static bool is_quick(const struct vmexit_event *events, size_t count)
{
    for (size_t i = count > 0 && is_apart(&events[0]); i < count; i++)
        if (events[i].actions != VMEXIT_RECORD || events[i].stages != VMEXIT_PRE || events[i].condition || filter_is_there(&events[i]) ||
            (events[i].flags & (VMEXIT_SHORT_CIRCUIT | VMEXIT_IMMEDIATE)))
            return false;
    return count > 0 && core.has_membarrier && clock_has_tsc();
}

static struct table *make_table(const struct vmexit_event *events, size_t count)
{
    size_t rules = 0;
    for (size_t i = 0; i < count; i++)
        rules += events[i].range_count;
    struct table *table = malloc(sizeof *table + count * sizeof *events + rules * sizeof *table->rules);
    const struct script **scripts = calloc(2 * count + 1, sizeof *scripts);
    if (table == NULL || scripts == NULL) {
        free(table);
        free(scripts);
        return NULL;
    }
    *table = (struct table){.count = count, .last_id = count ? events[count - 1].id : 0, .scripts = scripts};
    const bool has_own = count > 0 && is_apart(&events[0]);
    table->apart = has_own ? events[0].ranges[0].first : UINT64_MAX;
    table->quick_half = is_quick(events, count) ? (int64_t)(core.half_mask - count) : -1;
    table->quick_used = core.ring_mask + 1 - count;
    for (size_t i = 0; i < count; i++) {
        table->asks_for_task |= event_asks_for_task(&events[i]);
        table->has_post |= (events[i].stages & VMEXIT_POST) != 0;
    }
    struct rule *rule = table->rules = (struct rule *)(table->events + count);
    for (size_t i = 0; i < count; i++) {
        const struct vmexit_event *event = &events[i];
        table->events[i] = *event;
        table->scripts[i] = scripts_find(event->script);
        table->scripts[count + i] = scripts_find(event->condition);
        for (uint32_t r = 0; r < event->range_count && (event->flags & VMEXIT_ENABLED) && !(has_own && i == 0); r++)
            *rule++ = (struct rule){
                .first = event->ranges[r].first,
                .span = event->ranges[r].last - event->ranges[r].first,
                .core = event->core,
                .event = event->id,
                .slot = event->slot,
                .access = event->access,
                .others = (uint16_t)(event->range_count - 1 - r),
                .process = event->process,
                .asks_for_task = event_asks_for_task(event),
            };
    }
    table->rules_end = rule;
    return table;
}

/* `previous`: the event before it, or null. */
static bool event_is_sound(const struct vmexit_event *event, const struct vmexit_event *previous)
{
    if ((previous && event->id <= previous->id) || event->id > VMEXIT_MAX_EVENT_ID || event->slot >= VMEXIT_MAX_EVENTS)
        return false;
    if (event->actions & VMEXIT_SCRIPT ? scripts_find(event->script) == NULL : event->script != 0)
        return false;
    if (event->condition != 0 && scripts_find(event->condition) == NULL)
        return false;
    if (event->access == 0 || event->access > (VMEXIT_WRMSR | VMEXIT_RDMSR))
        return false;
    if (event->stages == 0 || event->stages > (VMEXIT_PRE | VMEXIT_POST))
        return false;
    if (event->actions == 0 || event->actions > (VMEXIT_RECORD | VMEXIT_ASK | VMEXIT_BREAK | VMEXIT_SCRIPT))
        return false;
    if (event->flags > (VMEXIT_ENABLED | VMEXIT_SHORT_CIRCUIT | VMEXIT_IMMEDIATE | VMEXIT_WITH_PROCESS | VMEXIT_ASK_FIRST))
        return false;
    if ((event->flags & VMEXIT_ASK_FIRST) && !(event->actions & VMEXIT_ASK))
        return false;
    if (event->range_count == 0 || event->range_count > VMEXIT_MAX_RANGES)
        return false;
    for (uint32_t i = 0; i < event->range_count; i++)
        if (event->ranges[i].first > event->ranges[i].last)
            return false;
    return filter_is_sound(event);
}

static uint32_t needed_capabilities(const struct vmexit_event *event)
{
    return VMEXIT_CAN_RECORD | (event->stages & VMEXIT_POST ? VMEXIT_CAN_POST : 0) |
           (event->actions & VMEXIT_ASK ? VMEXIT_CAN_READ : 0) | (event->actions & VMEXIT_BREAK ? VMEXIT_CAN_BREAK : 0) |
           (event->actions & VMEXIT_SCRIPT ? VMEXIT_CAN_READ | VMEXIT_CAN_MODIFY : 0) | (event->condition ? VMEXIT_CAN_READ : 0) |
           (event->flags & VMEXIT_SHORT_CIRCUIT ? VMEXIT_CAN_SKIP : 0) |
           (event->process != VMEXIT_ALL_PROCESSES ? VMEXIT_CAN_READ | VMEXIT_CAN_MEMORY : 0);
}

/* ---- putting it in place ---- */

/* Atomically where it is read at the same time. */
static void add_interest(uint8_t *interest, uint8_t access, struct vmexit_range range)
{
    uint64_t count = (uint64_t)range.last - range.first + 1;
    for (uint32_t i = 0; i < count && i < sizeof core_interest; i++) {
        uint8_t *wanted = &interest[(range.first + i) % sizeof core_interest];
        __atomic_store_n(wanted, (uint8_t)(*wanted | access), __ATOMIC_RELAXED);
    }
}

static void publish_interest(const struct table *table)
{
    uint8_t interest[sizeof core_interest] = {0};
    for (size_t i = 0; i < table->count; i++) {
        const struct vmexit_event *event = &table->events[i];
        if (!(event->flags & VMEXIT_ENABLED))
            continue;
        for (uint32_t r = 0; r < event->range_count; r++)
            add_interest(interest, event->access, event->ranges[r]);
    }
    for (size_t i = 0; i < sizeof interest; i++)
        __atomic_store_n(&core_interest[i], interest[i], __ATOMIC_RELAXED);
}

/* A door that traps no more than is wanted has to know what that is. Under the lock, so that it hears of changes in their order. */
static int tell_door(const struct table *table)
{
    return core.door->set_events ? core.door->set_events(table->events, table->count) : VMEXIT_OK;
}

/* VMEXIT_STALE: scripts have changed events since the debugger last looked, so it does not know what it replaces. */
static int exchange_tables(struct table *table, uint64_t changes)
{
    int status = VMEXIT_STALE;
    pthread_mutex_lock(&core.change_lock);
    if (changes == core.changes) {
        __atomic_store_n(&core.table, table, __ATOMIC_SEQ_CST);
        __atomic_store_n(&core.may_be_quick, table->quick_half >= 0, __ATOMIC_RELAXED);
        publish_interest(table);
        memset(core.shared->states, 0, sizeof core.shared->states);
        status = tell_door(table);
    }
    pthread_mutex_unlock(&core.change_lock);
    return status;
}

static int replace_table(struct table *table, uint64_t changes)
{
    struct table *old = core.table;
    int status = exchange_tables(table, changes);
    if (status == VMEXIT_STALE)
        return status;
    if (old != no_events) {
        old->retired = core.retired;
        core.retired = old;
    }
    tables_free_retired();
    return status;
}

bool tables_prepare(void)
{
    core.table = no_events = make_table(NULL, 0);
    return no_events != NULL;
}

void tables_clear(void)
{
    while (replace_table(no_events, __atomic_load_n(&core.changes, __ATOMIC_RELAXED)) == VMEXIT_STALE)
        ; /* a script has just changed an event */
}

int core_set_events(const struct vmexit_event *events, size_t count, uint64_t changes)
{
    if (count > VMEXIT_MAX_EVENTS)
        return VMEXIT_REFUSED;
    for (size_t i = 0; i < count; i++) {
        if (!event_is_sound(&events[i], i == 0 ? NULL : &events[i - 1]))
            return VMEXIT_REFUSED;
        if (needed_capabilities(&events[i]) & ~core.door->capabilities)
            return VMEXIT_UNAVAILABLE;
    }
    struct table *table = filters_prepare(events, count) ? make_table(events, count) : NULL;
    if (table == NULL)
        return VMEXIT_UNAVAILABLE;
    int status = replace_table(table, changes);
    if (status == VMEXIT_STALE)
        free_table(table);
    return status;
}

/* ---- changes by scripts ---- */

static struct vmexit_event *event_of(const struct table *table, uint32_t id)
{
    for (size_t i = 0; i < table->count; i++)
        if (table->events[i].id == id && !(table->events[i].flags & CLEARED))
            return (struct vmexit_event *)&table->events[i];
    return NULL;
}

static void set_state(struct vmexit_event *event, unsigned state)
{
    unsigned flags = event->flags & ~(unsigned)VMEXIT_ENABLED;
    flags |= state == VMEXIT_STATE_ENABLED ? VMEXIT_ENABLED : state == VMEXIT_STATE_CLEARED ? CLEARED : 0;
    __atomic_store_n(&event->flags, (uint8_t)flags, __ATOMIC_RELAXED);
    if (state != VMEXIT_STATE_ENABLED)
        return; /* somebody looks for nothing now and then, until the next table */
    for (uint32_t r = 0; r < event->range_count; r++)
        add_interest(core_interest, event->access, event->ranges[r]);
}

bool core_change_event(const struct trap *trap, uint32_t id, unsigned state)
{
    const struct table *reading = core.vcpus[trap->vcpu].reading;
    pthread_mutex_lock(&core.change_lock);
    struct vmexit_event *event = event_of(core.table, id);
    struct vmexit_event *older = reading != core.table ? event_of(reading, id) : NULL;
    if (event)
        set_state(event, state);
    if (older)
        set_state(older, state);
    if (event) {
        __atomic_store_n(&core.shared->states[event->slot], (uint8_t)state, __ATOMIC_RELAXED);
        __atomic_store_n(&core.changes, core.changes + 1, __ATOMIC_RELAXED);
        __atomic_store_n(&core.shared->changes, core.changes, __ATOMIC_RELEASE);
        if (state == VMEXIT_STATE_ENABLED)
            tell_door(core.table);
    }
    pthread_mutex_unlock(&core.change_lock);
    return event != NULL;
}
