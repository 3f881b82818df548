/* Events, rings and questions: what the agent does at a trap, in the vCPU's thread, whichever door the trap came through. */
#define _GNU_SOURCE
#include "clock.h"
#include "core.h"
#include "filter.h"
#include "quick.h"
#include "script_trap.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Room for records over all rings, in bytes; a ring gets its share as a power of two between the two bounds. */
enum { RINGS_BYTES = 8 << 20, RING_MOST = 65536, RING_LEAST = 512 };
/* The same for the text that scripts leave, in words of 8 bytes a ring; the least is twice the longest print. */
enum { TEXTS_BYTES = 4 << 20, TEXT_MOST = 1 << 17, TEXT_LEAST = 2 * VMEXIT_MAX_PRINT / 8 };
/* vmexit_event.flags, here only: a script has cleared it. */
enum { CLEARED = 0x80 };
/* A vCPU that waits looks this often whether the debugger is still there, in milliseconds. */
enum { WAIT_MS = 100 };
/* A vCPU that has asked looks so long for the answer before it sleeps. */
enum { SPIN_NS = 100000 };

struct core core = {.shared_fd = -1, .debugger_eventfd = -1, .change_lock = PTHREAD_MUTEX_INITIALIZER};

uint8_t core_interest[1 << 16];

static struct table *no_events;

static struct table *make_table(const struct vmexit_event *events, size_t count);

/* ---- set-up ---- */

/* How much of something each of the rings gets: the most, halved until all together fit or the least is reached. */
static uint32_t share(unsigned vcpus, uint32_t most, uint32_t least, size_t size, uint64_t bytes)
{
    while (most > least && (uint64_t)most * size * vcpus > bytes)
        most /= 2;
    return most;
}

static uint64_t page_round(uint64_t bytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

bool core_init(const struct door *door, unsigned vcpus)
{
    uint32_t records = share(vcpus, RING_MOST, RING_LEAST, sizeof(struct vmexit_record), RINGS_BYTES);
    uint32_t words = share(vcpus, TEXT_MOST, TEXT_LEAST, sizeof(uint64_t), TEXTS_BYTES);
    uint64_t rings_offset = sizeof(struct vmexit_shared);
    uint64_t records_offset = page_round(rings_offset + vcpus * sizeof(struct vmexit_ring));
    uint64_t text_offset = page_round(records_offset + (uint64_t)vcpus * records * sizeof(struct vmexit_record));
    uint64_t globals_offset = page_round(text_offset + (uint64_t)vcpus * words * sizeof(uint64_t));
    uint64_t size = page_round(globals_offset + VMEXIT_MAX_GLOBALS * sizeof(uint64_t));

    core.shared_fd = memfd_create("vmexit", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    core.debugger_eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    core.vcpus = aligned_alloc(64, vcpus * sizeof *core.vcpus);
    if (core.shared_fd < 0 || core.debugger_eventfd < 0 || core.vcpus == NULL || ftruncate(core.shared_fd, (off_t)size) != 0)
        return false;
    /* Nobody who gets the descriptor can shrink the file under the agent's feet. */
    fcntl(core.shared_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, core.shared_fd, 0);
    if (base == MAP_FAILED)
        return false;

    core.shared = (struct vmexit_shared *)base;
    core.layout = (struct vmexit_shared){
        .magic = VMEXIT_WIRE_MAGIC,
        .version = VMEXIT_WIRE_VERSION,
        .vcpus = vcpus,
        .ring_records = records,
        .records_offset = records_offset,
        .size = size,
        .text_offset = text_offset,
        .globals_offset = globals_offset,
        .ring_words = words,
    };
    for (unsigned i = 0; i < vcpus; i++)
        core.vcpus[i] = (struct vcpu){
            .ring = (struct vmexit_ring *)(base + rings_offset) + i,
            .records = (struct vmexit_record *)(base + records_offset) + (uint64_t)i * records,
            .text = (uint64_t *)(void *)(base + text_offset) + (uint64_t)i * words,
            .eventfd = -1,
        };
    clock_init();
    core.has_membarrier = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
    core.door = door;
    core.vcpu_count = vcpus;
    core.ring_mask = records - 1;
    core.half_mask = records / 2 - 1;
    core.text_mask = words - 1;
    core.table = no_events = make_table(NULL, 0);
    return core.table != NULL;
}

const struct door *core_door(void) { return core.door; }
unsigned core_vcpus(void) { return core.vcpu_count; }
int core_shared_fd(void) { return core.shared_fd; }
int core_debugger_eventfd(void) { return core.debugger_eventfd; }
uint64_t *core_script_globals(void) { return (uint64_t *)(void *)((char *)core.shared + core.layout.globals_offset); }

int core_vcpu_eventfd(unsigned vcpu)
{
    return vcpu < core.vcpu_count ? __atomic_load_n(&core.vcpus[vcpu].eventfd, __ATOMIC_ACQUIRE) : -1;
}

void core_vcpu_up(unsigned vcpu)
{
    if (vcpu < core.vcpu_count && core.vcpus[vcpu].eventfd < 0)
        __atomic_store_n(&core.vcpus[vcpu].eventfd, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), __ATOMIC_RELEASE);
}

/* ---- the table of events ---- */

/* Takes the current table for reading: says that it is read, then looks again. With a barrier between the two, either the link's
 * thread sees that this vCPU reads the table and keeps it, or this vCPU sees the newer one and tries again. The barrier is the link
 * thread's membarrier(2), which costs a trap nothing; a fence here where the kernel has none. */
static const struct table *table_enter(struct vcpu *vcpu)
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

static void table_leave(struct vcpu *vcpu)
{
    __atomic_store_n(&vcpu->reading, NULL, __ATOMIC_RELEASE);
}

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

static void free_retired_tables(void)
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
    free_retired_tables();
    return status;
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

void core_set_overflow_drop(bool drop) { __atomic_store_n(&core.drop, drop, __ATOMIC_RELAXED); }

/* ---- sleeping and waking ---- */

static uint32_t current_session(void) { return __atomic_load_n(&core.session, __ATOMIC_ACQUIRE); }

/* Whether the debugger of that session is still attached. */
static bool is_alive(uint32_t session) { return (session & 1) && current_session() == session; }

static void wake(int fd)
{
    uint64_t one = 1;
    /* EAGAIN: the counter is full, so the sleeper is awake already. */
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Wakes the debugger if it has gone to sleep. The fence orders the record's head before the look at `sleeping`; the debugger does
 * the two the other way round. */
static void wake_debugger(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&core.shared->sleeping, __ATOMIC_RELAXED)) {
        __atomic_store_n(&core.shared->sleeping, 0, __ATOMIC_RELAXED);
        wake(core.debugger_eventfd);
    }
}

