/* Finding the memory slots that a VMM had set up before the agent came into it. No ioctl tells them, but KVM says whether a guess is
 * right. What KVM_SET_USER_MEMORY_REGION does (virt/kvm/kvm_main.c, kvm_set_memory_region), in this order:
 *
 *   a slot that is there; another size, address in the VMM or KVM_MEM_READONLY        EINVAL
 *   the same, and at the same guest address                                           0, and nothing is done (where the flags differ: they change)
 *   the same at another guest address, or a slot that is not there, over another one  EEXIST
 *   else                                                                              it is moved, or made
 *
 * Nothing must be moved or made, so no guess is made for which that could be. To be sure of EEXIST the agent first makes a slot of its
 * own, of one page, at an address that is free: the guard. A guess that covers the guard is answered and nothing else, whatever it says.
 * The guard itself may be moved, and so tells which addresses are free. Where a slot begins or ends, a guess that begins or ends there
 * is either right or overlaps another slot (see confirm). Meanwhile no vCPU is in the guest, and no other thread of the VMM gets to
 * change slots; at the end the guard is deleted. A virtual machine of the agent's own is asked first whether this kernel keeps to all that.
 */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm.h"

enum { MOST_SLOTS = 64, LAST_NUMBER = 1023, MOST_BORDERS = 64, MOST_MARKS = 4096, MARKS_OF_A_RUN = 64, MOST_GUESSES = 200000 };
enum { HIGHEST_BITS = 51, LOWEST_BITS = 33 };
#define PAGE UINT64_C(4096)
#define LARGE_PAGE (512 * PAGE)
/* KVM_MEM_MAX_NR_PAGES: no slot is that large. */
#define HUGE_SIZE (((UINT64_C(1) << 31) - 1) * PAGE)

/* What is known of one of the VMM's slots. */
struct guess {
    uint32_t number;
    uint32_t flags;
    uint64_t size; /* 0: nothing is known but that it is there */
    uint64_t memory;
    uint64_t at; /* the guest's address */
    bool found;
};

/* Places in the VMM where one of its mappings begins or ends; `run` tells those apart between which nothing is mapped. */
struct mark {
    uint64_t address;
    unsigned run;
};

static struct {
    int vm;
    struct {
        uint32_t number;
        uint64_t at;
        char *page;
    } guard;
    bool failed; /* KVM has said something that it never says */
    unsigned guesses;
    struct guess slots[MOST_SLOTS];
    unsigned slot_count;
    /* Pages that are memory, and the one before it is not, or is another slot's; the addresses behind such, the other way round. */
    uint64_t starts[MOST_BORDERS];
    unsigned start_count;
    uint64_t ends[MOST_BORDERS];
    unsigned end_count;
    struct mark marks[MOST_MARKS];
    unsigned mark_count;
} search;

/* ---- asking KVM ---- */

static int set_slot(uint32_t number, uint32_t flags, uint64_t at, uint64_t size, uint64_t memory)
{
    const struct kvm_userspace_memory_region region = {
        .slot = number, .flags = flags, .guest_phys_addr = at, .memory_size = size, .userspace_addr = memory};
    return kvm_plain(search.vm, KVM_SET_USER_MEMORY_REGION, (void *)&region) == 0 ? 0 : errno;
}

/* Of a guess that covers the guard. */
static bool answered_as(int wanted, int other, int said)
{
    search.guesses++;
    search.failed |= said != wanted && said != other;
    return said == wanted;
}

static bool is_there(uint32_t number)
{
    return answered_as(EINVAL, EEXIST, set_slot(number, 0, search.guard.at, HUGE_SIZE, PAGE));
}

static bool is_right(uint32_t number, uint32_t flags, uint64_t size, uint64_t memory)
{
    return answered_as(EEXIST, EINVAL, set_slot(number, flags, search.guard.at, size, memory));
}

/* Whether there is memory at that page; the guard is there then if not. KVM refuses an address that no processor has (EINVAL) only
 * after it has looked for other slots. */
static bool is_taken(uint64_t at)
{
    const int said = set_slot(search.guard.number, 0, at, PAGE, (uintptr_t)search.guard.page);
    if (said == 0)
        search.guard.at = at;
    search.failed |= said != 0 && said != EEXIST && said != EINVAL;
    return said == EEXIST;
}

