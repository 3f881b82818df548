/* The TCG door: a QEMU plugin that is called before each translated WRMSR and RDMSR.
 *
 * What stops, skips or redirects the instruction needs the vCPU's precise state: restore it from the translated code's return
 * address, change it, leave the translated code (cpu_loop_exit). To carry the instruction out after all, RIP stays at it; it is
 * translated and called for once more, and what was already done for it is remembered in a hold.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "hold.h"
#include "paging.h"
#include "qemu.h"
#include "qemu_msrs.h"
#include "quick.h"

enum { ENV_TRIES = 16, ENV_PROVEN = ENV_TRIES + 1 };

/* The instruction that this vCPU executes now and that a post stage has been promised for. */
struct executed {
    bool pending;
    uint8_t access;
    uint8_t length;
    uint32_t msr;
    uint64_t rip;
};

/* struct trap.place */
struct place {
    uintptr_t site;
    uintptr_t return_address; /* into translated code; 0: the vCPU is between two blocks, with its state complete */
    uint64_t *env; /* what qemu_env gives */
    bool precise;
};

static struct {
    struct executed *executed; /* by vCPU */
    unsigned vcpu_count;
    unsigned env; /* ENV_PROVEN, or how often it could not be proven that the CPU's state is where it is thought to be */
} tcg;

/* ---- the state of a trapped vCPU ---- */

static void make_precise(struct trap *trap)
{
    struct place *place = trap->place;
    if (place->precise)
        return;
    cpu_restore_state(qemu_cpu(trap->vcpu), place->return_address, true);
    place->precise = true;
}

static uint64_t read_register(unsigned vcpu, const struct place *place, unsigned number)
{
    return place->return_address ? qemu_read_register(vcpu, number) : qemu_peek_register(vcpu, number);
}

static void get_asked(struct trap *trap, uint64_t *values)
{
    const struct place *place = trap->place;
    const uint64_t *env = place->env;
    make_precise(trap);
    for (unsigned number = 0; number < VMEXIT_RIP; number++)
        values[number] = env ? env[number] : read_register(trap->vcpu, place, number);
    values[VMEXIT_RIP] = env ? *qemu_env_rip(env) : read_register(trap->vcpu, place, VMEXIT_RIP);
    values[VMEXIT_RFLAGS] =
        place->return_address ? qemu_read_rflags(trap->vcpu) : qemu_peek_register(trap->vcpu, VMEXIT_RFLAGS);
}

static void set_asked(struct trap *trap, const uint64_t *values, uint32_t changed)
{
    const struct place *place = trap->place;
    for (unsigned number = 0; number <= VMEXIT_RFLAGS; number++) {
        if (!(changed >> number & 1))
            continue;
        if (!place->return_address)
            qemu_poke_register(trap->vcpu, number, values[number]);
        else if (number == VMEXIT_RFLAGS)
            qemu_write_rflags(trap->vcpu, values[number]);
        else
            qemu_write_register(trap->vcpu, number, values[number]);
    }
}

/* The state holds the general registers at every trap: the helper that carries the instruction out wants them there, or has just left
 * them there. What is written is found by that helper, or by what is executed next. */
static void get_general(struct trap *trap, uint64_t *values)
{
    const struct place *place = trap->place;
    if (place->env) {
        memcpy(values, place->env, 16 * sizeof *values);
        return;
    }
    for (unsigned number = 0; number < 16; number++)
        values[number] = read_register(trap->vcpu, place, number);
}

static uint64_t *general_in_place(struct trap *trap) { return ((const struct place *)trap->place)->env; }

static void set_general(struct trap *trap, const uint64_t *values, uint32_t changed)
{
    uint64_t *env = ((struct place *)trap->place)->env;
    if (env == NULL) {
        make_precise(trap);
        set_asked(trap, values, changed);
        return;
    }
    for (unsigned number = 0; number < 16; number++)
        if (changed >> number & 1)
            env[number] = values[number];
}

