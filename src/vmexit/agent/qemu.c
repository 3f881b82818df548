/* Registers, memory and locks of the QEMU around the agent. */
#define _GNU_SOURCE
#include "qemu.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "script.h"
#include "wire.h"

/* gdb's number (QEMU, target/i386/gdbstub.c) and the plugin interface's name of each wire register. */
static const struct {
    int8_t gdb;
    const char *name;
} registers[VMEXIT_REGISTERS] = {
    {0, "rax"},      {2, "rcx"},      {3, "rdx"},        {1, "rbx"},  {7, "rsp"},  {6, "rbp"},  {4, "rsi"},
    {5, "rdi"},      {8, "r8"},       {9, "r9"},         {10, "r10"}, {11, "r11"}, {12, "r12"}, {13, "r13"},
    {14, "r14"},     {15, "r15"},     {16, "rip"},       {17, "eflags"}, {18, "cs"}, {19, "ss"}, {20, "ds"},
    {21, "es"},      {22, "fs"},      {23, "gs"},        {24, "fs_base"}, {25, "gs_base"}, {26, "k_gs_base"}, {27, "cr0"},
    {28, "cr2"},     {29, "cr3"},     {30, "cr4"},       {31, "cr8"}, {32, "efer"},
};

/* CPUX86State (target/i386/cpu.h) begins with the general registers, 16 or (QEMU 11, for APX) 32 of them, then come RIP and, in bytes
 * behind it, what a precise RFLAGS needs. */
enum { ENV_CC_OP_BYTE = 40, ENV_DF_BYTE = 44 };
unsigned qemu_env_rip_index;
enum { STATUS_FLAGS = 0x8d5, DIRECTION_FLAG = 0x400, LARGEST_CC_OP = 63 };

static struct {
    unsigned vcpus;
    void **cpus; /* by vCPU; null while it is not there */
    struct qemu_plugin_register *handles[VMEXIT_REGISTERS];
    bool is_offered[VMEXIT_REGISTERS]; /* by the plugin interface; RAX's handle is null in QEMU 9.0 and 11.0 */
    bool has_handles;
    ptrdiff_t env_offset; /* from the CPU object to its state; 0: not proven */
    size_t debug_byte; /* where in the state the debug registers are, in bytes behind RIP; 0: not known */
} qemu;

EXPORT int qemu_plugin_version;

/* QEMU refuses a plugin that names a version which it does not know, so the version is found by what the process offers, before
 * QEMU reads it. */
__attribute__((constructor)) static void choose_version(void) { qemu_plugin_version = (int)qemu_api(); }

unsigned qemu_api(void)
{
    if (qemu_plugin_set_pc)
        return 6;
    if (qemu_plugin_write_register)
        return 5;
    if (qemu_plugin_read_memory_vaddr)
        return 4;
    if (qemu_plugin_register_vcpu_insn_exec_cond_cb)
        return 3;
    return qemu_plugin_read_register ? 2 : 1;
}

enum qemu_plugin_cb_flags qemu_callback_flags(void)
{
    if (qemu_plugin_write_register)
        return QEMU_PLUGIN_CB_RW_REGS;
    return qemu_plugin_read_register ? QEMU_PLUGIN_CB_R_REGS : QEMU_PLUGIN_CB_NO_REGS;
}

uint32_t qemu_capabilities(void)
{
    bool glib = g_byte_array_new && g_byte_array_set_size;
    bool internals = glib && qemu_get_cpu && x86_cpu_gdb_read_register && x86_cpu_gdb_write_register;
    bool precise = internals && cpu_restore_state && cpu_loop_exit;
    bool memory = internals && cpu_memory_rw_debug;
    return (internals || (glib && qemu_plugin_read_register) ? VMEXIT_CAN_RECORD : 0) |
           (precise ? VMEXIT_CAN_READ | VMEXIT_CAN_MODIFY | VMEXIT_CAN_SKIP : 0) |
           (precise && async_run_on_cpu ? VMEXIT_CAN_POST : 0) |
           (precise && vm_stop && vm_start && runstate_is_running ? VMEXIT_CAN_BREAK : 0) |
           (memory ? VMEXIT_CAN_MEMORY | VMEXIT_CAN_MEMORY_WRITE : 0) | (qemu_can_halt() ? VMEXIT_CAN_HALT : 0);
}

bool qemu_init(unsigned vcpus)
{
    qemu.vcpus = vcpus;
    qemu.cpus = calloc(vcpus, sizeof *qemu.cpus);
    return qemu.cpus != NULL;
}

