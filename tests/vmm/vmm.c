/* A small VMM for the bare-metal guests, as unlike QEMU as it can be: no monitor, one thread a vCPU, nothing but KVM.
 *
 *     vmm [-s] IMAGE ENTRY [VCPUS] [OWN_MSR [late|carry]]
 *
 * IMAGE is an ELF file, ENTRY (hexadecimal) where it is entered in 32-bit protected mode. The first serial port is standard output;
 * writing to port 0xf4 ends it with status 2 * value + 1, as QEMU's isa-debug-exit does. With OWN_MSR (hexadecimal) it sets an MSR
 * filter of its own and keeps that MSR itself; it prints "own " and the number of such exits when it ends. Status 70: a mistake of
 * this program's own, or an exit that it did not ask for. With "late" it sets the filter when the guest first prints something, with "carry" it carries
 * each write of that MSR out, as KVM would have done.
 * With -s memory comes in many slots (see slots), each of which ends with the words "end of slot N"; when it ends it prints "slots intact"
 * if they still are as they were made.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MEMORY = 64 << 20, MISTAKE = 70, CPUID_ENTRIES = 100 };

static int kvm, vm;
static char *memory;
static uint32_t own_msr;
static uint64_t own_value;
static unsigned own_exits;
static int is_late, carries_out;

/* Slots with a gap in between and without, read-only, with their dirty pages logged, and such of another mapping. */
static struct kvm_userspace_memory_region slots[] = {
    {.slot = 7, .guest_phys_addr = 0, .memory_size = 0xa0000},
    {.slot = 3, .guest_phys_addr = 0xe0000, .memory_size = 0x20000, .flags = KVM_MEM_READONLY},
    {.slot = 0, .guest_phys_addr = 0x100000, .memory_size = MEMORY - 0x100000},
    {.slot = 5, .guest_phys_addr = 0x100000000, .memory_size = 0x200000, .flags = KVM_MEM_LOG_DIRTY_PAGES},
    {.slot = 6, .guest_phys_addr = 0x100200000, .memory_size = 0x180000},
};
enum { SLOTS = sizeof slots / sizeof *slots, FAR = 0x100000000 >> 20 };
static int has_slots;

static void check(long result, const char *what)
{
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(MISTAKE);
}

static void load(const char *path)
{
    int fd = open(path, O_RDONLY);
    check(fd, path);
    off_t size = lseek(fd, 0, SEEK_END);
    char *file = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, fd, 0);
    const Elf64_Ehdr *elf = (const void *)file;
    const Elf64_Phdr *segment = (const void *)(file + elf->e_phoff);
    for (unsigned i = 0; i < elf->e_phnum; i++)
        if (segment[i].p_type == PT_LOAD)
            memcpy(memory + segment[i].p_paddr, file + segment[i].p_offset, segment[i].p_filesz);
    close(fd);
}

static void set_filter(void)
{
    uint8_t nothing = 0;
    struct kvm_enable_cap capability = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {KVM_MSR_EXIT_REASON_FILTER}};
    struct kvm_msr_filter filter = {.ranges = {{.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .nmsrs = 1, .base = own_msr,
                                                .bitmap = &nothing}}};
    check(ioctl(vm, KVM_ENABLE_CAP, &capability), "KVM_ENABLE_CAP");
    check(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), "KVM_X86_SET_MSR_FILTER");
}

static void set_cpuid(int vcpu, unsigned id)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + CPUID_ENTRIES * sizeof *cpuid->entries);
    cpuid->nent = CPUID_ENTRIES;
    check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
    for (unsigned i = 0; i < cpuid->nent; i++)
        if (cpuid->entries[i].function == 1)
            cpuid->entries[i].ebx = (cpuid->entries[i].ebx & 0xffffff) | id << 24;
    check(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    free(cpuid);
}

static void set_entry(int vcpu, uint64_t entry)
{
    struct kvm_segment flat = {.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = entry, .rflags = 2};
    check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs = flat;
    flat.type = 3;
    flat.selector = 16;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    sregs.cr0 = 1;
    check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void make_slots(void)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        char *start = memory + slots[i].guest_phys_addr;
        if (slots[i].guest_phys_addr >> 20 >= FAR) {
            int file = memfd_create("far", MFD_CLOEXEC);
            check(ftruncate(file, (off_t)slots[i].memory_size), "ftruncate");
            start = mmap(NULL, slots[i].memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        }
        slots[i].userspace_addr = (uintptr_t)start;
        if (slots[i].flags & KVM_MEM_READONLY && ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_READONLY_MEM) <= 0)
            slots[i].flags = 0;
        snprintf(start + slots[i].memory_size - 16, 16, "end of slot %u", slots[i].slot);
        check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slots[i]), "KVM_SET_USER_MEMORY_REGION");
    }
}

