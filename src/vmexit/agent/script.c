/* Running compiled scripts: the functions that they may call, the arena behind their addresses, their budgets. */
#define _GNU_SOURCE
#include "script_run.h"

#include <stdbool.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

typedef struct vmexit_script_context context_t;

enum { CHUNK = 256, PAGE = 4096 };
/* Bytes that cost as much as one turn of a loop. */
enum { BYTES_A_STEP = 64 };
enum { DATE_AT = 0, TIME_AT = 16, NAME_AT = 32, TEXT_BYTES = 16 };
#define PHYSICAL_BITS 52

static uint64_t fail(context_t *context, uint32_t error, uint64_t detail)
{
    context->error = error;
    context->detail = detail;
    return 0;
}

/* Whether the host's answer was "done"; else the run has failed. */
static bool done(context_t *context, int error, uint64_t detail)
{
    if (error != 0)
        fail(context, (uint32_t)error, detail);
    return error == 0;
}

static bool spend(context_t *context, uint64_t bytes)
{
    uint64_t steps = bytes / BYTES_A_STEP + 1;
    if (steps > context->steps) {
        context->steps = 0;
        fail(context, VMEXIT_FAULT_STEPS, 0);
        return false;
    }
    context->steps -= steps;
    return true;
}

/* ---- addresses ---- */

static bool is_arena(uint64_t address) { return address >> 56 == VMEXIT_ARENA_TAG; }

static uint64_t arena_address(unsigned segment, uint64_t offset)
{
    return (uint64_t)VMEXIT_ARENA_TAG << 56 | (uint64_t)segment << 48 | offset;
}

/* Where those bytes of the arena are; null where they are not all in one segment or, to be written, in one that can be. */
static uint8_t *arena_at(context_t *context, uint64_t address, uint64_t length, bool write)
{
    uint64_t number = address >> 48 & 0xff, offset = address & ((UINT64_C(1) << 48) - 1);
    if (number >= VMEXIT_ARENA_SEGMENTS)
        return NULL;
    const struct vmexit_segment *segment = &context->segments[number];
    if (length > segment->size || offset > segment->size - length || (write && !segment->writable))
        return NULL;
    return segment->bytes + offset;
}

/* Reads or writes at most a page's worth of bytes, the arena's or the guest's. */
static bool access(context_t *context, bool physical, bool write, uint64_t address, void *bytes, uint32_t length)
{
    if (!physical && is_arena(address)) {
        uint8_t *there = arena_at(context, address, length, write);
        if (there == NULL)
            return false;
        memcpy(write ? there : bytes, write ? bytes : there, length);
        return true;
    }
    if (address + length < address || (physical && address + length > UINT64_C(1) << PHYSICAL_BITS))
        return false;
    return context->host->memory && context->host->memory(context, physical, write, address, bytes, length) == 0;
}

/* How many of `length` bytes can be had at once: no more than a chunk and, so that the rest of a page can be read although the next
 * one is not there, none beyond the page. */
static uint32_t chunk_at(uint64_t address, uint64_t length)
{
    uint64_t most = PAGE - address % PAGE;
    most = most < CHUNK ? most : CHUNK;
    return (uint32_t)(length < most ? length : most);
}

/* ---- registers and memory ---- */

static uint64_t get_register(context_t *context, uint64_t number)
{
    uint64_t value = 0;
    int error = context->host->get_register ? context->host->get_register(context, (unsigned)number, &value) : VMEXIT_FAULT_REGISTER;
    return done(context, error, number) ? value : 0;
}

static uint64_t set_register(context_t *context, uint64_t number, uint64_t value)
{
    int error = context->host->set_register ? context->host->set_register(context, (unsigned)number, value) : VMEXIT_FAULT_REGISTER;
    done(context, error, number);
    return 0;
}

static uint64_t load(context_t *context, uint64_t address, uint64_t size)
{
    uint64_t value = 0;
    if (!access(context, false, false, address, &value, (uint32_t)size))
        return fail(context, VMEXIT_FAULT_READ, address);
    return value;
}

