/* Which MSR accesses leave the guest, and carrying them out. KVM keeps one filter and one mask of reasons a VM: the VMM's own are kept
 * here, and what KVM gets is made of them and of what events want. */
#if defined(__x86_64__)
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kvm.h"
#include "kvm_filter.h"

enum { IA32_UCODE_REV = 0x8b, IA32_EFER = 0xc0000080 };
enum { EFER_LME = 1 << 8, GENERAL_PROTECTION = 13 };
#define CR0_PG (UINT64_C(1) << 31)

/* MSRs that a VMM may set and the guest may not: KVM_SET_MSRS would do what is #GP for the guest (arch/x86/kvm/x86.c). */
static const struct {
    uint32_t first;
    uint32_t last;
} read_only[] = {{0x34, 0x34}, {0xce, 0xcf}, {0x10a, 0x10a}, {0x345, 0x345}, {0x480, 0x493}};

static struct {
    struct filter own;
    uint64_t own_reasons;
    struct filter merged;
    struct filter_want *wants;
    size_t want_count;
} msrs;

/* ---- what KVM gets ---- */

static int set_reasons(uint64_t reasons)
{
    struct kvm_enable_cap capability = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {reasons}};
    return kvm_plain(vm.fd, KVM_ENABLE_CAP, &capability);
}

static int set_filter(struct filter *filter)
{
    struct kvm_msr_filter set = {.flags = filter->denies_others ? KVM_MSR_FILTER_DEFAULT_DENY : KVM_MSR_FILTER_DEFAULT_ALLOW};
    for (unsigned i = 0; i < filter->count; i++)
        set.ranges[i] = (struct kvm_msr_filter_range){.flags = filter->ranges[i].flags,
                                                      .base = filter->ranges[i].first,
                                                      .nmsrs = filter->ranges[i].count,
                                                      .bitmap = filter->ranges[i].allowed};
    return kvm_plain(vm.fd, KVM_X86_SET_MSR_FILTER, &set);
}

static int set_merged(void)
{
    if (!filter_merge(&msrs.own, msrs.wants, msrs.want_count, &msrs.merged)) {
        errno = ENOMEM;
        return -1;
    }
    return set_filter(&msrs.merged);
}

/* The reason comes before the filter, and goes after it: a filter alone gives the guest #GP. */
static bool arm(void)
{
    if (msrs.want_count) {
        bool armed = set_reasons(msrs.own_reasons | KVM_MSR_EXIT_REASON_FILTER) == 0 && set_merged() == 0;
        __atomic_store_n(&vm.is_armed, true, __ATOMIC_RELAXED);
        return armed;
    }
    if (!vm.is_armed)
        return true;
    __atomic_store_n(&vm.is_armed, false, __ATOMIC_RELAXED);
    return set_filter(&msrs.own) == 0 && set_reasons(msrs.own_reasons) == 0;
}

static struct filter_want *make_wants(const struct vmexit_event *events, size_t count, size_t *want_count)
{
    *want_count = 0;
    for (size_t i = 0; i < count; i++)
        *want_count += events[i].flags & VMEXIT_ENABLED ? events[i].range_count : 0;
    struct filter_want *wants = malloc((*want_count + 1) * sizeof *wants), *want = wants;
    for (size_t i = 0; i < count && wants; i++)
        for (uint32_t r = 0; r < events[i].range_count && (events[i].flags & VMEXIT_ENABLED); r++)
            *want++ = (struct filter_want){
                .flags = (events[i].access & VMEXIT_WRMSR ? FILTER_WRITE : 0u) | (events[i].access & VMEXIT_RDMSR ? FILTER_READ : 0u),
                .first = events[i].ranges[r].first,
                .last = events[i].ranges[r].last,
            };
    return wants;
}

int msrs_want(const struct vmexit_event *events, size_t count)
{
    size_t want_count;
    struct filter_want *wants = make_wants(events, count, &want_count);
    if (wants == NULL)
        return VMEXIT_UNAVAILABLE;
    pthread_mutex_lock(&kvm_lock);
    struct filter_want *before = msrs.wants;
    msrs.wants = wants;
    msrs.want_count = want_count;
    bool armed = arm();
    pthread_mutex_unlock(&kvm_lock);
    free(before);
    return armed ? VMEXIT_OK : VMEXIT_UNAVAILABLE;
}

/* ---- the VMM's own ---- */

int msrs_enable_cap(const struct kvm_enable_cap *capability)
{
    struct kvm_enable_cap changed = *capability;
    pthread_mutex_lock(&kvm_lock);
    if (vm.is_armed)
        changed.args[0] |= KVM_MSR_EXIT_REASON_FILTER;
    int result = kvm_plain(vm.fd, KVM_ENABLE_CAP, &changed);
    if (result == 0)
        msrs.own_reasons = capability->args[0];
    pthread_mutex_unlock(&kvm_lock);
    return result;
}

/* What the kernel would refuse as well is left to it. */
static bool copy_filter(const struct kvm_msr_filter *given, struct filter *filter)
{
    *filter = (struct filter){.denies_others = given->flags & KVM_MSR_FILTER_DEFAULT_DENY};
    for (unsigned i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
        const struct kvm_msr_filter_range *range = &given->ranges[i];
        if (range->nmsrs == 0)
            continue;
        if (range->nmsrs > FILTER_RANGE_MSRS || range->flags == 0 || range->flags > (FILTER_READ | FILTER_WRITE))
            return false;
        struct filter_range *copy = &filter->ranges[filter->count++];
        *copy = (struct filter_range){.flags = range->flags, .first = range->base, .count = range->nmsrs};
        memcpy(copy->allowed, range->bitmap, (range->nmsrs + 7) / 8);
    }
    return given->flags <= KVM_MSR_FILTER_DEFAULT_DENY && (filter->count > 0 || !filter->denies_others);
}

