/* The functions of QEMU's plugin interface and of QEMU itself that the agent uses, declared by hand.
 *
 * Distributions do not package qemu-plugin.h, and one agent serves plugin API versions 1 (QEMU 7.2) to 6 (QEMU 11): what a
 * version lacks is a weak symbol that is null. Names and meanings are QEMU's own (include/qemu/qemu-plugin.h; for the internals
 * the header named beside each).
 */
#ifndef VMEXIT_QEMU_PLUGIN_H
#define VMEXIT_QEMU_PLUGIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define IF_PRESENT __attribute__((weak))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_register;

struct qemu_info {
    const char *target_name;
    struct {
        int min;
        int cur;
    } version;
    bool system_emulation;
    struct {
        int smp_vcpus;
        int max_vcpus;
    } system;
};

enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_CB_R_REGS, QEMU_PLUGIN_CB_RW_REGS };

/* glib's, through which QEMU hands out register values */
typedef struct {
    uint8_t *data;
    unsigned len;
} GByteArray;
typedef struct {
    char *data;
    unsigned len;
} GArray;
GByteArray *g_byte_array_new(void) IF_PRESENT;
GByteArray *g_byte_array_set_size(GByteArray *array, unsigned length) IF_PRESENT;
char *g_array_free(GArray *array, int free_segment) IF_PRESENT;
unsigned g_array_get_element_size(GArray *array) IF_PRESENT;

/* In every version */
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, unsigned)) IF_PRESENT;
void qemu_plugin_register_vcpu_exit_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, unsigned)) IF_PRESENT;
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*cb)(qemu_plugin_id_t, struct qemu_plugin_tb *)) IF_PRESENT;
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, void (*cb)(unsigned, void *),
                                            enum qemu_plugin_cb_flags flags, void *userdata) IF_PRESENT;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb) IF_PRESENT;
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb) IF_PRESENT;
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t idx) IF_PRESENT;
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn) IF_PRESENT;
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn) IF_PRESENT;
/* Up to API version 2 (QEMU 9.0) it returns a pointer to the bytes; from 3 on it copies them (other arguments). */
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *dest, size_t len) IF_PRESENT;

/* API version 2 (QEMU 9.0) */
typedef struct {
    struct qemu_plugin_register *handle;
    const char *name;
    const char *feature;
    /* from 6 on more follows: the array says how far it is to the next one */
} qemu_plugin_reg_descriptor;
GArray *qemu_plugin_get_registers(void) IF_PRESENT;
/* This and its like: in a callback and for the vCPU whose thread this is alone; elsewhere they give nothing or abort. */
int qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *buf) IF_PRESENT;
/* 3 (QEMU 9.1) */
void qemu_plugin_register_vcpu_insn_exec_cond_cb(void) IF_PRESENT;
/* 4 (QEMU 9.2) */
bool qemu_plugin_read_memory_vaddr(uint64_t addr, GByteArray *data, size_t len) IF_PRESENT;
/* 5 (QEMU 10.1); from 6 on it aborts where the register is RIP */
int qemu_plugin_write_register(struct qemu_plugin_register *handle, GByteArray *buf) IF_PRESENT;
bool qemu_plugin_write_memory_vaddr(uint64_t addr, GByteArray *data) IF_PRESENT;
/* 6 (QEMU 11.0) */
void qemu_plugin_set_pc(uint64_t vaddr) IF_PRESENT;

/* QEMU's internals, where its build exports them (-rdynamic): include/hw/core/cpu.h, include/exec/exec-all.h,
 * include/sysemu/runstate.h, include/qemu/main-loop.h, target/i386/cpu.h */
void *qemu_get_cpu(int index) IF_PRESENT;
int x86_cpu_gdb_read_register(void *cpu, GByteArray *buf, int n) IF_PRESENT;
int x86_cpu_gdb_write_register(void *cpu, uint8_t *buf, int n) IF_PRESENT;
int cpu_memory_rw_debug(void *cpu, uint64_t addr, void *buf, uint64_t len, bool is_write) IF_PRESENT;
void cpu_x86_update_dr7(void *env, uint32_t new_dr7) IF_PRESENT;
bool cpu_restore_state(void *cpu, uintptr_t host_pc, bool will_exit) IF_PRESENT;
void cpu_loop_exit(void *cpu) __attribute__((noreturn)) IF_PRESENT;
void async_run_on_cpu(void *cpu, void (*func)(void *, void *), void *data) IF_PRESENT;
int vm_stop(int state) IF_PRESENT;
void vm_start(void) IF_PRESENT;
bool runstate_is_running(void) IF_PRESENT;
void qemu_system_vmstop_request_prepare(void) IF_PRESENT;
void qemu_system_vmstop_request(int state) IF_PRESENT;
void *qemu_add_vm_change_state_handler(void (*func)(void *, bool, int), void *opaque) IF_PRESENT;
uint32_t cpu_cc_compute_all(void *env, int op) IF_PRESENT;
void cpu_load_eflags(void *env, int eflags, int update_mask) IF_PRESENT;
uint32_t address_space_rw(void *as, uint64_t addr, uint64_t attrs, void *buf, uint64_t len, bool is_write) IF_PRESENT;
extern char address_space_memory[] IF_PRESENT;
/* a VMStateDescription (include/migration/vmstate.h): where the CPU object keeps what migrates, field by field and with names */
extern const char vmstate_x86_cpu[] IF_PRESENT;
void *object_resolve_path_component(void *parent, const char *part) IF_PRESENT;
uint64_t cpu_get_apic_base(void *apic) IF_PRESENT;
void cpu_set_apic_base(void *apic, uint64_t value) IF_PRESENT;
void *address_space_map(void *as, uint64_t addr, uint64_t *plen, bool is_write, uint64_t attrs) IF_PRESENT;
void address_space_unmap(void *as, void *buffer, uint64_t len, bool is_write, uint64_t access_len) IF_PRESENT;
bool cpu_physical_memory_is_io(uint64_t phys_addr) IF_PRESENT;
void *qemu_ram_block_from_host(void *ptr, bool round_offset, uint64_t *offset) IF_PRESENT;
/* the big QEMU lock, by its names before and since QEMU 9.0 */
void qemu_mutex_lock_iothread_impl(const char *file, int line) IF_PRESENT;
void qemu_mutex_unlock_iothread(void) IF_PRESENT;
void bql_lock_impl(const char *file, int line) IF_PRESENT;
void bql_unlock(void) IF_PRESENT;
void rcu_register_thread(void) IF_PRESENT;
void qemu_register_reset(void (*func)(void *), void *opaque) IF_PRESENT;

#endif