/* Between two looks at memory that another processor is about to change. */
static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void sleep_on(struct vcpu *vcpu)
{
    uint64_t count;
    struct pollfd fd = {.fd = vcpu->eventfd, .events = POLLIN};
    if (poll(&fd, 1, WAIT_MS) > 0)
        (void)!read(vcpu->eventfd, &count, sizeof count);
}

/* Of an event in the table, where a script may be changing them. */
static unsigned flags_of(const struct vmexit_event *event) { return __atomic_load_n(&event->flags, __ATOMIC_RELAXED); }

/* ---- records ---- */

static uint64_t words_of(const struct vmexit_text *text) { return text ? text->size / sizeof(uint64_t) : 0; }

/* A tail that runs ahead of the head is no honest debugger's: then there is no room. */
static bool has_room(const struct vcpu *vcpu, uint64_t words)
{
    uint64_t records_used = vcpu->head - __atomic_load_n(&vcpu->ring->tail, __ATOMIC_ACQUIRE);
    uint64_t text_used = words ? vcpu->text_head - __atomic_load_n(&vcpu->ring->text_tail, __ATOMIC_ACQUIRE) : 0;
    return records_used <= core.ring_mask && text_used <= core.text_mask + 1 - words;
}

static bool wait_for_room(struct vcpu *vcpu, uint64_t words)
{
    struct vmexit_ring *ring = vcpu->ring;
    const uint32_t session = current_session();
    __atomic_store_n(&ring->waits, ring->waits + 1, __ATOMIC_RELAXED);
    while (is_alive(session)) {
        __atomic_store_n(&ring->waiting, VMEXIT_WAITS_FOR_ROOM, __ATOMIC_SEQ_CST);
        wake_debugger();
        if (has_room(vcpu, words))
            break;
        sleep_on(vcpu);
    }
    __atomic_store_n(&ring->waiting, 0, __ATOMIC_RELAXED);
    return is_alive(session);
}

