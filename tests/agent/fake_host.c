/* Plays QEMU for the agent: loads it as a plugin, and runs vCPUs and the main loop that the exports of fake_qemu.c need.
 *
 *     fake_host AGENT [OPTION=VALUE]...   with the options of `read_option` below; what follows "plugin:" goes to the agent
 *
 * Commands come from standard input, one a line (`obey` below); what happens is told on standard output, one line each.
 */
#define _GNU_SOURCE
#include "fake_host.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The oldest plugin API version that each still takes. */
enum { LEAST_API = API >= 3 ? 3 : API == 2 ? 2 : 0 };

struct qemu_info {
    const char *target_name;
    struct {
        int min, cur;
    } version;
    bool system_emulation;
    struct {
        int smp_vcpus, max_vcpus;
    } system;
};

static struct {
    const char *agent;
    char *plugin_arguments[4];
    int plugin_argument_count;
    struct qemu_info info;
    unsigned start; /* vCPUs that come up by themselves */
    bool single;    /* one thread runs all vCPUs in turn */
    unsigned slow_stop_ms;
} options = {.info = {.target_name = "x86_64", .version = {LEAST_API, API}, .system_emulation = true}, .start = 1};

struct host host = {.running = true};
__thread bool bql_held;
__thread bool in_vcpu_thread;
static pthread_mutex_t bql = PTHREAD_MUTEX_INITIALIZER, say_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

/* ---- telling ---- */

static void tell(int fd, const char *before, const char *format, va_list arguments)
{
    char line[256];
    int length = snprintf(line, sizeof line, "%s", before);
    length += vsnprintf(line + length, sizeof line - (size_t)length - 1, format, arguments);
    line[length++] = '\n';
    pthread_mutex_lock(&say_lock);
    if (write(fd, line, (size_t)length) != length)
        abort();
    pthread_mutex_unlock(&say_lock);
}

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    tell(1, "", format, arguments);
    va_end(arguments);
}

void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    tell(2, "fake host: ", format, arguments);
    va_end(arguments);
    abort();
}

/* ---- the big lock ---- */

void lock(void)
{
    assert_that(!bql_held);
    pthread_mutex_lock(&bql);
    bql_held = true;
}

void unlock(void)
{
    assert_that(bql_held);
    bql_held = false;
    pthread_mutex_unlock(&bql);
}

void tell_change(void) { pthread_cond_broadcast(&changed); }

void wait_for_change(void)
{
    bql_held = false;
    pthread_cond_wait(&changed, &bql);
    bql_held = true;
}

void kick(struct cpu *cpu) { STORE(cpu->exit_request, true); }

void stop_all(void)
{
    assert_that(bql_held && !in_vcpu_thread);
    for (unsigned i = 0; i < guest.vcpus; i++) {
        STORE(guest.cpus[i].stop, true);
        kick(&guest.cpus[i]);
    }
    tell_change();
    for (unsigned i = 0; i < guest.vcpus; i++)
        while (LOAD(host.is_up[i]) && !guest.cpus[i].stopped)
            wait_for_change();
    STORE(host.running, false);
    say("STOP");
}

/* ---- vCPU threads ---- */

static void plugin_translated(struct cpu *cpu, struct qemu_plugin_tb *tb)
{
    cpu->cb_flags = RW_REGS;
    host.translated(0, tb);
    cpu->cb_flags = NO_REGS;
}

static void begin_vcpu(struct cpu *cpu)
{
    current_cpu = cpu;
    STORE(host.is_up[cpu->index], true);
    cpu->cb_flags = RW_REGS;
    host.vcpu_up(0, cpu->index);
    cpu->cb_flags = NO_REGS;
    say("up %u", cpu->index);
}

/* What a vCPU has to do between two runs; whether it can run then. */
static bool between_runs(struct cpu *cpu, bool has_run)
{
    do_work(cpu);
    if (has_run && cpu->halted)
        say("halted %u %llx", cpu->index, (unsigned long long)cpu->env.eip);
    if (LOAD(cpu->stop) && !cpu->stopped) {
        cpu->stopped = true;
        tell_change();
    }
    return LOAD(host.is_up[cpu->index]) && !cpu->stopped && !cpu->halted;
}

static void run_unlocked(struct cpu *cpu)
{
    current_cpu = cpu;
    unlock();
    run_cpu(cpu);
    lock();
}

