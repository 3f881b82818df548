/* The KVM door's other half (see kvm.c): what happens at an exit that is a trap, and what the core and the link ask of the door. */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <string.h>

#include "hold.h"
#include "kvm.h"

enum { LARGEST_INSTRUCTION = 15 };

/* struct trap.place */
struct place {
    struct cpu *cpu;
    struct kvm_regs regs; /* as the callbacks see them and change them */
    uint32_t changed;
    bool has_paging;
    struct paging paging;
};

/* ---- a trap ---- */

static void get_asked(struct trap *trap, uint64_t *values)
{
    struct place *place = trap->place;
    for (unsigned number = 0; number < VMEXIT_ASKED_REGISTERS; number++)
        values[number] = *state_register(&place->regs, number);
}

static void set_asked(struct trap *trap, const uint64_t *values, uint32_t changed)
{
    struct place *place = trap->place;
    for (unsigned number = 0; number < VMEXIT_ASKED_REGISTERS; number++)
        if (changed >> number & 1)
            *state_register(&place->regs, number) = values[number];
    place->changed |= changed;
}

static void get_general(struct trap *trap, uint64_t *values)
{
    struct place *place = trap->place;
    for (unsigned number = 0; number < VMEXIT_RIP; number++)
        values[number] = *state_register(&place->regs, number);
}

static bool read_register(struct trap *trap, unsigned number, uint64_t *value)
{
    struct place *place = trap->place;
    uint64_t registers[KVM_REGISTERS];
    if (number < VMEXIT_ASKED_REGISTERS) {
        *value = *state_register(&place->regs, number);
        return true;
    }
    if (number >= KVM_REGISTERS || !state_get(place->cpu, UINT64_C(1) << number, registers))
        return false;
    *value = registers[number];
    return true;
}

static bool write_register(struct trap *trap, unsigned number, uint64_t value)
{
    struct place *place = trap->place;
    if (number >= KVM_REGISTERS)
        return false;
    if (number < VMEXIT_ASKED_REGISTERS) {
        *state_register(&place->regs, number) = value;
        place->changed |= UINT32_C(1) << number;
    } else {
        state_change(place->cpu, number, value);
        place->has_paging = false;
    }
    return true;
}

static const struct paging *paging_of(struct place *place)
{
    if (!place->has_paging)
        place->has_paging = state_get_paging(place->cpu, &place->paging);
    return place->has_paging ? &place->paging : NULL;
}

static bool reach_memory(struct trap *trap, bool physical, bool write, uint64_t address, void *bytes, uint32_t length)
{
    if (physical)
        return state_access_memory(write, address, bytes, length);
    const struct paging *paging = paging_of(trap->place);
    return paging && paging_access(paging, address, bytes, length, write);
}

static bool to_physical(struct trap *trap, uint64_t address, uint64_t *physical)
{
    const struct paging *paging = paging_of(trap->place);
    return paging && paging_translate(paging, address, physical, NULL);
}

static bool to_virtual(struct trap *trap, uint64_t physical, uint64_t *address)
{
    const struct paging *paging = paging_of(trap->place);
    return paging && paging_find(paging, physical, PAGING_MANY_TABLES, address);
}

static bool peek_msr(struct trap *trap, uint32_t msr, uint64_t *value)
{
    return access_peek_msr(((struct place *)trap->place)->cpu, msr, value);
}

static struct trap make_trap(struct place *place, unsigned access, uint32_t msr, uint64_t rip)
{
    const struct kvm_regs *regs = &place->regs;
    return (struct trap){
        .door = &kvm_door,
        .place = place,
        .vcpu = place->cpu->index,
        .access = (uint8_t)access,
        .rip = rip,
        .rsp = regs->rsp,
        .msr = msr,
        .value = regs->rdx << 32 | (uint32_t)regs->rax,
    };
}

#define BIT(number) (UINT32_C(1) << (number))

/* Finishes the instruction, then has registers that were changed become the guest's; `now` are all of them. False: it led to an exit,
 * which the VMM has to handle. */
static bool complete_with(struct cpu *cpu, const struct kvm_regs *regs, uint32_t changed, struct kvm_regs *now)
{
    bool completed = kvm_complete(cpu);
    state_get_regs(cpu, now);
    for (unsigned number = 0; number < VMEXIT_ASKED_REGISTERS; number++)
        if (changed >> number & 1)
            *state_register(now, number) = *state_register((struct kvm_regs *)regs, number);
    if (changed)
        state_set_regs(cpu, now);
    return completed;
}

/* Finishes an access that was carried out, and lets the events of stage post act right behind it. */
static enum next run_post(const struct promise *done, struct cpu *cpu)
{
    struct place place = {.cpu = cpu};
    bool completed = complete_with(cpu, &done->regs, done->changed, &place.regs);
    struct trap trap = make_trap(&place, done->access, done->msr, done->rip);
    if (place.regs.rip - done->rip <= LARGEST_INSTRUCTION)
        trap.length = (uint8_t)(place.regs.rip - done->rip);
    enum verdict verdict = core_post(&trap);
    if (place.changed)
        state_set_regs(cpu, &place.regs);
    bool interrupted = verdict == STOP && halt_here(cpu);
    return !completed ? TO_VMM : interrupted ? TO_VMM_INTERRUPTED : INTO_GUEST;
}

