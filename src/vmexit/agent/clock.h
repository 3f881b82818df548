/* The time of a trap. */
#ifndef VMEXIT_CLOCK_H
#define VMEXIT_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

/* Notes a first point in time; once, early. */
void clock_init(void);
/* Measures the time stamp counter against CLOCK_MONOTONIC since clock_init; before the first clock_now of a session. */
void clock_calibrate(void);
/* CLOCK_MONOTONIC in ns: by the time stamp counter (9 ns a call) where the kernel itself trusts it, else by asking (23 ns). */
uint64_t clock_now(void);

#pragma GCC visibility push(hidden)
#if defined(__x86_64__)
extern struct clock_tsc {
    bool trusted;
    uint64_t first_tsc, first_ns;
    uint64_t base_tsc, base_ns;
    uint64_t ns_per_tick; /* times 2^32; 0: not measured */
} clock_tsc;

/* Whether clock_now_by_tsc can be used. */
static inline bool clock_has_tsc(void) { return clock_tsc.ns_per_tick != 0; }

static inline uint64_t clock_now_by_tsc(void)
{
    uint64_t ticks = __builtin_ia32_rdtsc() - clock_tsc.base_tsc;
    return clock_tsc.base_ns + (uint64_t)((unsigned __int128)ticks * clock_tsc.ns_per_tick >> 32);
}
#else
static inline bool clock_has_tsc(void) { return false; }
static inline uint64_t clock_now_by_tsc(void) { return 0; }
#endif
#pragma GCC visibility pop

#endif