static bool read_any_register(struct trap *trap, unsigned number, uint64_t *value)
{
    const struct place *place = trap->place;
    if (number == VMEXIT_RIP && trap->stage == VMEXIT_PRE && !place->precise) {
        *value = trap->rip;
        return true;
    }
    if (number >= VMEXIT_REGISTERS)
        return qemu_read_system_register(trap->vcpu, number, value);
    if (number == VMEXIT_RIP || number == VMEXIT_RFLAGS)
        make_precise(trap);
    bool stale = number == VMEXIT_RFLAGS && place->return_address;
    *value = stale ? qemu_read_rflags(trap->vcpu) : read_register(trap->vcpu, place, number);
    return true;
}

static bool write_any_register(struct trap *trap, unsigned number, uint64_t value)
{
    const struct place *place = trap->place;
    make_precise(trap);
    if (number >= VMEXIT_REGISTERS)
        return qemu_write_system_register(trap->vcpu, number, value);
    if (!place->return_address)
        qemu_poke_register(trap->vcpu, number, value);
    else if (number == VMEXIT_RFLAGS)
        qemu_write_rflags(trap->vcpu, value);
    else
        qemu_write_register(trap->vcpu, number, value);
    return true;
}

static bool reach_memory(struct trap *trap, bool physical, bool write, uint64_t address, void *bytes, uint32_t length)
{
    return qemu_access_memory(trap->vcpu, physical, write, address, bytes, length);
}

static bool access_physical(void *unused, uint64_t physical, void *bytes, uint32_t length, bool write)
{
    (void)unused;
    return qemu_access_memory(0, true, write, physical, bytes, length);
}

/* `place`: where the vCPU is trapped. */
static bool translate_at(unsigned vcpu, const struct place *place, bool to_virtual, uint64_t address, uint64_t *translated)
{
    const struct paging paging = {
        .cr0 = read_register(vcpu, place, VMEXIT_CR0),
        .cr3 = read_register(vcpu, place, VMEXIT_CR3),
        .cr4 = read_register(vcpu, place, VMEXIT_CR4),
        .efer = read_register(vcpu, place, VMEXIT_EFER),
        .access = access_physical,
    };
    return to_virtual ? paging_find(&paging, address, PAGING_MANY_TABLES, translated)
                      : paging_translate(&paging, address, translated, NULL);
}

static bool to_physical(struct trap *trap, uint64_t address, uint64_t *physical)
{
    return translate_at(trap->vcpu, trap->place, false, address, physical);
}

static bool to_virtual(struct trap *trap, uint64_t physical, uint64_t *address)
{
    return translate_at(trap->vcpu, trap->place, true, physical, address);
}

static bool peek_msr(struct trap *trap, uint32_t msr, uint64_t *value) { return qemu_peek_msr(trap->vcpu, msr, value); }

static void halt(void)
{
    vm_stop(RUN_STATE_PAUSED);
    link_machine_held();
}

/* ---- what the link asks for ---- */

static bool is_reachable(unsigned vcpu)
{
    return vcpu < tcg.vcpu_count && qemu_cpu(vcpu) != NULL && (core_is_asking(vcpu) || !qemu_is_running());
}

/* VMEXIT_OK where this can be done now with this vCPU. */
static int check_reachable(unsigned vcpu, uint32_t capabilities)
{
    if (vcpu >= tcg.vcpu_count)
        return VMEXIT_REFUSED;
    if (capabilities & ~core_door()->capabilities)
        return VMEXIT_UNAVAILABLE;
    return is_reachable(vcpu) ? VMEXIT_OK : VMEXIT_RUNNING;
}

static int get_registers(unsigned vcpu, uint64_t *values)
{
    int status = check_reachable(vcpu, VMEXIT_CAN_READ);
    for (unsigned number = 0; number < VMEXIT_REGISTERS && status == VMEXIT_OK; number++)
        values[number] = qemu_peek_register(vcpu, number);
    return status;
}

static int get_register(unsigned vcpu, unsigned number, uint64_t *value)
{
    int status = check_reachable(vcpu, VMEXIT_CAN_READ);
    if (status != VMEXIT_OK)
        return status;
    if (number >= VMEXIT_REGISTERS)
        return qemu_read_system_register(vcpu, number, value) ? VMEXIT_OK : VMEXIT_UNAVAILABLE;
    *value = qemu_peek_register(vcpu, number);
    return VMEXIT_OK;
}