/* KVM_MEM_LOG_DIRTY_PAGES, if the slot has it; asked with a page that no slot has, so that no page is cleared. False: KVM does not say. */
static bool get_logging(uint32_t number, uint32_t *flags)
{
    struct kvm_clear_dirty_log ask = {.slot = number, .first_page = UINT64_C(1) << 40};
    const int said = kvm_plain(search.vm, KVM_CLEAR_DIRTY_LOG, &ask) == 0 ? 0 : errno;
    *flags = said == EINVAL ? KVM_MEM_LOG_DIRTY_PAGES : 0;
    return said == EINVAL || said == ENOENT;
}

static bool make_guard(uint32_t last_number)
{
    search.guard.page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (search.guard.page == MAP_FAILED)
        return false;
    search.guard.number = last_number;
    /* As high as the processor's addresses go. EINVAL also where the VMM has a slot of that number: its memory is not this page. */
    for (unsigned bits = HIGHEST_BITS; bits >= LOWEST_BITS; bits--) {
        search.guard.at = (UINT64_C(1) << bits) - PAGE;
        if (set_slot(search.guard.number, 0, search.guard.at, PAGE, (uintptr_t)search.guard.page) == 0)
            return true;
    }
    munmap(search.guard.page, PAGE);
    return false;
}

static void remove_guard(void)
{
    set_slot(search.guard.number, 0, 0, 0, 0);
    munmap(search.guard.page, PAGE);
}

/* Two slots in a virtual machine that nobody runs. */
static bool keeps_to_it(void)
{
    uint32_t flags;
    char *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const uint64_t memory = (uintptr_t)pages;
    if (pages == MAP_FAILED)
        return false;
    bool right = make_guard(1);
    if (right) {
        const uint64_t away = search.guard.at;
        right = set_slot(0, 0, 0, 2 * PAGE, memory) == 0 && is_there(0) && !is_there(2) && is_right(0, 0, 2 * PAGE, memory) &&
                !is_right(0, 0, PAGE, memory) && !is_right(0, 0, 2 * PAGE, memory + PAGE) &&
                !is_right(0, KVM_MEM_READONLY, 2 * PAGE, memory) && is_taken(PAGE) && !is_taken(2 * PAGE) && !is_taken(away) &&
                set_slot(0, 0, 0, 2 * PAGE, memory) == 0 && get_logging(0, &flags) && flags == 0 && !search.failed;
        remove_guard();
    }
    munmap(pages, 2 * PAGE);
    return right;
}

static bool kernel_keeps_to_it(int device)
{
    int ours = device < 0 ? open("/dev/kvm", O_RDWR | O_CLOEXEC) : -1;
    search.vm = kvm_plain(ours < 0 ? device : ours, KVM_CREATE_VM, NULL);
    bool right = search.vm >= 0 && keeps_to_it();
    if (search.vm >= 0)
        close(search.vm);
    if (ours >= 0)
        close(ours);
    return right;
}

/* ---- where memory begins and ends ---- */

static void add_border(uint64_t *borders, unsigned *count, uint64_t at)
{
    for (unsigned i = 0; i < *count; i++)
        if (borders[i] == at)
            return;
    if (*count < MOST_BORDERS)
        borders[(*count)++] = at;
}

/* Distances from `at`: the page at `taken` is memory, that at `open` is none. By halves the first one that is none. */
static uint64_t narrow(uint64_t at, uint64_t taken, uint64_t open, bool upward)
{
    while (open - taken > PAGE) {
        const uint64_t middle = (taken + (open - taken) / 2) & ~(PAGE - 1);
        if (is_taken(upward ? at + middle : at - middle))
            taken = middle;
        else
            open = middle;
    }
    return open;
}

/* In large steps first, then by halves: a gap in between may be missed. */
static uint64_t end_from(uint64_t at)
{
    uint64_t step = PAGE;
    while (step < UINT64_C(1) << HIGHEST_BITS && is_taken(at + step))
        step *= 2;
    return at + narrow(at, step > PAGE ? step / 2 : 0, step, true);
}

static uint64_t start_from(uint64_t at)
{
    uint64_t step = PAGE;
    while (step <= at && is_taken(at - step))
        step *= 2;
    if (step > at && is_taken(0))
        return 0;
    return at - narrow(at, step > PAGE ? step / 2 : 0, step > at ? at : step, false) + PAGE;
}

static void look_from(uint64_t at)
{
    at &= ~(PAGE - 1);
    if (!is_taken(at))
        return;
    const uint64_t start = start_from(at), end = end_from(at);
    /* What confirm relies on. */
    if (is_taken(start) && (start == 0 || !is_taken(start - PAGE)))
        add_border(search.starts, &search.start_count, start);
    if (is_taken(end - PAGE) && !is_taken(end))
        add_border(search.ends, &search.end_count, end);
}

