/* The MSRs that are registers of the wire as well. */
#ifndef VMEXIT_MSR_REGISTER_H
#define VMEXIT_MSR_REGISTER_H

#include <stdint.h>

#include "wire.h"

/* The register's number (VMEXIT_EFER ...); -1 for any other MSR. */
static inline int msr_register(uint32_t msr)
{
    switch (msr) {
    case 0xc0000080:
        return VMEXIT_EFER;
    case 0xc0000100:
        return VMEXIT_FS_BASE;
    case 0xc0000101:
        return VMEXIT_GS_BASE;
    case 0xc0000102:
        return VMEXIT_KERNEL_GS_BASE;
    default:
        return -1;
    }
}

#endif