static int set_register(unsigned vcpu, unsigned number, uint64_t value)
{
    int status = check_reachable(vcpu, VMEXIT_CAN_MODIFY);
    if (status != VMEXIT_OK)
        return status;
    if (core_is_asking(vcpu)) /* a question's registers go with its answer */
        return VMEXIT_RUNNING;
    qemu_lock();
    if (number < VMEXIT_REGISTERS)
        qemu_poke_register(vcpu, number, value);
    else if (!qemu_write_system_register(vcpu, number, value))
        status = VMEXIT_UNAVAILABLE;
    qemu_unlock();
    if (number < VMEXIT_REGISTERS)
        hold_follow(vcpu, number, value);
    return status;
}

static int access_memory(unsigned vcpu, bool physical, bool write, uint64_t address, void *bytes, uint32_t length)
{
    int status = check_reachable(vcpu, VMEXIT_CAN_MEMORY);
    if (status == VMEXIT_OK && !qemu_access_memory(vcpu, physical, write, address, bytes, length))
        return VMEXIT_UNREADABLE;
    return status;
}

static int translate(unsigned vcpu, bool to_virtual, uint64_t address, uint64_t *translated)
{
    const struct place between_blocks = {0};
    int status = check_reachable(vcpu, VMEXIT_CAN_MEMORY);
    if (status == VMEXIT_OK && !translate_at(vcpu, &between_blocks, to_virtual, address, translated))
        return VMEXIT_UNREADABLE;
    return status;
}

static int access_msr(unsigned vcpu, bool write, uint32_t msr, uint64_t *value)
{
    int status = check_reachable(vcpu, write ? VMEXIT_CAN_MODIFY : VMEXIT_CAN_READ);
    if (status != VMEXIT_OK)
        return status;
    if (write)
        return core_is_asking(vcpu) ? VMEXIT_RUNNING : qemu_write_msr(vcpu, msr, *value);
    return qemu_peek_msr(vcpu, msr, value) ? VMEXIT_OK : VMEXIT_NO_MSR;
}

static int decide(unsigned vcpu, bool skip) { return hold_decide(vcpu, skip) ? VMEXIT_OK : VMEXIT_REFUSED; }

static int set_halted(bool halted)
{
    if (halted)
        qemu_halt();
    else
        qemu_resume();
    return VMEXIT_OK;
}

static void on_reset(void *unused)
{
    (void)unused;
    hold_forget_all();
    tasks_distrust();
}

static void enter_thread(void)
{
    if (rcu_register_thread)
        rcu_register_thread();
}

static struct door door = {
    .name = "tcg",
    .get_asked = get_asked,
    .set_asked = set_asked,
    .get_general = get_general,
    .set_general = set_general,
    .general_in_place = general_in_place,
    .read_register = read_any_register,
    .write_register = write_any_register,
    .reach_memory = reach_memory,
    .to_physical = to_physical,
    .to_virtual = to_virtual,
    .peek_msr = peek_msr,
    .get_task_registers = qemu_task_registers,
    .get_kernel_gs_base = qemu_kernel_gs_base,
    .find_page = qemu_find_page,
    .read_physical = qemu_read_physical,
    .get_registers = get_registers,
    .get_register = get_register,
    .set_register = set_register,
    .access_memory = access_memory,
    .access_msr = access_msr,
    .translate = translate,
    .decide = decide,
    .resume = qemu_resume,
    .set_halted = set_halted,
    .is_running = qemu_is_running,
    .enter_thread = enter_thread,
};

/* ---- sites: what a callback is told about its instruction ---- */

/* Packed into the callback's user data, so that translating a block allocates nothing and a hostile guest cannot make it grow:
 * bits 0-11 the instruction's RIP within its page, 12-15 its length, 16-17 the access, 18 set if its block ends with it, 19 set if the
 * privilege level is to be looked at. The page comes from the CPU's state at the trap, because one translation serves every
 * virtual address of its physical page. */
static uintptr_t pack_site(uint64_t rip, unsigned length, unsigned access, bool ends_block, bool check_privilege)
{
    return (uintptr_t)((rip & 0xfff) | length << 12 | access << 16 | (unsigned)ends_block << 18 | (unsigned)check_privilege << 19);
}

