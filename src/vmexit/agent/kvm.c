/* The KVM door: the agent stands between a VMM and its ioctls, preloaded or injected.
 *
 * An event's MSRs leave the guest by KVM's MSR filter. The exit is taken before the VMM sees it: events act, the access is carried out
 * as the guest's own, skipped or refused, and the vCPU enters the guest again. What the VMM itself has asked KVM for, it gets.
 *
 * An exit is finished by the next KVM_RUN; with kvm_run.immediate_exit set that call returns before the guest runs on. So there is a
 * moment right behind the instruction (stage post), and for a break before it the instruction can be finished as if skipped and RIP be
 * put back: nothing is left unfinished then, whatever the VMM does with the halted vCPU. The instruction comes once more, and what was
 * done for it is remembered in a hold.
 */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kvm.h"
#include "qemu_plugin.h"

enum { FINISHING = 2 }; /* in kvm_run.immediate_exit; a VMM writes 1 there, at any time */
enum { SPARE_VCPUS = 15 }; /* that may be plugged in while the machine runs */

struct vm vm = {.fd = -1};
pthread_mutex_t kvm_lock = PTHREAD_MUTEX_INITIALIZER;

int kvm_plain(int fd, unsigned long request, void *argument)
{
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

/* ---- entering the guest ---- */

static void clear_immediate_exit(struct kvm_run *run)
{
    uint8_t ours = FINISHING;
    __atomic_compare_exchange_n(&run->immediate_exit, &ours, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* While events want MSRs, KVM leaves the registers in struct kvm_run, which is cheaper than asking for them. */
static void choose_sync_regs(struct cpu *cpu)
{
    uint64_t wanted = 0;
    if (__atomic_load_n(&vm.is_armed, __ATOMIC_RELAXED) && vm.has_sync_regs)
        wanted |= KVM_SYNC_X86_REGS;
    if (wanted && __atomic_load_n(&vm.syncs_sregs, __ATOMIC_RELAXED) && vm.has_sync_sregs)
        wanted |= KVM_SYNC_X86_SREGS;
    if (wanted == cpu->synced)
        return;
    const uint64_t own = cpu->run->kvm_valid_regs & ~cpu->synced; /* the VMM's wishes */
    cpu->run->kvm_valid_regs = own | wanted;
    cpu->synced = wanted & ~own;
}

static int enter_guest(struct cpu *cpu)
{
    choose_sync_regs(cpu);
    int result = kvm_plain(cpu->fd, KVM_RUN, NULL);
    if (result != 0)
        clear_immediate_exit(cpu->run);
    return result;
}

bool kvm_complete(struct cpu *cpu)
{
    uint8_t nothing = 0;
    __atomic_compare_exchange_n(&cpu->run->immediate_exit, &nothing, FINISHING, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    int result = kvm_plain(cpu->fd, KVM_RUN, NULL);
    clear_immediate_exit(cpu->run);
    return result != 0;
}

/* ---- KVM_RUN ---- */

static bool is_filter_exit(const struct kvm_run *run)
{
    return (run->exit_reason == KVM_EXIT_X86_WRMSR || run->exit_reason == KVM_EXIT_X86_RDMSR) &&
           run->msr.reason == KVM_MSR_EXIT_REASON_FILTER;
}

static bool needs_attention(const struct cpu *cpu)
{
    return __atomic_load_n(&vm.is_parked, __ATOMIC_SEQ_CST) || __atomic_load_n(&cpu->changed, __ATOMIC_RELAXED) || cpu->promise.pending;
}

/* What there is to do between two entries. */
static enum next attend(struct cpu *cpu)
{
    enum next next = INTO_GUEST;
    if (cpu->promise.pending)
        next = trap_keep_promise(cpu);
    else if (!kvm_complete(cpu))
        next = TO_VMM;
    while (next == INTO_GUEST && needs_attention(cpu)) {
        state_apply(cpu);
        if (__atomic_load_n(&vm.is_parked, __ATOMIC_SEQ_CST) && !halt_sleep(cpu))
            next = TO_VMM_INTERRUPTED;
    }
    return next;
}

static int run_until_exit(struct cpu *cpu)
{
    for (;;) {
        enum next next = INTO_GUEST;
        if (__builtin_expect(needs_attention(cpu), 0))
            next = attend(cpu);
        if (next == INTO_GUEST) {
            int result = enter_guest(cpu);
            if (result != 0 || !is_filter_exit(cpu->run))
                return result;
            next = trap_on_msr_exit(cpu);
        }
        if (next == TO_VMM)
            return 0;
        if (next == TO_VMM_INTERRUPTED) {
            errno = EINTR;
            return -1;
        }
    }
}

static int run(struct cpu *cpu)
{
    if (__builtin_expect(!cpu->passed || !pthread_equal(cpu->owner, pthread_self()), 0)) {
        cpu->owner = pthread_self();
        halt_adopt(cpu);
        __atomic_store_n(&cpu->passed, true, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&cpu->busy, true, __ATOMIC_SEQ_CST);
    while (__builtin_expect(__atomic_load_n(&vm.is_silent, __ATOMIC_SEQ_CST), 0)) {
        __atomic_store_n(&cpu->busy, false, __ATOMIC_SEQ_CST);
        halt_wait_for_silence_to_end();
        __atomic_store_n(&cpu->busy, true, __ATOMIC_SEQ_CST);
    }
    int result = run_until_exit(cpu);
    int error = errno;
    __atomic_store_n(&cpu->busy, false, __ATOMIC_SEQ_CST);
    errno = error;
    return result;
}

/* ---- the VM ---- */

struct cpu *kvm_add_cpu(int fd, struct kvm_run *run)
{
    struct cpu *cpu = calloc(1, sizeof *cpu);
    int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_lock(&kvm_lock);
    bool has_room = cpu != NULL && wake >= 0 && vm.count < KVM_MOST_VCPUS;
    if (has_room) {
        if (vm.count == 0) {
            const int syncs = kvm_plain(vm.fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_SYNC_REGS);
            vm.has_sync_regs = syncs > 0 && (syncs & KVM_SYNC_X86_REGS);
            vm.has_sync_sregs = syncs > 0 && (syncs & KVM_SYNC_X86_SREGS);
        }
        *cpu = (struct cpu){.fd = fd, .index = vm.count, .run = run, .wake = wake};
        vm.cpus[vm.count] = cpu;
        __atomic_store_n(&vm.count, vm.count + 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&kvm_lock);
    if (has_room)
        return cpu;
    free(cpu);
    if (wake >= 0)
        close(wake);
    return NULL;
}

static struct cpu *find(int fd)
{
    static __thread struct cpu *mine;
    if (mine && mine->fd == fd)
        return mine;
    for (unsigned i = 0; i < __atomic_load_n(&vm.count, __ATOMIC_ACQUIRE); i++)
        if (vm.cpus[i]->fd == fd)
            return mine = vm.cpus[i];
    return NULL;
}

/* ---- serving a debugger ---- */

bool kvm_serve(int listening)
{
    const unsigned there = __atomic_load_n(&vm.count, __ATOMIC_ACQUIRE);
    if (state_has_memory())
        kvm_door.capabilities |= VMEXIT_CAN_MEMORY | VMEXIT_CAN_MEMORY_WRITE;
    if (!core_init(&kvm_door, there + SPARE_VCPUS))
        return false;
    for (unsigned i = 0; i < there; i++)
        core_vcpu_up(i);
    return link_start(listening);
}

/* As it was preloaded: what the environment says. */
static struct {
    int listening;
    bool waits; /* the machine does not run before a debugger lets it */
    pthread_once_t once;
} start = {.listening = -1, .once = PTHREAD_ONCE_INIT};

static void complain(const char *what) { fprintf(stderr, "vmexit agent: %s\n", what); }

static void serve(void)
{
    if (!kvm_serve(start.listening)) {
        complain("out of memory or descriptors; this machine runs without it");
        __atomic_store_n(&vm.is_parked, false, __ATOMIC_SEQ_CST);
    }
}

static void *serve_when_called(void *unused)
{
    (void)unused;
    struct pollfd fd = {.fd = start.listening, .events = POLLIN};
    while (poll(&fd, 1, -1) <= 0)
        ;
    serve();
    return NULL;
}

/* How many vCPUs there are has to be known before the first debugger comes. One that speaks to the VMM itself comes when they are all
 * made; for one that does not, it is when the first of them is to run. */
static void start_serving(void)
{
    pthread_t thread;
    sigset_t all, before;
    if (start.waits) {
        halt_at_start();
        serve();
        return;
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, serve_when_called, NULL) == 0)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ---- the VMM's ioctls ---- */

static int create_vm(int fd, void *argument)
{
    int result = kvm_plain(fd, KVM_CREATE_VM, argument);
    /* A VM without vCPUs was made to try something out. */
    if (result >= 0 && vm.count == 0) {
        vm.fd = result;
        vm.run_bytes = (uint32_t)kvm_plain(fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
    }
    return result;
}

static int create_vcpu(void *argument)
{
    int fd = kvm_plain(vm.fd, KVM_CREATE_VCPU, argument);
    if (fd < 0)
        return fd;
    void *run = mmap(NULL, vm.run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct cpu *cpu = run == MAP_FAILED ? NULL : kvm_add_cpu(fd, run);
    if (cpu == NULL)
        complain("a vCPU cannot be looked at: out of memory, or too many");
    else if (core_vcpus() > cpu->index) {
        core_vcpu_up(cpu->index);
        link_announce_vcpu(cpu->index);
    } else if (core_vcpus())
        complain("a vCPU was added that cannot be trapped on: too many since the machine began");
    if (cpu && !start.waits)
        pthread_once(&start.once, start_serving);
    return fd;
}

static int on_vm(unsigned long request, void *argument)
{
    switch ((uint32_t)request) {
    case (uint32_t)KVM_CREATE_VCPU:
        return create_vcpu(argument);
    case (uint32_t)KVM_ENABLE_CAP:
        if (((struct kvm_enable_cap *)argument)->cap != KVM_CAP_X86_USER_SPACE_MSR)
            break;
        return msrs_enable_cap(argument);
    case (uint32_t)KVM_X86_SET_MSR_FILTER:
        return msrs_set_filter(argument);
    default:
        /* With guest_memfd there is a second one that begins as the first. */
        if (_IOC_NR(request) == _IOC_NR(KVM_SET_USER_MEMORY_REGION) || _IOC_NR(request) == 0x49)
            return state_set_memory(request, argument);
    }
    return kvm_plain(vm.fd, request, argument);
}

static int set_signal_mask(int fd, const struct kvm_signal_mask *given)
{
    struct {
        struct kvm_signal_mask head;
        uint8_t mask[8];
    } amended = {.head.len = sizeof amended.mask};
    if (given == NULL || given->len != sizeof amended.mask)
        return kvm_plain(fd, KVM_SET_SIGNAL_MASK, (void *)given);
    memcpy(amended.mask, given->sigset, sizeof amended.mask);
    halt_amend_mask(amended.mask, sizeof amended.mask);
    return kvm_plain(fd, KVM_SET_SIGNAL_MASK, &amended);
}

static int on_kvm(int fd, unsigned long request, void *argument)
{
    struct cpu *cpu;
    if ((uint32_t)request == KVM_RUN && (cpu = find(fd)) != NULL) {
        if (start.waits)
            pthread_once(&start.once, start_serving);
        return run(cpu);
    }
    if ((uint32_t)request == KVM_CREATE_VM)
        return create_vm(fd, argument);
    if (fd == vm.fd)
        return on_vm(request, argument);
    if ((uint32_t)request == (uint32_t)KVM_SET_SIGNAL_MASK && find(fd) != NULL)
        return set_signal_mask(fd, argument);
    return kvm_plain(fd, request, argument);
}

/* A VMM that nobody looks at pays for two comparisons. */
int kvm_ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (_IOC_TYPE(request) != KVMIO || !vm.active)
        return kvm_plain(fd, request, argument);
    return on_kvm(fd, request, argument);
}

/* Preloaded, it stands before the C library's. */
EXPORT int ioctl(int fd, unsigned long request, ...) __attribute__((alias("kvm_ioctl")));

/* ---- the beginning ---- */

__attribute__((constructor)) static void look_at_environment(void)
{
    const char *settings = getenv("VMEXIT_AGENT");
    int listening;
    if (settings == NULL || sscanf(settings, "link=%d", &listening) != 1 || !link_is_listening(listening))
        return;
    start.listening = listening;
    start.waits = strstr(settings, ",wait") != NULL;
    vm.active = true;
}
#endif
