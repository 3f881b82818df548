/* What the way to the current thread needs of the QEMU around the agent, in as few steps as can be: where GS leads to, and guest memory as
 * it lies in this process. */
#include <pthread.h>
#include <string.h>

#include "core.h"
#include "qemu.h"

enum { EFER_LMA = 1 << 10 };
/* In CPUX86State, in bytes behind RIP: hflags, and the base of GS, the sixth segment. */
enum { ENV_HFLAGS_BYTE = 48, ENV_GS_BASE_BYTE = ENV_SEGMENTS_BYTE + 5 * SEGMENT_BYTES + SEGMENT_BASE_BYTE };
enum { HFLAGS_CPL = 3, HFLAGS_LMA = 1 << 14 };

/* ---- registers ---- */

enum layout { UNPROVEN, PROVEN, OTHER };

static int layout;

static uint32_t hflags_of(const char *rip)
{
    uint32_t hflags;
    memcpy(&hflags, rip + ENV_HFLAGS_BYTE, sizeof hflags);
    return hflags;
}

static uint64_t gs_base_of(const char *rip)
{
    uint64_t base;
    memcpy(&base, rip + ENV_GS_BASE_BYTE, sizeof base);
    return base;
}

/* The state is laid out as it is known if a kernel's GS base stands there, and what hflags repeat. */
static void prove_layout(unsigned vcpu, const char *rip, const struct task_registers *registers)
{
    if (!registers->is_long || registers->gs_base >> 63 == 0)
        return;
    const bool fits = gs_base_of(rip) == registers->gs_base && (hflags_of(rip) & HFLAGS_LMA) &&
                      (hflags_of(rip) & HFLAGS_CPL) == (qemu_peek_register(vcpu, VMEXIT_CS) & 3);
    __atomic_store_n(&layout, fits ? PROVEN : OTHER, __ATOMIC_RELAXED);
}

bool qemu_task_registers(unsigned vcpu, struct task_registers *registers)
{
    const uint64_t *env = qemu_env(vcpu);
    const char *rip = env ? (const char *)qemu_env_rip(env) : NULL;
    const int known = rip ? __atomic_load_n(&layout, __ATOMIC_RELAXED) : OTHER;
    if (known == PROVEN) {
        *registers = (struct task_registers){.is_long = hflags_of(rip) & HFLAGS_LMA, .gs_base = gs_base_of(rip)};
        return true;
    }
    *registers = (struct task_registers){
        .is_long = qemu_peek_register(vcpu, VMEXIT_EFER) & EFER_LMA,
        .gs_base = qemu_peek_register(vcpu, VMEXIT_GS_BASE),
    };
    if (known == UNPROVEN)
        prove_layout(vcpu, rip, registers);
    return true;
}

bool qemu_kernel_gs_base(unsigned vcpu, uint64_t *base)
{
    *base = qemu_peek_register(vcpu, VMEXIT_KERNEL_GS_BASE);
    return true;
}

/* ---- memory ---- */

/* QEMU is asked for as much as lies in one piece, from such a boundary on, else from the page itself. */
static const uint64_t boundaries[] = {UINT64_C(1) << 30, UINT64_C(1) << 21, UINT64_C(1) << 12};

/* Pieces that were asked for. QEMU keeps them where they are, even if it takes the memory away from the guest, as long as they are not
 * given back; and they are few, so they never are. */
enum { MOST_PIECES = 64 };

static struct {
    pthread_mutex_t lock;
    unsigned count;
    struct {
        uint64_t first;
        uint64_t size;
        const uint8_t *bytes;
    } pieces[MOST_PIECES];
} map = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool can_map(void)
{
    return address_space_map && address_space_unmap && address_space_memory && cpu_physical_memory_is_io && qemu_ram_block_from_host;
}

static const uint8_t *find_piece(uint64_t physical)
{
    for (unsigned i = 0; i < map.count; i++)
        if (physical - map.pieces[i].first < map.pieces[i].size)
            return map.pieces[i].bytes + (physical - map.pieces[i].first);
    return NULL;
}

/* Devices are not asked: to read one can do something. */
static const uint8_t *map_piece(uint64_t first, uint64_t physical)
{
    const uint64_t no_attributes = 1; /* MEMTXATTRS_UNSPECIFIED */
    uint64_t size = UINT64_C(1) << 46, offset;
    if (map.count == MOST_PIECES || cpu_physical_memory_is_io(first))
        return NULL;
    uint8_t *bytes = address_space_map(address_space_memory, first, &size, false, no_attributes);
    if (bytes == NULL)
        return NULL;
    /* A piece of QEMU's own instead of the guest's, or one that ends before the page. */
    if (qemu_ram_block_from_host(bytes, false, &offset) == NULL || physical - first >= size || size % 4096 != 0) {
        address_space_unmap(address_space_memory, bytes, size, false, 0);
        return NULL;
    }
    map.pieces[map.count].first = first;
    map.pieces[map.count].size = size;
    map.pieces[map.count].bytes = bytes;
    map.count++;
    return bytes + (physical - first);
}

const uint8_t *qemu_find_page(uint64_t physical)
{
    if (!can_map())
        return NULL;
    pthread_mutex_lock(&map.lock);
    const uint8_t *page = find_piece(physical);
    for (size_t i = 0; page == NULL && i < sizeof boundaries / sizeof *boundaries; i++)
        page = map_piece(physical & ~(boundaries[i] - 1), physical);
    pthread_mutex_unlock(&map.lock);
    return page;
}

bool qemu_read_physical(uint64_t physical, void *bytes, uint32_t length)
{
    return qemu_access_memory(0, true, false, physical, bytes, length);
}
