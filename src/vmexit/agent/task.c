/* The way to the current thread: a recipe, checked when it comes, and followed at each trap that asks.
 *
 * All of it is read through page tables that the recipe names, not through CR3, and directly where the guest's memory lies in this process.
 * It is remembered with the entries of the page tables that map the pages that it leads through: as long as these entries and the pointers
 * on the way are what they were, nothing has to be searched for.
 *
 * Every value comes from the guest and may lie: each read is of memory that is there, there are at most VMEXIT_MAX_STEPS of them, and what
 * does not pass its check makes the thread unknown.
 */
#define _GNU_SOURCE
#include "task.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "paging.h"
#include "quick.h"

#define PAGE_BYTES UINT64_C(0x1000)
#define PAGE_START(address) ((address) & ~(PAGE_BYTES - 1))
/* Above it are what kernels return as errors. */
#define LAST_POINTER UINT64_C(0xfffffffffffff000)

enum { CR0_PAGING = 1u << 31, CR4_PAE = 1 << 5, CR4_LA57 = 1 << 12, EFER_LMA = 1 << 10 };
/* Pages of physical memory whose place is remembered (sets of two), pages that one way can lead through, names that were told. */
enum { PAGE_SETS = 128, MOST_PAGES = 2 * VMEXIT_MAX_STEPS, MOST_LEVELS = 5, TOLD = 256 };
/* Pages off the way that are remembered. */
enum { OTHER_PAGES = 64 };

struct recipe {
    struct vmexit_recipe head;
    uint64_t serial; /* of no other */
    uint32_t sources; /* bit n: a step goes on from what was found as n */
    uint64_t lowest_pointer;
    uint64_t bases[]; /* rising */
};

/* A page that the way leads through. */
struct mapped {
    uint64_t address;
    const uint8_t *bytes; /* null: to be read by the door */
    uint64_t physical;
    unsigned levels;
    unsigned shared; /* so many of them, from the top, are those of the way's first page */
    struct {
        const uint8_t *at; /* null: to be read by the door */
        uint64_t value;
    } entries[MOST_LEVELS]; /* of the page tables, and what they were */
};

struct known_page {
    uint64_t physical;
    const uint8_t *bytes; /* null: nothing is known */
};

struct told {
    bool is_told;
    uint32_t process, thread;
    char name[VMEXIT_NAME_BYTES];
};

/* What is known of one vCPU; its own thread's. */
struct place {
    unsigned busy; /* the thread is looking, and memory must stay where it is */
    uint64_t serial; /* of the recipe that what follows was found by */
    uint64_t generation;
    uint64_t session;
    uint64_t base; /* its own area, seen when there was no doubt; 0: not yet */
    uint64_t way_from; /* the area that the remembered way begins at; 0: there is none */
    struct task task;
    unsigned page_count;
    struct mapped pages[MOST_PAGES];
    const uint8_t *at[VMEXIT_MAX_STEPS]; /* where each step reads */
    struct mapped others[OTHER_PAGES];
    struct known_page known[PAGE_SETS][2];
    struct told told[TOLD];
};

static struct {
    const struct recipe *recipe;
    uint64_t serials; /* that were given; the link's thread's */
    uint64_t generation; /* rises when what was seen of memory and of vCPUs holds no more */
    uint64_t session;
    struct place *places; /* by vCPU; there once a recipe has come */
} tasks;

const struct task task_nobody;

/* ---- the recipe ---- */

static bool step_is_sound(const struct vmexit_step *step, uint32_t found)
{
    if (step->result == VMEXIT_FOUND_BASE || step->result >= VMEXIT_FOUNDS || found >> step->result & 1)
        return false;
    if (step->source >= VMEXIT_FOUNDS || step->source == VMEXIT_FOUND_NAME || !(found >> step->source & 1))
        return false;
    if (step->result == VMEXIT_FOUND_NAME)
        return step->size > 0 && step->size <= VMEXIT_NAME_BYTES && step->check == VMEXIT_CHECK_NONE;
    return (step->size == 1 || step->size == 2 || step->size == 4 || step->size == 8) && step->check <= VMEXIT_CHECK_SAME;
}

