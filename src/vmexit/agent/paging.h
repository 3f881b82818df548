/* A guest's page tables, walked from its control registers and its physical memory: every mode of an x86 processor, both ways. */
#ifndef VMEXIT_PAGING_H
#define VMEXIT_PAGING_H

#include <stdbool.h>
#include <stdint.h>

/* So many tables are worth a search, where a vCPU waits for it. */
enum { PAGING_MANY_TABLES = 4096 };

/* Where to walk: control registers as the processor has them, and a way to guest-physical memory. */
struct paging {
    uint64_t cr0;
    uint64_t cr3;
    uint64_t cr4;
    uint64_t efer;
    /* Reads or writes so many bytes from a physical address on; false where not all of them are memory. */
    bool (*access)(void *context, uint64_t physical, void *bytes, uint32_t length, bool write);
    void *context;
};

/* The physical address of a virtual one, whatever the page's protection; false where it is not mapped, or not canonical. `page` is the
 * size of its page in bytes (4 KB, 2 MB, 4 MB, 1 GB; 4 GB without paging) and may be null. */
bool paging_translate(const struct paging *paging, uint64_t virtual_address, uint64_t *physical, uint64_t *page);
/* A virtual address of a physical one: the lowest of those in the upper half of the address space (the kernel's, in most systems), else
 * the lowest one. False where it is not mapped, and where that many tables have been read in vain: a guest's tables may be endless. */
bool paging_find(const struct paging *paging, uint64_t physical, unsigned tables, uint64_t *virtual_address);
/* Reads or writes virtual memory, read-only pages included. False where any of it is not mapped; what lies before that is done. */
bool paging_access(const struct paging *paging, uint64_t virtual_address, void *bytes, uint32_t length, bool write);

#endif
