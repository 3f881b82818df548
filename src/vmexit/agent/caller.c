/* Callers at traps.
 *
 * Everything that is read comes from the guest and may lie: a search takes as many steps as a table can have bits of length, each read is of
 * memory that is there, and what is no address in the kernel's code is no caller. What a table says of an instruction is remembered: traps
 * come from few places.
 */
#define _GNU_SOURCE
#include "caller.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"
#include "task.h"

/* Instructions that are remembered; and addresses with a number, of which a part of the table stays free. */
enum { RULES = 256, ADDRESSES = 1 << 16, MOST_NUMBERS = ADDRESSES / 4 * 3 };
enum { ENTRY_BYTES = 6, RETURN_BYTES = 8 };

struct code {
    struct vmexit_frames head;
    struct vmexit_code pieces[]; /* rising */
};

/* Where the return address lies, seen from one instruction. */
struct rule {
    uint64_t rip; /* 0: nothing is remembered */
    int32_t offset;
    enum { NOWHERE, FROM_RSP, FROM_RBP, BY_FRAME_POINTER, PERHAPS_AT_RSP } where;
    struct caller last; /* with a number; address 0: nothing is remembered */
};

struct numbered {
    uint64_t address; /* 0: a free place */
    uint16_t number;
};

/* What is known of one vCPU; its own thread's. */
struct place {
    uint64_t generation; /* of the code that the rules were found by */
    uint64_t memory;
    uint64_t session;
    uint32_t numbers; /* that were given */
    struct rule rules[RULES];
    struct numbered addresses[ADDRESSES];
};

static struct {
    const struct code *code;
    uint64_t generation; /* rises with each exchange of the code, before it */
    uint64_t session;
    struct place *places; /* by vCPU; there once code has come */
} callers;

/* ---- what the debugger tells ---- */

static bool is_sound(const struct vmexit_frames *head, const struct vmexit_code *pieces)
{
    if (head->rsp > 15 || head->rbp > 15 || head->rsp == head->rbp || head->call > 7 || head->frame_pointers > 1)
        return false;
    for (uint32_t i = 0; i < head->count; i++)
        if (pieces[i].first > pieces[i].last || (i > 0 && pieces[i].first <= pieces[i - 1].last))
            return false;
    return true;
}

/* Null where it is not sound, or memory is short (`status` says which). */
static struct code *read_code(const uint8_t *bytes, size_t length, int *status)
{
    struct vmexit_frames head;
    *status = VMEXIT_REFUSED;
    if (length < sizeof head)
        return NULL;
    memcpy(&head, bytes, sizeof head);
    if (head.count > VMEXIT_MAX_CODES || length != sizeof head + head.count * sizeof(struct vmexit_code))
        return NULL;
    struct code *code = malloc(sizeof *code + head.count * sizeof *code->pieces);
    if (code == NULL) {
        *status = VMEXIT_UNAVAILABLE;
        return NULL;
    }
    *code = (struct code){.head = head};
    memcpy(code->pieces, bytes + sizeof head, head.count * sizeof *code->pieces);
    if (!is_sound(&code->head, code->pieces)) {
        free(code);
        return NULL;
    }
    *status = VMEXIT_OK;
    return code;
}

