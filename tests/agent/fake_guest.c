/* Translates and executes the few instructions that the tests' programs are made of, the way TCG does. */
#include "fake_guest.h"

#include <pthread.h>
#include <string.h>

struct guest guest;

static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
static struct qemu_plugin_tb blocks[4096];
static unsigned block_count;

/* ---- memory ---- */

uint64_t translate(uint64_t vaddr)
{
    uint64_t paddr = vaddr >= ALIAS ? vaddr - ALIAS : vaddr;
    return paddr < MEMORY_BYTES ? paddr : UINT64_MAX;
}

bool access_memory(uint64_t vaddr, void *bytes, size_t length, bool write)
{
    uint64_t paddr = translate(vaddr);
    if (paddr == UINT64_MAX || paddr + length > MEMORY_BYTES)
        return false;
    if (write)
        memcpy(guest.memory + paddr, bytes, length);
    else
        memcpy(bytes, guest.memory + paddr, length);
    return true;
}

/* ---- registers ---- */

static const char *const names[] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags",
    "cs", "ss", "ds", "es", "fs", "gs", "fs_base", "gs_base", "k_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer",
};
static const int gdb_to_encoding[] = {RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP};

const char *register_name(int number) { return number < (int)(sizeof names / sizeof *names) ? names[number] : NULL; }

static uint64_t *register_place(struct env *env, int number)
{
    if (number < 8)
        return &env->regs[gdb_to_encoding[number]];
    if (number < 16)
        return &env->regs[number];
    if (number == 16)
        return &env->eip;
    if (number == 17)
        return &env->eflags;
    return number < FIRST_SYSTEM_REGISTER + SYSTEM_REGISTERS ? &env->system[number - FIRST_SYSTEM_REGISTER] : NULL;
}

/* Segments and RFLAGS are 4 bytes wide for gdb, the others 8. */
static int register_size(int number) { return number >= 17 && number < 24 ? 4 : 8; }

int read_register(struct cpu *cpu, int number, uint8_t *bytes)
{
    const uint64_t *place = register_place(&cpu->env, number);
    if (place == NULL)
        return 0;
    memcpy(bytes, place, (size_t)register_size(number));
    return register_size(number);
}

int write_register(struct cpu *cpu, int number, const uint8_t *bytes)
{
    uint64_t *place = register_place(&cpu->env, number);
    if (place == NULL)
        return 0;
    *place = 0;
    memcpy(place, bytes, (size_t)register_size(number));
    return register_size(number);
}

/* ---- flags: kept apart while translated code runs ---- */

static uint64_t status_flags(const struct env *env)
{
    if (env->cc_op == CC_OP_EFLAGS)
        return env->cc_src & STATUS_FLAGS;
    return env->cc_dst == 0 ? ZERO_FLAG : 0;
}

uint64_t rflags(const struct env *env) { return (env->eflags & ~(uint64_t)STATUS_FLAGS) | status_flags(env) | RFLAGS_ALWAYS; }

static void enter_translated_code(struct env *env)
{
    env->cc_src = env->eflags & STATUS_FLAGS;
    env->cc_op = CC_OP_EFLAGS;
    env->df = 1;
    env->eflags &= ~(uint64_t)STATUS_FLAGS;
}

static void leave_translated_code(struct env *env) { env->eflags = rflags(env); }

/* ---- translation ---- */

static size_t prefix_length(const uint8_t *bytes)
{
    size_t length = 0;
    while (length < 13 && memchr("\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3", bytes[length], 11))
        length++;
    return length + ((bytes[length] & 0xf0) == 0x40);
}

static size_t instruction_length(const uint8_t *bytes)
{
    size_t prefixes = prefix_length(bytes);
    switch (bytes[prefixes]) {
    case 0x0f:
    case 0x75:
    case 0xff:
        return prefixes + 2;
    case 0xb8 ... 0xbb:
        return prefixes + 5;
    default:
        return prefixes + 1;
    }
}

static bool ends_block(const struct qemu_plugin_insn *insn)
{
    const uint8_t *code = insn->bytes + prefix_length(insn->bytes);
    return (code[0] == 0x0f && code[1] == 0x30) || code[0] == 0x75 || code[0] == 0xf4 || code[0] == 0xcf || code[0] == 0xcc;
}

static void decode_block(struct qemu_plugin_tb *tb)
{
    for (uint64_t vaddr = tb->vaddr; tb->insn_count < 16; vaddr += tb->insns[tb->insn_count++].size) {
        struct qemu_plugin_insn *insn = &tb->insns[tb->insn_count];
        if (tb->insn_count && (vaddr ^ tb->vaddr) >= PAGE)
            return;
        insn->vaddr = vaddr;
        if (!access_memory(vaddr, insn->bytes, 15, false))
            die("execution at %#llx", (unsigned long long)vaddr);
        insn->size = instruction_length(insn->bytes);
        if (ends_block(insn)) {
            tb->insn_count++;
            return;
        }
    }
}

