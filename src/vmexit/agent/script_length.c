/* How long an x86 instruction is (Intel SDM volume 2, chapter 2 and appendix A). */
#include <stdbool.h>

#include "script_run.h"

enum { MOST = 15 };

struct decoder {
    const uint8_t *bytes;
    size_t available;
    size_t at;
    bool is_64;
    bool operand_16; /* prefix 66 */
    bool address_small; /* prefix 67: 32 bits in 64-bit mode, else 16 */
    bool wide; /* REX.W */
    bool bad;
};

/* A set of opcodes, a bit each. */
typedef const uint32_t opcodes[8];

static bool has(opcodes set, uint8_t opcode) { return set[opcode / 32] >> opcode % 32 & 1; }

/* One-byte opcodes with a ModRM byte. */
static opcodes modrm_1 = {0x0f0f0f0f, 0x0f0f0f0f, 0, 0x00000a0c, 0x0000ffff, 0, 0xff0f00f3, 0xc0c00000};
/* One-byte opcodes with one byte of immediate data. */
static opcodes byte_1 = {0x10101010, 0x10101010, 0, 0xffff0c00, 0x0000000d, 0x00ff0100, 0x00302043, 0x000008ff};
/* ... with as many as the operand has, at most 4. */
static opcodes operand_1 = {0x20202020, 0x20202020, 0, 0x00000300, 0x00000002, 0x00000200, 0x00000080, 0};
/* One-byte opcodes that 64-bit mode does not have. 62, C4 and C5 are looked at before. */
static opcodes not_in_64 = {0xc0c040c0, 0x80808080, 0, 0x00000003, 0x04000004, 0, 0x00704000, 0x00000400};
/* Opcodes behind 0F without a ModRM byte. */
static opcodes no_modrm_2 = {0x00004be0, 0x00ff0000, 0, 0x00800000, 0, 0x00000707, 0x0000ff00, 0};
/* Opcodes behind 0F that do not exist. */
static opcodes missing_2 = {0x00001410, 0xfa4000f0, 0, 0x0c000000, 0, 0x000000c0, 0, 0};
/* Opcodes behind 0F with one byte of immediate data; and those of them that vector instructions have too. */
static opcodes byte_2 = {0x00008000, 0, 0, 0x000f0000, 0, 0x04001010, 0x00000074, 0};
static opcodes byte_vector = {0, 0, 0, 0x000f0000, 0, 0, 0x00000074, 0};

static uint8_t take(struct decoder *d)
{
    if (d->at >= d->available || d->at >= MOST) {
        d->bad = true;
        return 0;
    }
    return d->bytes[d->at++];
}

static void skip(struct decoder *d, unsigned count)
{
    while (count-- > 0)
        take(d);
}

static unsigned operand_bytes(const struct decoder *d) { return d->operand_16 && !d->wide ? 2 : 4; }

/* The ModRM byte, and with it the SIB byte and the displacement. */
static uint8_t take_modrm(struct decoder *d)
{
    uint8_t modrm = take(d);
    unsigned mode = modrm >> 6, rm = modrm & 7;
    if (mode == 3)
        return modrm;
    if (d->address_small && !d->is_64) {
        skip(d, mode == 1 ? 1 : mode == 2 || rm == 6 ? 2 : 0);
        return modrm;
    }
    if (rm == 4) {
        uint8_t base = take(d) & 7;
        if (mode == 0 && base == 5)
            skip(d, 4);
    } else if (mode == 0 && rm == 5) {
        skip(d, 4);
    }
    skip(d, mode == 1 ? 1 : mode == 2 ? 4 : 0);
    return modrm;
}

/* Behind VEX, EVEX or XOP, whose opcode maps number the same: 1 is 0F, 2 is 0F 38, 3 is 0F 3A. */
static void take_vector(struct decoder *d, unsigned map)
{
    uint8_t opcode = take(d);
    if (map == 1 && opcode == 0x77)
        return;
    take_modrm(d);
    if (map == 3 || map == 8 || (map == 1 && has(byte_vector, opcode)))
        skip(d, 1);
    else if (map == 10)
        skip(d, 4);
}