/* Zeroes that take no memory until they are touched. */
static bool make_places(void)
{
    if (callers.places)
        return true;
    void *memory = mmap(NULL, core_vcpus() * sizeof *callers.places, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    __atomic_store_n(&callers.places, memory, __ATOMIC_RELEASE);
    return true;
}

static void exchange_code(const struct code *code)
{
    __atomic_fetch_add(&callers.generation, 1, __ATOMIC_SEQ_CST);
    const struct code *old = __atomic_exchange_n(&callers.code, code, __ATOMIC_SEQ_CST);
    /* Whoever looks at the old one reads the guest's memory. */
    if (old)
        tasks_forget_memory();
    free((void *)old);
}

int callers_set_code(const void *bytes, size_t length)
{
    int status = VMEXIT_OK;
    struct code *code = length ? read_code(bytes, length, &status) : NULL;
    if (status == VMEXIT_OK && code != NULL && (core_door()->find_page == NULL || !make_places())) {
        free(code);
        status = VMEXIT_UNAVAILABLE;
    }
    if (status == VMEXIT_OK)
        exchange_code(code);
    return status;
}

void callers_begin_session(void)
{
    __atomic_fetch_add(&callers.session, 1, __ATOMIC_SEQ_CST);
    exchange_code(NULL);
}

/* ---- numbers ---- */

/* The place of an address, or the free one where it belongs. */
static struct numbered *find_number(struct place *place, uint64_t address)
{
    unsigned at = (unsigned)(address * UINT64_C(0x9e3779b97f4a7c15) >> 48);
    while (place->addresses[at].address != 0 && place->addresses[at].address != address)
        at = (at + 1) % ADDRESSES;
    return &place->addresses[at];
}

uint16_t caller_next_number(unsigned vcpu)
{
    const struct place *place = &callers.places[vcpu];
    return place->numbers < MOST_NUMBERS ? (uint16_t)(place->numbers + 1) : 0;
}

void caller_told(unsigned vcpu, uint64_t address)
{
    struct place *place = &callers.places[vcpu];
    *find_number(place, address) = (struct numbered){.address = address, .number = (uint16_t)++place->numbers};
}

/* ---- the tables ---- */

static const struct vmexit_code *piece_of(const struct code *code, uint64_t address)
{
    size_t from = 0, to = code->head.count;
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (code->pieces[middle].last < address)
            from = middle + 1;
        else
            to = middle;
    }
    return from < code->head.count && code->pieces[from].first <= address ? &code->pieces[from] : NULL;
}

/* The entry for an instruction: the last whose place is not above it. */
static bool read_entry(unsigned vcpu, const struct vmexit_code *piece, uint64_t rip, uint8_t *entry)
{
    uint32_t from = 0, to = piece->count;
    while (from < to) {
        const uint32_t middle = from + (to - from) / 2;
        const uint64_t at = piece->places + UINT64_C(4) * middle;
        int32_t offset;
        if (!task_read(vcpu, at, &offset, sizeof offset))
            return false;
        if (at + (uint64_t)(int64_t)offset <= rip)
            from = middle + 1;
        else
            to = middle;
    }
    return from > 0 && task_read(vcpu, piece->entries + (uint64_t)(from - 1) * ENTRY_BYTES, entry, ENTRY_BYTES);
}

static struct rule make_rule(unsigned vcpu, const struct code *code, uint64_t rip)
{
    const struct vmexit_code *piece = piece_of(code, rip);
    uint8_t entry[ENTRY_BYTES];
    int16_t offset;
    uint16_t rest;
    struct rule rule = {.rip = rip, .where = NOWHERE};
    /* Code that is not known may still be the kernel's; the guest's programs and its firmware are elsewhere. */
    if (piece == NULL ? rip >> 63 : piece->count == 0)
        rule.where = piece && code->head.frame_pointers ? BY_FRAME_POINTER : PERHAPS_AT_RSP;
    if (rule.where == BY_FRAME_POINTER)
        rule.offset = RETURN_BYTES; /* above RBP as it was before */
    if (piece == NULL || piece->count == 0 || !read_entry(vcpu, piece, rip, entry))
        return rule;
    memcpy(&offset, entry, sizeof offset);
    memcpy(&rest, entry + 4, sizeof rest);
    const unsigned base = rest & 15;
    if ((rest >> 8 & 7) != code->head.call)
        return rule;
    rule.where = base == code->head.rsp ? FROM_RSP : base == code->head.rbp ? FROM_RBP : NOWHERE;
    rule.offset = offset - RETURN_BYTES;
    return rule;
}

static bool goes_by_rbp(const struct rule *rule) { return rule->where == FROM_RBP || rule->where == BY_FRAME_POINTER; }

static inline struct rule *rule_at(struct place *place, uint64_t rip)
{
    return &place->rules[rip * UINT64_C(0x9e3779b97f4a7c15) >> 56];
}

static struct rule *rule_of(struct place *place, unsigned vcpu, const struct code *code, uint64_t rip)
{
    struct rule *rule = rule_at(place, rip);
    if (rule->rip != rip || rip == 0)
        *rule = make_rule(vcpu, code, rip);
    return rule;
}

/* ---- at a trap ---- */