int msrs_set_filter(const struct kvm_msr_filter *given)
{
    static struct filter filter; /* too large for a thread's stack; under the lock */
    int result;
    pthread_mutex_lock(&kvm_lock);
    if (!copy_filter(given, &filter)) {
        result = kvm_plain(vm.fd, KVM_X86_SET_MSR_FILTER, (void *)given);
    } else if (!vm.is_armed) {
        result = kvm_plain(vm.fd, KVM_X86_SET_MSR_FILTER, (void *)given);
        if (result == 0)
            msrs.own = filter;
    } else {
        msrs.own = filter;
        result = set_merged();
    }
    pthread_mutex_unlock(&kvm_lock);
    return result;
}

void msrs_assume(const struct kvm_msr_filter *filter, uint64_t reasons)
{
    copy_filter(filter, &msrs.own);
    msrs.own_reasons = reasons;
}

bool msrs_own_denies(uint32_t msr, bool write)
{
    pthread_mutex_lock(&kvm_lock);
    bool allowed = filter_allows(&msrs.own, msr, write ? FILTER_WRITE : FILTER_READ);
    pthread_mutex_unlock(&kvm_lock);
    return !allowed;
}

bool msrs_own_reason(uint64_t reason) { return __atomic_load_n(&msrs.own_reasons, __ATOMIC_RELAXED) & reason; }

/* ---- carrying out ---- */

static bool is_read_only(uint32_t msr)
{
    for (size_t i = 0; i < sizeof read_only / sizeof *read_only; i++)
        if (msr >= read_only[i].first && msr <= read_only[i].last)
            return true;
    return false;
}

/* With paging on, the guest may not switch long mode (Intel SDM volume 3, 10.8.5.4); KVM asks no VMM for that. */
static bool switches_mode(const struct cpu *cpu, uint64_t efer)
{
    struct kvm_sregs sregs;
    return kvm_plain(cpu->fd, KVM_GET_SREGS, &sregs) == 0 && (sregs.cr0 & CR0_PG) && ((sregs.efer ^ efer) & EFER_LME);
}

/* The exit is finished already. */
static void inject_gp(const struct cpu *cpu, struct kvm_regs *before)
{
    struct kvm_vcpu_events events;
    kvm_plain(cpu->fd, KVM_SET_REGS, before);
    if (kvm_plain(cpu->fd, KVM_GET_VCPU_EVENTS, &events) != 0)
        return;
    events.exception.injected = 1;
    events.exception.nr = GENERAL_PROTECTION;
    events.exception.has_error_code = 1;
    events.exception.error_code = 0;
    kvm_plain(cpu->fd, KVM_SET_VCPU_EVENTS, &events);
}

/* A KVM that emulates the guest's instructions forgets the one that is unfinished when EFER changes under it, and does it again. So that
 * one is finished first, as if it had been skipped. */
static bool write_efer(struct cpu *cpu, uint64_t value)
{
    struct kvm_regs before;
    if (switches_mode(cpu, value))
        return false;
    state_get_regs(cpu, &before);
    cpu->run->msr.error = 0;
    kvm_complete(cpu);
    bool done = state_set_msr(cpu, IA32_EFER, value);
    if (!done)
        inject_gp(cpu, &before);
    return done;
}

bool msrs_refuse_guest(const struct cpu *cpu, uint32_t msr, uint64_t value)
{
    return is_read_only(msr) || (msr == IA32_EFER && switches_mode(cpu, value));
}

static bool write_msr(struct cpu *cpu, uint32_t msr, uint64_t value)
{
    if (is_read_only(msr))
        return false;
    if (msr == IA32_EFER)
        return write_efer(cpu, value);
    /* The guest's writes of the microcode's revision are ignored. */
    return msr == IA32_UCODE_REV || state_set_msr(cpu, msr, value);
}

static enum carried leave_to_vmm(struct kvm_run *run, uint32_t msr, uint64_t value, uint32_t reason)
{
    run->msr.index = msr;
    run->msr.data = value;
    run->msr.reason = reason;
    run->msr.error = 0;
    return LEFT_TO_VMM;
}

enum carried msrs_carry_out(struct cpu *cpu, bool write, uint32_t msr, uint64_t value)
{
    struct kvm_run *run = cpu->run;
    uint64_t read = 0;
    run->msr.error = 1;
    if (msrs_own_denies(msr, write))
        return msrs_own_reason(KVM_MSR_EXIT_REASON_FILTER) ? leave_to_vmm(run, msr, value, KVM_MSR_EXIT_REASON_FILTER) : FAULTED;
    if (!(write ? write_msr(cpu, msr, value) : state_get_msr(cpu, msr, &read))) {
        uint32_t reason = state_get_msr(cpu, msr, &read) ? KVM_MSR_EXIT_REASON_INVAL : KVM_MSR_EXIT_REASON_UNKNOWN;
        return msrs_own_reason(reason) ? leave_to_vmm(run, msr, value, reason) : FAULTED;
    }
    run->msr.data = read;
    run->msr.error = 0;
    return CARRIED_OUT;
}
#endif