/* Whether that made a half of the ring's text full. */
static bool write_text(struct vcpu *vcpu, const struct vmexit_text *text)
{
    const uint64_t words = words_of(text), at = vcpu->text_head & core.text_mask, half = (core.text_mask + 1) / 2;
    const uint64_t first = words < core.text_mask + 1 - at ? words : core.text_mask + 1 - at;
    memcpy(vcpu->text + at, text, first * sizeof(uint64_t));
    memcpy(vcpu->text, (const uint64_t *)(const void *)text + first, (words - first) * sizeof(uint64_t));
    vcpu->text_head += words;
    __atomic_store_n(&vcpu->ring->text_head, vcpu->text_head, __ATOMIC_RELEASE);
    return ((vcpu->text_head - words) & half) != (vcpu->text_head & half);
}

static bool is_droppable(unsigned action) { return !(action & (VMEXIT_ASK | VMEXIT_BREAK)); }

const struct task *trap_task(struct trap *trap)
{
    if (trap->task == NULL)
        trap->task = task_now(trap->vcpu, trap->rsp);
    return trap->task;
}

/* Writes one record, and text with it if there is any, and gives its sequence number; UINT64_MAX where it was dropped or the debugger
 * is gone. What the debugger must answer or show (a question, a break) waits for room under every policy. */
static uint64_t publish(struct trap *trap, struct vcpu *vcpu, const struct vmexit_event *event, unsigned action, unsigned flags,
                        const struct vmexit_text *text)
{
    struct vmexit_ring *ring = vcpu->ring;
    if (!has_room(vcpu, words_of(text))) {
        if (is_droppable(action) && __atomic_load_n(&core.drop, __ATOMIC_RELAXED)) {
            __atomic_store_n(&ring->dropped, ring->dropped + 1, __ATOMIC_RELAXED);
            return UINT64_MAX;
        }
        if (!wait_for_room(vcpu, words_of(text)))
            return UINT64_MAX;
    }
    uint64_t head = vcpu->head++;
    uint32_t text_at = (uint32_t)vcpu->text_head;
    bool full = text && write_text(vcpu, text);
    uint64_t sequence = next_sequence();
    vcpu->records[head & core.ring_mask] = (struct vmexit_record){
        .sequence = sequence,
        .time_ns = clock_now(),
        .rip = trap->rip,
        .rsp = trap->rsp,
        .value = trap->value,
        .msr = trap->msr,
        .event = (uint16_t)event->id,
        .vcpu = (uint16_t)trap->vcpu,
        .access = trap->access,
        .stage = trap->stage,
        .action = (uint8_t)action,
        .flags = (uint8_t)(trap->flags | flags),
        .length = trap->length,
        .script = text ? event->script : 0,
        .text = text ? text_at : 0,
    };
    if (action == VMEXIT_NAME)
        vcpu->records[head & core.ring_mask].value = task_number(trap->task);
    else if (action == VMEXIT_CALLER)
        vcpu->records[head & core.ring_mask].value = trap->caller.address;
    else if (text == NULL && event_asks_for_task(event))
        set_task(&vcpu->records[head & core.ring_mask], trap_task(trap));
    if (trap->has_caller && text == NULL && event_asks_for_task(event))
        set_caller(&vcpu->records[head & core.ring_mask], &trap->caller);
    if (action == VMEXIT_ASK)
        __atomic_store_n(&ring->question.asked, sequence + 1, __ATOMIC_RELEASE);
    __atomic_store_n(&ring->head, head + 1, __ATOMIC_RELEASE);
    bool urgent = (flags_of(event) & VMEXIT_IMMEDIATE) || !(action & (VMEXIT_RECORD | VMEXIT_PRINT));
    if (urgent)
        __atomic_store_n(&ring->urgent, head + 1, __ATOMIC_RELEASE);
    /* What need not be seen at once is fetched by the debugger from time to time; when half the ring is full it is called. */
    if (urgent || full || ((head + 1) & core.half_mask) == 0)
        wake_debugger();
    return sequence;
}

/* Before the first record of a thread by that name. */
static void tell_name(struct trap *trap, struct vcpu *vcpu, const struct vmexit_event *event)
{
    const struct task *task = trap_task(trap);
    struct {
        struct vmexit_text header;
        char name[VMEXIT_NAME_BYTES];
    } text = {.header.size = sizeof text};
    if (!task->is_known || task->is_told)
        return;
    memcpy(text.name, task->name, sizeof text.name);
    if (publish(trap, vcpu, event, VMEXIT_NAME, 0, &text.header) != UINT64_MAX)
        task_told(trap->vcpu);
}