static unsigned site_length(uintptr_t site) { return site >> 12 & 15; }
static unsigned site_access(uintptr_t site) { return site >> 16 & 3; }
static bool site_ends_block(uintptr_t site) { return site >> 18 & 1; }
static bool site_check_privilege(uintptr_t site) { return site >> 19 & 1; }

/* The state's RIP is that of an earlier instruction of the same block, and a block does not begin in one page and go on in another. */
static uint64_t site_rip(uintptr_t site, uint64_t rip_before) { return rip_before + ((site - rip_before) & 0xfff); }

/* 0: not a WRMSR or RDMSR (Intel SDM volume 2: 0F 30, 0F 32 behind legacy prefixes and REX). With LOCK it is #UD and does not count.
 * WRMSRNS (0F 01 C6) is #UD under TCG. */
static unsigned decode_access(const uint8_t *bytes, size_t length)
{
    size_t i = 0;
    while (i < length && memchr("\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3", bytes[i], 10))
        i++;
    if (i < length && (bytes[i] & 0xf0) == 0x40)
        i++;
    if (i + 2 != length || bytes[i] != 0x0f)
        return 0;
    return bytes[i + 1] == 0x30 ? VMEXIT_WRMSR : bytes[i + 1] == 0x32 ? VMEXIT_RDMSR : 0;
}

static unsigned insn_access(const struct qemu_plugin_insn *insn)
{
    uint8_t copy[16] = {0};
    size_t length = qemu_plugin_insn_size(insn);
    if (length < 2 || length > 15)
        return 0;
    if (qemu_api() >= 3)
        qemu_plugin_insn_data(insn, copy, length);
    else
        memcpy(copy, qemu_plugin_insn_data(insn, NULL, 0), length);
    return decode_access(copy, length);
}

/* Outside of ring 0 the instruction is #GP by privilege, which comes before any interception (Intel SDM volume 3, 26.1.1). */
static bool is_privileged(unsigned vcpu)
{
    if (!(qemu_read_register(vcpu, VMEXIT_CR0) & CR0_PE))
        return true;
    if (qemu_read_register(vcpu, VMEXIT_RFLAGS) & RFLAGS_VM)
        return false;
    return (qemu_read_register(vcpu, VMEXIT_CS) & 3) == 0;
}

/* ---- traps ---- */

static inline struct trap make_trap(unsigned vcpu, struct place *place, unsigned access, unsigned length, uint64_t rip)
{
    const uint64_t *env = place->env;
    struct trap trap = {.door = &door, .place = place, .vcpu = vcpu, .access = (uint8_t)access, .length = (uint8_t)length, .rip = rip};
    uint64_t rax = env ? env[VMEXIT_RAX] : read_register(vcpu, place, VMEXIT_RAX);
    uint64_t rdx = env ? env[VMEXIT_RDX] : read_register(vcpu, place, VMEXIT_RDX);
    trap.value = rdx << 32 | (uint32_t)rax;
    trap.msr = (uint32_t)(env ? env[VMEXIT_RCX] : read_register(vcpu, place, VMEXIT_RCX));
    trap.rsp = env ? env[VMEXIT_RSP] : read_register(vcpu, place, VMEXIT_RSP);
    return trap;
}

static void run_post(struct trap *trap, const struct executed *executed)
{
    trap->msr = executed->msr;
    if (core_post(trap) == STOP)
        halt();
}

/* Whether the instruction has completed: RIP is behind it, or an interrupt came first and returns to there. A fault returns to it. */
static bool has_completed(unsigned vcpu, const struct executed *executed, bool *interrupted)
{
    const uint64_t next = executed->rip + executed->length;
    *interrupted = false;
    if (qemu_peek_register(vcpu, VMEXIT_RIP) == next)
        return true;
    uint64_t frame_rip = 0;
    uint64_t rsp = qemu_peek_register(vcpu, VMEXIT_RSP);
    bool long_mode = qemu_peek_register(vcpu, VMEXIT_EFER) >> 10 & 1;
    uint32_t width = long_mode ? 8 : qemu_peek_register(vcpu, VMEXIT_CR0) & CR0_PE ? 4 : 2;
    *interrupted = qemu_access_memory(vcpu, false, false, rsp, &frame_rip, width) &&
                   frame_rip == (width == 8 ? next : next & ((UINT64_C(1) << width * 8) - 1));
    return *interrupted;
}