static struct qemu_plugin_tb *find_block(struct cpu *cpu)
{
    const uint64_t vaddr = cpu->env.eip, paddr = translate(vaddr);
    const unsigned privilege = cpu->env.system[CS] & 3;
    pthread_mutex_lock(&blocks_lock);
    for (unsigned i = 0; i < block_count; i++) {
        struct qemu_plugin_tb *tb = &blocks[i];
        if (tb->paddr == paddr && tb->privilege == privilege && (guest.shares_translations || tb->vaddr == vaddr)) {
            pthread_mutex_unlock(&blocks_lock);
            return tb;
        }
    }
    if (block_count == sizeof blocks / sizeof *blocks)
        die("too many blocks");
    struct qemu_plugin_tb *tb = &blocks[block_count++];
    *tb = (struct qemu_plugin_tb){.vaddr = vaddr, .paddr = paddr, .privilege = privilege, .translator = cpu->index};
    decode_block(tb);
    guest.translated(cpu, tb);
    pthread_mutex_unlock(&blocks_lock);
    return tb;
}

void load_byte(uint64_t paddr, uint8_t byte)
{
    pthread_mutex_lock(&blocks_lock);
    guest.memory[paddr % MEMORY_BYTES] = byte;
    /* Blocks of this page are not found any more; one that runs right now is not pulled away. */
    for (unsigned i = 0; i < block_count; i++)
        if ((blocks[i].paddr ^ paddr) < PAGE)
            blocks[i].paddr = UINT64_MAX;
    pthread_mutex_unlock(&blocks_lock);
}

/* ---- execution ---- */

/* A callback is called with RBP = the CPU's state, and returns to translated_code. */
void call_from_translated_code(void (*func)(unsigned, void *), unsigned index, void *userdata, struct env *env);
#if defined(__x86_64__)
__asm__(".text\n"
        "call_from_translated_code:\n"
        "    push %rbp\n"
        "    mov %rdi, %rax\n"
        "    mov %esi, %edi\n"
        "    mov %rdx, %rsi\n"
        "    mov %rcx, %rbp\n"
        "    call *%rax\n"
        ".globl translated_code\n"
        "translated_code:\n"
        "    pop %rbp\n"
        "    ret\n");
#else
#error "the fake host is written for x86-64"
#endif

static uint64_t *msr_place(struct cpu *cpu, uint32_t number)
{
    for (unsigned i = 0; i < cpu->msr_count; i++)
        if (cpu->msrs[i].number == number)
            return &cpu->msrs[i].value;
    if (cpu->msr_count == sizeof cpu->msrs / sizeof *cpu->msrs)
        die("too many MSRs");
    cpu->msrs[cpu->msr_count] = (struct msr){.number = number};
    return &cpu->msrs[cpu->msr_count++].value;
}

void *kept_msr(struct cpu *cpu, uint32_t number, size_t *size)
{
    *size = 8;
    if (number - 0x200 < 16)
        return &cpu->mtrr_var[number - 0x200];
    switch (number) {
    case 0xc0000081:
        return &cpu->star;
    case 0xc0000082:
        return &cpu->lstar;
    case 0x174:
        *size = 4;
        return &cpu->sysenter_cs;
    default:
        return NULL;
    }
}

static void push(struct cpu *cpu, uint64_t value)
{
    cpu->env.regs[RSP] -= 8;
    if (!access_memory(cpu->env.regs[RSP], &value, 8, true))
        die("stack at %#llx", (unsigned long long)cpu->env.regs[RSP]);
}

static uint64_t pop(struct cpu *cpu)
{
    uint64_t value = 0;
    if (!access_memory(cpu->env.regs[RSP], &value, 8, false))
        die("stack at %#llx", (unsigned long long)cpu->env.regs[RSP]);
    cpu->env.regs[RSP] += 8;
    return value;
}

static uint64_t end_program(struct cpu *cpu, uint64_t next)
{
    if (cpu->repeat > 1) {
        cpu->repeat--;
        return cpu->entry;
    }
    cpu->halted = true;
    cpu->exit_request = true;
    return next;
}