/* An access has been carried out, or has faulted. */
static enum next go_on(const struct promise *done, struct cpu *cpu, bool failed)
{
    struct kvm_regs now;
    struct promise kept = *done;
    /* A read has its result there. */
    if (kept.access == VMEXIT_RDMSR && !failed)
        kept.changed &= ~(BIT(VMEXIT_RAX) | BIT(VMEXIT_RDX));
    if (kept.wants_post && !failed)
        return run_post(&kept, cpu);
    if (kept.changed == 0)
        return INTO_GUEST;
    return complete_with(cpu, &kept.regs, kept.changed, &now) ? INTO_GUEST : TO_VMM;
}

/* Goes on as if the instruction were none, or where a callback has sent the guest. */
static enum next skip(struct place *place, const struct trap *trap)
{
    struct kvm_run *run = place->cpu->run;
    uint32_t changed = place->changed;
    if (place->regs.rip == trap->rip)
        changed &= ~BIT(VMEXIT_RIP);
    run->msr.error = 0;
    if (trap->access == VMEXIT_RDMSR) {
        /* KVM puts this into EDX:EAX, and clears the upper halves. */
        run->msr.data = place->regs.rdx << 32 | (uint32_t)place->regs.rax;
        if ((place->regs.rax | place->regs.rdx) >> 32)
            changed |= BIT(VMEXIT_RAX) | BIT(VMEXIT_RDX);
    }
    if (changed == 0)
        return INTO_GUEST;
    struct kvm_regs now;
    return complete_with(place->cpu, &place->regs, changed, &now) ? INTO_GUEST : TO_VMM;
}

/* Halts the machine with the vCPU at the instruction, and nothing done. */
static enum next stop_before(struct place *place, const struct trap *trap, struct progress progress)
{
    struct cpu *cpu = place->cpu;
    cpu->run->msr.error = 0;
    kvm_complete(cpu);
    kvm_plain(cpu->fd, KVM_SET_REGS, &place->regs);
    if (place->regs.rip == trap->rip)
        hold_put(trap, trap->rsp, progress, true);
    return halt_here(cpu) ? TO_VMM_INTERRUPTED : INTO_GUEST;
}

static enum next carry_out(struct place *place, const struct trap *trap)
{
    struct cpu *cpu = place->cpu;
    const struct promise promise = {
        .pending = true,
        .wants_post = trap->wants_post,
        .access = trap->access,
        .msr = trap->msr,
        .changed = place->changed,
        .rip = trap->rip,
        .regs = place->regs,
    };
    enum carried carried = msrs_carry_out(cpu, trap->access == VMEXIT_WRMSR, trap->msr, trap->value);
    if (carried != LEFT_TO_VMM)
        return go_on(&promise, cpu, carried == FAULTED);
    cpu->promise = promise;
    return TO_VMM;
}

enum next trap_keep_promise(struct cpu *cpu)
{
    const struct promise promise = cpu->promise;
    cpu->promise.pending = false;
    enum next next = go_on(&promise, cpu, cpu->run->msr.error);
    /* Whatever else there is to do wants it finished. */
    return next == INTO_GUEST && !kvm_complete(cpu) ? TO_VMM : next;
}

static enum next on_trap(struct cpu *cpu, unsigned access)
{
    struct place place = {.cpu = cpu};
    state_get_regs(cpu, &place.regs);
    struct trap trap = make_trap(&place, access, cpu->run->msr.index, place.regs.rip);
    struct progress progress = hold_any() ? hold_take(trap.rip, trap.rsp) : PROGRESS_BEGIN;
    enum verdict verdict = core_pre(&trap, &progress);
    if (verdict == STOP)
        return stop_before(&place, &trap, progress);
    if (verdict == SKIP || place.regs.rip != trap.rip)
        return skip(&place, &trap);
    return carry_out(&place, &trap);
}

enum next trap_on_msr_exit(struct cpu *cpu)
{
    struct kvm_run *run = cpu->run;
    const bool write = run->exit_reason == KVM_EXIT_X86_WRMSR;
    const unsigned access = write ? VMEXIT_WRMSR : VMEXIT_RDMSR;
    if (core_wants(access, run->msr.index) && cpu->index < core_vcpus())
        return on_trap(cpu, access);
    return msrs_carry_out(cpu, write, run->msr.index, run->msr.data) == LEFT_TO_VMM ? TO_VMM : INTO_GUEST;
}

/* ---- what the link asks for ---- */

static struct cpu *reachable(unsigned vcpu, int *status)
{
    *status = VMEXIT_REFUSED;
    if (vcpu >= core_vcpus() || vcpu >= __atomic_load_n(&vm.count, __ATOMIC_ACQUIRE))
        return NULL;
    *status = VMEXIT_RUNNING;
    return core_is_asking(vcpu) || !halt_is_running() ? vm.cpus[vcpu] : NULL;
}

