/* What a QEMU exports to its plugins: glib, the plugin interface of one version, and some of QEMU itself. What QEMU asserts is
 * asserted here.
 *
 * Built with -DAPI=1 to 6 (the plugin API version to play), -DINTERNALS=0 (nothing but the plugin interface is exported), -DHALT=0
 * (no vm_stop and its like) and -DGENERAL_REGISTERS=N (fake_guest.h).
 */
#define _GNU_SOURCE
#include "fake_host.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

static pthread_mutex_t work_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- glib, as far as the agent uses it ---- */

typedef struct {
    uint8_t *data;
    unsigned len;
} GByteArray;

typedef struct {
    char *data;
    unsigned len;
    unsigned element_size; /* behind what is public */
} GArray;

GByteArray *g_byte_array_new(void)
{
    GByteArray *array = calloc(1, sizeof *array);
    assert_that(array != NULL);
    return array;
}

GByteArray *g_byte_array_set_size(GByteArray *array, unsigned length)
{
    /* Always moved, so that a pointer from before is seen to be stale. */
    uint8_t *data = malloc(length ? length : 1);
    assert_that(data != NULL);
    if (array->len)
        memcpy(data, array->data, array->len < length ? array->len : length);
    free(array->data);
    array->data = data;
    array->len = length;
    return array;
}

char *g_array_free(GArray *array, int free_segment)
{
    char *data = array->data;
    free(array);
    if (!free_segment)
        return data;
    free(data);
    return NULL;
}

unsigned g_array_get_element_size(GArray *array) { return array->element_size; }

static void append(GByteArray *array, const uint8_t *bytes, int length)
{
    unsigned before = array->len;
    g_byte_array_set_size(array, before + (unsigned)length);
    memcpy(array->data + before, bytes, (size_t)length);
}

/* ---- the plugin interface that every version has ---- */

void qemu_plugin_register_vcpu_init_cb(uint64_t id, void (*cb)(uint64_t, unsigned)) { (void)id, host.vcpu_up = cb; }
void qemu_plugin_register_vcpu_exit_cb(uint64_t id, void (*cb)(uint64_t, unsigned)) { (void)id, host.vcpu_down = cb; }

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*cb)(uint64_t, struct qemu_plugin_tb *))
{
    (void)id;
    host.translated = cb;
}

void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, void (*cb)(unsigned, void *), int flags, void *userdata)
{
    assert_that(flags >= NO_REGS && flags <= RW_REGS && insn->callback_count < 4);
    insn->callbacks[insn->callback_count++] = (struct callback){cb, flags, userdata};
}

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb) { return tb->insn_count; }
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb) { return tb->vaddr; }
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn) { return insn->size; }
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn) { return insn->vaddr; }

struct qemu_plugin_insn *qemu_plugin_tb_get_insn(struct qemu_plugin_tb *tb, size_t index)
{
    return index < tb->insn_count ? &tb->insns[index] : NULL;
}

#if API < 3
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn) { return insn->bytes; }
#else
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *dest, size_t length)
{
    assert_that(dest != NULL);
    length = length < insn->size ? length : insn->size;
    memcpy(dest, insn->bytes, length);
    return length;
}
#endif

/* ---- what exports of QEMU itself there are ---- */

#if !INTERNALS
#pragma GCC visibility push(hidden)
#endif

__thread struct cpu *current_cpu;

/* VMStateField and VMStateDescription as QEMU 7.2 has them (include/migration/vmstate.h). */
struct field {
    const char *name;
    const char *err_hint;
    size_t offset;
    size_t size;
    size_t start;
    int num;
    size_t num_offset;
    size_t size_offset;
    const void *info;
    int flags;
    const void *vmsd;
    int version_id;
    int struct_version_id;
    void *field_exists;
};

struct description {
    const char *name;
    bool unmigratable;
    int version_id;
    int minimum_version_id;
    int priority;
    void *functions[6];
    const struct field *fields;
    const struct description *const *subsections;
};

#define FIELD(member, bytes) {.name = "env." #member, .offset = offsetof(struct cpu, member), .size = bytes}
static const struct field more[] = {FIELD(mcg_cap, 8), FIELD(mce_banks, 8), {0}};
static const struct description part = {.name = "cpu/more", .fields = more};
static const struct description *const parts[] = {&part, NULL};
static const struct field fields[] = {
    {.name = "env.regs", .offset = offsetof(struct cpu, env.regs), .size = 8, .num = GENERAL_REGISTERS},
    {.name = "env.eip", .offset = offsetof(struct cpu, env.eip), .size = 8},
    {.name = "env.eflags", .offset = offsetof(struct cpu, env.eflags), .size = 8},
    FIELD(sysenter_cs, 4),
    FIELD(star, 8),
    FIELD(lstar, 8),
    FIELD(mtrr_var, 16),
    {0},
};
const struct description vmstate_x86_cpu = {.name = "cpu", .version_id = 12, .fields = fields, .subsections = parts};