/* Runs on the vCPU's thread when it has left the block that the instruction ended, before its next instruction. */
static void post_work(void *cpu, void *data)
{
    unsigned vcpu = (unsigned)(uintptr_t)data;
    struct executed executed = tcg.executed[vcpu];
    struct place place = {.env = qemu_env(vcpu), .precise = true};
    bool interrupted;
    (void)cpu;
    tcg.executed[vcpu].pending = false;
    if (!executed.pending)
        return;
    /* QEMU runs such work under its big lock, which reading memory takes too, and which must not be held while a vCPU waits. */
    qemu_unlock();
    if (has_completed(vcpu, &executed, &interrupted)) {
        struct trap trap = make_trap(vcpu, &place, executed.access, executed.length, executed.rip);
        trap.flags = interrupted ? VMEXIT_INTERRUPTED : 0;
        run_post(&trap, &executed);
    }
    qemu_lock();
}

static void leave(struct trap *trap) __attribute__((noreturn));
static void leave(struct trap *trap) { cpu_loop_exit(qemu_cpu(trap->vcpu)); }

static void skip(struct trap *trap)
{
    make_precise(trap);
    /* Unless a callback has sent the guest elsewhere. */
    if (qemu_read_register(trap->vcpu, VMEXIT_RIP) == trap->rip)
        qemu_write_register(trap->vcpu, VMEXIT_RIP, trap->rip + trap->length);
    leave(trap);
}

/* The instruction comes once more and finds that its events have acted, unless a callback has sent the guest elsewhere. */
static void hold_unless_moved(const struct trap *trap, struct progress progress, bool stopped)
{
    if (qemu_read_register(trap->vcpu, VMEXIT_RIP) == trap->rip)
        hold_put(trap, trap->rsp, progress, stopped);
}

static void carry_out(struct trap *trap, struct progress progress)
{
    if (((struct place *)trap->place)->precise) {
        hold_unless_moved(trap, progress, false);
        leave(trap);
    }
    if (!trap->wants_post)
        return;
    tcg.executed[trap->vcpu] = (struct executed){
        .pending = true, .access = trap->access, .length = trap->length, .msr = trap->msr, .rip = trap->rip};
    /* Where the block goes on behind it, the next instruction's callback is the post stage. */
    if (site_ends_block(((struct place *)trap->place)->site))
        async_run_on_cpu(qemu_cpu(trap->vcpu), post_work, (void *)(uintptr_t)trap->vcpu);
}

/* `env`: what qemu_env gives. */
static void on_wanted(unsigned index, uintptr_t site, uint64_t rip, uint64_t *env, uintptr_t return_address)
{
    struct place place = {.site = site, .return_address = return_address, .env = env};
    struct trap trap = make_trap(index, &place, site_access(site), site_length(site), rip);
    struct progress progress = hold_any() ? hold_take(rip, trap.rsp) : PROGRESS_BEGIN;
    switch (core_pre(&trap, &progress)) {
    case STOP:
        make_precise(&trap);
        hold_unless_moved(&trap, progress, true);
        halt();
        leave(&trap);
    case SKIP:
        skip(&trap);
        break;
    case CARRY_OUT:
        carry_out(&trap, progress);
        break;
    }
}

static bool env_is_proven(unsigned index, const uint64_t *env)
{
    unsigned state = __atomic_load_n(&tcg.env, __ATOMIC_ACQUIRE);
    if (__builtin_expect(state < ENV_TRIES, 0)) {
        state = env != NULL && qemu_prove_env(index, env) ? ENV_PROVEN : state + 1;
        __atomic_store_n(&tcg.env, state, __ATOMIC_RELEASE);
    }
    return state == ENV_PROVEN;
}

/* Where one thread runs all vCPUs, QEMU from 10.0 on tells a callback the vCPU that its block was translated for (accel/tcg/plugin-gen.c,
 * gen_cpu_index), whichever it is that executes it now. */