static uint64_t rbp_of_trap(void *context)
{
    struct trap *trap = context;
    uint64_t registers[16];
    trap->door->get_general(trap, registers);
    return registers[VMEXIT_RBP];
}

/* Before the first record with that caller. */
static void tell_caller(struct trap *trap, struct vcpu *vcpu, const struct vmexit_event *event)
{
    /* Behind an interrupt RSP is that of its handler. */
    if (!trap->has_caller && !(trap->flags & VMEXIT_INTERRUPTED))
        trap->caller = caller_find(trap->vcpu, trap->rip, trap->rsp, rbp_of_trap, trap);
    trap->has_caller = true;
    if (trap->caller.address == 0 || trap->caller.number != 0)
        return;
    trap->caller.number = caller_next_number(trap->vcpu);
    if (trap->caller.number == 0)
        return;
    if (publish(trap, vcpu, event, VMEXIT_CALLER, 0, NULL) != UINT64_MAX)
        caller_told(trap->vcpu, trap->caller.address);
    else
        trap->caller.number = 0;
}

bool core_leave_text(struct trap *trap, const struct vmexit_event *event, unsigned action, const struct vmexit_text *text)
{
    return publish(trap, &core.vcpus[trap->vcpu], event, action, 0, text) != UINT64_MAX ||
           __atomic_load_n(&core.drop, __ATOMIC_RELAXED);
}

/* ---- questions ---- */

#define WRITABLE ((UINT32_C(1) << VMEXIT_ASKED_REGISTERS) - 1)

static bool answer_is_sound(const struct vmexit_question *question)
{
    return (question->changed & ~WRITABLE) == 0 && question->skip <= 1 && question->halt <= 1 && question->script <= 1 &&
           question->again <= 1;
}

static bool is_answered(const struct vcpu *vcpu, uint64_t sequence)
{
    return __atomic_load_n(&vcpu->ring->question.answered, __ATOMIC_ACQUIRE) == sequence + 1;
}

/* A short callback is over sooner than a thread is put to sleep and woken; only then the vCPU sleeps. The debugger writes its eventfd
 * only where `waiting` says that it does. */
static bool wait_for_answer(struct vcpu *vcpu, uint32_t session, uint64_t sequence)
{
    const uint64_t deadline = clock_now() + SPIN_NS;
    while (!is_answered(vcpu, sequence) && clock_now() < deadline)
        relax();
    while (!is_answered(vcpu, sequence) && is_alive(session)) {
        __atomic_store_n(&vcpu->ring->waiting, VMEXIT_WAITS_FOR_ANSWER, __ATOMIC_SEQ_CST);
        if (!is_answered(vcpu, sequence))
            sleep_on(vcpu);
    }
    __atomic_store_n(&vcpu->ring->waiting, 0, __ATOMIC_RELAXED);
    return is_answered(vcpu, sequence);
}

void trap_follow(struct trap *trap, const uint64_t *registers, uint32_t changed)
{
    if (changed >> VMEXIT_RCX & 1)
        trap->msr = (uint32_t)registers[VMEXIT_RCX];
    if (changed >> VMEXIT_RAX & 1)
        trap->value = (trap->value & ~(uint64_t)UINT32_MAX) | (uint32_t)registers[VMEXIT_RAX];
    if (changed >> VMEXIT_RDX & 1)
        trap->value = registers[VMEXIT_RDX] << 32 | (uint32_t)trap->value;
    if (changed >> VMEXIT_RSP & 1)
        trap->rsp = registers[VMEXIT_RSP];
}

/* What the debugger wants done at a trap, beyond changed registers. */
struct wanted {
    bool halt;
    bool script;
    bool again;
};

/* Stops the vCPU until the debugger has answered. An unsound answer, and a debugger that dies, change nothing and want nothing.
 * `flags`: of the record. */
