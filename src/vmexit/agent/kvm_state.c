/* A vCPU's registers by KVM's ioctls, and the guest's memory where its VMM keeps it. */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "kvm.h"
#include "paging.h"
#include "qemu.h"
#include "script.h"

enum { IA32_KERNEL_GS_BASE = 0xc0000102 };

struct slot {
    uint32_t number;
    uint64_t first;
    uint64_t size;
    uint64_t memory; /* the VMM's address of it */
};

static struct {
    struct slot *slots;
    size_t count;
    size_t room;
    bool seen; /* the VMM's calls from the beginning */
} memory;

/* ---- registers ---- */

uint64_t *state_register(struct kvm_regs *regs, unsigned number)
{
    static const uint8_t offsets[VMEXIT_ASKED_REGISTERS] = {
        offsetof(struct kvm_regs, rax), offsetof(struct kvm_regs, rcx), offsetof(struct kvm_regs, rdx),
        offsetof(struct kvm_regs, rbx), offsetof(struct kvm_regs, rsp), offsetof(struct kvm_regs, rbp),
        offsetof(struct kvm_regs, rsi), offsetof(struct kvm_regs, rdi), offsetof(struct kvm_regs, r8),
        offsetof(struct kvm_regs, r9),  offsetof(struct kvm_regs, r10), offsetof(struct kvm_regs, r11),
        offsetof(struct kvm_regs, r12), offsetof(struct kvm_regs, r13), offsetof(struct kvm_regs, r14),
        offsetof(struct kvm_regs, r15), offsetof(struct kvm_regs, rip), offsetof(struct kvm_regs, rflags),
    };
    return (uint64_t *)((char *)regs + offsets[number]);
}

void state_get_regs(struct cpu *cpu, struct kvm_regs *regs)
{
    if (vm.has_sync_regs && (cpu->run->kvm_valid_regs & KVM_SYNC_X86_REGS))
        *regs = cpu->run->s.regs.regs;
    else if (kvm_plain(cpu->fd, KVM_GET_REGS, regs) != 0)
        memset(regs, 0, sizeof *regs);
}

bool state_set_regs(const struct cpu *cpu, const struct kvm_regs *regs)
{
    struct kvm_vcpu_events events;
    bool faults = kvm_plain(cpu->fd, KVM_GET_VCPU_EVENTS, &events) == 0 && (events.exception.injected || events.exception.pending);
    bool done = kvm_plain(cpu->fd, KVM_SET_REGS, (void *)regs) == 0;
    if (faults)
        kvm_plain(cpu->fd, KVM_SET_VCPU_EVENTS, &events);
    return done;
}

struct one_msr {
    struct kvm_msrs head;
    struct kvm_msr_entry entry;
};

bool state_get_msr(const struct cpu *cpu, uint32_t msr, uint64_t *value)
{
    struct one_msr one = {.head.nmsrs = 1, .entry.index = msr};
    bool done = kvm_plain(cpu->fd, KVM_GET_MSRS, &one) == 1;
    if (done)
        *value = one.entry.data;
    return done;
}

bool state_set_msr(const struct cpu *cpu, uint32_t msr, uint64_t value)
{
    struct one_msr one = {.head.nmsrs = 1, .entry.index = msr, .entry.data = value};
    return kvm_plain(cpu->fd, KVM_SET_MSRS, &one) == 1;
}

struct all {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_debugregs debug;
    uint64_t kernel_gs_base;
};

#define BIT(number) (UINT64_C(1) << (number))
#define GENERAL (BIT(VMEXIT_ASKED_REGISTERS) - 1)
#define IN_MSRS BIT(VMEXIT_KERNEL_GS_BASE)
#define DEBUG (BIT(VMEXIT_SCRIPT_DR7 + 1) - BIT(VMEXIT_SCRIPT_DR0))
#define SYSTEM (BIT(KVM_REGISTERS) - 1 - GENERAL - IN_MSRS - DEBUG)

/* Those of these registers that KVM gives together are got together. */
static bool get_all(const struct cpu *cpu, uint64_t wanted, struct all *all)
{
    return (!(wanted & GENERAL) || kvm_plain(cpu->fd, KVM_GET_REGS, &all->regs) == 0) &&
           (!(wanted & SYSTEM) || kvm_plain(cpu->fd, KVM_GET_SREGS, &all->sregs) == 0) &&
           (!(wanted & DEBUG) || kvm_plain(cpu->fd, KVM_GET_DEBUGREGS, &all->debug) == 0) &&
           (!(wanted & IN_MSRS) || state_get_msr(cpu, IA32_KERNEL_GS_BASE, &all->kernel_gs_base));
}