static void keep_handles(GArray *descriptors)
{
    size_t size = g_array_get_element_size ? g_array_get_element_size(descriptors) : sizeof(qemu_plugin_reg_descriptor);
    for (unsigned i = 0; i < descriptors->len; i++) {
        const qemu_plugin_reg_descriptor *descriptor = (const void *)(descriptors->data + i * size);
        for (unsigned number = 0; number < VMEXIT_REGISTERS; number++)
            if (!qemu.is_offered[number] && strcmp(descriptor->name, registers[number].name) == 0) {
                qemu.handles[number] = descriptor->handle;
                qemu.is_offered[number] = true;
            }
    }
}

void qemu_vcpu_up(unsigned vcpu)
{
    if (qemu_get_cpu)
        __atomic_store_n(&qemu.cpus[vcpu], qemu_get_cpu((int)vcpu), __ATOMIC_RELEASE);
    if (!qemu_plugin_get_registers || qemu.has_handles)
        return;
    GArray *descriptors = qemu_plugin_get_registers();
    keep_handles(descriptors);
    if (g_array_free)
        g_array_free(descriptors, true);
    qemu.has_handles = true;
}

void qemu_vcpu_down(unsigned vcpu) { __atomic_store_n(&qemu.cpus[vcpu], NULL, __ATOMIC_RELEASE); }

void *qemu_cpu(unsigned vcpu) { return __atomic_load_n(&qemu.cpus[vcpu], __ATOMIC_ACQUIRE); }

bool qemu_current_vcpu(unsigned *vcpu)
{
    /* Thread-local, and so not to be had as a weak symbol. */
    static __thread void **current;
    static __thread bool has_looked;
    if (!has_looked)
        current = dlsym(RTLD_DEFAULT, "current_cpu");
    has_looked = true;
    if (current == NULL || *current == NULL)
        return false;
    if (*vcpu < qemu.vcpus && qemu_cpu(*vcpu) == *current)
        return true;
    for (unsigned i = 0; i < qemu.vcpus; i++)
        if (qemu_cpu(i) == *current) {
            *vcpu = i;
            return true;
        }
    return false;
}

/* ---- registers ---- */

/* A thread's own, so that no trap allocates. */
static GByteArray *empty_buffer(void)
{
    static __thread GByteArray *buffer;
    if (buffer == NULL)
        buffer = g_byte_array_new();
    return g_byte_array_set_size(buffer, 0);
}

static uint64_t buffer_value(const GByteArray *buffer)
{
    uint64_t value = 0;
    /* The guest is little-endian; so are the hosts. */
    memcpy(&value, buffer->data, buffer->len < sizeof value ? buffer->len : sizeof value);
    return value;
}

uint64_t qemu_peek_register(unsigned vcpu, unsigned number)
{
    GByteArray *buffer = empty_buffer();
    if (x86_cpu_gdb_read_register && qemu_get_cpu)
        x86_cpu_gdb_read_register(qemu_cpu(vcpu), buffer, registers[number].gdb);
    return buffer_value(buffer);
}

void qemu_poke_register(unsigned vcpu, unsigned number, uint64_t value)
{
    if (x86_cpu_gdb_write_register && qemu_get_cpu)
        x86_cpu_gdb_write_register(qemu_cpu(vcpu), (uint8_t *)&value, registers[number].gdb);
}

uint64_t qemu_read_register(unsigned vcpu, unsigned number)
{
    if (!qemu.is_offered[number])
        return qemu_peek_register(vcpu, number);
    GByteArray *buffer = empty_buffer();
    qemu_plugin_read_register(qemu.handles[number], buffer);
    return buffer_value(buffer);
}

void qemu_write_register(unsigned vcpu, unsigned number, uint64_t value)
{
    if (!qemu_plugin_write_register || !qemu.is_offered[number] || number == VMEXIT_RIP) {
        qemu_poke_register(vcpu, number, value);
        return;
    }
    GByteArray *buffer = g_byte_array_set_size(empty_buffer(), sizeof value);
    memcpy(buffer->data, &value, sizeof value);
    qemu_plugin_write_register(qemu.handles[number], buffer);
}

uint64_t *qemu_env(unsigned vcpu)
{
    ptrdiff_t offset = __atomic_load_n(&qemu.env_offset, __ATOMIC_ACQUIRE);
    return offset ? (uint64_t *)((char *)qemu_cpu(vcpu) + offset) : NULL;
}

bool qemu_prove_env(unsigned vcpu, const uint64_t *candidate)
{
    char *cpu = qemu_cpu(vcpu);
    ptrdiff_t offset = (char *)candidate - cpu;
    /* The state is a part of the CPU object (X86CPU.env), which is some ten thousand bytes long. */
    if (cpu == NULL || offset <= 0 || offset > 1 << 17 || offset % 8 != 0)
        return false;
    for (unsigned number = 0; number < 16; number++)
        if (candidate[number] != qemu_read_register(vcpu, number))
            return false;
    /* A RIP of 0 proves nothing: so is every register that nobody uses. */
    uint64_t rip = qemu_read_register(vcpu, VMEXIT_RIP);
    unsigned index = candidate[16] == rip ? 16 : 32;
    if (rip == 0 || candidate[index] != rip)
        return false;
    __atomic_store_n(&qemu_env_rip_index, index, __ATOMIC_RELAXED);
    __atomic_store_n(&qemu.env_offset, offset, __ATOMIC_RELEASE);
    return true;
}

