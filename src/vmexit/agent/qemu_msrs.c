/* See qemu_msrs.h. QEMU's own functions for RDMSR and WRMSR are not exported, but its description of the CPU object for migration is: it
 * names the fields and says where they are, so they are found whatever the version. EFER and the segments' bases have numbers for gdb. */
#define _GNU_SOURCE
#include "qemu_msrs.h"

#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "msr_register.h"
#include "qemu.h"

enum { MCG_CAP = 0x179, MCG_CTL = 0x17b, APIC_BASE = 0x1b, FIRST_BANK = 0x400, MOST_BANKS = 10 };
enum { MCG_CTL_PRESENT = 1 << 8, MCG_BANKS = 0xff, BANK_MSRS = 4 };

/* What TCG reads and writes (QEMU, target/i386/tcg/sysemu/misc_helper.c), and the field that it is in. Those that do more than to keep
 * a value, or that the guest cannot write, are read only. */
static const struct {
    uint32_t first;
    uint32_t count; /* in a row, 8 bytes apart */
    const char *field;
    uint8_t skipped; /* bytes of the field before the first */
    bool read_only;
    uint64_t writable; /* bits; 0: all */
} known[] = {
    {0x34, 1, "env.msr_smi_count", 0, true, 0},
    {0x174, 1, "env.sysenter_cs", 0, false, 0xffff},
    {0x175, 1, "env.sysenter_esp", 0, false, 0},
    {0x176, 1, "env.sysenter_eip", 0, false, 0},
    {MCG_CAP, 1, "env.mcg_cap", 0, true, 0},
    {0x17a, 1, "env.mcg_status", 0, false, 0},
    {MCG_CTL, 1, "env.mcg_ctl", 0, true, 0},
    {0x1a0, 1, "env.msr_ia32_misc_enable", 0, false, 0},
    {0x200, 16, "env.mtrr_var", 0, false, 0}, /* base and mask, base and mask ... */
    {0x250, 1, "env.mtrr_fixed", 0, false, 0},
    {0x258, 2, "env.mtrr_fixed", 8, false, 0},
    {0x268, 8, "env.mtrr_fixed", 24, false, 0},
    {0x277, 1, "env.pat", 0, false, 0},
    {0x2ff, 1, "env.mtrr_deftype", 0, false, 0},
    {FIRST_BANK, MOST_BANKS * BANK_MSRS, "env.mce_banks", 0, true, 0},
    {0x6e1, 1, "env.pkrs", 0, true, 0},
    {0xd90, 1, "env.msr_bndcfgs", 0, true, 0},
    {0xc0000081, 1, "env.star", 0, false, 0},
    {0xc0000082, 1, "env.lstar", 0, false, 0},
    {0xc0000083, 1, "env.cstar", 0, false, 0},
    {0xc0000084, 1, "env.fmask", 0, false, 0},
    {0xc0000103, 1, "env.tsc_aux", 0, false, 0},
    {0xc0010117, 1, "env.vm_hsave", 0, false, 0},
};
enum { KNOWN = sizeof known / sizeof *known };

static struct {
    pthread_once_t once;
    size_t general; /* where the general registers are in the CPU object, in bytes; 0: the description is not as it is known */
    struct {
        uint32_t offset; /* 0: there is no such field */
        uint32_t size; /* of it, or of one of its elements */
    } fields[KNOWN];
} layout = {.once = PTHREAD_ONCE_INIT};

/* ---- reading the description ---- */

/* It is another program's, of a version that nobody may have seen: so a wrong pointer must do no harm. */
static bool look(uint64_t address, void *bytes, size_t length)
{
    struct iovec ours = {.iov_base = bytes, .iov_len = length};
    struct iovec theirs = {.iov_base = (void *)address, .iov_len = length}; // NOLINT: an address of this very process
    return process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0) == (ssize_t)length;
}

static uint64_t word_at(uint64_t address)
{
    uint64_t word = 0;
    look(address, &word, sizeof word);
    return word;
}

static bool is_text(uint64_t address, const char *text)
{
    char found[64];
    size_t length = strlen(text) + 1;
    return address != 0 && length <= sizeof found && look(address, found, length) && memcmp(found, text, length) == 0;
}