static bool set_all(const struct cpu *cpu, uint64_t changed, struct all *all)
{
    bool done = true;
    if (changed & SYSTEM)
        done &= kvm_plain(cpu->fd, KVM_SET_SREGS, &all->sregs) == 0;
    if (changed & DEBUG)
        done &= kvm_plain(cpu->fd, KVM_SET_DEBUGREGS, &all->debug) == 0;
    if (changed & IN_MSRS)
        done &= state_set_msr(cpu, IA32_KERNEL_GS_BASE, all->kernel_gs_base);
    if (changed & GENERAL)
        done &= state_set_regs(cpu, &all->regs);
    return done;
}

/* Where a register is; null for the selectors. */
static void *place_of(struct all *all, unsigned number)
{
    struct kvm_sregs *sregs = &all->sregs;
    if (number < VMEXIT_ASKED_REGISTERS)
        return state_register(&all->regs, number);
    switch (number) {
    case VMEXIT_FS_BASE:
        return &sregs->fs.base;
    case VMEXIT_GS_BASE:
        return &sregs->gs.base;
    case VMEXIT_KERNEL_GS_BASE:
        return &all->kernel_gs_base;
    case VMEXIT_CR0:
        return &sregs->cr0;
    case VMEXIT_CR2:
        return &sregs->cr2;
    case VMEXIT_CR3:
        return &sregs->cr3;
    case VMEXIT_CR4:
        return &sregs->cr4;
    case VMEXIT_CR8:
        return &sregs->cr8;
    case VMEXIT_EFER:
        return &sregs->efer;
    case VMEXIT_SCRIPT_GDTR:
        return &sregs->gdt.base;
    case VMEXIT_SCRIPT_IDTR:
        return &sregs->idt.base;
    case VMEXIT_SCRIPT_LDTR:
        return &sregs->ldt.base;
    case VMEXIT_SCRIPT_TR:
        return &sregs->tr.base;
    case VMEXIT_SCRIPT_DR6:
        return &all->debug.dr6;
    case VMEXIT_SCRIPT_DR7:
        return &all->debug.dr7;
    default:
        return number >= VMEXIT_SCRIPT_DR0 && number <= VMEXIT_SCRIPT_DR3 ? &all->debug.db[number - VMEXIT_SCRIPT_DR0] : NULL;
    }
}

static uint16_t *selector_of(struct kvm_sregs *sregs, unsigned number)
{
    struct kvm_segment *const segments[] = {&sregs->cs, &sregs->ss, &sregs->ds, &sregs->es, &sregs->fs, &sregs->gs};
    return &segments[number - VMEXIT_CS]->selector;
}

static bool is_selector(unsigned number) { return number >= VMEXIT_CS && number <= VMEXIT_GS; }

static uint64_t load(struct all *all, unsigned number)
{
    const void *place = place_of(all, number);
    uint64_t value = 0;
    if (is_selector(number))
        value = *selector_of(&all->sregs, number);
    else if (place)
        memcpy(&value, place, sizeof value);
    return value;
}

static void store(struct all *all, unsigned number, uint64_t value)
{
    void *place = place_of(all, number);
    if (is_selector(number))
        *selector_of(&all->sregs, number) = (uint16_t)value;
    else if (place)
        memcpy(place, &value, sizeof value);
}

static bool set_changed(const struct cpu *cpu, const uint64_t *values, uint64_t changed)
{
    struct all all;
    if (!get_all(cpu, changed, &all))
        return false;
    for (unsigned number = 0; number < KVM_REGISTERS; number++)
        if (changed & BIT(number))
            store(&all, number, values[number]);
    return set_all(cpu, changed, &all);
}

bool state_get(struct cpu *cpu, uint64_t wanted, uint64_t *registers)
{
    struct all all;
    if (!get_all(cpu, wanted, &all))
        return false;
    pthread_mutex_lock(&kvm_lock);
    for (unsigned number = 0; number < KVM_REGISTERS; number++)
        if (wanted & BIT(number))
            registers[number] = cpu->changed & BIT(number) ? cpu->values[number] : load(&all, number);
    pthread_mutex_unlock(&kvm_lock);
    return true;
}

bool state_would_take(struct cpu *cpu, unsigned number, uint64_t value)
{
    uint64_t values[KVM_REGISTERS] = {0};
    values[number] = value;
    return number < VMEXIT_ASKED_REGISTERS || set_changed(cpu, values, BIT(number));
}

void state_change(struct cpu *cpu, unsigned number, uint64_t value)
{
    pthread_mutex_lock(&kvm_lock);
    cpu->values[number] = value;
    __atomic_store_n(&cpu->changed, cpu->changed | BIT(number), __ATOMIC_RELAXED);
    pthread_mutex_unlock(&kvm_lock);
}

void state_apply(struct cpu *cpu)
{
    uint64_t values[KVM_REGISTERS];
    pthread_mutex_lock(&kvm_lock);
    const uint64_t changed = cpu->changed;
    memcpy(values, cpu->values, sizeof values);
    __atomic_store_n(&cpu->changed, 0, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&kvm_lock);
    if (changed)
        set_changed(cpu, values, changed);
    if (changed & CHANGED_MSRS)
        access_apply(cpu);
}

/* ---- memory ---- */

