/* Records, questions and events that act: what the agent does at a trap, in the vCPU's thread, whichever door the trap came through. */
#define _GNU_SOURCE
#include "clock.h"
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
/* A vCPU that waits looks this often whether the debugger is still there, in milliseconds. */
enum { WAIT_MS = 100 };
/* A vCPU that has asked looks so long for the answer before it sleeps. */
enum { SPIN_NS = 100000 };

struct core core = {.shared_fd = -1, .debugger_eventfd = -1, .change_lock = PTHREAD_MUTEX_INITIALIZER};

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
    return tables_prepare();
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
    tables_free_retired();
    for (int tries = 0; tries < 2000 && core.retired != NULL; tries++) {
        nanosleep(&moment, NULL);
        tables_free_retired();
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
    tables_clear();
    core_set_overflow_drop(false);
    for (unsigned i = 0; i < core.vcpu_count; i++)
        if (core_vcpu_eventfd(i) >= 0)
            wake(core_vcpu_eventfd(i));
}