static struct wanted ask(struct trap *trap, struct vcpu *vcpu, const struct vmexit_event *event, struct progress *progress,
                         unsigned flags)
{
    struct vmexit_question *question = &vcpu->ring->question;
    const uint32_t session = current_session();
    question->changed = 0;
    question->skip = progress->skip;
    question->halt = question->script = question->again = 0;
    trap->door->get_asked(trap, question->registers);
    __atomic_store_n(&vcpu->asking, true, __ATOMIC_RELEASE);
    uint64_t sequence = publish(trap, vcpu, event, VMEXIT_ASK, flags | (progress->skip ? VMEXIT_SKIPPED : 0), NULL);
    bool answered = sequence != UINT64_MAX && wait_for_answer(vcpu, session, sequence);
    __atomic_store_n(&vcpu->asking, false, __ATOMIC_RELEASE);
    __atomic_store_n(&question->asked, 0, __ATOMIC_RELEASE);
    struct vmexit_question answer = *question;
    if (!answered || !answer_is_sound(&answer))
        return (struct wanted){0};
    if (!progress->decided)
        progress->skip = answer.skip;
    if (answer.changed) {
        trap->door->set_asked(trap, answer.registers, answer.changed);
        trap_follow(trap, answer.registers, answer.changed);
    }
    return (struct wanted){
        .halt = answer.halt && (core.door->capabilities & VMEXIT_CAN_BREAK), .script = answer.script, .again = answer.again};
}

bool core_is_asking(unsigned vcpu)
{
    return vcpu < core.vcpu_count && __atomic_load_n(&core.vcpus[vcpu].asking, __ATOMIC_ACQUIRE);
}

bool core_is_waiting(unsigned vcpu)
{
    return core_is_asking(vcpu) ||
           (vcpu < core.vcpu_count && __atomic_load_n(&core.vcpus[vcpu].ring->waiting, __ATOMIC_ACQUIRE) != 0);
}

/* ---- events ---- */

static bool has_msr(const struct vmexit_event *event, uint32_t msr)
{
    for (uint32_t i = 0; i < event->range_count; i++)
        if (msr - event->ranges[i].first <= event->ranges[i].last - event->ranges[i].first)
            return true;
    return false;
}

static bool matches(const struct vmexit_event *event, struct trap *trap, unsigned stage)
{
    return (flags_of(event) & VMEXIT_ENABLED) && (event->access & trap->access) && (event->stages & stage) &&
           (event->core == VMEXIT_ALL_CORES || event->core == trap->vcpu) && has_msr(event, trap->msr) &&
           (event->process == VMEXIT_ALL_PROCESSES || task_is_of(trap_task(trap), event->process)) &&
           (!filter_is_there(event) || filter_lets(event, trap, stage));
}

/* Counts a trap that an event matches, and tells whether its condition lets it act. */
static bool is_let(struct trap *trap, struct vcpu *vcpu, const struct table *table, size_t index, struct progress *progress)
{
    const struct vmexit_event *event = &table->events[index];
    uint64_t *hits = &vcpu->ring->hits[event->slot];
    __atomic_store_n(hits, *hits + 1, __ATOMIC_RELAXED);
    const struct script *condition = table->scripts[table->count + index];
    return condition == NULL || scripts_hold(trap, event, condition, progress);
}

/* True: the machine has to halt. */
static bool act(struct trap *trap, struct vcpu *vcpu, const struct table *table, size_t index, struct progress *progress)
{
    const struct vmexit_event *event = &table->events[index];
    const struct script *script = table->scripts[index];
    const bool asks_first = flags_of(event) & VMEXIT_ASK_FIRST;
    const unsigned again = event->actions & VMEXIT_RECORD ? VMEXIT_AGAIN : 0;
    if (event_asks_for_task(event) && event->actions != VMEXIT_SCRIPT) {
        tell_name(trap, vcpu, event);
        tell_caller(trap, vcpu, event);
    }
    if (event->actions & VMEXIT_RECORD)
        publish(trap, vcpu, event, VMEXIT_RECORD, progress->skip ? VMEXIT_SKIPPED : 0, NULL);
    bool halt = event->actions & VMEXIT_BREAK;
    struct wanted wanted = {.script = true, .again = event->actions & VMEXIT_ASK};
    if (asks_first) {
        wanted = ask(trap, vcpu, event, progress, again);
        halt |= wanted.halt;
    }
    if (wanted.script && script)
        halt |= scripts_run(trap, event, script, progress);
    if (wanted.again)
        halt |= ask(trap, vcpu, event, progress, asks_first ? VMEXIT_AGAIN : again).halt;
    /* A break that the debugger does not get to know of must not halt the machine: nobody would let it go on. */
    return halt && publish(trap, vcpu, event, VMEXIT_BREAK, progress->skip ? VMEXIT_SKIPPED : 0, NULL) != UINT64_MAX;
}

/* The debugger's own event, which is the first, need not be looked at for any MSR but its own. */
static size_t first_event(const struct table *table, const struct trap *trap)
{
    return table->apart <= UINT32_MAX && table->apart != trap->msr;
}