static int get_registers(unsigned vcpu, uint64_t *registers)
{
    int status;
    uint64_t values[KVM_REGISTERS];
    struct cpu *cpu = reachable(vcpu, &status);
    if (cpu == NULL)
        return status;
    if (!state_get(cpu, (UINT64_C(1) << VMEXIT_REGISTERS) - 1, values))
        return VMEXIT_UNAVAILABLE;
    memcpy(registers, values, VMEXIT_REGISTERS * sizeof *registers);
    return VMEXIT_OK;
}

static int get_register(unsigned vcpu, unsigned number, uint64_t *value)
{
    int status;
    uint64_t values[KVM_REGISTERS];
    struct cpu *cpu = reachable(vcpu, &status);
    if (cpu == NULL)
        return status;
    if (number >= KVM_REGISTERS || !state_get(cpu, UINT64_C(1) << number, values))
        return VMEXIT_UNAVAILABLE;
    *value = values[number];
    return VMEXIT_OK;
}

static int set_register(unsigned vcpu, unsigned number, uint64_t value)
{
    int status;
    struct cpu *cpu = reachable(vcpu, &status);
    if (cpu == NULL || core_is_asking(vcpu)) /* a question's registers go with its answer */
        return cpu ? VMEXIT_RUNNING : status;
    if (number >= KVM_REGISTERS || !state_would_take(cpu, number, value))
        return VMEXIT_UNAVAILABLE;
    state_change(cpu, number, value);
    if (number < VMEXIT_REGISTERS)
        hold_follow(vcpu, number, value);
    return VMEXIT_OK;
}

static struct cpu *reachable_with_memory(unsigned vcpu, int *status)
{
    *status = VMEXIT_UNAVAILABLE;
    return state_has_memory() ? reachable(vcpu, status) : NULL;
}

static int access_memory(unsigned vcpu, bool physical, bool write, uint64_t address, void *bytes, uint32_t length)
{
    int status;
    struct paging paging;
    struct cpu *cpu = reachable_with_memory(vcpu, &status);
    if (cpu == NULL)
        return status;
    if (physical)
        return state_access_memory(write, address, bytes, length) ? VMEXIT_OK : VMEXIT_UNREADABLE;
    bool done = state_get_paging(cpu, &paging) && paging_access(&paging, address, bytes, length, write);
    return done ? VMEXIT_OK : VMEXIT_UNREADABLE;
}

static int access_msr(unsigned vcpu, bool write, uint32_t msr, uint64_t *value)
{
    int status;
    struct cpu *cpu = reachable(vcpu, &status);
    if (cpu == NULL || (write && core_is_asking(vcpu)))
        return cpu ? VMEXIT_RUNNING : status;
    if (write)
        return access_write_msr(cpu, msr, *value);
    return access_peek_msr(cpu, msr, value) ? VMEXIT_OK : VMEXIT_NO_MSR;
}

static int translate(unsigned vcpu, bool to_virtual, uint64_t address, uint64_t *translated)
{
    int status;
    struct paging paging;
    struct cpu *cpu = reachable_with_memory(vcpu, &status);
    if (cpu == NULL)
        return status;
    bool done = state_get_paging(cpu, &paging) && (to_virtual ? paging_find(&paging, address, PAGING_MANY_TABLES, translated)
                                                              : paging_translate(&paging, address, translated, NULL));
    return done ? VMEXIT_OK : VMEXIT_UNREADABLE;
}

static int decide(unsigned vcpu, bool skip) { return hold_decide(vcpu, skip) ? VMEXIT_OK : VMEXIT_REFUSED; }

struct door kvm_door = {
    .name = "kvm",
    .capabilities = VMEXIT_CAN_RECORD | VMEXIT_CAN_READ | VMEXIT_CAN_MODIFY | VMEXIT_CAN_SKIP | VMEXIT_CAN_POST | VMEXIT_CAN_BREAK |
                    VMEXIT_CAN_HALT,
    .get_asked = get_asked,
    .set_asked = set_asked,
    .get_general = get_general,
    .set_general = set_asked,
    .read_register = read_register,
    .write_register = write_register,
    .reach_memory = reach_memory,
    .to_physical = to_physical,
    .to_virtual = to_virtual,
    .peek_msr = peek_msr,
    .get_task_registers = task_get_registers,
    .get_kernel_gs_base = task_get_kernel_gs_base,
    .find_page = state_find_page,
    .read_physical = task_read_physical,
    .enter_thread = halt_prepare,
    .get_registers = get_registers,
    .get_register = get_register,
    .set_register = set_register,
    .access_memory = access_memory,
    .access_msr = access_msr,
    .translate = translate,
    .decide = decide,
    .resume = halt_resume,
    .set_events = task_set_events,
    .set_halted = halt_set,
    .is_running = halt_is_running,
};
#endif