/* Where there is memory as a rule, and where the vCPUs are. */
static void look_around(void)
{
    static const uint64_t usual[] = {0, 0x9f000, 0xc0000, 0xf0000, 0x100000, 0x1000000, 0xfffff000, UINT64_C(1) << 32};
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++)
        look_from(usual[i]);
    for (unsigned i = 0; i < vm.count; i++) {
        struct kvm_sregs sregs;
        struct kvm_regs regs;
        if (kvm_plain(vm.cpus[i]->fd, KVM_GET_SREGS, &sregs) != 0 || kvm_plain(vm.cpus[i]->fd, KVM_GET_REGS, &regs) != 0)
            continue;
        struct kvm_translation place = {.linear_address = sregs.cs.base + regs.rip};
        if (kvm_plain(vm.cpus[i]->fd, KVM_TRANSLATE, &place) == 0 && place.valid)
            look_from(place.physical_address);
        look_from(sregs.cr3);
    }
}

/* ---- where the VMM has it ---- */

static void read_marks(void)
{
    char *line = NULL;
    size_t room = 0;
    uint64_t first, last;
    FILE *maps = fopen("/proc/self/maps", "re");
    search.mark_count = 0;
    unsigned run = 0;
    while (maps && getline(&line, &room, maps) > 0 && search.mark_count + 2 <= MOST_MARKS) {
        char read;
        if (sscanf(line, "%lx-%lx %c", &first, &last, &read) != 3 || read != 'r' || strstr(line, "[v"))
            continue;
        const bool goes_on = search.mark_count > 0 && search.marks[search.mark_count - 1].address == first;
        if (!goes_on)
            search.marks[search.mark_count++] = (struct mark){first, ++run};
        search.marks[search.mark_count++] = (struct mark){last, run};
    }
    free(line);
    if (maps)
        fclose(maps);
}

static bool may_guess(void) { return !search.failed && search.guesses < MOST_GUESSES; }

static bool try_as(struct guess *slot, uint32_t flags, uint64_t size, uint64_t memory)
{
    if (!may_guess() || !is_right(slot->number, flags, size, memory))
        return false;
    slot->size = size;
    slot->memory = memory;
    slot->flags = flags;
    return true;
}

static bool try_memory(struct guess *slot, uint64_t size, uint64_t memory)
{
    return try_as(slot, 0, size, memory) || try_as(slot, KVM_MEM_READONLY, size, memory);
}

/* A mapping as a whole, or some that lie side by side. */
static bool try_mappings(struct guess *slot)
{
    for (unsigned i = 0; i < search.mark_count; i++)
        for (unsigned j = i + 1; j < search.mark_count && j < i + MARKS_OF_A_RUN && search.marks[j].run == search.marks[i].run; j++)
            if (try_memory(slot, search.marks[j].address - search.marks[i].address, search.marks[i].address))
                return true;
    return false;
}

/* As much as between two borders. VMMs mostly lay memory out as the guest sees it; the kernel may have put such a mapping together with
 * others, and aligns large ones. */
static bool try_from_to(struct guess *slot, uint64_t start, uint64_t end)
{
    const uint64_t size = end - start;
    for (unsigned i = 0; i < search.slot_count; i++)
        if (search.slots[i].found && try_memory(slot, size, search.slots[i].memory + (start - search.slots[i].at)))
            return true;
    for (unsigned i = 0; i + 1 < search.mark_count; i++) {
        const struct mark *first = &search.marks[i], *next = first + 1;
        if (first->run != next->run || next->address - first->address < size)
            continue;
        if (try_memory(slot, size, first->address) || try_memory(slot, size, first->address + start) ||
            try_memory(slot, size, next->address - size))
            return true;
        for (uint64_t base = (first->address + LARGE_PAGE) & ~(LARGE_PAGE - 1); base < next->address && may_guess(); base += LARGE_PAGE)
            if (try_memory(slot, size, base) || (start && try_memory(slot, size, base + start)))
                return true;
    }
    return false;
}

/* Any place in any mapping that is large enough. */
static bool try_everywhere(struct guess *slot, uint64_t start, uint64_t end)
{
    const uint64_t size = end - start;
    for (unsigned i = 0; i + 1 < search.mark_count; i++) {
        const struct mark *first = &search.marks[i], *next = first + 1;
        if (first->run == next->run && next->address - first->address > size)
            for (uint64_t memory = first->address + PAGE; memory + size < next->address && may_guess(); memory += PAGE)
                if (try_as(slot, 0, size, memory))
                    return true;
    }
    return false;
}