enum { MOST_WORDS = 32, MOST_FIELDS = 256, MOST_PARTS = 256 };

/* How a VMStateField is laid out: in bytes, from one to the next, and to its offset, which its size follows. */
struct form {
    size_t stride;
    size_t offset;
};

/* By what is known of the first three: the general registers (16 or, since QEMU 11, 32), RIP, RFLAGS. */
static bool find_form(uint64_t fields, struct form *form)
{
    form->stride = 8;
    while (form->stride < MOST_WORDS * 8 && !is_text(word_at(fields + form->stride), "env.eip"))
        form->stride += 8;
    if (!is_text(word_at(fields + 2 * form->stride), "env.eflags"))
        return false;
    for (form->offset = 8; form->offset < form->stride; form->offset += 8) {
        const uint64_t general = word_at(fields + form->offset);
        const uint64_t rip = word_at(fields + form->stride + form->offset);
        const uint64_t rflags = word_at(fields + 2 * form->stride + form->offset);
        bool fits = rip - general == 16 * 8 || rip - general == 32 * 8;
        if (fits && rflags - rip == 8 && word_at(fields + form->offset + 8) == 8) {
            layout.general = general;
            return true;
        }
    }
    return false;
}

static void take_fields(uint64_t field, const struct form *form)
{
    uint64_t name;
    for (unsigned i = 0; i < MOST_FIELDS && (name = word_at(field)) != 0; i++, field += form->stride)
        for (unsigned k = 0; k < KNOWN; k++) {
            if (layout.fields[k].offset != 0 || !is_text(name, known[k].field))
                continue;
            layout.fields[k].offset = (uint32_t)word_at(field + form->offset);
            layout.fields[k].size = (uint32_t)word_at(field + form->offset + 8);
        }
}

/* A VMStateDescription has its fields somewhere, and right behind them its parts, which are of the same form. */
static void find_fields(void)
{
    const uint64_t description = (uint64_t)(uintptr_t)vmstate_x86_cpu;
    struct form form;
    if (description == 0)
        return;
    size_t at = 0;
    while (at < MOST_WORDS * 8 && !is_text(word_at(word_at(description + at)), "env.regs"))
        at += 8;
    const uint64_t fields = word_at(description + at);
    if (at == MOST_WORDS * 8 || !find_form(fields, &form))
        return;
    take_fields(fields, &form);
    const uint64_t parts = word_at(description + at + 8);
    for (unsigned i = 0; parts != 0 && i < MOST_PARTS; i++) {
        const uint64_t part = word_at(parts + i * 8);
        if (part == 0)
            break;
        take_fields(word_at(part + at), &form);
    }
}

/* ---- a vCPU ---- */

/* Whether its general registers are where the description has them. */
static bool fits(unsigned vcpu)
{
    char *cpu = qemu_cpu(vcpu);
    pthread_once(&layout.once, find_fields);
    if (cpu == NULL || layout.general == 0)
        return false;
    const uint64_t *env = qemu_env(vcpu);
    if (env)
        return (const char *)env == cpu + layout.general;
    const uint64_t *general = (const uint64_t *)(const void *)(cpu + layout.general);
    for (unsigned number = 0; number < 16; number++)
        if (general[number] != qemu_peek_register(vcpu, number))
            return false;
    return true;
}

static int find(uint32_t msr)
{
    for (unsigned k = 0; k < KNOWN; k++)
        if (msr - known[k].first < known[k].count)
            return (int)k;
    return -1;
}

/* Where a known MSR is kept; null where this QEMU does not have it, or not in this form. */
static char *place_of(unsigned vcpu, uint32_t msr, int k)
{
    const uint32_t size = layout.fields[k].size, offset = layout.fields[k].offset;
    if (offset == 0 || (size != 8 && !(size == 4 && known[k].count == 1) && !(size == 16 && known[k].count == 16)))
        return NULL;
    return (char *)qemu_cpu(vcpu) + offset + known[k].skipped + (size_t)(msr - known[k].first) * 8;
}