static void *vcpu_thread(void *argument)
{
    struct cpu *cpu = argument;
    in_vcpu_thread = true;
    lock();
    begin_vcpu(cpu);
    for (bool has_run = false;;) {
        bool can_run = between_runs(cpu, has_run);
        has_run = can_run;
        if (can_run)
            run_unlocked(cpu);
        else
            wait_for_change();
    }
    return NULL;
}

/* One thread for all vCPUs. Work is done for each with current_cpu as the last one that ran has left it. */
static void *single_thread(void *unused)
{
    bool has_run[MOST_VCPUS] = {false};
    (void)unused;
    in_vcpu_thread = true;
    lock();
    for (unsigned i = 0; i < options.start; i++)
        begin_vcpu(&guest.cpus[i]);
    for (;;) {
        bool any = false;
        for (unsigned i = 0; i < guest.vcpus; i++) {
            has_run[i] = between_runs(&guest.cpus[i], has_run[i]);
            any |= has_run[i];
        }
        for (unsigned i = 0; i < guest.vcpus; i++)
            if (has_run[i] && !guest.cpus[i].stopped)
                run_unlocked(&guest.cpus[i]);
        if (!any)
            wait_for_change();
    }
    return NULL;
}

static void start_thread(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, function, argument) != 0)
        die("no thread");
    pthread_detach(thread);
}

/* ---- commands ---- */

static struct cpu *cpu_named(unsigned index)
{
    if (index >= guest.vcpus)
        die("there is no vCPU %u", index);
    return &guest.cpus[index];
}

static int register_named(const char *name)
{
    for (int number = 0; register_name(number); number++)
        if (strcmp(register_name(number), name) == 0)
            return number;
    die("there is no register %s", name);
}

static void load(unsigned long long address, const char *hex)
{
    for (unsigned byte; sscanf(hex, "%2x", &byte) == 1; hex += 2)
        load_byte(address++, (uint8_t)byte);
}

static void tell_register(unsigned index, const char *name)
{
    uint64_t value = 0;
    read_register(cpu_named(index), register_named(name), (uint8_t *)&value);
    say("%s %u %llx", name, index, (unsigned long long)value);
}

static void tell_msr(const struct cpu *cpu, unsigned number)
{
    for (unsigned i = 0; i < cpu->msr_count; i++)
        if (cpu->msrs[i].number == number)
            say("msr %u %x %llx", cpu->index, number, (unsigned long long)cpu->msrs[i].value);
}

static void obey(const char *line)
{
    unsigned index, number;
    unsigned long long value, times;
    char word[32];
    static char hex[8192];
    if (sscanf(line, "load %llx %8191s", &value, hex) == 2) {
        load(value, hex);
    } else if (sscanf(line, "set %u %31s %llx", &index, word, &value) == 3) {
        write_register(cpu_named(index), register_named(word), (uint8_t *)&value);
    } else if (sscanf(line, "get %u %31s", &index, word) == 2) {
        tell_register(index, word);
    } else if (sscanf(line, "msr %u %x", &index, &number) == 2) {
        tell_msr(cpu_named(index), number);
    } else if (sscanf(line, "handlers %llx %llx", &value, &times) == 2) {
        guest.interrupt_handler = value;
        guest.fault_handler = times;
    } else if (sscanf(line, "run %u %llx %llu", &index, &value, &times) == 3) {
        struct cpu *cpu = cpu_named(index);
        cpu->env.eip = cpu->entry = value;
        cpu->repeat = times;
        cpu->halted = false;
        tell_change();
    } else if (sscanf(line, "up %u", &index) == 1) {
        start_thread(vcpu_thread, cpu_named(index));
    } else if (sscanf(line, "down %u", &index) == 1) {
        host.vcpu_down(0, index);
        STORE(host.is_up[index], false);
    } else if (strcmp(line, "stop") == 0) {
        vm_stop(RUN_STATE_PAUSED);
    } else if (strcmp(line, "cont") == 0) {
        vm_start();
    } else if (strcmp(line, "reads") == 0) {
        say("reads %u", LOAD(host.register_reads));
    } else if (strcmp(line, "reset") == 0) {
        host.reset(host.reset_opaque);
    } else if (strcmp(line, "quit") == 0) {
        exit(0);
    } else if (sscanf(line, "echo %31s", word) == 1) {
        say("%s", word);
    } else {
        die("no such command: %s", line);
    }
}