static unsigned own_index(unsigned index, const uint64_t *env)
{
    if (tcg.vcpu_count > 1 && (env == NULL || env != qemu_env(index)))
        qemu_current_vcpu(&index);
    return index;
}

static void look_closer(unsigned index, uintptr_t site, uint64_t *env, uintptr_t return_address)
{
    if (!env_is_proven(index, env))
        env = NULL;
    uint32_t msr = (uint32_t)(env ? env[VMEXIT_RCX] : qemu_read_register(index, VMEXIT_RCX));
    tcg.executed[index].pending = false;
    if (!core_wants(site_access(site), msr))
        return;
    if (site_check_privilege(site) && !is_privileged(index))
        return;
    uint64_t rip = site_rip(site, env ? *qemu_env_rip(env) : qemu_read_register(index, VMEXIT_RIP));
    on_wanted(index, site, rip, qemu_env(index), return_address);
}

/* The common way in from translated code. `env` is what the host's register held that TCG keeps the CPU's state in. */
__attribute__((visibility("hidden"), used)) void tcg_before(unsigned index, uintptr_t site, uint64_t *env)
{
    look_closer(own_index(index, env), site, env, (uintptr_t)__builtin_return_address(0));
}

/* The same, where `env` is proven and somebody may be interested. */
__attribute__((visibility("hidden"), used)) void tcg_before_quick(unsigned index, uintptr_t site, uint64_t *env)
{
    const uint64_t rip = site_rip(site, *qemu_env_rip(env));
    index = own_index(index, env);
    if (site_check_privilege(site) && !is_privileged(index)) {
        tcg.executed[index].pending = false;
        return;
    }
    if (!hold_any() && quick_is_possible() && quick_pre(index, site_access(site), site_length(site), rip, env))
        return;
    tcg.executed[index].pending = false;
    on_wanted(index, site, rip, env, (uintptr_t)__builtin_return_address(0));
}

/* On the instruction behind an RDMSR of the same block, whose site it is: nothing can have come in between. */
__attribute__((visibility("hidden"), used)) void tcg_after(unsigned index, uintptr_t site, uint64_t *env)
{
    index = own_index(index, env);
    struct executed executed = tcg.executed[index];
    if (!executed.pending)
        return;
    tcg.executed[index].pending = false;
    /* Left by an RDMSR that faulted, where the one here was of an MSR that nobody wants. */
    uint32_t msr = (uint32_t)(env_is_proven(index, env) ? env[VMEXIT_RCX] : qemu_read_register(index, VMEXIT_RCX));
    if (msr != executed.msr || ((executed.rip ^ site) & 0xfff) != 0)
        return;
    struct place place = {.return_address = (uintptr_t)__builtin_return_address(0), .env = qemu_env(index)};
    struct trap trap = make_trap(index, &place, executed.access, executed.length, executed.rip);
    trap.msr = executed.msr;
    enum verdict verdict = core_post(&trap);
    if (verdict == STOP) {
        make_precise(&trap);
        halt();
    }
    if (place.precise)
        leave(&trap);
}

