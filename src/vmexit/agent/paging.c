/* Page tables by the Intel SDM, volume 3, chapter 4 ("Paging"). What a table's entry allows is not looked at: a debugger may. */
#include "paging.h"

#include <stddef.h>

enum { CR0_PG = 1u << 31, CR4_PSE = 1 << 4, CR4_PAE = 1 << 5, CR4_LA57 = 1 << 12, EFER_LMA = 1 << 10 };
enum { PRESENT = 1, PAGE_SIZE = 1 << 7 };
enum { MOST_LEVELS = 5, LARGEST_PAGE_LEVEL = 2 };
/* Of a table so many bytes are read at a time. */
enum { CHUNK = 512 };

#define FRAME UINT64_C(0x000ffffffffff000)

/* Levels count from the bottom: an entry of level 0 maps 4 KB. */
struct mode {
    unsigned levels; /* 0: no paging */
    unsigned index_bits; /* of the virtual address, for each level */
    unsigned top_bits; /* and for the topmost one */
    unsigned entry_bytes;
    bool pages_2m; /* at level 1; 4 MB where an entry has four bytes */
    bool pages_1g;
    uint64_t root;
};

static struct mode mode_of(const struct paging *paging)
{
    struct mode mode = {.index_bits = 9, .top_bits = 9, .entry_bytes = 8, .pages_2m = true, .root = paging->cr3 & FRAME};
    if (!(paging->cr0 & CR0_PG))
        return (struct mode){0};
    if (paging->efer & EFER_LMA) {
        mode.levels = paging->cr4 & CR4_LA57 ? 5 : 4;
        mode.pages_1g = true;
    } else if (paging->cr4 & CR4_PAE) {
        mode.levels = 3;
        mode.top_bits = 2;
        mode.root = paging->cr3 & UINT64_C(0xffffffe0);
    } else {
        mode = (struct mode){.levels = 2, .index_bits = 10, .top_bits = 10, .entry_bytes = 4, .root = paging->cr3 & UINT64_C(0xfffff000)};
        mode.pages_2m = paging->cr4 & CR4_PSE;
    }
    return mode;
}

static unsigned shift_of(const struct mode *mode, unsigned level) { return 12 + level * mode->index_bits; }

static unsigned entries_of(const struct mode *mode, unsigned level)
{
    return 1u << (level + 1 == mode->levels ? mode->top_bits : mode->index_bits);
}

static unsigned address_bits(const struct mode *mode)
{
    return mode->levels <= 3 ? 32 : shift_of(mode, mode->levels);
}

/* In long mode the upper bits repeat the topmost one that is translated; in the others there are none. */
static uint64_t canonical(const struct mode *mode, uint64_t address)
{
    const unsigned unused = 64 - address_bits(mode);
    return mode->levels <= 3 ? address & UINT32_MAX : (uint64_t)((int64_t)(address << unused) >> unused);
}

static uint64_t entry_at(const struct mode *mode, const uint8_t *bytes)
{
    uint64_t entry = 0;
    for (unsigned i = 0; i < mode->entry_bytes; i++)
        entry |= (uint64_t)bytes[i] << 8 * i;
    return entry;
}

enum kind { NOTHING, PAGE, TABLE };

/* What an entry leads to, and where that is. */
static enum kind follow(const struct mode *mode, unsigned level, uint64_t entry, uint64_t *physical)
{
    const uint64_t within = (UINT64_C(1) << shift_of(mode, level)) - 1;
    if (!(entry & PRESENT))
        return NOTHING;
    *physical = entry & FRAME & ~within;
    if (level == 0)
        return PAGE;
    /* Without 4 MB pages the bit is ignored; elsewhere it is reserved where there is no such page, and the processor faults. */
    const bool large = entry & PAGE_SIZE && (mode->entry_bytes == 8 || mode->pages_2m);
    if (!large) {
        *physical = entry & FRAME;
        return TABLE;
    }
    if (mode->entry_bytes == 4)
        *physical = (entry & UINT64_C(0xffc00000)) | (entry >> 13 & 0xff) << 32; /* PSE-36 */
    return level > LARGEST_PAGE_LEVEL || (level == LARGEST_PAGE_LEVEL && !mode->pages_1g) ? NOTHING : PAGE;
}