/* Both give the RIP to go on at. */
static uint64_t write_msr(struct cpu *cpu, uint64_t rip, uint64_t next)
{
    struct env *env = &cpu->env;
    const uint32_t number = (uint32_t)env->regs[RCX];
    const uint64_t value = env->regs[RDX] << 32 | (uint32_t)env->regs[RAX];
    if (number == FAULTING_MSR || (env->system[CS] & 3)) {
        if (guest.logs)
            say("fault %u %llx", cpu->index, (unsigned long long)rip);
        push(cpu, rip);
        push(cpu, 0); /* error code */
        return guest.fault_handler ? guest.fault_handler : end_program(cpu, rip);
    }
    size_t size;
    void *kept = kept_msr(cpu, number, &size);
    *msr_place(cpu, number) = value;
    if (kept)
        memcpy(kept, &value, size);
    if (guest.logs)
        say("wrmsr %u %x %llx %llx", cpu->index, number, (unsigned long long)value, (unsigned long long)rip);
    if (number != INTERRUPTING_MSR)
        return next;
    push(cpu, next);
    return guest.interrupt_handler;
}

static uint64_t read_msr(struct cpu *cpu, uint64_t rip, uint64_t next)
{
    struct env *env = &cpu->env;
    uint64_t value = *msr_place(cpu, (uint32_t)env->regs[RCX]);
    size_t size;
    const void *kept = kept_msr(cpu, (uint32_t)env->regs[RCX], &size);
    if (kept)
        memcpy(&value, kept, size);
    env->regs[RAX] = (uint32_t)value;
    env->regs[RDX] = value >> 32;
    if (guest.logs)
        say("rdmsr %u %x %llx %llx", cpu->index, (uint32_t)env->regs[RCX], (unsigned long long)value, (unsigned long long)rip);
    return next;
}

/* Where arithmetic leaves its result until somebody wants the flags. */
static void set_result(struct env *env, unsigned number, uint32_t value)
{
    env->regs[number] = value;
    env->cc_dst = value;
    env->cc_op = CC_OP_RESULT;
}

static uint64_t execute(struct cpu *cpu, const struct qemu_plugin_insn *insn, uint64_t rip)
{
    struct env *env = &cpu->env;
    const uint64_t next = rip + insn->size;
    const uint8_t *code = insn->bytes + prefix_length(insn->bytes);
    uint32_t immediate;
    switch (code[0]) {
    case 0x0f:
        if (code[1] == 0x30)
            return write_msr(cpu, rip, next);
        if (code[1] == 0x32)
            return read_msr(cpu, rip, next);
        break;
    case 0x75: /* jnz */
        return status_flags(env) & ZERO_FLAG ? next : next + (uint64_t)(int64_t)(int8_t)code[1];
    case 0x90: /* nop */
        return next;
    case 0xb8 ... 0xbb: /* mov eax, ecx, edx, ebx */
        memcpy(&immediate, code + 1, sizeof immediate);
        env->regs[code[0] & 7] = immediate;
        return next;
    case 0xcf: /* iret, of a frame that is RIP alone */
        return pop(cpu);
    case 0xf4: /* hlt: the program is at its end */
        return end_program(cpu, next);
    case 0xff: /* inc, dec */
        if ((code[1] & 0xf0) == 0xc0) {
            unsigned number = code[1] & 7;
            set_result(env, number, (uint32_t)env->regs[number] + (code[1] & 8 ? UINT32_MAX : 1));
            return next;
        }
        break;
    }
    die("instruction %02x %02x at %#llx", code[0], code[1], (unsigned long long)rip);
}

/* One block. The state's RIP stays that of its first instruction until it ends or the code leaves it. */
static void run_block(struct cpu *cpu)
{
    struct qemu_plugin_tb *tb = find_block(cpu);
    const uint64_t moved = cpu->env.eip - tb->vaddr;
    const unsigned index = guest.tells_translator ? tb->translator : cpu->index;
    uint64_t next = cpu->env.eip;
    cpu->in_block = true;
    for (size_t i = 0; i < tb->insn_count; i++) {
        struct qemu_plugin_insn *insn = &tb->insns[i];
        cpu->insn_rip = insn->vaddr + moved;
        for (unsigned c = 0; c < insn->callback_count; c++) {
            cpu->cb_flags = insn->callbacks[c].flags;
            call_from_translated_code(insn->callbacks[c].func, index, insn->callbacks[c].userdata, &cpu->env);
            cpu->cb_flags = 0;
            if (cpu->restored)
                die("a callback restored the state and returned to translated code");
        }
        next = execute(cpu, insn, cpu->insn_rip);
    }
    cpu->env.eip = next;
    cpu->in_block = false;
}

void run_cpu(struct cpu *cpu)
{
    enter_translated_code(&cpu->env);
    if (sigsetjmp(cpu->exit, 0)) {
        /* cpu_loop_exit */
        cpu->in_block = false;
        cpu->restored = false;
        cpu->cb_flags = 0;
    }
    /* Where one thread runs all vCPUs, each has its turn. */
    for (unsigned left = 64; left > 0 && !__atomic_exchange_n(&cpu->exit_request, false, __ATOMIC_ACQ_REL); left--)
        run_block(cpu);
    leave_translated_code(&cpu->env);
}