void *qemu_get_cpu(int index) { return LOAD(host.is_up[index]) ? &guest.cpus[index] : NULL; }

int x86_cpu_gdb_read_register(void *cpu, GByteArray *buffer, int number)
{
    uint8_t bytes[8];
    __atomic_fetch_add(&host.register_reads, 1, __ATOMIC_RELAXED);
    int length = read_register(cpu, number, bytes);
    append(buffer, bytes, length);
    return length;
}

int x86_cpu_gdb_write_register(void *cpu, uint8_t *buffer, int number) { return write_register(cpu, number, buffer); }

int cpu_memory_rw_debug(void *cpu, uint64_t address, void *bytes, uint64_t length, bool is_write)
{
    assert_that(cpu != NULL && bql_held);
    return access_memory(address, bytes, length, is_write) ? 0 : -1;
}

char address_space_memory[1];

uint32_t address_space_rw(void *space, uint64_t address, uint64_t attributes, void *bytes, uint64_t length, bool is_write)
{
    assert_that(space == address_space_memory && attributes == 1 && bql_held);
    return address < MEMORY_BYTES && access_memory(address, bytes, length, is_write) ? 0 : 2;
}

/* The upper quarter is no memory that lies in this process, as far as anybody can see. */
enum { MAPPED_BYTES = MEMORY_BYTES / 4 * 3 };
static unsigned mapped_pieces;

bool cpu_physical_memory_is_io(uint64_t address) { return address >= MAPPED_BYTES; }

void *address_space_map(void *space, uint64_t address, uint64_t *length, bool is_write, uint64_t attributes)
{
    assert_that(space == address_space_memory && attributes == 1 && !is_write && address < MAPPED_BYTES);
    assert_that(__atomic_add_fetch(&mapped_pieces, 1, __ATOMIC_RELAXED) < 100);
    *length = *length < MAPPED_BYTES - address ? *length : MAPPED_BYTES - address;
    return guest.memory + address;
}

void address_space_unmap(void *space, void *bytes, uint64_t length, bool is_write, uint64_t accessed)
{
    assert_that(space == address_space_memory && bytes != NULL && length && !is_write && accessed == 0);
    __atomic_sub_fetch(&mapped_pieces, 1, __ATOMIC_RELAXED);
}

void *qemu_ram_block_from_host(void *at, bool round, uint64_t *offset)
{
    const uint8_t *byte = at;
    (void)round;
    *offset = (uint64_t)(byte - guest.memory);
    return byte >= guest.memory && byte < guest.memory + MEMORY_BYTES ? guest.memory : NULL;
}

bool cpu_restore_state(struct cpu *cpu, uintptr_t host_pc, bool will_exit)
{
    (void)will_exit; /* until 7.2 */
    assert_that(cpu == current_cpu && cpu->in_block);
    if (host_pc != (uintptr_t)translated_code)
        die("cpu_restore_state: %#lx is not in translated code", (unsigned long)host_pc);
    cpu->env.eip = cpu->insn_rip;
    cpu->restored = true;
    return true;
}

void cpu_loop_exit(struct cpu *cpu)
{
    assert_that(cpu == current_cpu && cpu->in_block && !bql_held);
    siglongjmp(cpu->exit, 1);
}

void async_run_on_cpu(struct cpu *cpu, void (*func)(void *, void *), void *data)
{
    pthread_mutex_lock(&work_lock);
    assert_that(cpu->work_count < 8);
    cpu->work[cpu->work_count++] = (struct work){func, data};
    pthread_mutex_unlock(&work_lock);
    kick(cpu);
}

/* Like process_queued_cpu_work: under the big lock, and current_cpu is whatever it is. */
void do_work(struct cpu *cpu)
{
    for (;;) {
        pthread_mutex_lock(&work_lock);
        struct work work = cpu->work[0];
        bool any = cpu->work_count > 0;
        if (any)
            memmove(cpu->work, cpu->work + 1, --cpu->work_count * sizeof *cpu->work);
        pthread_mutex_unlock(&work_lock);
        if (!any)
            return;
        work.func(cpu, work.data);
    }
}

uint32_t cpu_cc_compute_all(struct env *env, int op)
{
    return op == CC_OP_EFLAGS ? (uint32_t)env->cc_src & STATUS_FLAGS : env->cc_dst == 0 ? ZERO_FLAG : 0;
}

void cpu_load_eflags(struct env *env, int eflags, int update_mask)
{
    env->cc_src = (unsigned)eflags & STATUS_FLAGS;
    env->cc_op = CC_OP_EFLAGS;
    env->df = eflags & 0x400 ? -1 : 1;
    env->eflags = (env->eflags & ~(uint64_t)(unsigned)update_mask) | ((unsigned)eflags & (unsigned)update_mask) | RFLAGS_ALWAYS;
}