bool paging_translate(const struct paging *paging, uint64_t virtual_address, uint64_t *physical, uint64_t *page)
{
    const struct mode mode = mode_of(paging);
    if (canonical(&mode, virtual_address) != virtual_address)
        return false;
    uint64_t at = mode.levels ? mode.root : virtual_address;
    uint64_t size = UINT64_C(1) << 32;
    for (unsigned level = mode.levels; level-- > 0;) {
        const uint64_t index = virtual_address >> shift_of(&mode, level) & (entries_of(&mode, level) - 1);
        uint8_t bytes[8] = {0};
        if (!paging->access(paging->context, at + index * mode.entry_bytes, bytes, mode.entry_bytes, false))
            return false;
        const enum kind kind = follow(&mode, level, entry_at(&mode, bytes), &at);
        if (kind == NOTHING)
            return false;
        if (kind == PAGE) {
            size = UINT64_C(1) << shift_of(&mode, level);
            at |= virtual_address & (size - 1);
            break;
        }
    }
    *physical = at;
    if (page)
        *page = size;
    return true;
}

/* ---- from a physical address back to a virtual one ---- */

struct search {
    const struct paging *paging;
    struct mode mode;
    uint64_t physical;
    unsigned tables; /* that may still be read */
    uint64_t path[MOST_LEVELS]; /* the tables on the way from the root, by level */
    uint64_t found;
};

/* Tables of some systems lead back to themselves; what is mapped that way is tables, and the search would not end. */
static bool is_on_path(const struct search *search, unsigned level, uint64_t table)
{
    for (unsigned above = level; above < search->mode.levels; above++)
        if (search->path[above] == table)
            return true;
    return false;
}

static bool search_table(struct search *search, unsigned level, uint64_t table, uint64_t base);

static bool search_entry(struct search *search, unsigned level, uint64_t entry, uint64_t base)
{
    const uint64_t size = UINT64_C(1) << shift_of(&search->mode, level);
    uint64_t at;
    switch (follow(&search->mode, level, entry, &at)) {
    case PAGE:
        if (search->physical - at >= size)
            return false;
        search->found = canonical(&search->mode, base | (search->physical - at));
        return true;
    case TABLE:
        return !is_on_path(search, level, at) && search_table(search, level - 1, at, base);
    default:
        return false;
    }
}

/* `first` and `count` in entries. */
static bool search_entries(struct search *search, unsigned level, uint64_t table, uint64_t base, unsigned first, unsigned count)
{
    const unsigned entry_bytes = search->mode.entry_bytes;
    uint8_t chunk[CHUNK];
    for (unsigned done = 0; done < count;) {
        unsigned now = CHUNK / entry_bytes;
        now = now < count - done ? now : count - done;
        const uint64_t at = table + (uint64_t)(first + done) * entry_bytes;
        if (!search->paging->access(search->paging->context, at, chunk, now * entry_bytes, false))
            return false;
        for (unsigned i = 0; i < now; i++, done++) {
            const uint64_t here = base | (uint64_t)(first + done) << shift_of(&search->mode, level);
            if (search_entry(search, level, entry_at(&search->mode, chunk + i * entry_bytes), here))
                return true;
        }
    }
    return false;
}

static bool search_table(struct search *search, unsigned level, uint64_t table, uint64_t base)
{
    const unsigned entries = entries_of(&search->mode, level);
    const bool is_top = level + 1 == search->mode.levels;
    if (search->tables == 0)
        return false;
    search->tables--;
    search->path[level] = table;
    if (!is_top)
        return search_entries(search, level, table, base, 0, entries);
    return search_entries(search, level, table, base, entries / 2, entries / 2) ||
           search_entries(search, level, table, base, 0, entries / 2);
}

bool paging_find(const struct paging *paging, uint64_t physical, unsigned tables, uint64_t *virtual_address)
{
    struct search search = {.paging = paging, .mode = mode_of(paging), .physical = physical, .tables = tables, .found = physical};
    bool found = physical <= UINT32_MAX;
    if (search.mode.levels)
        found = search_table(&search, search.mode.levels - 1, search.mode.root, 0);
    if (found)
        *virtual_address = search.found;
    return found;
}

/* ---- memory ---- */

bool paging_access(const struct paging *paging, uint64_t virtual_address, void *bytes, uint32_t length, bool write)
{
    uint8_t *at = bytes;
    while (length > 0) {
        uint64_t physical, page;
        if (!paging_translate(paging, virtual_address, &physical, &page))
            return false;
        const uint64_t left = page - (virtual_address & (page - 1));
        const uint32_t now = left < length ? (uint32_t)left : length;
        if (!paging->access(paging->context, physical, at, now, write))
            return false;
        virtual_address += now;
        at += now;
        length -= now;
    }
    return true;
}
