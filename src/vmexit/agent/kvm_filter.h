/* MSR filters of KVM: what a VMM has set for itself, what events want, and one filter that does for both. No ioctl is made here. */
#ifndef VMEXIT_KVM_FILTER_H
#define VMEXIT_KVM_FILTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Limits and flags of the kernel's (Documentation/virt/kvm/api.rst, KVM_X86_SET_MSR_FILTER). */
#define FILTER_RANGES 16
#define FILTER_RANGE_MSRS 12288
#define FILTER_BITMAP_BYTES 1536
#define FILTER_READ 1
#define FILTER_WRITE 2

struct filter_range {
    uint32_t flags; /* FILTER_READ, FILTER_WRITE */
    uint32_t first;
    uint32_t count; /* of MSRs; 0: the range is not used */
    uint8_t allowed[FILTER_BITMAP_BYTES]; /* a bit an MSR */
};

/* Of ranges that overlap the first one counts; what is in none is allowed unless `denies_others`. */
struct filter {
    bool denies_others;
    uint32_t count;
    struct filter_range ranges[FILTER_RANGES];
};

/* MSRs, both ends included, that somebody wants to see accessed in these ways. */
struct filter_want {
    uint32_t flags;
    uint32_t first;
    uint32_t last;
};

/* Whether the processor does this access (FILTER_READ or FILTER_WRITE) itself. As in KVM, x2APIC MSRs are always allowed. */
bool filter_allows(const struct filter *filter, uint32_t msr, uint32_t flag);
/* Makes a filter that denies whatever `own` denies or somebody wants; it may deny more where the kernel's limits leave no other way,
 * so each access that comes of it has to be looked up. False where memory is short. */
bool filter_merge(const struct filter *own, const struct filter_want *wants, size_t count, struct filter *merged);

#endif