static uint64_t load_physical(context_t *context, uint64_t address, uint64_t size)
{
    uint64_t value = 0;
    if (!access(context, true, false, address, &value, (uint32_t)size))
        return fail(context, VMEXIT_FAULT_READ, address);
    return value;
}

static uint64_t store(context_t *context, uint64_t address, uint64_t value, uint64_t size)
{
    if (!access(context, false, true, address, &value, (uint32_t)size))
        fail(context, VMEXIT_FAULT_WRITE, address);
    return 0;
}

static uint64_t edit(context_t *context, uint64_t address, uint64_t value, uint64_t size)
{
    return access(context, false, true, address, &value, (uint32_t)size);
}

static uint64_t edit_physical(context_t *context, uint64_t address, uint64_t value, uint64_t size)
{
    return access(context, true, true, address, &value, (uint32_t)size);
}

static uint64_t check(context_t *context, uint64_t address)
{
    uint8_t byte;
    return access(context, false, false, address, &byte, 1);
}

static uint64_t to_physical(context_t *context, uint64_t address)
{
    uint64_t physical = 0;
    if (is_arena(address) || !context->host->to_physical || context->host->to_physical(context, address, &physical) != 0)
        return 0;
    return physical;
}

static uint64_t to_virtual(context_t *context, uint64_t physical)
{
    uint64_t address = 0;
    if (physical >> PHYSICAL_BITS || !context->host->to_virtual || context->host->to_virtual(context, physical, &address) != 0)
        return 0;
    return address;
}

/* ---- blocks and strings ---- */

static uint64_t copy_bytes(context_t *context, bool physical, uint64_t to, uint64_t from, uint64_t length)
{
    uint8_t chunk[CHUNK];
    if (length == 0 || length > UINT32_MAX)
        return fail(context, VMEXIT_FAULT_LENGTH, length);
    /* As memmove: from the end where the destination begins within the source. */
    bool backwards = to - from < length;
    for (uint64_t did = 0; did < length;) {
        uint64_t left = length - did;
        uint32_t count = left < CHUNK ? (uint32_t)left : CHUNK;
        uint64_t at = backwards ? left - count : did;
        if (!spend(context, count))
            return 0;
        if (!access(context, physical, false, from + at, chunk, count))
            return fail(context, VMEXIT_FAULT_READ, from + at);
        if (!access(context, physical, true, to + at, chunk, count))
            return fail(context, VMEXIT_FAULT_WRITE, to + at);
        did += count;
    }
    return 0;
}

static uint64_t copy(context_t *context, uint64_t to, uint64_t from, uint64_t length)
{
    return copy_bytes(context, false, to, from, length);
}

static uint64_t copy_physical(context_t *context, uint64_t to, uint64_t from, uint64_t length)
{
    return copy_bytes(context, true, to, from, length);
}

static uint64_t compare(context_t *context, uint64_t left, uint64_t right, uint64_t length)
{
    uint8_t a[CHUNK], b[CHUNK];
    for (uint64_t at = 0; at < length;) {
        uint32_t count = chunk_at(left + at, length - at);
        count = chunk_at(right + at, count);
        if (!spend(context, count))
            return 0;
        if (!access(context, false, false, left + at, a, count) || !access(context, false, false, right + at, b, count))
            return 2;
        int order = memcmp(a, b, count);
        if (order != 0)
            return order < 0 ? UINT64_MAX : 1;
        at += count;
    }
    return 0;
}

/* A string's characters, fetched in chunks. */
struct reader {
    uint64_t address;
    uint32_t have;
    uint32_t next;
    uint8_t chunk[CHUNK];
};