enum verdict core_pre(struct trap *trap, struct progress *progress)
{
    struct vcpu *vcpu = &core.vcpus[trap->vcpu];
    const struct table *table = table_enter(vcpu);
    trap->stage = VMEXIT_PRE;
    trap->before.again = progress->after == PROGRESS_DONE;
    for (size_t i = first_event(table, trap); i < table->count && table->events[i].id <= progress->limit; i++) {
        const struct vmexit_event *event = &table->events[i];
        const bool has_acted = progress->after != 0 && event->id <= progress->after;
        /* One that compares with the value of before has to see that one, even if it has acted before a break. */
        if ((has_acted && !event->changes) || !matches(event, trap, VMEXIT_PRE) || has_acted ||
            !is_let(trap, vcpu, table, i, progress))
            continue;
        /* Each event that acts sets the short-circuit state anew, so the last one decides. */
        if (!progress->decided && !(flags_of(event) & VMEXIT_ASK_FIRST))
            progress->skip = flags_of(event) & VMEXIT_SHORT_CIRCUIT;
        if (act(trap, vcpu, table, i, progress)) {
            progress->after = event->id;
            if (progress->limit == UINT32_MAX)
                progress->limit = table->last_id;
            table_leave(vcpu);
            return STOP;
        }
    }
    progress->after = PROGRESS_DONE;
    trap->wants_post = false;
    /* All that will compare the value with the one of before have to see that one now. */
    for (size_t i = 0; table->has_post && i < table->count && !progress->skip; i++)
        if (!trap->wants_post || table->events[i].changes)
            trap->wants_post |= matches(&table->events[i], trap, VMEXIT_POST);
    if (!progress->skip)
        filter_note(trap);
    table_leave(vcpu);
    return progress->skip ? SKIP : CARRY_OUT;
}

enum verdict core_post(struct trap *trap)
{
    struct vcpu *vcpu = &core.vcpus[trap->vcpu];
    const struct table *table = table_enter(vcpu);
    enum verdict verdict = CARRY_OUT;
    trap->stage = VMEXIT_POST;
    /* What ran is the MSR of before, whatever ECX a question of this stage leaves behind. */
    const uint32_t msr = trap->msr;
    for (size_t i = 0; i < table->count; i++) {
        struct progress progress = PROGRESS_BEGIN;
        if (!matches(&table->events[i], trap, VMEXIT_POST) || !is_let(trap, vcpu, table, i, &progress))
            continue;
        if (act(trap, vcpu, table, i, &progress))
            verdict = STOP;
        trap->msr = msr;
    }
    table_leave(vcpu);
    return verdict;
}

/* ---- coming and going of the debugger ---- */

/* A vCPU may still act on the events of the debugger before this one: its records and questions would reach the wrong debugger. It
 * was woken when that one went, so this takes no time to speak of. */
static void wait_for_retired_tables(void)
{
    const struct timespec moment = {.tv_nsec = 1000000};
    free_retired_tables();
    for (int tries = 0; tries < 2000 && core.retired != NULL; tries++) {
        nanosleep(&moment, NULL);
        free_retired_tables();
    }
}

uint64_t core_attach(void)
{
    wait_for_retired_tables();
    /* Whatever the debugger before this one has left there. */
    *core.shared = core.layout;
    core.changes = 0;
    for (unsigned i = 0; i < core.vcpu_count; i++)
        *core.vcpus[i].ring = (struct vmexit_ring){
            .head = core.vcpus[i].head,
            .tail = core.vcpus[i].head,
            .text_head = core.vcpus[i].text_head,
            .text_tail = core.vcpus[i].text_head,
        };
    scripts_begin_session();
    filters_begin_session();
    tasks_begin_session();
    callers_begin_session();
    clock_calibrate();
    __atomic_fetch_add(&core.session, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&core.sequence, __ATOMIC_SEQ_CST);
}

void core_detach(void)
{
    __atomic_fetch_add(&core.session, 1, __ATOMIC_SEQ_CST);
    while (replace_table(no_events, __atomic_load_n(&core.changes, __ATOMIC_RELAXED)) == VMEXIT_STALE)
        ; /* a script has just changed an event */
    core_set_overflow_drop(false);
    for (unsigned i = 0; i < core.vcpu_count; i++)
        if (core_vcpu_eventfd(i) >= 0)
            wake(core_vcpu_eventfd(i));
}
