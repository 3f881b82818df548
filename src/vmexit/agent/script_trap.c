/* Scripts at traps: the files of code that the debugger adds, a context for each vCPU, and what scripts reach of the trapped machine. */
#define _GNU_SOURCE
#include "quick.h"
#include "script_trap.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct vmexit_script_context context_t;

struct script {
    struct script *next;
    uint32_t number;
    script_entry entry;
    struct vmexit_segment constants;
    struct vmexit_segment buffer;
    void *memory;
    size_t size;
};

/* What the runs on one vCPU use, one after the other. */
struct place_to_run {
    context_t context;
    bool tells_process; /* the context says which one runs */
    uint64_t registers[16];
    _Alignas(16) uint8_t stack[VMEXIT_ARENA_STACK_BYTES];
    _Alignas(8) uint8_t record[VMEXIT_MAX_PRINT];
};

/* One run (context->machine). */
struct run {
    struct trap *trap;
    const struct vmexit_event *event;
    struct progress *progress;
    bool halt;
};

static struct {
    struct script *first; /* the link's thread alone */
    struct place_to_run *places; /* by vCPU; there once a script has been added */
    uint64_t steps;
    uint64_t stack;
    int64_t local_time;
} scripts;

/* ---- what scripts reach ---- */

static struct run *run_of(const context_t *context) { return context->machine; }

static int get_register(context_t *context, unsigned number, uint64_t *value)
{
    struct trap *trap = run_of(context)->trap;
    return trap->door->read_register(trap, number, value) ? 0 : VMEXIT_FAULT_REGISTER;
}

static int set_register(context_t *context, unsigned number, uint64_t value)
{
    struct trap *trap = run_of(context)->trap;
    return trap->door->write_register(trap, number, value) ? 0 : VMEXIT_FAULT_REGISTER;
}

static int memory(context_t *context, int physical, int write, uint64_t address, void *bytes, uint32_t length)
{
    struct trap *trap = run_of(context)->trap;
    if (trap->door->reach_memory(trap, physical, write, address, bytes, length))
        return 0;
    return write ? VMEXIT_FAULT_WRITE : VMEXIT_FAULT_READ;
}

static int to_physical(context_t *context, uint64_t address, uint64_t *physical)
{
    struct trap *trap = run_of(context)->trap;
    return trap->door->to_physical(trap, address, physical) ? 0 : VMEXIT_FAULT_READ;
}

static int to_virtual(context_t *context, uint64_t physical, uint64_t *address)
{
    struct trap *trap = run_of(context)->trap;
    return trap->door->to_virtual(trap, physical, address) ? 0 : VMEXIT_FAULT_READ;
}

static int print(context_t *context, const void *record, uint32_t size)
{
    struct run *run = run_of(context);
    (void)size;
    return core_leave_text(run->trap, run->event, VMEXIT_PRINT, record) ? 0 : VMEXIT_FAULT_OUTPUT;
}

/* In the post stage it says nothing any more: the instruction has been executed. */
static int short_circuit(context_t *context, uint64_t on)
{
    struct run *run = run_of(context);
    if (!(run->trap->door->capabilities & VMEXIT_CAN_SKIP))
        return VMEXIT_FAULT_MACHINE;
    if (!run->progress->decided && run->trap->stage == VMEXIT_PRE)
        run->progress->skip = on != 0;
    return 0;
}

static int event(context_t *context, unsigned call, uint64_t id)
{
    unsigned state = call == VMEXIT_CALL_EVENT_ENABLE    ? VMEXIT_STATE_ENABLED
                     : call == VMEXIT_CALL_EVENT_DISABLE ? VMEXIT_STATE_DISABLED
                                                         : VMEXIT_STATE_CLEARED;
    /* An event is known by its number or its tag; the wire's ids begin at 1. */
    uint64_t number = id >= VMEXIT_FIRST_TAG ? id - VMEXIT_FIRST_TAG : id;
    if (number >= UINT32_MAX || !core_change_event(run_of(context)->trap, (uint32_t)number + 1, state))
        return VMEXIT_FAULT_EVENT;
    return 0;
}

static int pause_machine(context_t *context)
{
    struct run *run = run_of(context);
    if (!(run->trap->door->capabilities & VMEXIT_CAN_BREAK))
        return VMEXIT_FAULT_MACHINE;
    run->halt = true;
    return 0;
}

/* Nothing is kept back here that would be to throw away: what was printed has been handed to the debugger. */
static int flush(context_t *context)
{
    (void)context;
    return 0;
}

static const struct vmexit_script_host host = {
    .get_register = get_register,
    .set_register = set_register,
    .memory = memory,
    .to_physical = to_physical,
    .to_virtual = to_virtual,
    .print = print,
    .short_circuit = short_circuit,
    .event = event,
    .pause = pause_machine,
    .flush = flush,
};

/* ---- the debugger's scripts ---- */