/* Where a slot was moved or changed, or another one made, one of these fails. */
static int are_slots_intact(void)
{
    int intact = 1;
    for (unsigned i = 0; i < SLOTS; i++) {
        struct kvm_dirty_log log = {.slot = slots[i].slot, .dirty_bitmap = calloc(1, MEMORY / 4096 / 8)};
        intact &= (ioctl(vm, KVM_GET_DIRTY_LOG, &log) == 0) == !!(slots[i].flags & KVM_MEM_LOG_DIRTY_PAGES);
        intact &= ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slots[i]) == 0;
        free(log.dirty_bitmap);
    }
    const unsigned last = (unsigned)ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS) - 1;
    for (unsigned number = 8; number <= last; number++) {
        struct kvm_userspace_memory_region none = {.slot = number};
        intact &= ioctl(vm, KVM_SET_USER_MEMORY_REGION, &none) != 0; /* to delete what is not there is a mistake */
    }
    return intact;
}

static void end(int status)
{
    if (has_slots)
        printf("slots %s\n", are_slots_intact() ? "intact" : "changed");
    if (own_msr)
        printf("own %u\n", __atomic_load_n(&own_exits, __ATOMIC_SEQ_CST));
    fflush(stdout);
    _exit(status);
}

static void on_port(struct kvm_run *run)
{
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == 0x3f8) {
        if (is_late)
            set_filter();
        is_late = 0;
        putchar(*data);
        if (*data == '\n')
            fflush(stdout);
    } else if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == 0xf4) {
        end(2 * *data + 1);
    } else if (run->io.direction == KVM_EXIT_IO_IN) {
        memset(data, run->io.port == 0x3fd ? 0x60 : 0, (size_t)run->io.size * run->io.count);
    }
}

static void carry_out(int vcpu, const struct kvm_run *run)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } one = {.head.nmsrs = 1, .entry = {.index = run->msr.index, .data = run->msr.data}};
    check(ioctl(vcpu, KVM_SET_MSRS, &one), "KVM_SET_MSRS");
}

static void on_msr(int vcpu, struct kvm_run *run)
{
    if (run->msr.index != own_msr) {
        fprintf(stderr, "an exit for MSR %x, which nobody asked for\n", run->msr.index);
        end(MISTAKE);
    }
    __atomic_fetch_add(&own_exits, 1, __ATOMIC_SEQ_CST);
    if (run->exit_reason == KVM_EXIT_X86_WRMSR && carries_out)
        carry_out(vcpu, run);
    if (run->exit_reason == KVM_EXIT_X86_WRMSR)
        own_value = run->msr.data;
    else
        run->msr.data = own_value;
    run->msr.error = 0;
}

struct vcpu {
    int fd;
    struct kvm_run *run;
};

static void *run_vcpu(void *argument)
{
    const struct vcpu *vcpu = argument;
    for (;;) {
        int result = ioctl(vcpu->fd, KVM_RUN, 0);
        if (result < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        check(result, "KVM_RUN");
        switch (vcpu->run->exit_reason) {
        case KVM_EXIT_IO:
            on_port(vcpu->run);
            break;
        case KVM_EXIT_X86_WRMSR:
        case KVM_EXIT_X86_RDMSR:
            on_msr(vcpu->fd, vcpu->run);
            break;
        default:
            fprintf(stderr, "exit %u\n", vcpu->run->exit_reason);
            end(MISTAKE);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    has_slots = argc > 1 && strcmp(argv[1], "-s") == 0;
    argc -= has_slots;
    argv += has_slots;
    if (argc < 3) {
        fprintf(stderr, "usage: vmm [-s] IMAGE ENTRY [VCPUS] [OWN_MSR [late|carry]]\n");
        return MISTAKE;
    }
    unsigned vcpus = argc > 3 ? (unsigned)atoi(argv[3]) : 1;
    own_msr = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 16) : 0;
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    check(kvm, "/dev/kvm");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    check(vm, "KVM_CREATE_VM");
    check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
    check(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    load(argv[1]);
    struct kvm_userspace_memory_region region = {.memory_size = MEMORY, .userspace_addr = (uintptr_t)memory};
    if (has_slots)
        make_slots();
    else
        check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    is_late = argc > 5 && strcmp(argv[5], "late") == 0;
    carries_out = argc > 5 && strcmp(argv[5], "carry") == 0;
    if (own_msr && !is_late)
        set_filter();
    int run_bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct vcpu *all = calloc(vcpus, sizeof *all);
    pthread_t thread;
    for (unsigned i = 0; i < vcpus; i++) {
        all[i].fd = ioctl(vm, KVM_CREATE_VCPU, i);
        check(all[i].fd, "KVM_CREATE_VCPU");
        all[i].run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, all[i].fd, 0);
        set_cpuid(all[i].fd, i);
        if (i == 0)
            set_entry(all[i].fd, strtoull(argv[2], NULL, 16));
    }
    for (unsigned i = 0; i < vcpus; i++)
        pthread_create(&thread, NULL, run_vcpu, &all[i]);
    pthread_join(thread, NULL);
    return MISTAKE;
}