static bool recipe_is_sound(const struct vmexit_recipe *head, const uint64_t *bases)
{
    uint32_t found = 1u << VMEXIT_FOUND_BASE;
    if ((head->levels != 4 && head->levels != 5) || head->step_count > VMEXIT_MAX_STEPS)
        return false;
    for (uint32_t i = 0; i < head->step_count; i++) {
        if (!step_is_sound(&head->steps[i], found))
            return false;
        found |= 1u << head->steps[i].result;
    }
    for (uint32_t i = 0; i < head->base_count; i++)
        if (bases[i] == 0 || (i > 0 && bases[i] <= bases[i - 1]))
            return false;
    return (found >> VMEXIT_FOUND_PID & 1) && (head->stack_bytes != 0) == (found >> VMEXIT_FOUND_STACK & 1);
}

/* Null where it is not sound, or memory is short (`status` says which). */
static struct recipe *read_recipe(const uint8_t *bytes, size_t length, int *status)
{
    struct vmexit_recipe head;
    *status = VMEXIT_REFUSED;
    if (length < sizeof head)
        return NULL;
    memcpy(&head, bytes, sizeof head);
    if (head.base_count > VMEXIT_MAX_BASES || length != sizeof head + head.base_count * sizeof(uint64_t))
        return NULL;
    struct recipe *recipe = malloc(sizeof *recipe + head.base_count * sizeof(uint64_t));
    if (recipe == NULL) {
        *status = VMEXIT_UNAVAILABLE;
        return NULL;
    }
    *recipe = (struct recipe){.head = head, .serial = ++tasks.serials};
    memcpy(recipe->bases, bytes + sizeof head, head.base_count * sizeof(uint64_t));
    if (!recipe_is_sound(&recipe->head, recipe->bases)) {
        free(recipe);
        return NULL;
    }
    for (uint32_t i = 0; i < head.step_count; i++)
        recipe->sources |= 1u << head.steps[i].source;
    recipe->lowest_pointer = -(UINT64_C(1) << (12 + 9 * head.levels - 1));
    *status = VMEXIT_OK;
    return recipe;
}

static bool is_pointer(const struct recipe *recipe, uint64_t value)
{
    return value >= recipe->lowest_pointer && value < LAST_POINTER && value % 8 == 0;
}

static bool is_base(const struct recipe *recipe, uint64_t value)
{
    size_t from = 0, to = recipe->head.base_count;
    if (to == 0)
        return is_pointer(recipe, value);
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (recipe->bases[middle] == value)
            return true;
        if (recipe->bases[middle] < value)
            from = middle + 1;
        else
            to = middle;
    }
    return false;
}

/* ---- who reads, and who takes away ---- */