static bool try_borders(struct guess *slot, bool (*try)(struct guess *slot, uint64_t start, uint64_t end))
{
    /* Where memory for firmware and for devices of old begins. */
    static const uint64_t cuts[] = {0xa0000, 0xc0000, 0xe0000, 0xf0000, 0x100000, UINT64_C(1) << 32};
    enum { CUTS = sizeof cuts / sizeof *cuts };
    for (unsigned i = 0; i < search.start_count + CUTS; i++)
        for (unsigned j = 0; j < search.end_count + CUTS; j++) {
            const uint64_t start = i < search.start_count ? search.starts[i] : cuts[i - search.start_count];
            const uint64_t end = j < search.end_count ? search.ends[j] : cuts[j - search.end_count];
            /* One of them at least has to be a border. */
            if (end > start && (i < search.start_count || j < search.end_count) && try(slot, start, end))
                return true;
        }
    return false;
}

/* ---- both put together ---- */

/* Size, memory and flags are known to be right. `at` is such that the range begins where memory begins, or ends where it ends. Take the
 * page there: it is in this slot, which then begins or ends there too, and the guess is right; or it is in another, and KVM says EEXIST. */
static bool confirm(struct guess *slot, uint64_t at)
{
    uint32_t logging;
    if (!get_logging(slot->number, &logging))
        return false;
    const int said = set_slot(slot->number, slot->flags | logging, at, slot->size, slot->memory);
    search.failed |= said != 0 && said != EEXIST;
    if (said != 0)
        return false;
    slot->at = at;
    state_know_memory(slot->number, at, slot->size, slot->memory);
    return true;
}

static bool place(struct guess *slot)
{
    bool found = false;
    for (unsigned i = 0; i < search.start_count && !found && !search.failed; i++)
        found = confirm(slot, search.starts[i]);
    for (unsigned i = 0; i < search.end_count && !found && !search.failed; i++)
        found = search.ends[i] >= slot->size && confirm(slot, search.ends[i] - slot->size);
    if (found) {
        /* Its neighbours begin and end where it does. */
        if (is_taken(slot->at + slot->size))
            add_border(search.starts, &search.start_count, slot->at + slot->size);
        if (slot->at > 0 && is_taken(slot->at - PAGE))
            add_border(search.ends, &search.end_count, slot->at);
    }
    return found;
}

/* What was found of one helps to find others: whether there was any. */
static bool find_more(bool everywhere)
{
    bool more = false;
    for (unsigned i = 0; i < search.slot_count && may_guess(); i++) {
        struct guess *slot = &search.slots[i];
        if (slot->found)
            continue;
        if (slot->size == 0 && !(everywhere ? try_borders(slot, try_everywhere) : try_mappings(slot) || try_borders(slot, try_from_to)))
            continue;
        more |= slot->found = place(slot);
    }
    return more;
}

static void find_all(uint32_t last_number)
{
    for (uint32_t i = 0; i < last_number && i <= LAST_NUMBER && search.slot_count < MOST_SLOTS && !search.failed; i++)
        if (is_there(i))
            search.slots[search.slot_count++].number = i;
    read_marks();
    look_around();
    while (find_more(false) || find_more(true))
        ;
}

/* Memory that only the guest is to see has flags that must not be set anew. */
static bool has_private_memory(void)
{
    bool found = false;
    char path[64], target[64];
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    while (folder && !found && (entry = readdir(folder)) != NULL) {
        snprintf(path, sizeof path, "/proc/self/fd/%.20s", entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        target[length > 0 ? length : 0] = '\0';
        found = strstr(target, "gmem") || strstr(target, "guest_memfd");
    }
    if (folder)
        closedir(folder);
    return found || folder == NULL;
}

void slots_find(int device)
{
    if (state_has_memory() || has_private_memory() || !kernel_keeps_to_it(device))
        return;
    search.vm = vm.fd;
    const int slots = kvm_plain(search.vm, KVM_CHECK_EXTENSION, (void *)KVM_CAP_NR_MEMSLOTS);
    if (slots <= 1 || !halt_begin_silence())
        return;
    search.guesses = 0;
    if (make_guard((uint32_t)slots - 1)) {
        find_all((uint32_t)slots - 1);
        remove_guard();
    }
    halt_end_silence();
}
#endif
