/* Time stamps that are cheap enough for every trap. */
#define _GNU_SOURCE
#include "clock.h"

#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LEAST_BASE_NS = 20000000 }; /* over which the counter's rate is measured: reading the two clocks apart by 100 ns is 5 ppm */

static uint64_t ask_kernel(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

#if defined(__x86_64__)

struct clock_tsc clock_tsc;

/* The kernel uses the counter as its own clock only if it runs at a constant rate and agrees between all processors. */
static bool kernel_trusts_tsc(void)
{
    char name[4] = {0};
    int fd = open("/sys/devices/system/clocksource/clocksource0/current_clocksource", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool is_tsc = read(fd, name, sizeof name) == 4 && memcmp(name, "tsc\n", 4) == 0;
    close(fd);
    return is_tsc;
}

void clock_init(void)
{
    clock_tsc.trusted = kernel_trusts_tsc();
    clock_tsc.first_ns = ask_kernel();
    clock_tsc.first_tsc = __builtin_ia32_rdtsc();
}

void clock_calibrate(void)
{
    if (!clock_tsc.trusted)
        return;
    uint64_t elapsed = ask_kernel() - clock_tsc.first_ns;
    if (elapsed < LEAST_BASE_NS)
        nanosleep(&(struct timespec){.tv_nsec = (long)(LEAST_BASE_NS - elapsed)}, NULL);
    clock_tsc.base_ns = ask_kernel();
    clock_tsc.base_tsc = __builtin_ia32_rdtsc();
    unsigned __int128 ns = (unsigned __int128)(clock_tsc.base_ns - clock_tsc.first_ns) << 32;
    clock_tsc.ns_per_tick = (uint64_t)(ns / (clock_tsc.base_tsc - clock_tsc.first_tsc));
}

uint64_t clock_now(void)
{
    return clock_has_tsc() ? clock_now_by_tsc() : ask_kernel();
}

#else

void clock_init(void) {}
void clock_calibrate(void) {}
uint64_t clock_now(void) { return ask_kernel(); }

#endif