/* What holds no more. */
static void refresh(struct place *place, uint64_t generation, uint64_t memory)
{
    const uint64_t session = __atomic_load_n(&callers.session, __ATOMIC_ACQUIRE);
    if (generation == place->generation && memory == place->memory && session == place->session)
        return;
    memset(place->rules, 0, sizeof place->rules);
    if (session != place->session && place->numbers > 0) {
        memset(place->addresses, 0, sizeof place->addresses);
        place->numbers = 0;
    }
    place->generation = generation;
    place->memory = memory;
    place->session = session;
}

/* E8, or FF /2 with a register or memory operand, in each of the lengths that it has. */
static bool is_behind_call(unsigned vcpu, uint64_t address)
{
    static const unsigned lengths[] = {2, 3, 4, 6, 7};
    uint8_t code[7];
    if (!task_read(vcpu, address - sizeof code, code, sizeof code))
        return false;
    if (code[2] == 0xe8)
        return true;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        if (code[7 - lengths[i]] == 0xff && (code[8 - lengths[i]] >> 3 & 7) == 2)
            return true;
    return false;
}

/* A place on the stack that a table tells holds a caller where it points into code that is known; else it is a guess, as in code without a
 * table, and has to point behind a call, as that has which a frame pointer leads to. */
static struct caller look(struct place *place, unsigned vcpu, const struct code *code, struct rule *rule, uint64_t base)
{
    const struct caller nobody = {0};
    uint64_t address;
    if (!task_read(vcpu, base + (uint64_t)(int64_t)rule->offset, &address, sizeof address) || address >> 63 == 0)
        return nobody;
    if (address == rule->last.address)
        return rule->last;
    const uint16_t number = find_number(place, address)->number;
    const bool is_known = piece_of(code, address) != NULL;
    const bool is_guess = rule->where == PERHAPS_AT_RSP || !is_known;
    const bool has_table = rule->where == FROM_RSP || rule->where == FROM_RBP;
    if (!has_table && !is_known)
        return nobody;
    if ((!has_table || is_guess) && !is_behind_call(vcpu, address))
        return nobody;
    const struct caller caller = {.address = address, .number = number, .is_guess = is_guess};
    if (number != 0)
        rule->last = caller;
    return caller;
}

/* What the instruction's caller was the last time, if it is the same again: nearly always. */
static bool is_same_again(struct place *place, unsigned vcpu, const struct rule *rule, uint64_t base)
{
    uint64_t memory, address;
    return __atomic_load_n(&callers.generation, __ATOMIC_ACQUIRE) == place->generation &&
           __atomic_load_n(&callers.session, __ATOMIC_ACQUIRE) == place->session &&
           task_read_word(vcpu, base + (uint64_t)(int64_t)rule->offset, &address, &memory) && memory == place->memory &&
           address == rule->last.address;
}

static struct caller find(struct place *place, unsigned vcpu, uint64_t rip, uint64_t rsp, uint64_t (*rbp)(void *context), void *context)
{
    struct caller caller = {0};
    uint64_t memory;
    if (!task_begin_reading(vcpu, &memory))
        return caller;
    const uint64_t generation = __atomic_load_n(&callers.generation, __ATOMIC_ACQUIRE);
    const struct code *code = __atomic_load_n(&callers.code, __ATOMIC_ACQUIRE);
    if (code != NULL) {
        refresh(place, generation, memory);
        struct rule *rule = rule_of(place, vcpu, code, rip);
        if (rule->where != NOWHERE)
            caller = look(place, vcpu, code, rule, goes_by_rbp(rule) ? rbp(context) : rsp);
    }
    task_end_reading(vcpu);
    return caller;
}

struct caller caller_find(unsigned vcpu, uint64_t rip, uint64_t rsp, uint64_t (*rbp)(void *context), void *context)
{
    if (__atomic_load_n(&callers.code, __ATOMIC_ACQUIRE) == NULL)
        return (struct caller){0};
    struct place *place = &__atomic_load_n(&callers.places, __ATOMIC_ACQUIRE)[vcpu];
    const struct rule *rule = rule_at(place, rip);
    if (rule->rip == rip && rule->last.address && is_same_again(place, vcpu, rule, goes_by_rbp(rule) ? rbp(context) : rsp))
        return rule->last;
    return find(place, vcpu, rip, rsp, rbp, context);
}