static size_t in_pages(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

/* Nobody can change what was checked, nor cut the file off under a vCPU that runs it. */
static bool file_is_sound(const struct vmexit_script_file *file, int fd)
{
    const int needed = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
    struct stat status;
    if (file->script == 0 || file->code_size == 0 || file->entry >= file->code_size || scripts_find(file->script) != NULL)
        return false;
    if (fcntl(fd, F_GET_SEALS) < 0 || (fcntl(fd, F_GET_SEALS) & needed) != needed || fstat(fd, &status) != 0)
        return false;
    return (uint64_t)status.st_size >= in_pages(file->code_size) + in_pages(file->constants_size);
}

/* $buffer can be written by anybody who has the file, but not cut off. */
static bool buffer_is_sound(const struct vmexit_script_file *file, int fd)
{
    struct stat status;
    if (file->buffer_size == 0)
        return fd < 0;
    if (file->buffer_size > VMEXIT_MAX_BUFFER || fd < 0)
        return false;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || (seals & F_SEAL_WRITE) || fstat(fd, &status) != 0)
        return false;
    return (uint64_t)status.st_size >= in_pages(file->buffer_size);
}

static bool map_buffer(struct script *script, const struct vmexit_script_file *file, int fd)
{
    if (file->buffer_size == 0)
        return true;
    void *bytes = mmap(NULL, in_pages(file->buffer_size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED)
        return false;
    script->buffer = (struct vmexit_segment){.bytes = bytes, .size = file->buffer_size, .writable = 1};
    return true;
}

static void unmap(struct script *script)
{
    if (script->memory)
        munmap(script->memory, script->size);
    if (script->buffer.bytes)
        munmap(script->buffer.bytes, in_pages(script->buffer.size));
    free(script);
}

static bool map_file(struct script *script, const struct vmexit_script_file *file, int fd)
{
    const size_t code = in_pages(file->code_size);
    script->size = code + in_pages(file->constants_size);
    void *memory = mmap(NULL, script->size, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED)
        return false;
    script->memory = memory;
    if (file->constants_size)
        mprotect((uint8_t *)script->memory + code, script->size - code, PROT_READ);
    const uint8_t *entry = (uint8_t *)script->memory + file->entry;
    memcpy(&script->entry, &entry, sizeof entry);
    script->constants = (struct vmexit_segment){.bytes = (uint8_t *)script->memory + code, .size = file->constants_size};
    return true;
}

/* Zeroes that take no memory until a run touches them. */
static bool make_places(void)
{
    if (scripts.places)
        return true;
    size_t count = core_vcpus();
    void *memory = mmap(NULL, count * sizeof *scripts.places, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    struct place_to_run *places = memory;
    for (unsigned i = 0; i < count; i++) {
        context_t *context = &places[i].context;
        context->registers = places[i].registers;
        context->record = places[i].record;
        context->host = &host;
        context->lock_wait_ns = VMEXIT_LOCK_WAIT_NS;
        context->segments[VMEXIT_ARENA_GLOBALS] = (struct vmexit_segment){
            .bytes = (uint8_t *)core_script_globals(), .size = VMEXIT_MAX_GLOBALS * sizeof(uint64_t), .writable = 1};
        context->segments[VMEXIT_ARENA_STACK] =
            (struct vmexit_segment){.bytes = places[i].stack, .size = sizeof places[i].stack, .writable = 1};
        context->values[VMEXIT_VALUE_CORE] = i;
        script_prepare(context);
    }
    scripts.places = places;
    return true;
}

int scripts_add(const struct vmexit_script_file *file, int fd, int buffer_fd)
{
    if (!file_is_sound(file, fd) || !buffer_is_sound(file, buffer_fd))
        return VMEXIT_REFUSED;
    struct script *script = calloc(1, sizeof *script);
    if (script == NULL)
        return VMEXIT_UNAVAILABLE;
    if (!make_places() || !map_file(script, file, fd) || !map_buffer(script, file, buffer_fd)) {
        unmap(script);
        return VMEXIT_UNAVAILABLE;
    }
    script->number = file->script;
    script->next = scripts.first;
    scripts.first = script;
    return VMEXIT_OK;
}

int scripts_set_limits(uint64_t steps, uint32_t stack)
{
    if (steps == 0 || stack < VMEXIT_MIN_STACK || stack > VMEXIT_MAX_STACK)
        return VMEXIT_REFUSED;
    __atomic_store_n(&scripts.steps, steps, __ATOMIC_RELAXED);
    __atomic_store_n(&scripts.stack, stack, __ATOMIC_RELAXED);
    return VMEXIT_OK;
}

const struct script *scripts_find(uint32_t number)
{
    const struct script *script = scripts.first;
    while (script != NULL && (number == 0 || script->number != number))
        script = script->next;
    return script;
}

void scripts_forget_unless(bool (*is_needed)(const struct script *script))
{
    struct script **link = &scripts.first;
    while (*link != NULL) {
        struct script *script = *link;
        if (is_needed(script)) {
            link = &script->next;
            continue;
        }
        *link = script->next;
        unmap(script);
    }
}

void scripts_begin_session(void)
{
    time_t now = time(NULL);
    struct tm local;
    memset(core_script_globals(), 0, VMEXIT_MAX_GLOBALS * sizeof(uint64_t));
    scripts.local_time = localtime_r(&now, &local) ? local.tm_gmtoff : 0;
    scripts_set_limits(VMEXIT_DEFAULT_STEPS, VMEXIT_DEFAULT_STACK);
}

/* ---- a run ---- */

/* Of an event that does not ask, nothing is found out, and nothing left of what another asked. */
static void tell_process(struct place_to_run *place, const struct run *run)
{
    static const uint8_t values[][2] = {
        {VMEXIT_VALUE_PID, VMEXIT_FOUND_PID},   {VMEXIT_VALUE_TID, VMEXIT_FOUND_TID}, {VMEXIT_VALUE_PROC, VMEXIT_FOUND_PROCESS},
        {VMEXIT_VALUE_THREAD, VMEXIT_FOUND_THREAD}, {VMEXIT_VALUE_PEB, VMEXIT_FOUND_PEB}, {VMEXIT_VALUE_TEB, VMEXIT_FOUND_TEB},
    };
    const bool tells = event_asks_for_task(run->event);
    if (!tells && !place->tells_process)
        return;
    const struct task *task = tells ? trap_task(run->trap) : &task_nobody;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        place->context.values[values[i][0]] = task->found[values[i][1]];
    script_set_name(&place->context, task->name, sizeof task->name);
    place->tells_process = tells;
}

static void ready(context_t *context, struct run *run, const struct script *script)
{
    const struct trap *trap = run->trap;
    context->machine = run;
    context->changed = 0;
    context->native_budget = __atomic_load_n(&scripts.stack, __ATOMIC_RELAXED);
    context->local_time = scripts.local_time;
    context->segments[VMEXIT_ARENA_CONSTANTS] = script->constants;
    context->segments[VMEXIT_ARENA_BUFFER] = script->buffer;
    context->values[VMEXIT_VALUE_BUFFER] =
        script->buffer.size ? (uint64_t)VMEXIT_ARENA_TAG << 56 | (uint64_t)VMEXIT_ARENA_BUFFER << 48 : 0;
    context->values[VMEXIT_VALUE_CONTEXT] = trap->msr;
    context->values[VMEXIT_VALUE_EVENT_STAGE] = trap->stage == VMEXIT_POST;
    context->values[VMEXIT_VALUE_EVENT_ID] = run->event->id - 1;
    context->values[VMEXIT_VALUE_EVENT_TAG] = VMEXIT_FIRST_TAG + run->event->id - 1;
    context->values[VMEXIT_VALUE_RIP] = trap->rip;
}

/* The general registers: where the guest has them, which spares copying them, or in the place to run. */
static uint64_t *registers_of(struct trap *trap, struct place_to_run *place)
{
    uint64_t *there = trap->door->general_in_place ? trap->door->general_in_place(trap) : NULL;
    if (there == NULL)
        trap->door->get_general(trap, place->registers);
    return there ? there : place->registers;
}

static void leave_fault(const struct run *run, const context_t *context, uint32_t error)
{
    struct {
        struct vmexit_text header;
        uint64_t place;
        uint64_t detail;
    } text = {{.size = sizeof text, .number = error}, context->place, context->detail};
    core_leave_text(run->trap, run->event, VMEXIT_FAULT, &text.header);
}

bool scripts_run(struct trap *trap, const struct vmexit_event *event, const struct script *script, struct progress *progress)
{
    struct place_to_run *place = &scripts.places[trap->vcpu];
    context_t *context = &place->context;
    struct run run = {.trap = trap, .event = event, .progress = progress};
    tell_process(place, &run);
    ready(context, &run, script);
    context->registers = registers_of(trap, place);
    uint32_t error = script_run(context, script->entry, __atomic_load_n(&scripts.steps, __ATOMIC_RELAXED));
    if (context->changed) {
        if (context->registers == place->registers)
            trap->door->set_general(trap, context->registers, context->changed);
        trap_follow(trap, context->registers, context->changed);
    }
    if (error != VMEXIT_FAULT_NONE)
        leave_fault(&run, context, error);
    return run.halt;
}

bool scripts_hold(struct trap *trap, const struct vmexit_event *event, const struct script *condition, struct progress *progress)
{
    struct place_to_run *place = &scripts.places[trap->vcpu];
    context_t *context = &place->context;
    struct run run = {.trap = trap, .event = event, .progress = progress};
    ready(context, &run, condition);
    /* In a copy: the guest is to see nothing of what it writes. */
    context->registers = place->registers;
    trap->door->get_general(trap, place->registers);
    uint32_t error = script_run(context, condition->entry, __atomic_load_n(&scripts.steps, __ATOMIC_RELAXED));
    return error == VMEXIT_FAULT_NONE && context->registers[VMEXIT_RAX] != 0;
}