static bool fetch_byte(context_t *context, struct reader *reader, uint8_t *byte)
{
    if (reader->next == reader->have) {
        uint32_t count = chunk_at(reader->address, CHUNK);
        if (!spend(context, count))
            return false;
        /* What can be read may end sooner: at the end of the arena's segment, or of memory that is given by the byte. */
        while (!access(context, false, false, reader->address, reader->chunk, count)) {
            if (count == 1)
                return false;
            count /= 2;
        }
        reader->address += count;
        reader->have = count;
        reader->next = 0;
    }
    *byte = reader->chunk[reader->next++];
    return true;
}

static bool fetch(context_t *context, struct reader *reader, uint64_t width, uint16_t *unit)
{
    uint8_t low = 0, high = 0;
    if (!fetch_byte(context, reader, &low) || (width == 2 && !fetch_byte(context, reader, &high)))
        return false;
    *unit = (uint16_t)(low | high << 8);
    return true;
}

static uint64_t text_length(context_t *context, uint64_t address, uint64_t width)
{
    struct reader reader = {.address = address};
    uint16_t unit;
    for (uint64_t length = 0; fetch(context, &reader, width, &unit); length++)
        if (unit == 0)
            return length;
    return 0;
}

static uint64_t compare_text(context_t *context, uint64_t left, uint64_t right, uint64_t most, uint64_t width)
{
    struct reader a = {.address = left}, b = {.address = right};
    for (uint64_t at = 0; at < most; at++) {
        uint16_t one, other;
        if (!fetch(context, &a, width, &one) || !fetch(context, &b, width, &other))
            return 2;
        if (one != other)
            return one < other ? UINT64_MAX : 1;
        if (one == 0)
            return 0;
    }
    return 0;
}

/* ---- printing ---- */

/* Copies a string behind `used` bytes of the record and gives its length in bytes; UINT32_MAX where the run has failed. */
static uint32_t print_text(context_t *context, uint32_t used, uint64_t address, uint64_t width, uint64_t limit)
{
    struct reader reader = {.address = address};
    uint32_t bytes = 0;
    for (uint64_t at = 0; at < limit; at++) {
        uint16_t unit;
        if (!fetch(context, &reader, width, &unit)) {
            if (context->error == 0)
                fail(context, VMEXIT_FAULT_READ, address);
            return UINT32_MAX;
        }
        if (unit == 0)
            break;
        if (at == VMEXIT_MAX_STRING || used + bytes + width > VMEXIT_MAX_PRINT) {
            fail(context, VMEXIT_FAULT_TEXT, address);
            return UINT32_MAX;
        }
        memcpy(context->record + used + bytes, &unit, width);
        bytes += (uint32_t)width;
    }
    return bytes;
}

static uint64_t print(context_t *context, uint64_t format, uint64_t count, const uint64_t *slots, uint64_t strings, uint64_t wide,
                      uint64_t limited)
{
    uint32_t used = sizeof(struct vmexit_text);
    for (uint64_t i = 0; i < count; i++) {
        bool is_text = (strings | wide) >> i & 1;
        uint64_t value = slots[i];
        if (used + sizeof value > VMEXIT_MAX_PRINT)
            return fail(context, VMEXIT_FAULT_TEXT, 0);
        uint32_t at = used;
        used += sizeof value;
        if (is_text) {
            /* The slot before that of a limited string is its precision; a negative one is as if there was none. */
            uint64_t limit = limited >> i & 1 ? (uint64_t)(int64_t)(int32_t)slots[i - 1] : UINT64_MAX;
            uint32_t length = print_text(context, used, slots[i], wide >> i & 1 ? 2 : 1, limit);
            if (length == UINT32_MAX)
                return 0;
            value = length;
            uint32_t padding = -length & 7;
            if (used + length + padding > VMEXIT_MAX_PRINT)
                return fail(context, VMEXIT_FAULT_TEXT, slots[i]);
            memset(context->record + used + length, 0, padding);
            used += length + padding;
        }
        memcpy(context->record + at, &value, sizeof value);
    }
    struct vmexit_text header = {.size = used, .number = (uint32_t)format};
    memcpy(context->record, &header, sizeof header);
    done(context, context->host->print ? context->host->print(context, context->record, used) : VMEXIT_FAULT_OUTPUT, 0);
    return 0;
}

