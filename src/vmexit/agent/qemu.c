/* Registers, memory and locks of the QEMU around the agent. */
#define _GNU_SOURCE
#include "qemu.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

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

/* CPUX86State behind its 16 general registers (target/i386/cpu.h): what a precise RFLAGS needs. */
enum { ENV_RIP = 16, ENV_CC_OP_BYTE = 168, ENV_DF_BYTE = 172 };
enum { STATUS_FLAGS = 0x8d5, DIRECTION_FLAG = 0x400, LARGEST_CC_OP = 63 };

static struct {
    unsigned vcpus;
    void **cpus; /* by vCPU; null while it is not there */
    GByteArray **buffers; /* a vCPU's own, so that no trap allocates */
    struct qemu_plugin_register *handles[VMEXIT_REGISTERS];
    bool has_handles;
    ptrdiff_t env_offset; /* from the CPU object to its state; 0: not proven */
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
    bool internals = qemu_get_cpu && g_byte_array_new && g_byte_array_set_size;
    bool read = (qemu_plugin_read_register && g_byte_array_new) || (internals && x86_cpu_gdb_read_register);
    bool precise = internals && cpu_restore_state && cpu_loop_exit;
    bool modify = precise && (qemu_plugin_write_register || x86_cpu_gdb_write_register);
    bool memory = internals && cpu_memory_rw_debug;
    return (read ? VMEXIT_CAN_RECORD : 0) | (read && precise ? VMEXIT_CAN_READ : 0) | (read && modify ? VMEXIT_CAN_MODIFY : 0) |
           (read && modify ? VMEXIT_CAN_SKIP : 0) | (read && precise && async_run_on_cpu ? VMEXIT_CAN_POST : 0) |
           (read && precise && vm_stop && vm_start && runstate_is_running ? VMEXIT_CAN_BREAK : 0) |
           (memory ? VMEXIT_CAN_MEMORY | VMEXIT_CAN_MEMORY_WRITE : 0);
}

bool qemu_init(unsigned vcpus)
{
    qemu.vcpus = vcpus;
    qemu.cpus = calloc(vcpus, sizeof *qemu.cpus);
    qemu.buffers = calloc(vcpus, sizeof *qemu.buffers);
    if (qemu.cpus == NULL || qemu.buffers == NULL || !g_byte_array_new || !g_byte_array_set_size)
        return false;
    for (unsigned i = 0; i < vcpus; i++) {
        qemu.buffers[i] = g_byte_array_new();
        g_byte_array_set_size(qemu.buffers[i], 64);
    }
    return true;
}

static void keep_handles(const GArray *descriptors)
{
    const qemu_plugin_reg_descriptor *descriptor = (const void *)descriptors->data;
    for (unsigned i = 0; i < descriptors->len; i++)
        for (unsigned number = 0; number < VMEXIT_REGISTERS; number++)
            if (qemu.handles[number] == NULL && strcmp(descriptor[i].name, registers[number].name) == 0)
                qemu.handles[number] = descriptor[i].handle;
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
    /* Thread-local, and so not to be had as a weak symbol. Only asked while code is translated. */
    void **cpu = dlsym(RTLD_DEFAULT, "current_cpu");
    for (unsigned i = 0; cpu && i < qemu.vcpus; i++)
        if (qemu.cpus[i] == *cpu) {
            *vcpu = i;
            return true;
        }
    return false;
}

/* ---- registers ---- */

uint64_t qemu_read_register(unsigned vcpu, unsigned number)
{
    GByteArray *buffer = qemu.buffers[vcpu];
    uint64_t value = 0;
    g_byte_array_set_size(buffer, 0);
    if (qemu.handles[number])
        qemu_plugin_read_register(qemu.handles[number], buffer);
    else if (x86_cpu_gdb_read_register && qemu_get_cpu)
        x86_cpu_gdb_read_register(qemu_cpu(vcpu), buffer, registers[number].gdb);
    /* The guest is little-endian; so are the hosts. */
    memcpy(&value, buffer->data, buffer->len < sizeof value ? buffer->len : sizeof value);
    return value;
}

void qemu_write_register(unsigned vcpu, unsigned number, uint64_t value)
{
    if (qemu.handles[number] && qemu_plugin_write_register) {
        GByteArray *buffer = qemu.buffers[vcpu];
        g_byte_array_set_size(buffer, sizeof value);
        memcpy(buffer->data, &value, sizeof value);
        qemu_plugin_write_register(qemu.handles[number], buffer);
    } else if (x86_cpu_gdb_write_register && qemu_get_cpu) {
        x86_cpu_gdb_write_register(qemu_cpu(vcpu), (uint8_t *)&value, registers[number].gdb);
    }
}

uint64_t *qemu_env(unsigned vcpu)
{
    return qemu.env_offset ? (uint64_t *)((char *)qemu_cpu(vcpu) + qemu.env_offset) : NULL;
}

uint64_t *qemu_prove_env(unsigned vcpu, uint64_t *candidate)
{
    char *cpu = qemu_cpu(vcpu);
    ptrdiff_t offset = (char *)candidate - cpu;
    /* The state is a part of the CPU object (X86CPU.env), which is some ten thousand bytes long. */
    if (cpu == NULL || offset <= 0 || offset > 1 << 17 || offset % 8 != 0)
        return NULL;
    for (unsigned number = 0; number < 16; number++)
        if (candidate[number] != qemu_read_register(vcpu, number))
            return NULL;
    if (candidate[ENV_RIP] != qemu_read_register(vcpu, VMEXIT_RIP))
        return NULL;
    __atomic_store_n(&qemu.env_offset, offset, __ATOMIC_RELEASE);
    return candidate;
}

uint64_t qemu_read_rflags(unsigned vcpu)
{
    uint64_t rflags = qemu_read_register(vcpu, VMEXIT_RFLAGS);
    char *env = (char *)qemu_env(vcpu);
    uint32_t cc_op;
    int32_t df;
    if (env == NULL || !cpu_cc_compute_all)
        return rflags;
    memcpy(&cc_op, env + ENV_CC_OP_BYTE, sizeof cc_op);
    memcpy(&df, env + ENV_DF_BYTE, sizeof df);
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