/* The main loop: it holds the big lock but for when it waits. */
static void main_loop(void)
{
    static char buffer[1 << 14];
    size_t filled = 0;
    struct pollfd fds[] = {{.fd = 0, .events = POLLIN}, {.fd = host.wake_main, .events = POLLIN}};
    lock();
    for (;;) {
        eventfd_t count;
        unlock();
        poll(fds, 2, -1);
        if (fds[1].revents && options.slow_stop_ms)
            usleep(options.slow_stop_ms * 1000);
        lock();
        if (fds[1].revents) {
            eventfd_read(host.wake_main, &count);
            if (__atomic_exchange_n(&host.stop_requested, false, __ATOMIC_ACQ_REL) && LOAD(host.running))
                stop_all();
        }
        if (!fds[0].revents)
            continue;
        ssize_t received = read(0, buffer + filled, sizeof buffer - filled);
        if (received <= 0)
            exit(0);
        filled += (size_t)received;
        for (char *end; (end = memchr(buffer, '\n', filled)) != NULL;) {
            *end = 0;
            obey(buffer);
            filled -= (size_t)(end + 1 - buffer);
            memmove(buffer, end + 1, filled);
        }
    }
}

/* ---- start ---- */

/* A kernel, or a container, that has no membarrier(2). */
static void forbid_membarrier(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof code / sizeof *code, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        die("no system call can be forbidden here");
}

static void read_option(char *option)
{
    unsigned number;
    if (strncmp(option, "plugin:", 7) == 0)
        options.plugin_arguments[options.plugin_argument_count++] = option + 7;
    else if (strncmp(option, "target=", 7) == 0)
        options.info.target_name = option + 7;
    else if (sscanf(option, "vcpus=%u", &number) == 1)
        options.start = number;
    else if (sscanf(option, "max_vcpus=%u", &number) == 1)
        options.info.system.max_vcpus = (int)number;
    else if (sscanf(option, "user=%u", &number) == 1)
        options.info.system_emulation = !number;
    else if (sscanf(option, "pcrel=%u", &number) == 1)
        guest.shares_translations = number;
    else if (sscanf(option, "single=%u", &number) == 1)
        options.single = number;
    else if (sscanf(option, "log=%u", &number) == 1)
        guest.logs = number;
    else if (sscanf(option, "slow_stop=%u", &number) == 1)
        options.slow_stop_ms = number;
    else if (strcmp(option, "membarrier=0") == 0)
        forbid_membarrier();
    else
        die("no such option: %s", option);
}

static void load_plugin(void)
{
    void *plugin = dlopen(options.agent, RTLD_NOW | RTLD_LOCAL);
    if (plugin == NULL)
        die("%s", dlerror());
    const int *version = dlsym(plugin, "qemu_plugin_version");
    int (*install)(uint64_t, const struct qemu_info *, int, char **);
    *(void **)&install = dlsym(plugin, "qemu_plugin_install");
    if (version == NULL || install == NULL)
        die("the agent is no plugin");
    if (*version < LEAST_API || *version > API)
        die("plugin API version %d, only %d to %d supported", *version, LEAST_API, API);
    if (install(0, &options.info, options.plugin_argument_count, options.plugin_arguments) != 0) {
        fprintf(stderr, "the plugin could not be installed\n");
        exit(1);
    }
    say("installed %d", *version);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        die("no agent given");
    options.agent = argv[1];
    for (int i = 2; i < argc; i++)
        read_option(argv[i]);
    options.info.system.smp_vcpus = (int)options.start;
    if (options.info.system.max_vcpus < (int)options.start)
        options.info.system.max_vcpus = (int)options.start;
    if (options.info.system.max_vcpus > MOST_VCPUS)
        die("too many vCPUs");
    host.wake_main = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    load_plugin();
    guest.translated = plugin_translated;
    guest.tells_translator = options.single && API >= 4; /* since QEMU 10.0 (accel/tcg/plugin-gen.c, gen_cpu_index) */
    guest.vcpus = (unsigned)options.info.system.max_vcpus;
    for (unsigned i = 0; i < guest.vcpus; i++) {
        struct cpu *cpu = &guest.cpus[i];
        cpu->index = i;
        cpu->halted = true;
        cpu->env.regs[RSP] = MEMORY_BYTES - i * 256 - 256;
        cpu->env.eflags = RFLAGS_ALWAYS;
        cpu->env.system[CS] = 0x10;
        cpu->env.system[CR0] = 0x80000001;
        cpu->env.system[EFER] = 0x500;
    }
    if (options.single)
        start_thread(single_thread, NULL);
    for (unsigned i = 0; i < options.start && !options.single; i++)
        start_thread(vcpu_thread, &guest.cpus[i]);
    main_loop();
}
