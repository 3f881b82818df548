/* A processor, its memory and its translated blocks: as much of QEMU's TCG as the agent can tell from the real one. */
#ifndef FAKE_GUEST_H
#define FAKE_GUEST_H

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Nothing here is for the agent to find. */
#pragma GCC visibility push(hidden)

/* General registers that the state has room for: 32 since QEMU 11, for APX. */
#ifndef GENERAL_REGISTERS
#define GENERAL_REGISTERS 16
#endif

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
enum { PAGE = 4096, MEMORY_BYTES = 1 << 20, MOST_VCPUS = 300 };
enum { ZERO_FLAG = 0x40, STATUS_FLAGS = 0x8d5, RFLAGS_ALWAYS = 2 };
/* What CC_OP says of where the status flags are: in cc_src, or to be had from the last result. */
enum { CC_OP_EFLAGS = 1, CC_OP_RESULT = 30 };
/* Writing these MSRs has an effect: #GP, or an interrupt that arrives right after the instruction. */
enum { FAULTING_MSR = 0xbad, INTERRUPTING_MSR = 0x1a7 };
/* Segments, bases and control registers by gdb's number, 18 ("cs") and on; 27 is cr0, 32 is efer. */
enum { FIRST_SYSTEM_REGISTER = 18, SYSTEM_REGISTERS = 15, CS = 0, CR0 = 9, EFER = 14 };
/* Second virtual home of all memory. */
#define ALIAS UINT64_C(0xffff800000000000)

/* CPUX86State as QEMU 7.2 begins it (target/i386/cpu.h). */
struct env {
    uint64_t regs[GENERAL_REGISTERS];
    uint64_t eip;
    uint64_t eflags;
    uint64_t cc_dst, cc_src, cc_src2;
    uint32_t cc_op;
    int32_t df;
    uint64_t system[SYSTEM_REGISTERS];
};

struct msr {
    uint32_t number;
    uint64_t value;
};

struct work {
    void (*func)(void *cpu, void *data);
    void *data;
};

struct cpu {
    char parent[512];
    struct env env;
    unsigned index;
    sigjmp_buf exit;
    bool in_block;  /* translated code runs */
    bool restored;  /* cpu_restore_state was called: translated code must not go on */
    bool exit_request;
    bool halted;    /* nothing to run */
    bool stop;
    bool stopped;
    int cb_flags;   /* enum qemu_plugin_cb_flags that hold now */
    uint64_t insn_rip; /* of the instruction that translated code is at */
    uint64_t repeat; /* times that the program is still to be run */
    uint64_t entry;
    unsigned work_count;
    struct work work[8];
    unsigned msr_count;
    struct msr msrs[512];
    /* MSRs that QEMU's description of the CPU object tells of (vmstate_x86_cpu). */
    uint64_t star, lstar;
    uint32_t sysenter_cs;
    uint64_t mtrr_var[16];
    uint64_t mcg_cap, mce_banks[40];
};

struct callback {
    void (*func)(unsigned, void *);
    int flags;
    void *userdata;
};

struct qemu_plugin_insn {
    uint64_t vaddr;
    size_t size;
    uint8_t bytes[16];
    unsigned callback_count;
    struct callback callbacks[4];
};

struct qemu_plugin_tb {
    struct qemu_plugin_tb *next;
    uint64_t vaddr;  /* for which it was translated */
    uint64_t paddr;
    unsigned privilege;
    unsigned translator; /* the vCPU that it was translated for */
    size_t insn_count;
    struct qemu_plugin_insn insns[16];
};

struct guest {
    uint8_t memory[MEMORY_BYTES];
    struct cpu cpus[MOST_VCPUS];
    unsigned vcpus;
    bool shares_translations; /* one block serves every virtual address of its page (CF_PCREL) */
    bool tells_translator; /* callbacks are told that vCPU, not the one that executes the block */
    bool logs;
    uint64_t interrupt_handler, fault_handler; /* 0: a fault halts the vCPU */
    /* Called for a block that was not translated yet; given by the host, which calls the plugin. */
    void (*translated)(struct cpu *cpu, struct qemu_plugin_tb *tb);
};
extern struct guest guest;

/* Where an MSR is kept that has a place of its own; null for others. Its size in bytes is `size`. */
void *kept_msr(struct cpu *cpu, uint32_t number, size_t *size);

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* Physical address; UINT64_MAX where nothing is mapped. */
uint64_t translate(uint64_t vaddr);
bool access_memory(uint64_t vaddr, void *bytes, size_t length, bool write);

/* Part of a program; what was translated of it is translated anew. */
void load_byte(uint64_t paddr, uint8_t byte);

/* Lets translated code run until something asks it to leave. */
void run_cpu(struct cpu *cpu);
uint64_t rflags(const struct env *env);
/* The address that a callback finds as its return address. */
extern char translated_code[];

/* By gdb's number: the register's size in bytes, 0 where there is none. */
int read_register(struct cpu *cpu, int number, uint8_t *bytes);
int write_register(struct cpu *cpu, int number, const uint8_t *bytes);
const char *register_name(int number);

#pragma GCC visibility pop

#endif
