/* The MSRs of a vCPU that QEMU's TCG runs: where its CPU object keeps them. */
#ifndef VMEXIT_QEMU_MSRS_H
#define VMEXIT_QEMU_MSRS_H

#include <stdbool.h>
#include <stdint.h>

#pragma GCC visibility push(hidden)

/* What the guest's RDMSR would give. On the vCPU's own thread at a trap, or while it stands still. False: no such MSR is kept, or it is
 * not known where. */
bool qemu_peek_msr(unsigned vcpu, uint32_t msr, uint64_t *value);
/* Does what the guest's WRMSR would; only while the vCPU stands still. VMEXIT_OK, VMEXIT_NO_MSR, VMEXIT_NO_VALUE. */
int qemu_write_msr(unsigned vcpu, uint32_t msr, uint64_t value);

#pragma GCC visibility pop

#endif