void qemu_register_reset(void (*func)(void *), void *opaque)
{
    host.reset = func;
    host.reset_opaque = opaque;
}

void rcu_register_thread(void) {}

#if API >= 2
void bql_lock_impl(const char *file, int line) { (void)file, (void)line, lock(); }
void bql_unlock(void) { unlock(); }
#else
void qemu_mutex_lock_iothread_impl(const char *file, int line) { (void)file, (void)line, lock(); }
void qemu_mutex_unlock_iothread(void) { unlock(); }
#endif

#if !HALT
#pragma GCC visibility push(hidden)
#endif

bool runstate_is_running(void) { return LOAD(host.running); }

int vm_stop(int state)
{
    assert_that(state == RUN_STATE_PAUSED);
    if (!in_vcpu_thread) {
        if (LOAD(host.running))
            stop_all();
        return 0;
    }
    STORE(host.stop_requested, true);
    eventfd_write(host.wake_main, 1);
    STORE(current_cpu->stop, true);
    kick(current_cpu);
    return 0;
}

void vm_start(void)
{
    assert_that(bql_held);
    if (LOAD(host.running))
        return;
    STORE(host.running, true);
    for (unsigned i = 0; i < guest.vcpus; i++) {
        STORE(guest.cpus[i].stop, false);
        guest.cpus[i].stopped = false;
    }
    tell_change();
    say("RESUME");
}

#if !HALT
#pragma GCC visibility pop
#endif
#if !INTERNALS
#pragma GCC visibility pop
#endif

/* ---- registers by the plugin interface: of the vCPU whose thread this is, inside of a callback that asked for them ---- */

#if API >= 2
struct descriptor {
    uintptr_t handle;
    const char *name;
    const char *feature;
#if API >= 6
    bool is_readonly;
#endif
};

/* 9.0 gave out gdb's number itself, 0 for RAX; then one more; 11.0 has a bit for what is read-only. */
static uintptr_t handle_of(int number)
{
    if (API >= 6)
        return (uintptr_t)number << 1 | (number == 16);
    return (uintptr_t)number + (API >= 3);
}

static int number_of(uintptr_t handle) { return API >= 6 ? (int)(handle >> 1) : (int)handle - (API >= 3); }

GArray *qemu_plugin_get_registers(void)
{
    assert_that(current_cpu != NULL);
    GArray *array = calloc(1, sizeof *array);
    struct descriptor *descriptors = calloc(64, sizeof *descriptors);
    assert_that(array != NULL && descriptors != NULL);
    for (int number = 0; register_name(number); number++) {
        descriptors[array->len].handle = handle_of(number);
        descriptors[array->len].feature = "org.gnu.gdb.i386.core";
        descriptors[array->len++].name = register_name(number);
    }
    array->data = (char *)descriptors;
    array->element_size = sizeof *descriptors;
    return array;
}

int qemu_plugin_read_register(uintptr_t handle, GByteArray *buffer)
{
    assert_that(current_cpu != NULL);
    if (API >= 5 && current_cpu->cb_flags == NO_REGS)
        return API >= 6 ? 0 : -1;
    uint8_t bytes[8];
    __atomic_fetch_add(&host.register_reads, 1, __ATOMIC_RELAXED);
    int length = read_register(current_cpu, number_of(handle), bytes);
    append(buffer, bytes, length);
    return API >= 6 ? length > 0 : length;
}
#endif
#if API >= 3
void qemu_plugin_register_vcpu_insn_exec_cond_cb(void) { die("nobody asked for a conditional callback"); }
#endif
#if API >= 4
bool qemu_plugin_read_memory_vaddr(uint64_t address, GByteArray *buffer, size_t length)
{
    assert_that(current_cpu != NULL && length != 0);
    g_byte_array_set_size(buffer, (unsigned)length);
    return access_memory(address, buffer->data, length, false);
}
#endif
#if API >= 5
int qemu_plugin_write_register(uintptr_t handle, GByteArray *buffer)
{
    assert_that(current_cpu != NULL);
    assert_that(API < 6 || (handle & 1) == 0);
    if (buffer->len == 0 || current_cpu->cb_flags != RW_REGS)
        return API >= 6 ? 0 : -1;
    int length = write_register(current_cpu, number_of(handle), buffer->data);
    return API >= 6 ? length > 0 : length;
}

bool qemu_plugin_write_memory_vaddr(uint64_t address, GByteArray *buffer)
{
    assert_that(current_cpu != NULL && buffer->len != 0);
    return access_memory(address, buffer->data, buffer->len, true);
}
#endif
#if API >= 6
void qemu_plugin_set_pc(uint64_t vaddr) { die("nobody asked for qemu_plugin_set_pc(%#llx)", (unsigned long long)vaddr); }
#endif