uint64_t qemu_read_rflags(unsigned vcpu)
{
    uint64_t rflags = qemu_read_register(vcpu, VMEXIT_RFLAGS);
    uint64_t *env = qemu_env(vcpu);
    uint32_t cc_op;
    int32_t df;
    if (env == NULL || !cpu_cc_compute_all)
        return rflags;
    const char *rip = (const char *)qemu_env_rip(env);
    memcpy(&cc_op, rip + ENV_CC_OP_BYTE, sizeof cc_op);
    memcpy(&df, rip + ENV_DF_BYTE, sizeof df);
    if ((df != 1 && df != -1) || cc_op > LARGEST_CC_OP)
        return rflags; /* another layout than the one known */
    rflags &= ~(uint64_t)(STATUS_FLAGS | DIRECTION_FLAG);
    return rflags | (cpu_cc_compute_all(env, (int)cc_op) & STATUS_FLAGS) | (df == -1 ? DIRECTION_FLAG : 0);
}

void qemu_write_rflags(unsigned vcpu, uint64_t value)
{
    uint64_t *env = qemu_env(vcpu);
    if (env != NULL && cpu_load_eflags)
        cpu_load_eflags(env, (int)value, -1);
    else
        qemu_write_register(vcpu, VMEXIT_RFLAGS, value);
}

/* ---- system registers ---- */

/* Behind RIP, in bytes, from ENV_SEGMENTS_BYTE on: six segments, then LDTR, TR, GDTR and IDTR of the same form, then CR0 to CR4. */
enum { SEGMENTS = 6 };
enum { ENV_CR_BYTE = ENV_SEGMENTS_BYTE + 10 * SEGMENT_BYTES };
/* How far behind RIP the eight debug registers may be. */
enum { ENV_DR_FIRST_BYTE = ENV_CR_BYTE, ENV_DR_LAST_BYTE = 1 << 14 };

static uint64_t env_word(const char *rip, size_t byte)
{
    uint64_t word;
    memcpy(&word, rip + byte, sizeof word);
    return word;
}

/* The state is laid out as it is known if what is told of it by other ways stands there: the selectors of all segments (in the order
 * ES, CS, SS, DS, FS, GS) and the control registers. */
static bool segments_are_known(unsigned vcpu, const char *rip)
{
    static const unsigned selectors[SEGMENTS] = {VMEXIT_ES, VMEXIT_CS, VMEXIT_SS, VMEXIT_DS, VMEXIT_FS, VMEXIT_GS};
    static const unsigned control[5] = {VMEXIT_CR0, 0, VMEXIT_CR2, VMEXIT_CR3, VMEXIT_CR4};
    for (unsigned i = 0; i < SEGMENTS; i++)
        if ((uint32_t)env_word(rip, ENV_SEGMENTS_BYTE + i * SEGMENT_BYTES) != qemu_peek_register(vcpu, selectors[i]))
            return false;
    for (unsigned i = 0; i < 5; i++)
        if (i != 1 && env_word(rip, ENV_CR_BYTE + i * 8) != qemu_peek_register(vcpu, control[i]))
            return false;
    return true;
}

/* DR0 to DR7 as a processor has them that nobody debugs: DR6 and DR7 have fixed bits (Intel SDM volume 3, 17.2), and what stands for DR4
 * and DR5 is not used. Found once, and only where there is but one such place. */
static size_t find_debug_registers(const char *rip)
{
    size_t found = 0;
    for (size_t byte = ENV_DR_FIRST_BYTE; byte < ENV_DR_LAST_BYTE; byte += 8) {
        bool fits = env_word(rip, byte + 6 * 8) == 0xffff0ff0 && env_word(rip, byte + 7 * 8) == 0x400;
        for (unsigned i = 0; fits && i < 6; i++)
            fits = env_word(rip, byte + i * 8) == 0;
        if (fits && found)
            return 0;
        if (fits)
            found = byte;
    }
    return found;
}