static void take_two_byte(struct decoder *d)
{
    uint8_t opcode = take(d);
    if (opcode == 0x38) {
        take(d);
        take_modrm(d);
    } else if (opcode == 0x3a) {
        take(d);
        take_modrm(d);
        skip(d, 1);
    } else if (opcode >= 0x20 && opcode <= 0x23) {
        take(d); /* control and debug registers: always as if between registers */
    } else if (opcode >= 0x80 && opcode <= 0x8f) {
        skip(d, d->is_64 ? 4 : operand_bytes(d));
    } else if (has(missing_2, opcode)) {
        d->bad = true;
    } else if (!has(no_modrm_2, opcode)) {
        take_modrm(d);
        if (has(byte_2, opcode))
            skip(d, 1);
    }
}

static void take_one_byte(struct decoder *d, uint8_t opcode)
{
    if (d->is_64 && has(not_in_64, opcode)) {
        d->bad = true;
        return;
    }
    uint8_t modrm = has(modrm_1, opcode) ? take_modrm(d) : 0;
    bool tests = (opcode == 0xf6 || opcode == 0xf7) && (modrm >> 3 & 7) < 2;
    if (opcode == 0xf6)
        skip(d, tests);
    else if (opcode == 0xf7)
        skip(d, tests ? operand_bytes(d) : 0);
    else if (opcode >= 0xb8 && opcode <= 0xbf)
        skip(d, d->wide ? 8 : operand_bytes(d));
    else if (opcode >= 0xa0 && opcode <= 0xa3)
        skip(d, d->is_64 ? (d->address_small ? 4 : 8) : (d->address_small ? 2 : 4));
    else if (opcode == 0xc2 || opcode == 0xca)
        skip(d, 2);
    else if (opcode == 0xc8)
        skip(d, 3);
    else if (opcode == 0x9a || opcode == 0xea)
        skip(d, operand_bytes(d) + 2);
    else if (opcode == 0xe8 || opcode == 0xe9)
        skip(d, d->is_64 ? 4 : operand_bytes(d));
    else if (has(byte_1, opcode))
        skip(d, 1);
    else if (has(operand_1, opcode))
        skip(d, operand_bytes(d));
}

static bool is_prefix(struct decoder *d, uint8_t byte)
{
    switch (byte) {
    case 0x66:
        d->operand_16 = true;
        return true;
    case 0x67:
        d->address_small = true;
        return true;
    case 0x26:
    case 0x2e:
    case 0x36:
    case 0x3e:
    case 0x64:
    case 0x65:
    case 0xf0:
    case 0xf2:
    case 0xf3:
        return true;
    default:
        return false;
    }
}

static bool is_rex(const struct decoder *d, uint8_t byte) { return d->is_64 && (byte & 0xf0) == 0x40; }

/* C4, C5, 62 and 8F are other instructions outside of 64-bit mode, told apart by what would be their ModRM byte. */
static bool is_vector(const struct decoder *d, uint8_t opcode)
{
    if (d->at >= d->available)
        return false;
    uint8_t next = d->bytes[d->at];
    if (opcode == 0x8f)
        return (next & 0x1f) >= 8;
    return (opcode == 0xc4 || opcode == 0xc5 || opcode == 0x62) && (d->is_64 || next >= 0xc0);
}

unsigned script_instruction_length(const uint8_t *bytes, size_t available, unsigned bits)
{
    struct decoder decoder = {.bytes = bytes, .available = available, .is_64 = bits == 64}, *d = &decoder;
    uint8_t byte = take(d);
    while (!d->bad && (is_prefix(d, byte) || is_rex(d, byte))) {
        d->wide = is_rex(d, byte) && byte & 8; /* a REX counts only as the last prefix */
        byte = take(d);
    }
    if (d->bad)
        return 0;
    if (is_vector(d, byte)) {
        unsigned map = byte == 0xc5 ? 1 : take(d) & (byte == 0x62 ? 7 : 31);
        skip(d, byte == 0x62 ? 2 : 1);
        take_vector(d, map);
    } else if (byte == 0x0f) {
        take_two_byte(d);
    } else {
        take_one_byte(d, byte);
    }
    return d->bad ? 0 : (unsigned)d->at;
}
