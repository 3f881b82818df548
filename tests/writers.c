/* writers KIND ROUNDS CPU: makes the kernel write MSRs, each time a value that says which thread it is of.
 *
 *   base    two threads set FS and GS (arch_prctl) and let others run
 *   msr     two threads write MSR 0 of that CPU (/dev/cpu/CPU/msr); they stay on it
 *   ptrace  a process stops, another one gives it FS and GS (POKEUSER and SETREGS in turn) and has it go on
 *   perf    a process counts something with a performance counter of its own, and lets others run
 *
 * ROUNDS 0: for ever. Each thread prints "thread KIND PID TID NAME" before it begins; the program ends with 0 if the guest
 * saw what it should. Needs no library: nobody else sets FS here.
 *
 * A value is KIND (1 to 4) << 44 | PID << 30 | TID << 16 | ROUND, which is an address of the lower half.
 */
#include "syscall.h"

enum { OPEN = 2, WRITE = 1, PWRITE64 = 18, SCHED_YIELD = 24, GETPID = 39, CLONE = 56, FORK = 57, EXIT = 60, WAIT4 = 61 };
enum { KILL = 62, PTRACE = 101, PRCTL = 157, ARCH_PRCTL = 158, GETTID = 186, SCHED_SETAFFINITY = 203, EXIT_GROUP = 231 };
enum { PERF_EVENT_OPEN = 298 };
enum { O_WRONLY = 1, SET_NAME = 15, SIGSTOP = 19, SIGKILL = 9 };
enum { SET_GS = 0x1001, SET_FS = 0x1002, GET_FS = 0x1003, GET_GS = 0x1004 };
enum { TRACEME = 0, POKEUSER = 6, CONT = 7, GETREGS = 12, SETREGS = 13 };
enum { FS_BASE = 21, GS_BASE = 22, REGS = 27 }; /* of struct user_regs_struct, in words */
enum { THREAD_FLAGS = 0x50f00 };                /* CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM */
enum { BASE = 1, MSR, TRACED, PERF };

typedef unsigned long u64;

static long rounds, cpu;
static volatile int finished;
static char second_stack[16384] __attribute__((aligned(16)));

#define CALL1(number, a) call(number, (long)(a), 0, 0, 0, 0)
#define CALL2(number, a, b) call(number, (long)(a), (long)(b), 0, 0, 0)
#define CALL3(number, a, b, c) call(number, (long)(a), (long)(b), (long)(c), 0, 0)

static void need(int holds, const char *what)
{
    if (holds)
        return;
    long length = 0;
    while (what[length])
        length++;
    CALL3(WRITE, 1, "writers: ", 9);
    CALL3(WRITE, 1, what, length);
    CALL3(WRITE, 1, "\n", 1);
    CALL1(EXIT_GROUP, 1);
}

static u64 value(u64 kind, long round)
{
    return kind << 44 | (u64)CALL1(GETPID, 0) << 30 | (u64)CALL1(GETTID, 0) << 16 | ((u64)round & 0xffff);
}

static char *put(char *to, const char *text)
{
    while (*text)
        *to++ = *text++;
    *to++ = ' ';
    return to;
}

static char *put_number(char *to, long number)
{
    char digits[24], *from = digits + sizeof digits;
    *--from = 0;
    do
        *--from = (char)('0' + number % 10);
    while (number /= 10);
    return put(to, from);
}

/* Takes this name, and tells who that is in one write, so that lines of several threads do not mix. */
static void introduce(const char *name)
{
    char line[128], *end;
    CALL2(PRCTL, SET_NAME, name);
    end = put(put_number(put_number(put(line, "thread"), CALL1(GETPID, 0)), CALL1(GETTID, 0)), name);
    end[-1] = '\n';
    CALL3(WRITE, 1, line, end - line);
}

static void set_bases(void)
{
    for (long round = 0; !rounds || round < rounds; round++) {
        u64 base = value(BASE, round), fs = 0, gs = 0;
        need(CALL2(ARCH_PRCTL, SET_FS, base) == 0 && CALL2(ARCH_PRCTL, SET_GS, base) == 0, "arch_prctl");
        CALL1(SCHED_YIELD, 0);
        CALL2(ARCH_PRCTL, GET_FS, &fs);
        CALL2(ARCH_PRCTL, GET_GS, &gs);
        need(fs == base && gs == base, "FS or GS is not what was set");
    }
}

static void write_msr(void)
{
    u64 mask = 1ul << cpu;
    need(CALL3(SCHED_SETAFFINITY, 0, sizeof mask, &mask) == 0, "sched_setaffinity");
    char path[] = "/dev/cpu/0/msr";
    path[9] = (char)('0' + cpu);
    long file = CALL2(OPEN, path, O_WRONLY);
    for (long round = 0; !rounds || round < rounds; round++) {
        u64 written = value(MSR, round);
        need(call(PWRITE64, file, (long)&written, 8, 0, 0) == 8, "write of an MSR");
        CALL1(SCHED_YIELD, 0);
    }
}