/* ---- what several vCPUs share ---- */

/* The 8 bytes of a script variable that atomic operations may work on; null and a failed run where it is none. */
static uint64_t *atomic_at(context_t *context, uint64_t address)
{
    uint8_t *there = is_arena(address) && address % 8 == 0 ? arena_at(context, address, 8, true) : NULL;
    if (there == NULL)
        fail(context, VMEXIT_FAULT_ATOMIC, address);
    return (uint64_t *)(void *)there;
}

static uint64_t add(context_t *context, uint64_t address, uint64_t value)
{
    uint64_t *there = atomic_at(context, address);
    return there ? __atomic_fetch_add(there, value, __ATOMIC_SEQ_CST) : 0;
}

static uint64_t exchange(context_t *context, uint64_t address, uint64_t value)
{
    uint64_t *there = atomic_at(context, address);
    return there ? __atomic_exchange_n(there, value, __ATOMIC_SEQ_CST) : 0;
}

static uint64_t compare_exchange(context_t *context, uint64_t address, uint64_t value, uint64_t comparand)
{
    uint64_t *there = atomic_at(context, address);
    if (there)
        __atomic_compare_exchange_n(there, &comparand, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return there ? comparand : 0;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#endif
}

static void forget_lock(context_t *context, const uint64_t *lock)
{
    for (uint32_t i = 0; i < context->lock_count; i++)
        if (context->locks[i] == lock) {
            context->locks[i] = context->locks[--context->lock_count];
            return;
        }
}

static uint64_t lock(context_t *context, uint64_t address, uint64_t pauses)
{
    uint64_t *there = atomic_at(context, address);
    if (there == NULL)
        return 0;
    if (context->lock_count == VMEXIT_MAX_LOCKS)
        return fail(context, VMEXIT_FAULT_LOCK, address);
    const uint64_t begin = now_ns();
    for (uint64_t wait = 1;; wait = wait * 2 < pauses ? wait * 2 : pauses) {
        uint64_t unlocked = 0;
        if (__atomic_compare_exchange_n(there, &unlocked, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            break;
        if (now_ns() - begin > context->lock_wait_ns)
            return fail(context, VMEXIT_FAULT_LOCK, address);
        for (uint64_t i = 0; i < wait && i < 65536; i++)
            relax();
    }
    context->locks[context->lock_count++] = there;
    return 0;
}

static uint64_t unlock(context_t *context, uint64_t address)
{
    uint64_t *there = atomic_at(context, address);
    if (there == NULL)
        return 0;
    forget_lock(context, there);
    __atomic_store_n(there, 0, __ATOMIC_RELEASE);
    return 0;
}

static void release_locks(context_t *context)
{
    while (context->lock_count > 0)
        __atomic_store_n(context->locks[--context->lock_count], 0, __ATOMIC_RELEASE);
}

/* ---- events and the machine ---- */

static uint64_t event_sc(context_t *context, uint64_t on)
{
    done(context, context->host->short_circuit ? context->host->short_circuit(context, on != 0) : VMEXIT_FAULT_MACHINE, 0);
    return 0;
}

static void event(context_t *context, unsigned call, uint64_t id)
{
    done(context, context->host->event ? context->host->event(context, call, id) : VMEXIT_FAULT_MACHINE, id);
}

static uint64_t event_enable(context_t *context, uint64_t id)
{
    event(context, VMEXIT_CALL_EVENT_ENABLE, id);
    return 0;
}

static uint64_t event_disable(context_t *context, uint64_t id)
{
    event(context, VMEXIT_CALL_EVENT_DISABLE, id);
    return 0;
}

static uint64_t event_clear(context_t *context, uint64_t id)
{
    event(context, VMEXIT_CALL_EVENT_CLEAR, id);
    return 0;
}

static uint64_t pause_machine(context_t *context)
{
    done(context, context->host->pause ? context->host->pause(context) : VMEXIT_FAULT_MACHINE, 0);
    return 0;
}

static uint64_t flush(context_t *context)
{
    done(context, context->host->flush ? context->host->flush(context) : VMEXIT_FAULT_MACHINE, 0);
    return 0;
}

/* ---- time ---- */

static uint64_t rdtsc(context_t *context)
{
    (void)context;
#if defined(__x86_64__)
    return __rdtsc();
#else
    return now_ns();
#endif
}

static uint64_t rdtscp(context_t *context)
{
    (void)context;
#if defined(__x86_64__)
    unsigned core;
    return __rdtscp(&core);
#else
    return now_ns();
#endif
}

static uint64_t sleep_us(context_t *context, uint64_t microseconds)
{
    if (microseconds > VMEXIT_MAX_SLEEP)
        return fail(context, VMEXIT_FAULT_SLEEP, microseconds);
    const uint64_t begin = now_ns();
    /* The kernel wakes a sleeper some 50 microseconds late. */
    if (microseconds > 200) {
        struct timespec time = {.tv_sec = (time_t)(microseconds / 1000000), .tv_nsec = (long)(microseconds % 1000000 * 1000)};
        while (nanosleep(&time, &time) != 0)
            ;
    }
    while (now_ns() - begin < microseconds * 1000)
        relax();
    return 0;
}

static void put_number(uint8_t *at, uint64_t number, unsigned digits)
{
    for (; digits > 0; number /= 10)
        at[--digits] = (uint8_t)('0' + number % 10);
}

/* The day's date in the proleptic Gregorian calendar: eras of 400 years that begin on a 1 March. */
static void put_date(uint8_t *at, int64_t days)
{
    days += 719468; /* from 0000-03-01 to 1970-01-01 */
    int64_t era = (days >= 0 ? days : days - 146096) / 146097;
    uint64_t day = (uint64_t)(days - era * 146097);
    uint64_t year = (day - day / 1460 + day / 36524 - day / 146096) / 365;
    day -= 365 * year + year / 4 - year / 100;
    uint64_t month = (5 * day + 2) / 153;
    put_number(at, (uint64_t)(era * 400) + year + (month >= 10), 4);
    put_number(at + 5, month < 10 ? month + 3 : month - 9, 2);
    put_number(at + 8, day - (153 * month + 2) / 5 + 1, 2);
    at[4] = at[7] = '-';
}

static struct timespec local_now(const context_t *context)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec += context->local_time;
    return now;
}

static uint64_t date(context_t *context)
{
    struct timespec now = local_now(context);
    put_date(context->text + DATE_AT, now.tv_sec / 86400 - (now.tv_sec % 86400 < 0));
    return arena_address(VMEXIT_ARENA_TEXT, DATE_AT);
}

static uint64_t time_of_day(context_t *context)
{
    struct timespec now = local_now(context);
    uint64_t second = (uint64_t)((now.tv_sec % 86400 + 86400) % 86400);
    uint8_t *at = context->text + TIME_AT;
    put_number(at, second / 3600, 2);
    put_number(at + 3, second / 60 % 60, 2);
    put_number(at + 6, second % 60, 2);
    put_number(at + 9, (uint64_t)now.tv_nsec / 1000000, 3);
    at[2] = at[5] = ':';
    at[8] = '.';
    return arena_address(VMEXIT_ARENA_TEXT, TIME_AT);
}

/* ---- the rest ---- */

static uint64_t instruction(context_t *context, uint64_t address, uint64_t bits)
{
    uint8_t bytes[15];
    uint32_t have = 0;
    /* Byte by byte near the end of what can be read: the instruction may end there. */
    while (have < sizeof bytes) {
        uint32_t count = chunk_at(address + have, sizeof bytes - have);
        if (!access(context, false, false, address + have, bytes + have, count)) {
            if (count == 1 || !access(context, false, false, address + have, bytes + have, 1))
                break;
            count = 1;
        }
        have += count;
    }
    return script_instruction_length(bytes, have, (unsigned)bits);
}

static uint64_t enter(context_t *context, uint64_t size)
{
    const struct vmexit_segment *stack = &context->segments[VMEXIT_ARENA_STACK];
    uint64_t offset = context->stack_used;
    if (offset > stack->size || size > stack->size - offset)
        return fail(context, VMEXIT_FAULT_STACK, 0);
    memset(stack->bytes + offset, 0, size);
    context->stack_used = offset + size;
    return offset;
}

static uint64_t zero(context_t *context, uint64_t offset, uint64_t size)
{
    memset(context->segments[VMEXIT_ARENA_STACK].bytes + offset, 0, size);
    return 0;
}

#define CALL(name, function) [VMEXIT_CALL_##name] = (void *)(uintptr_t)(function)

static void *const functions[VMEXIT_CALLS] = {
    CALL(GET_REGISTER, get_register),
    CALL(SET_REGISTER, set_register),
    CALL(LOAD, load),
    CALL(STORE, store),
    CALL(LOAD_PHYSICAL, load_physical),
    CALL(EDIT, edit),
    CALL(EDIT_PHYSICAL, edit_physical),
    CALL(CHECK, check),
    CALL(TO_PHYSICAL, to_physical),
    CALL(TO_VIRTUAL, to_virtual),
    CALL(COPY, copy),
    CALL(COPY_PHYSICAL, copy_physical),
    CALL(COMPARE, compare),
    CALL(LENGTH, text_length),
    CALL(COMPARE_TEXT, compare_text),
    CALL(PRINT, print),
    CALL(ADD, add),
    CALL(EXCHANGE, exchange),
    CALL(COMPARE_EXCHANGE, compare_exchange),
    CALL(LOCK, lock),
    CALL(UNLOCK, unlock),
    CALL(EVENT_SC, event_sc),
    CALL(EVENT_ENABLE, event_enable),
    CALL(EVENT_DISABLE, event_disable),
    CALL(EVENT_CLEAR, event_clear),
    CALL(PAUSE, pause_machine),
    CALL(FLUSH, flush),
    CALL(RDTSC, rdtsc),
    CALL(RDTSCP, rdtscp),
    CALL(SLEEP, sleep_us),
    CALL(DATE, date),
    CALL(TIME, time_of_day),
    CALL(INSTRUCTION, instruction),
    CALL(ENTER, enter),
    CALL(ZERO, zero),
};

void script_prepare(context_t *context)
{
    context->functions = functions;
    context->globals = (uint64_t *)(void *)context->segments[VMEXIT_ARENA_GLOBALS].bytes;
    context->stack = context->segments[VMEXIT_ARENA_STACK].bytes;
    context->segments[VMEXIT_ARENA_TEXT] = (struct vmexit_segment){.bytes = context->text, .size = sizeof context->text};
    context->values[VMEXIT_VALUE_PNAME] = arena_address(VMEXIT_ARENA_TEXT, NAME_AT);
}

void script_set_name(context_t *context, const char *name, size_t size)
{
    memset(context->text + NAME_AT, 0, sizeof context->text - NAME_AT);
    memcpy(context->text + NAME_AT, name, size);
}

uint32_t script_run(context_t *context, script_entry entry, uint64_t steps)
{
    context->error = VMEXIT_FAULT_NONE;
    context->place = 0;
    context->detail = 0;
    context->stack_used = 0;
    context->lock_count = 0;
    context->steps = steps;
    context->native_floor = (uint64_t)(uintptr_t)__builtin_frame_address(0) - context->native_budget;
    uint32_t error = entry(context);
    if (error != VMEXIT_FAULT_NONE)
        release_locks(context);
    return error;
}