static bool peek_known(unsigned vcpu, uint32_t msr, uint64_t *value)
{
    int k = find(msr);
    const char *place = k < 0 ? NULL : place_of(vcpu, msr, k);
    *value = 0;
    if (place == NULL)
        return false;
    memcpy(value, place, layout.fields[k].size == 4 ? 4 : 8);
    return true;
}

/* A bank that the processor does not have is no MSR, and MCG_CTL is one only where MCG_CAP says so. */
static bool exists(unsigned vcpu, uint32_t msr)
{
    uint64_t cap = 0;
    if (msr != MCG_CTL && msr - FIRST_BANK >= MOST_BANKS * BANK_MSRS)
        return true;
    peek_known(vcpu, MCG_CAP, &cap);
    return msr == MCG_CTL ? cap & MCG_CTL_PRESENT : msr - FIRST_BANK < BANK_MSRS * (cap & MCG_BANKS);
}

static void *apic_of(unsigned vcpu)
{
    if (!object_resolve_path_component || !cpu_get_apic_base || qemu_cpu(vcpu) == NULL)
        return NULL;
    return object_resolve_path_component(qemu_cpu(vcpu), "lapic");
}

bool qemu_peek_msr(unsigned vcpu, uint32_t msr, uint64_t *value)
{
    int number = msr_register(msr);
    if (number >= 0) {
        if (!x86_cpu_gdb_read_register || !qemu_get_cpu)
            return false;
        *value = qemu_peek_register(vcpu, (unsigned)number);
        return true;
    }
    if (msr == APIC_BASE) {
        void *apic = apic_of(vcpu);
        if (apic)
            *value = cpu_get_apic_base(apic);
        return apic != NULL;
    }
    return find(msr) >= 0 && fits(vcpu) && exists(vcpu, msr) && peek_known(vcpu, msr, value);
}

static int write_known(unsigned vcpu, uint32_t msr, uint64_t value)
{
    int k = find(msr);
    char *place = k >= 0 && !known[k].read_only && fits(vcpu) ? place_of(vcpu, msr, k) : NULL;
    if (place == NULL)
        return VMEXIT_NO_MSR;
    if (known[k].writable)
        value &= known[k].writable;
    memcpy(place, &value, layout.fields[k].size == 4 ? 4 : 8);
    return VMEXIT_OK;
}

/* The bits of EFER that there are (AMD APM volume 2, 3.1.7): SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE. With paging on, LME and with it
 * LMA stay. */
static int write_efer(unsigned vcpu, uint64_t value)
{
    const uint64_t bits = 0xfd01, modes = 0x500, paging = UINT64_C(1) << 31;
    const uint64_t old = qemu_peek_register(vcpu, VMEXIT_EFER);
    if ((value & ~bits) || ((old ^ value) & 0x400) || (((old ^ value) & modes) && (qemu_peek_register(vcpu, VMEXIT_CR0) & paging)))
        return VMEXIT_NO_VALUE;
    qemu_poke_register(vcpu, VMEXIT_EFER, value);
    return VMEXIT_OK;
}

static int write_register(unsigned vcpu, unsigned number, uint64_t value)
{
    if (!x86_cpu_gdb_write_register || !qemu_get_cpu)
        return VMEXIT_NO_MSR;
    if (number == VMEXIT_EFER)
        return write_efer(vcpu, value);
    if ((int64_t)(value << 7) >> 7 != (int64_t)value) /* not canonical, be it with five levels of paging */
        return VMEXIT_NO_VALUE;
    qemu_poke_register(vcpu, number, value);
    return VMEXIT_OK;
}

int qemu_write_msr(unsigned vcpu, uint32_t msr, uint64_t value)
{
    int number = msr_register(msr), status = VMEXIT_NO_MSR;
    void *apic = msr == APIC_BASE && cpu_set_apic_base ? apic_of(vcpu) : NULL;
    qemu_lock();
    if (number >= 0) {
        status = write_register(vcpu, (unsigned)number, value);
    } else if (apic) {
        cpu_set_apic_base(apic, value);
        status = VMEXIT_OK;
    } else {
        status = write_known(vcpu, msr, value);
    }
    qemu_unlock();
    return status;
}
