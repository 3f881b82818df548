/* The time of a trap. */
#ifndef VMEXIT_CLOCK_H
#define VMEXIT_CLOCK_H

#include <stdint.h>

/* Notes a first point in time; once, early. */
void clock_init(void);
/* Measures the time stamp counter against CLOCK_MONOTONIC since clock_init; before the first clock_now of a session. */
void clock_calibrate(void);
/* CLOCK_MONOTONIC in ns: by the time stamp counter (9 ns a call) where the kernel itself trusts it, else by asking (23 ns). */
uint64_t clock_now(void);

#endif