/* As table_enter: either the one who changes something sees that this vCPU is busy and waits, or this vCPU sees the change. */
static void begin(struct place *place)
{
    __atomic_store_n(&place->busy, 1, __ATOMIC_RELAXED);
    if (core.has_membarrier)
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    else
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void end(struct place *place) { __atomic_store_n(&place->busy, 0, __ATOMIC_RELEASE); }

static void wait_until_idle(void)
{
    const struct timespec moment = {.tv_nsec = 20000};
    struct place *places = __atomic_load_n(&tasks.places, __ATOMIC_ACQUIRE);
    if (core.has_membarrier)
        syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
    for (unsigned i = 0; places != NULL && i < core_vcpus(); i++)
        while (__atomic_load_n(&places[i].busy, __ATOMIC_SEQ_CST))
            nanosleep(&moment, NULL);
}

void tasks_distrust(void) { __atomic_fetch_add(&tasks.generation, 1, __ATOMIC_SEQ_CST); }

void tasks_forget_memory(void)
{
    int error = errno;
    tasks_distrust();
    wait_until_idle();
    errno = error;
}

/* Zeroes that take no memory until they are touched. */
static bool make_places(void)
{
    if (tasks.places)
        return true;
    void *memory = mmap(NULL, core_vcpus() * sizeof *tasks.places, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    __atomic_store_n(&tasks.places, memory, __ATOMIC_RELEASE);
    return true;
}

static void exchange_recipes(const struct recipe *recipe)
{
    const struct recipe *old = __atomic_exchange_n(&tasks.recipe, recipe, __ATOMIC_SEQ_CST);
    tasks_forget_memory();
    free((void *)old);
}

int tasks_set_recipe(const void *bytes, size_t length)
{
    int status = VMEXIT_OK;
    struct recipe *recipe = length ? read_recipe(bytes, length, &status) : NULL;
    if (status == VMEXIT_OK && recipe != NULL && (core.door->read_physical == NULL || !make_places())) {
        free(recipe);
        status = VMEXIT_UNAVAILABLE;
    }
    if (status == VMEXIT_OK)
        exchange_recipes(recipe);
    return status;
}

void tasks_begin_session(void)
{
    __atomic_fetch_add(&tasks.session, 1, __ATOMIC_SEQ_CST);
    exchange_recipes(NULL);
}

/* ---- the guest's memory ---- */

/* Where a page of physical memory is in this process; null: it is not to be read directly. */
static const uint8_t *page_at(struct place *place, uint64_t physical)
{
    struct known_page *set = place->known[physical / PAGE_BYTES * UINT64_C(0x9e3779b97f4a7c15) >> 57];
    if (set[0].physical == physical && set[0].bytes)
        return set[0].bytes;
    struct known_page found = set[1];
    if (found.physical != physical || found.bytes == NULL)
        found = (struct known_page){physical, core.door->find_page ? core.door->find_page(physical) : NULL};
    if (found.bytes) {
        set[1] = set[0];
        set[0] = found;
    }
    return found.bytes;
}

/* A walk through the page tables. */
struct walk {
    struct place *place;
    struct mapped *page;
};

static bool read_entry(void *context, uint64_t physical, void *bytes, uint32_t length, bool write)
{
    struct walk *walk = context;
    const uint8_t *page = page_at(walk->place, PAGE_START(physical));
    const unsigned level = walk->page->levels++;
    (void)write;
    if (page == NULL)
        return core.door->read_physical(physical, bytes, length);
    walk->page->entries[level].at = page + physical % PAGE_BYTES;
    memcpy(bytes, walk->page->entries[level].at, length);
    memcpy(&walk->page->entries[level].value, bytes, length);
    return true;
}

static uint64_t load(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static bool is_direct(const struct mapped *page)
{
    for (unsigned level = 0; level < page->levels; level++)
        if (page->entries[level].at == NULL)
            return false;
    return true;
}

static bool is_still_mapped(const struct mapped *page)
{
    for (unsigned level = page->shared; level < page->levels; level++)
        if (load(page->entries[level].at) != page->entries[level].value)
            return false;
    return true;
}

static bool map(struct place *place, const struct recipe *recipe, uint64_t address, struct mapped *found)
{
    struct walk walk = {.place = place, .page = found};
    *found = (struct mapped){.address = address};
    const struct paging paging = {
        .cr0 = CR0_PAGING,
        .cr3 = recipe->head.root,
        .cr4 = CR4_PAE | (recipe->head.levels == 5 ? CR4_LA57 : 0),
        .efer = EFER_LMA,
        .access = read_entry,
        .context = &walk,
    };
    if (!paging_translate(&paging, address, &found->physical, NULL))
        return false;
    found->bytes = page_at(place, found->physical);
    return true;
}

static const struct mapped *map_page(struct place *place, const struct recipe *recipe, uint64_t address)
{
    for (unsigned i = 0; i < place->page_count; i++)
        if (place->pages[i].address == address)
            return &place->pages[i];
    if (place->page_count == MOST_PAGES)
        return NULL;
    struct mapped *found = &place->pages[place->page_count];
    if (!map(place, recipe, address, found))
        return NULL;
    if (place->page_count++ > 0)
        while (found->shared < found->levels && found->entries[found->shared].at == place->pages[0].entries[found->shared].at)
            found->shared++;
    return found;
}

/* Reads guest memory. `at` is where all of it is in this process, or null where it is not in one piece or not to be read directly. */
static bool read_memory(struct place *place, const struct recipe *recipe, uint64_t address, uint8_t *bytes, uint32_t length,
                        const uint8_t **at)
{
    *at = NULL;
    for (uint32_t done = 0, now; done < length; done += now) {
        const uint64_t from = address + done, within = from % PAGE_BYTES;
        const struct mapped *page = map_page(place, recipe, PAGE_START(from));
        if (page == NULL)
            return false;
        now = length - done < PAGE_BYTES - within ? length - done : (uint32_t)(PAGE_BYTES - within);
        if (page->bytes == NULL) {
            if (!core.door->read_physical(page->physical + within, bytes + done, now))
                return false;
            continue;
        }
        memcpy(bytes + done, page->bytes + within, now);
        if (now == length)
            *at = page->bytes + within;
    }
    return true;
}

/* ---- the way ---- */

static bool passes(const struct recipe *recipe, const struct vmexit_step *step, uint64_t value, uint64_t source)
{
    switch (step->check) {
    case VMEXIT_CHECK_POINTER:
        return is_pointer(recipe, value);
    case VMEXIT_CHECK_POINTER_OR_NULL:
        return value == 0 || is_pointer(recipe, value);
    case VMEXIT_CHECK_MOST:
        return value <= step->operand;
    case VMEXIT_CHECK_SAME:
        return value == source + step->operand;
    default:
        return true;
    }
}

/* The guest is little-endian; so are the hosts. */
static uint64_t number_at(const uint8_t *bytes, unsigned size)
{
    uint32_t four;
    uint16_t two;
    switch (size) {
    case 8:
        return load(bytes);
    case 4:
        memcpy(&four, bytes, sizeof four);
        return four;
    case 2:
        memcpy(&two, bytes, sizeof two);
        return two;
    default:
        return *bytes;
    }
}

static bool is_named(const struct task *task, const uint8_t *name, unsigned size)
{
    return size == VMEXIT_NAME_BYTES ? memcmp(task->name, name, VMEXIT_NAME_BYTES) == 0 : memcmp(task->name, name, size) == 0;
}

/* What a step has read becomes part of the task. */
static bool take(const struct recipe *recipe, const struct vmexit_step *step, const uint8_t *bytes, struct task *task)
{
    if (step->result == VMEXIT_FOUND_NAME) {
        memset(task->name, 0, sizeof task->name);
        memcpy(task->name, bytes, step->size);
        return true;
    }
    const uint64_t value = number_at(bytes, step->size);
    task->found[step->result] = value;
    return passes(recipe, step, value, task->found[step->source]);
}

/* Goes all the way from an area to its thread, and remembers it. */
static bool follow(struct place *place, const struct recipe *recipe, uint64_t base)
{
    struct task *task = &place->task;
    bool can_repeat = true;
    place->way_from = 0;
    place->page_count = 0;
    *task = (struct task){.found[VMEXIT_FOUND_BASE] = base};
    for (uint32_t i = 0; i < recipe->head.step_count; i++) {
        const struct vmexit_step *step = &recipe->head.steps[i];
        uint8_t bytes[VMEXIT_NAME_BYTES];
        if (!read_memory(place, recipe, task->found[step->source] + step->offset, bytes, step->size, &place->at[i]) ||
            !take(recipe, step, bytes, task))
            return false;
        can_repeat &= place->at[i] != NULL;
    }
    for (unsigned i = 0; i < place->page_count; i++)
        can_repeat &= is_direct(&place->pages[i]);
    task->is_known = true;
    if (can_repeat)
        place->way_from = base;
    return true;
}

/* The same where the way is still the one that is remembered. False: it is not. */
static bool follow_again(struct place *place, const struct recipe *recipe)
{
    for (unsigned i = 0; i < place->page_count; i++)
        if (!is_still_mapped(&place->pages[i]))
            return false;
    struct task *task = &place->task;
    for (uint32_t i = 0; i < recipe->head.step_count; i++) {
        const struct vmexit_step *step = &recipe->head.steps[i];
        const uint64_t before = task->found[step->result];
        if (step->result == VMEXIT_FOUND_NAME) {
            if (is_named(task, place->at[i], step->size))
                continue;
            task->is_told = false;
            take(recipe, step, place->at[i], task);
            continue;
        }
        if (!take(recipe, step, place->at[i], task))
            return false;
        if (task->found[step->result] == before)
            continue;
        if (recipe->sources >> step->result & 1)
            return false;
        task->is_told = false;
    }
    return true;
}

static bool has_stack_of(const struct recipe *recipe, const struct task *task, uint64_t rsp)
{
    return recipe->head.stack_bytes == 0 || rsp - task->found[VMEXIT_FOUND_STACK] < recipe->head.stack_bytes;
}

/* The vCPU's own area, of the two that it may be; 0: they do not tell. A vCPU keeps its area, so where only one of them can be one, which
 * leaves no doubt (`is_sure`), it is worth to be remembered. */
static uint64_t choose_base(struct place *place, const struct recipe *recipe, unsigned vcpu, uint64_t gs_base, uint64_t rsp, bool *is_sure)
{
    uint64_t other = 0;
    *is_sure = false;
    if (gs_base == place->base && gs_base != 0)
        return gs_base;
    if (!core.door->get_kernel_gs_base(vcpu, &other))
        return 0;
    if (place->base)
        return other == place->base ? other : 0;
    const bool first = is_base(recipe, gs_base), second = other != gs_base && is_base(recipe, other);
    *is_sure = first != second;
    if (!first || !second)
        return first ? gs_base : second ? other : 0;
    const bool owns_first = follow(place, recipe, gs_base) && has_stack_of(recipe, &place->task, rsp);
    const bool owns_second = follow(place, recipe, other) && has_stack_of(recipe, &place->task, rsp);
    return owns_first == owns_second ? 0 : owns_first ? gs_base : other;
}

/* ---- names that the debugger has been told ---- */

static struct told *told_of(struct place *place, const struct task *task)
{
    return &place->told[task->found[VMEXIT_FOUND_TID] % TOLD];
}

static bool was_told(struct place *place, const struct task *task)
{
    const struct told *told = told_of(place, task);
    return told->is_told && told->thread == (uint32_t)task->found[VMEXIT_FOUND_TID] &&
           told->process == (uint32_t)task->found[VMEXIT_FOUND_PID] && memcmp(told->name, task->name, sizeof told->name) == 0;
}

void task_told(unsigned vcpu)
{
    struct place *place = &tasks.places[vcpu];
    struct task *task = &place->task;
    struct told *told = told_of(place, task);
    *told = (struct told){
        .is_told = true,
        .process = (uint32_t)task->found[VMEXIT_FOUND_PID],
        .thread = (uint32_t)task->found[VMEXIT_FOUND_TID],
    };
    memcpy(told->name, task->name, sizeof told->name);
    task->is_told = true;
}

/* ---- at a trap ---- */

/* What holds no more. */
static void refresh(struct place *place, const struct recipe *recipe)
{
    const uint64_t generation = __atomic_load_n(&tasks.generation, __ATOMIC_ACQUIRE);
    const uint64_t session = __atomic_load_n(&tasks.session, __ATOMIC_ACQUIRE);
    if (generation == place->generation && session == place->session && recipe->serial == place->serial)
        return;
    if (generation != place->generation || recipe->serial != place->serial) {
        place->base = place->way_from = 0;
        memset(place->known, 0, sizeof place->known);
        memset(place->others, 0, sizeof place->others);
    }
    if (session != place->session) {
        memset(place->told, 0, sizeof place->told);
        place->way_from = 0;
    }
    place->generation = generation;
    place->serial = recipe->serial;
    place->session = session;
}

static const struct task *look(struct place *place, const struct recipe *recipe, unsigned vcpu, uint64_t rsp)
{
    struct task_registers registers;
    bool is_sure;
    if (!core.door->get_task_registers(vcpu, &registers) || !registers.is_long)
        return &task_nobody;
    const uint64_t base = choose_base(place, recipe, vcpu, registers.gs_base, rsp, &is_sure);
    if (base == 0)
        return &task_nobody;
    if (base != place->way_from || !follow_again(place, recipe))
        if (!follow(place, recipe, base))
            return &task_nobody;
    if (is_sure)
        place->base = base;
    struct task *task = &place->task;
    if (!task->is_told)
        task->is_told = was_told(place, task);
    return task;
}

const struct task *task_now(unsigned vcpu, uint64_t rsp)
{
    if (__atomic_load_n(&tasks.recipe, __ATOMIC_ACQUIRE) == NULL)
        return &task_nobody;
    struct place *place = &__atomic_load_n(&tasks.places, __ATOMIC_ACQUIRE)[vcpu];
    const struct task *task = &task_nobody;
    begin(place);
    const struct recipe *recipe = __atomic_load_n(&tasks.recipe, __ATOMIC_ACQUIRE);
    if (recipe != NULL) {
        refresh(place, recipe);
        task = look(place, recipe, vcpu, rsp);
    }
    end(place);
    return task;
}

/* ---- other memory ---- */

bool task_begin_reading(unsigned vcpu, uint64_t *serial)
{
    if (__atomic_load_n(&tasks.recipe, __ATOMIC_ACQUIRE) == NULL)
        return false;
    struct place *place = &__atomic_load_n(&tasks.places, __ATOMIC_ACQUIRE)[vcpu];
    begin(place);
    const struct recipe *recipe = __atomic_load_n(&tasks.recipe, __ATOMIC_ACQUIRE);
    if (recipe == NULL) {
        end(place);
        return false;
    }
    refresh(place, recipe);
    *serial = place->serial + place->generation;
    return true;
}

void task_end_reading(unsigned vcpu) { end(&tasks.places[vcpu]); }

/* Where a page is in this process; null: nowhere. */
static const uint8_t *other_page(struct place *place, const struct recipe *recipe, uint64_t address)
{
    struct mapped *page = &place->others[address / PAGE_BYTES * UINT64_C(0x9e3779b97f4a7c15) >> 58];
    if (page->bytes != NULL && page->address == address && is_still_mapped(page))
        return page->bytes;
    /* One that is found through tables which cannot be looked at again is not there. */
    if (map(place, recipe, address, page) && is_direct(page))
        return page->bytes;
    page->bytes = NULL;
    return NULL;
}

bool task_read(unsigned vcpu, uint64_t address, void *bytes, uint32_t length)
{
    struct place *place = &tasks.places[vcpu];
    const struct recipe *recipe = __atomic_load_n(&tasks.recipe, __ATOMIC_ACQUIRE);
    for (uint32_t done = 0, now; done < length; done += now) {
        const uint64_t from = address + done, within = from % PAGE_BYTES;
        const uint8_t *page = recipe ? other_page(place, recipe, PAGE_START(from)) : NULL;
        if (page == NULL)
            return false;
        now = length - done < PAGE_BYTES - within ? length - done : (uint32_t)(PAGE_BYTES - within);
        memcpy((uint8_t *)bytes + done, page + within, now);
    }
    return true;
}

bool task_read_word(unsigned vcpu, uint64_t address, uint64_t *value, uint64_t *serial)
{
    const uint64_t within = address % PAGE_BYTES;
    if (within > PAGE_BYTES - sizeof *value || !task_begin_reading(vcpu, serial))
        return false;
    const struct recipe *recipe = __atomic_load_n(&tasks.recipe, __ATOMIC_ACQUIRE);
    const uint8_t *page = recipe ? other_page(&tasks.places[vcpu], recipe, address - within) : NULL;
    if (page)
        *value = load(page + within);
    task_end_reading(vcpu);
    return page != NULL;
}
