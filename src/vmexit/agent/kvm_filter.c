/* Merging filters. Both are laid over the same few stretches of MSRs, for each of which KVM gets a bitmap. */
#include "kvm_filter.h"

#include <stdlib.h>
#include <string.h>

enum { X2APIC_FIRST = 0x800, X2APIC_LAST = 0x8ff };
/* As many stretches can have a bitmap each for reads and for writes. */
enum { MOST_WITH_TWO = FILTER_RANGES / 2 };

struct stretch {
    uint32_t first;
    uint32_t last; /* inclusive, less than FILTER_RANGE_MSRS away */
};

/* Where processors and hypervisors have MSRs: Intel's and AMD's low and high ones, AMD's own, and those of Hyper-V and KVM. Where all
 * others are denied, those that nobody wants are allowed here. */
static const struct stretch populated[] = {
    {0, 0x2fff}, {0x40000000, 0x400001ff}, {0x4b564d00, 0x4b564dff}, {0xc0000000, 0xc0002fff}, {0xc0010000, 0xc0012fff},
};

static bool bit(const uint8_t *bits, uint32_t number) { return bits[number / 8] >> number % 8 & 1; }

static bool is_x2apic(uint64_t msr) { return msr >= X2APIC_FIRST && msr <= X2APIC_LAST; }

bool filter_allows(const struct filter *filter, uint32_t msr, uint32_t flag)
{
    if (is_x2apic(msr))
        return true;
    for (unsigned i = 0; i < filter->count; i++) {
        const struct filter_range *range = &filter->ranges[i];
        if ((range->flags & flag) && msr - range->first < range->count)
            return bit(range->allowed, msr - range->first);
    }
    return !filter->denies_others;
}

/* ---- stretches ---- */

struct stretches {
    size_t count;
    size_t room;
    struct stretch *items;
};

static void add(struct stretches *stretches, uint32_t first, uint32_t last)
{
    if (stretches->count < stretches->room)
        stretches->items[stretches->count++] = (struct stretch){first, last};
}

static int by_first(const void *a, const void *b)
{
    const uint32_t first = ((const struct stretch *)a)->first, other = ((const struct stretch *)b)->first;
    return (first > other) - (first < other);
}

/* Joins what overlaps or is near to each other, as far as a bitmap reaches: disjoint ones remain, in order. */
static void join(struct stretches *stretches)
{
    size_t joined = 0;
    struct stretch *items = stretches->items;
    qsort(items, stretches->count, sizeof *items, by_first);
    for (size_t i = 0; i < stretches->count; i++) {
        struct stretch next = items[i];
        struct stretch *last = joined ? &items[joined - 1] : NULL;
        if (last && next.last <= last->last)
            continue;
        if (last && next.last - last->first < FILTER_RANGE_MSRS) {
            last->last = next.last;
            continue;
        }
        if (last && next.first <= last->last)
            next.first = last->last + 1;
        items[joined++] = next;
    }
    stretches->count = joined;
}

/* ---- bitmaps ---- */

/* x2APIC MSRs stay allowed, in keeping with KVM; so a filter that denies all others is never without a range, which KVM refuses. */
static void forbid(uint8_t *allowed, struct stretch stretch, uint32_t first, uint32_t last)
{
    first = first > stretch.first ? first : stretch.first;
    last = last < stretch.last ? last : stretch.last;
    for (uint64_t msr = first; msr <= last; msr++)
        if (!is_x2apic(msr))
            allowed[(msr - stretch.first) / 8] &= (uint8_t) ~(1u << (msr - stretch.first) % 8);
}

/* True where the bitmap says anything but what holds for all others. */
static bool fill(struct filter_range *range, struct stretch stretch, uint32_t flags, const struct filter *own,
                 const struct filter_want *wants, size_t count, bool denies_others)
{
    *range = (struct filter_range){.flags = flags, .first = stretch.first, .count = stretch.last - stretch.first + 1};
    for (uint32_t i = 0; i < range->count; i++) {
        bool allowed = (!(flags & FILTER_READ) || filter_allows(own, stretch.first + i, FILTER_READ)) &&
                       (!(flags & FILTER_WRITE) || filter_allows(own, stretch.first + i, FILTER_WRITE));
        range->allowed[i / 8] |= (uint8_t)(allowed << i % 8);
    }
    for (size_t i = 0; i < count; i++)
        if (wants[i].flags & flags)
            forbid(range->allowed, stretch, wants[i].first, wants[i].last);
    for (uint32_t i = 0; i < range->count; i++)
        if (bit(range->allowed, i) == denies_others)
            return true;
    return false;
}

static void lay_over(struct filter *merged, struct stretch stretch, const struct filter *own, const struct filter_want *wants,
                     size_t count, bool with_two)
{
    struct filter_range *range = &merged->ranges[merged->count];
    const bool denies = merged->denies_others;
    if (!with_two) {
        merged->count += fill(range, stretch, FILTER_READ | FILTER_WRITE, own, wants, count, denies);
        return;
    }
    const bool reads = fill(range, stretch, FILTER_READ, own, wants, count, denies);
    struct filter_range *second = range + reads;
    const bool writes = fill(second, stretch, FILTER_WRITE, own, wants, count, denies);
    if (reads && writes && memcmp(range->allowed, second->allowed, sizeof range->allowed) == 0) {
        range->flags |= FILTER_WRITE;
        merged->count++;
    } else {
        merged->count += (unsigned)reads + writes;
    }
}

/* False where it cannot be told exactly with all others allowed. */
static bool collect(struct stretches *stretches, const struct filter *own, const struct filter_want *wants, size_t count, bool denies)
{
    stretches->count = 0;
    for (unsigned i = 0; i < own->count; i++)
        if (own->ranges[i].count)
            add(stretches, own->ranges[i].first, own->ranges[i].first + (own->ranges[i].count - 1));
    for (size_t i = 0; i < count && !denies; i++) {
        if (wants[i].last - wants[i].first >= FILTER_RANGE_MSRS)
            return false;
        add(stretches, wants[i].first, wants[i].last);
    }
    for (size_t i = 0; i < sizeof populated / sizeof *populated && denies; i++)
        add(stretches, populated[i].first, populated[i].last);
    join(stretches);
    return denies || stretches->count <= FILTER_RANGES;
}

bool filter_merge(const struct filter *own, const struct filter_want *wants, size_t count, struct filter *merged)
{
    const size_t room = FILTER_RANGES + sizeof populated / sizeof *populated + count;
    struct stretches stretches = {.room = room, .items = malloc(room * sizeof *stretches.items)};
    if (stretches.items == NULL)
        return false;
    merged->count = 0;
    merged->denies_others = own->denies_others;
    if (!collect(&stretches, own, wants, count, merged->denies_others)) {
        merged->denies_others = true;
        collect(&stretches, own, wants, count, true);
    }
    const bool with_two = stretches.count <= MOST_WITH_TWO;
    for (size_t i = 0; i < stretches.count && merged->count < FILTER_RANGES; i++)
        lay_over(merged, stretches.items[i], own, wants, count, with_two);
    free(stretches.items);
    return true;
}
