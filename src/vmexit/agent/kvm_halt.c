/* Halting a machine under KVM: a QEMU that exports its internals halts itself, as for its own monitor. For any other VMM the agent keeps
 * the vCPUs from entering the guest; the VMM's other threads go on. */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kvm.h"
#include "qemu.h"

/* What the agent writes into kvm_run.immediate_exit, where a VMM writes 1: so neither takes away what the other wants. */
enum { FETCHED = 2 };
/* A vCPU that sleeps here lets its VMM look so often whether it has something else for it to do. */
enum { SLEEP_MS = 100 };
/* A vCPU that does not come out of the guest in that time does not want to. */
enum { SILENCE_MS = 1000 };

static int fetch_signal; /* 0: not chosen yet */
static unsigned parked_times;

static void moment(void)
{
    const struct timespec time = {.tv_nsec = 1000000};
    nanosleep(&time, NULL);
}

/* ---- where the agent keeps vCPUs from running ---- */

static void ignore_signal(int number) { (void)number; }

/* A signal that nobody uses, with a handler that does nothing: it makes KVM_RUN return. */
static int choose_signal(void)
{
    pthread_mutex_lock(&kvm_lock);
    for (int number = SIGRTMAX - 1; number > SIGRTMIN && fetch_signal == 0; number--) {
        struct sigaction action;
        if (sigaction(number, NULL, &action) != 0 || action.sa_handler != SIG_DFL)
            continue;
        action = (struct sigaction){.sa_handler = ignore_signal};
        if (sigaction(number, &action, NULL) == 0)
            fetch_signal = number;
    }
    pthread_mutex_unlock(&kvm_lock);
    return fetch_signal;
}

void halt_adopt(struct cpu *cpu)
{
    __atomic_store_n(&cpu->thread, (pid_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
    if (qemu_can_halt())
        return;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, choose_signal());
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

void halt_amend_mask(uint8_t *mask, uint32_t bytes)
{
    if (qemu_can_halt())
        return;
    const unsigned bit = (unsigned)choose_signal() - 1;
    if (bit / 8 < bytes)
        mask[bit / 8] &= (uint8_t) ~(1u << bit % 8);
}

static bool is_busy(const struct cpu *cpu) { return __atomic_load_n(&cpu->busy, __ATOMIC_SEQ_CST); }
static bool is_parked(void) { return __atomic_load_n(&vm.is_parked, __ATOMIC_SEQ_CST); }

static void fetch(struct cpu *cpu)
{
    uint8_t nothing = 0;
    __atomic_compare_exchange_n(&cpu->run->immediate_exit, &nothing, FETCHED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    pid_t thread = __atomic_load_n(&cpu->thread, __ATOMIC_ACQUIRE);
    if (thread && fetch_signal)
        syscall(SYS_tgkill, getpid(), thread, fetch_signal);
}

/* Each time that the vCPUs are to be halted has a number. */
static bool is_still(unsigned number) { return is_parked() && __atomic_load_n(&parked_times, __ATOMIC_SEQ_CST) == number; }

/* Tells the debugger that the machine is halted, once no vCPU but this one runs or has anything to do for a trap: it may have to answer a
 * question until then, or to take records. Unless the machine is to run on before that. */
static void announce_when_quiet(const struct cpu *self, unsigned number)
{
    for (unsigned i = 0; i < __atomic_load_n(&vm.count, __ATOMIC_ACQUIRE); i++)
        while (vm.cpus[i] != self && is_busy(vm.cpus[i]) && is_still(number)) {
            if (!core_is_waiting(i))
                fetch(vm.cpus[i]);
            moment();
        }
    if (is_still(number))
        link_announce_machine(false);
}

static void *announce(void *number)
{
    announce_when_quiet(NULL, (unsigned)(uintptr_t)number);
    return NULL;
}

/* The link's thread has to serve the debugger meanwhile. */
static bool announce_later(unsigned number)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool begun = pthread_create(&thread, NULL, announce, (void *)(uintptr_t)number) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (begun)
        pthread_detach(thread);
    return begun;
}

bool halt_sleep(struct cpu *cpu)
{
    uint64_t count;
    struct pollfd fd = {.fd = cpu->wake, .events = POLLIN};
    __atomic_store_n(&cpu->busy, false, __ATOMIC_SEQ_CST);
    int woken = poll(&fd, 1, SLEEP_MS);
    __atomic_store_n(&cpu->busy, true, __ATOMIC_SEQ_CST);
    if (woken > 0)
        (void)!read(cpu->wake, &count, sizeof count);
    return woken > 0;
}

static void unpark(void)
{
    const uint64_t one = 1;
    __atomic_store_n(&vm.is_parked, false, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < __atomic_load_n(&vm.count, __ATOMIC_ACQUIRE); i++)
        (void)!write(vm.cpus[i]->wake, &one, sizeof one);
    link_announce_machine(true);
}

void halt_wait_for_silence_to_end(void)
{
    while (__atomic_load_n(&vm.is_silent, __ATOMIC_SEQ_CST))
        moment();
}

/* A vCPU says that it is busy, then looks whether there is silence; here it is the other way round. */
bool halt_begin_silence(void)
{
    int left = qemu_can_halt() ? 0 : SILENCE_MS;
    __atomic_store_n(&vm.is_silent, true, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < __atomic_load_n(&vm.count, __ATOMIC_ACQUIRE) && left > 0; i++)
        for (; is_busy(vm.cpus[i]) && left > 0; left--) {
            fetch(vm.cpus[i]);
            moment();
        }
    pthread_mutex_lock(&kvm_lock);
    if (left > 0)
        return true;
    halt_end_silence();
    return false;
}

void halt_end_silence(void)
{
    pthread_mutex_unlock(&kvm_lock);
    __atomic_store_n(&vm.is_silent, false, __ATOMIC_SEQ_CST);
}

void halt_at_start(void) { __atomic_store_n(&vm.is_parked, true, __ATOMIC_SEQ_CST); }

/* ---- both ---- */

void halt_prepare(void)
{
    if (rcu_register_thread)
        rcu_register_thread();
    if (!qemu_can_halt())
        return;
    qemu_lock();
    qemu_watch_state(link_announce_machine);
    qemu_unlock();
}

bool halt_is_running(void) { return qemu_can_halt() ? qemu_is_running() : !is_parked(); }

bool halt_here(struct cpu *cpu)
{
    if (qemu_can_halt()) {
        vm_stop(RUN_STATE_PAUSED);
        link_machine_held();
        return true;
    }
    if (!__atomic_exchange_n(&vm.is_parked, true, __ATOMIC_SEQ_CST)) {
        link_machine_held();
        announce_when_quiet(cpu, __atomic_add_fetch(&parked_times, 1, __ATOMIC_SEQ_CST));
    }
    return false;
}

int halt_set(bool halted)
{
    if (qemu_can_halt()) {
        if (halted)
            qemu_halt();
        else
            qemu_resume();
        return VMEXIT_OK;
    }
    if (!halted) {
        unpark();
    } else if (!__atomic_exchange_n(&vm.is_parked, true, __ATOMIC_SEQ_CST)) {
        if (!announce_later(__atomic_add_fetch(&parked_times, 1, __ATOMIC_SEQ_CST))) {
            unpark();
            return VMEXIT_UNAVAILABLE;
        }
    }
    return VMEXIT_OK;
}

void halt_resume(void)
{
    if (qemu_can_halt())
        qemu_resume();
    else
        unpark();
}
#endif