static struct slot *slot_numbered(uint32_t number)
{
    for (size_t i = 0; i < memory.count; i++)
        if (memory.slots[i].number == number)
            return &memory.slots[i];
    if (memory.count == memory.room) {
        size_t room = memory.room ? memory.room * 2 : 32;
        struct slot *slots = realloc(memory.slots, room * sizeof *slots);
        if (slots == NULL)
            return NULL;
        memory.slots = slots;
        memory.room = room;
    }
    memory.slots[memory.count] = (struct slot){.number = number};
    return &memory.slots[memory.count++];
}

void state_know_memory(uint32_t number, uint64_t first, uint64_t size, uint64_t address)
{
    struct slot *slot = slot_numbered(number);
    memory.seen = true;
    if (slot)
        *slot = (struct slot){number, first, size, address};
}

/* Done under the lock, so that nobody reads memory that the VMM takes away behind it. */
int state_set_memory(unsigned long request, const struct kvm_userspace_memory_region *region)
{
    pthread_mutex_lock(&kvm_lock);
    int result = kvm_plain(vm.fd, request, (void *)region);
    /* The upper half names an address space; 1 is what SMM sees. */
    if (result == 0 && region->slot >> 16 == 0)
        state_know_memory(region->slot, region->guest_phys_addr, region->memory_size, region->userspace_addr);
    pthread_mutex_unlock(&kvm_lock);
    tasks_forget_memory();
    return result;
}

static bool qemu_has_memory(void) { return address_space_rw && address_space_memory; }

bool state_has_memory(void) { return memory.seen || qemu_has_memory(); }

/* By the kernel, because the VMM's mapping may be read-only, or a hole. */
static bool copy(uint64_t theirs, void *bytes, uint32_t length, bool write)
{
    struct iovec ours = {.iov_base = bytes, .iov_len = length};
    struct iovec remote = {.iov_base = (void *)theirs, .iov_len = length}; // NOLINT: an address of this very process
    ssize_t done = write ? process_vm_writev(getpid(), &ours, 1, &remote, 1, 0) : process_vm_readv(getpid(), &ours, 1, &remote, 1, 0);
    return done == (ssize_t)length;
}

static bool access_slots(uint64_t physical, uint8_t *bytes, uint32_t length, bool write)
{
    while (length > 0) {
        const struct slot *found = NULL;
        for (size_t i = 0; i < memory.count && found == NULL; i++)
            if (physical - memory.slots[i].first < memory.slots[i].size)
                found = &memory.slots[i];
        if (found == NULL)
            return false;
        const uint64_t offset = physical - found->first;
        const uint32_t now = length < found->size - offset ? length : (uint32_t)(found->size - offset);
        if (!copy(found->memory + offset, bytes, now, write))
            return false;
        physical += now;
        bytes += now;
        length -= now;
    }
    return true;
}

static bool access_physical(void *context, uint64_t physical, void *bytes, uint32_t length, bool write)
{
    (void)context;
    if (!memory.seen)
        return qemu_has_memory() && qemu_access_memory(0, true, write, physical, bytes, length);
    pthread_mutex_lock(&kvm_lock);
    bool done = access_slots(physical, bytes, length, write);
    pthread_mutex_unlock(&kvm_lock);
    return done;
}

/* A slot may name memory that the VMM does not have there, or not for reading; the kernel finds out. Until the slots are changed it is taken
 * for granted then: KVM itself reads it for the guest. */
static const uint8_t *find_page(uint64_t physical)
{
    uint8_t byte;
    for (size_t i = 0; i < memory.count; i++) {
        const uint64_t offset = physical - memory.slots[i].first;
        if (offset < memory.slots[i].size && copy(memory.slots[i].memory + offset, &byte, 1, false))
            return (const uint8_t *)memory.slots[i].memory + offset; // NOLINT: an address of this very process
    }
    return NULL;
}

const uint8_t *state_find_page(uint64_t physical)
{
    if (!memory.seen)
        return qemu_find_page(physical);
    pthread_mutex_lock(&kvm_lock);
    const uint8_t *page = find_page(physical);
    pthread_mutex_unlock(&kvm_lock);
    return page;
}

bool state_access_memory(bool write, uint64_t address, void *bytes, uint32_t length)
{
    return access_physical(NULL, address, bytes, length, write);
}

bool state_get_paging(struct cpu *cpu, struct paging *paging)
{
    uint64_t registers[KVM_REGISTERS];
    if (!state_get(cpu, BIT(VMEXIT_CR0) | BIT(VMEXIT_CR3) | BIT(VMEXIT_CR4) | BIT(VMEXIT_EFER), registers))
        return false;
    *paging = (struct paging){
        .cr0 = registers[VMEXIT_CR0],
        .cr3 = registers[VMEXIT_CR3],
        .cr4 = registers[VMEXIT_CR4],
        .efer = registers[VMEXIT_EFER],
        .access = access_physical,
    };
    return true;
}
#endif