/* TCG keeps the CPU's state in RBP on x86-64 hosts; elsewhere the registers are read the slow way. */
#if defined(__x86_64__)
#define ENTRY(name, target)                                                          \
    __attribute__((naked)) static void name(unsigned vcpu, void *site)               \
    {                                                                                \
        (void)vcpu, (void)site;                                                      \
        __asm__("mov %rbp, %rdx\n\tjmp " #target);                                   \
    }
#else
#define ENTRY(name, target)                                                          \
    static void name(unsigned vcpu, void *site) { target(vcpu, (uintptr_t)site, NULL); }
#endif
ENTRY(before_entry, tcg_before)
ENTRY(after_entry, tcg_after)

/* Once RBP is proven, the first look is taken in five instructions: for most accesses it is the last one too. */
#if defined(__x86_64__)
#define STRING(constant) #constant
#define QUICK_ENTRY(name, access)                                                    \
    __attribute__((naked)) static void name(unsigned vcpu, void *site)               \
    {                                                                                \
        (void)vcpu, (void)site;                                                      \
        __asm__("movzwl 8(%rbp), %eax\n\t" /* CX */                                  \
                "lea core_interest(%rip), %rdx\n\t"                                  \
                "testb $" STRING(access) ", (%rdx,%rax)\n\t"                         \
                "jne 1f\n\t"                                                         \
                "ret\n"                                                              \
                "1:\tmov %rbp, %rdx\n\t"                                             \
                "jmp tcg_before_quick");                                                   \
    }
QUICK_ENTRY(before_wrmsr, VMEXIT_WRMSR)
QUICK_ENTRY(before_rdmsr, VMEXIT_RDMSR)
#else
#define before_wrmsr before_entry
#define before_rdmsr before_entry
#endif

typedef void entry(unsigned vcpu, void *site);

static entry *best_entry(unsigned access)
{
    if (__atomic_load_n(&tcg.env, __ATOMIC_ACQUIRE) != ENV_PROVEN)
        return before_entry;
    return access == VMEXIT_WRMSR ? before_wrmsr : before_rdmsr;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    size_t count = qemu_plugin_tb_n_insns(tb);
    unsigned vcpu = UINT32_MAX;
    uint64_t cs_base = 0;
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        unsigned access = insn_access(insn);
        if (access == 0)
            continue;
        /* A block is translated for the state that its first instruction finds, privilege level and code segment included. */
        if (vcpu == UINT32_MAX && qemu_current_vcpu(&vcpu)) {
            if (!is_privileged(vcpu))
                return;
            cs_base = qemu_plugin_tb_vaddr(tb) - qemu_read_register(vcpu, VMEXIT_RIP);
        }
        bool ends_block = i + 1 == count;
        uintptr_t site = pack_site(qemu_plugin_insn_vaddr(insn) - cs_base, (unsigned)qemu_plugin_insn_size(insn), access, ends_block,
                                   vcpu == UINT32_MAX);
        qemu_plugin_register_vcpu_insn_exec_cb(insn, best_entry(access), qemu_callback_flags(), (void *)site);
        if (!ends_block)
            qemu_plugin_register_vcpu_insn_exec_cb(qemu_plugin_tb_get_insn(tb, i + 1), after_entry, qemu_callback_flags(), (void *)site);
    }
}

/* ---- the plugin ---- */

static void on_vcpu_up(qemu_plugin_id_t id, unsigned vcpu)
{
    (void)id;
    if (vcpu >= tcg.vcpu_count)
        return;
    qemu_vcpu_up(vcpu);
    core_vcpu_up(vcpu);
    link_announce_vcpu(vcpu);
}

static void on_vcpu_down(qemu_plugin_id_t id, unsigned vcpu)
{
    (void)id;
    if (vcpu < tcg.vcpu_count)
        qemu_vcpu_down(vcpu);
}

static int fail(const char *why)
{
    fprintf(stderr, "vmexit agent: %s\n", why);
    return 1;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int argc, char **argv)
{
    int listening = -1;
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], "link=", 5) == 0)
            listening = atoi(argv[i] + 5);
    if (!link_is_listening(listening))
        return fail("no link=DESCRIPTOR of a listening socket given; it is started by 'vmexit run'");
    if (!info->system_emulation || (strcmp(info->target_name, "x86_64") != 0 && strcmp(info->target_name, "i386") != 0))
        return fail("only x86 system emulation has MSRs to trap");
    door.capabilities = qemu_capabilities();
    door.plugin_api = qemu_api();
    if (door.capabilities & VMEXIT_CAN_HALT) {
        qemu_watch_state(link_announce_machine);
    } else {
        door.set_halted = NULL;
        door.is_running = NULL;
    }
    tcg.vcpu_count = (unsigned)info->system.max_vcpus;
    tcg.executed = calloc(tcg.vcpu_count, sizeof *tcg.executed);
    if (!(door.capabilities & VMEXIT_CAN_RECORD))
        return fail("this QEMU offers no way to read registers: neither its plugin interface nor exported internals");
    if (tcg.executed == NULL || !qemu_init(tcg.vcpu_count) || !core_init(&door, tcg.vcpu_count) || !link_start(listening))
        return fail("out of memory or descriptors");
    if (qemu_register_reset)
        qemu_register_reset(on_reset, NULL);
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu_up);
    qemu_plugin_register_vcpu_exit_cb(id, on_vcpu_down);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    return 0;
}