/* The other thread of the process: its own name, the same work. */
static void second(void (*work)(void), const char *name)
{
    introduce(name);
    work();
    finished = 1;
    for (;;)
        CALL1(EXIT, 0);
}

static void in_two_threads(void (*work)(void), const char *first_name, const char *second_name)
{
    long result;
    register long r10 __asm__("r10") = 0;
    register void *work_of_it __asm__("r12") = (void *)work;
    register const char *name_of_it __asm__("r13") = second_name;
    register void (*begin)(void (*)(void), const char *) __asm__("r14") = second;
    introduce(first_name);
    __asm__ volatile("syscall\n test %%eax, %%eax\n jnz 1f\n mov %%r12, %%rdi\n mov %%r13, %%rsi\n call *%%r14\n 1:"
                     : "=a"(result)
                     : "a"((long)CLONE), "D"((long)THREAD_FLAGS), "S"(second_stack + sizeof second_stack), "d"(0L), "r"(r10),
                       "r"(work_of_it), "r"(name_of_it), "r"(begin)
                     : "rcx", "r11", "memory");
    need(result > 0, "clone");
    work();
    while (!finished)
        CALL1(SCHED_YIELD, 0);
}

/* What is traced: compares its FS and GS with what it was to be given, once each time that it goes on. */
static void be_traced(void)
{
    need(CALL1(PTRACE, TRACEME) == 0, "PTRACE_TRACEME");
    introduce("traced");
    for (long round = 0;; round++) {
        u64 fs = 0, gs = 0;
        CALL2(KILL, CALL1(GETPID, 0), SIGSTOP);
        CALL2(ARCH_PRCTL, GET_FS, &fs);
        CALL2(ARCH_PRCTL, GET_GS, &gs);
        need(fs == value(TRACED, round) && gs == fs, "FS or GS is not what the tracer said");
    }
}

static void trace(void)
{
    u64 registers[REGS];
    introduce("tracer");
    long child = CALL1(FORK, 0);
    if (child == 0)
        be_traced();
    need(child > 0, "fork");
    for (long round = 0; !rounds || round < rounds; round++) {
        u64 base = (u64)TRACED << 44 | (u64)child << 30 | (u64)child << 16 | ((u64)round & 0xffff);
        int status = 0;
        need(CALL3(WAIT4, child, &status, 0) == child && (status & 0xff) == 0x7f, "what is traced has not stopped");
        if (round & 1) {
            need(call(PTRACE, GETREGS, child, 0, (long)registers, 0) == 0, "PTRACE_GETREGS");
            registers[FS_BASE] = registers[GS_BASE] = base;
            need(call(PTRACE, SETREGS, child, 0, (long)registers, 0) == 0, "PTRACE_SETREGS");
        } else {
            need(call(PTRACE, POKEUSER, child, FS_BASE * 8, (long)base, 0) == 0, "PTRACE_POKEUSER of fs_base");
            need(call(PTRACE, POKEUSER, child, GS_BASE * 8, (long)base, 0) == 0, "PTRACE_POKEUSER of gs_base");
        }
        need(CALL3(PTRACE, CONT, child, 0) == 0, "PTRACE_CONT");
    }
    int status = 0;
    CALL3(WAIT4, child, &status, 0);
    need((status & 0xff) == 0x7f, "what is traced has found something wrong");
    CALL2(KILL, child, SIGKILL);
    CALL3(WAIT4, child, &status, 0);
}

/* Counts an event whose number and period are this process's own: the kernel writes both when the process comes to a CPU. */
static void count(void)
{
    struct {
        unsigned type, size;
        u64 config, period, sample_type, read_format, flags;
        unsigned wakeup, breakpoint_type;
        u64 breakpoint;
    } attributes = {.type = 4 /* PERF_TYPE_RAW */, .size = sizeof attributes};
    introduce("counting");
    attributes.config = (u64)CALL1(GETPID, 0) & 0xff;
    attributes.period = value(PERF, 0);
    long file = call(PERF_EVENT_OPEN, (long)&attributes, 0, -1, -1, 0);
    need(file >= 0, "perf_event_open");
    for (long round = 0; !rounds || round < rounds; round++)
        CALL1(SCHED_YIELD, 0);
}

__attribute__((used, noreturn)) static void start(long *stack)
{
    char **arguments = (char **)(stack + 1);
    for (const char *digit = arguments[2]; *digit; digit++)
        rounds = rounds * 10 + *digit - '0';
    cpu = arguments[3][0] - '0';
    switch (arguments[1][0]) {
    case 'b':
        in_two_threads(set_bases, "bases", "bases-2");
        break;
    case 'm':
        in_two_threads(write_msr, "msrs", "msrs-2");
        break;
    case 'p':
        if (arguments[1][1] == 't')
            trace();
        else
            count();
        break;
    }
    for (;;)
        CALL1(EXIT_GROUP, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\nand $-16, %rsp\ncall start");