static char *system_register_at(unsigned vcpu, unsigned number)
{
    const uint64_t *env = qemu_env(vcpu);
    if (env == NULL)
        return NULL;
    char *rip = (char *)qemu_env_rip(env);
    if (number >= VMEXIT_SCRIPT_DR0) {
        size_t byte = __atomic_load_n(&qemu.debug_byte, __ATOMIC_RELAXED);
        if (byte == 0) {
            byte = find_debug_registers(rip);
            __atomic_store_n(&qemu.debug_byte, byte, __ATOMIC_RELAXED);
        }
        unsigned which = number <= VMEXIT_SCRIPT_DR3 ? number - VMEXIT_SCRIPT_DR0 : number - VMEXIT_SCRIPT_DR6 + 6;
        return byte ? rip + byte + which * 8 : NULL;
    }
    static const unsigned segments[] = {
        [VMEXIT_SCRIPT_LDTR] = 6, [VMEXIT_SCRIPT_TR] = 7, [VMEXIT_SCRIPT_GDTR] = 8, [VMEXIT_SCRIPT_IDTR] = 9};
    if (!segments_are_known(vcpu, rip))
        return NULL;
    return rip + ENV_SEGMENTS_BYTE + segments[number] * SEGMENT_BYTES + SEGMENT_BASE_BYTE;
}

bool qemu_read_system_register(unsigned vcpu, unsigned number, uint64_t *value)
{
    const char *at = system_register_at(vcpu, number);
    if (at)
        memcpy(value, at, sizeof *value);
    return at != NULL;
}

/* The breakpoints that DR7 switches on are set anew, because that is what a changed address needs. */
bool qemu_write_system_register(unsigned vcpu, unsigned number, uint64_t value)
{
    char *at = system_register_at(vcpu, number);
    if (at == NULL || (number >= VMEXIT_SCRIPT_DR0 && !cpu_x86_update_dr7))
        return false;
    if (number < VMEXIT_SCRIPT_DR0 || number == VMEXIT_SCRIPT_DR6) {
        memcpy(at, &value, sizeof value);
        return true;
    }
    uint64_t dr7 = 0;
    qemu_read_system_register(vcpu, VMEXIT_SCRIPT_DR7, &dr7);
    if (number == VMEXIT_SCRIPT_DR7) {
        cpu_x86_update_dr7(qemu_env(vcpu), (uint32_t)value);
        return true;
    }
    cpu_x86_update_dr7(qemu_env(vcpu), (uint32_t)dr7 & ~UINT32_C(0xff));
    memcpy(at, &value, sizeof value);
    cpu_x86_update_dr7(qemu_env(vcpu), (uint32_t)dr7);
    return true;
}

/* ---- memory ---- */

bool qemu_access_memory(unsigned vcpu, bool physical, bool write, uint64_t address, void *bytes, uint32_t length)
{
    const uint64_t no_attributes = 1; /* MEMTXATTRS_UNSPECIFIED */
    bool done = false;
    qemu_lock();
    if (!physical && cpu_memory_rw_debug)
        done = cpu_memory_rw_debug(qemu_cpu(vcpu), address, bytes, length, write) == 0;
    else if (physical && address_space_rw)
        done = address_space_rw(address_space_memory, address, no_attributes, bytes, length, write) == 0;
    qemu_unlock();
    return done;
}

/* ---- locks and state ---- */

bool qemu_is_running(void) { return !runstate_is_running || runstate_is_running(); }

void qemu_lock(void)
{
    if (bql_lock_impl)
        bql_lock_impl(__FILE__, __LINE__);
    else if (qemu_mutex_lock_iothread_impl)
        qemu_mutex_lock_iothread_impl(__FILE__, __LINE__);
}

void qemu_unlock(void)
{
    if (bql_unlock)
        bql_unlock();
    else if (qemu_mutex_unlock_iothread)
        qemu_mutex_unlock_iothread();
}

/* ---- halting ---- */

bool qemu_can_halt(void)
{
    return vm_stop && vm_start && runstate_is_running && qemu_add_vm_change_state_handler && qemu_system_vmstop_request &&
           qemu_system_vmstop_request_prepare && (bql_lock_impl || qemu_mutex_lock_iothread_impl);
}

void qemu_halt(void)
{
    if (!qemu_is_running())
        return;
    qemu_system_vmstop_request_prepare();
    qemu_system_vmstop_request(RUN_STATE_PAUSED);
}

void qemu_resume(void)
{
    /* A stop that a vCPU has just asked for takes QEMU's main loop a moment; a start before that would leave the vCPU behind. */
    const struct timespec moment = {.tv_nsec = 1000000};
    for (int tries = 0; tries < 2000 && qemu_is_running(); tries++)
        nanosleep(&moment, NULL);
    qemu_lock();
    if (!qemu_is_running())
        vm_start();
    qemu_unlock();
}

static void on_state(void *told, bool running, int state)
{
    (void)state;
    ((void (*)(bool))told)(running);
}

void qemu_watch_state(void (*told)(bool running)) { qemu_add_vm_change_state_handler(on_state, (void *)told); }
