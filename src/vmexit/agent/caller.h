/* Where the function that a trapped instruction is in returns to: found on the guest's stack by tables that the guest's kernel keeps, and
 * told to the debugger by a number, before the first record that carries it. */
#ifndef VMEXIT_CALLER_H
#define VMEXIT_CALLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#pragma GCC visibility push(hidden)

struct caller {
    uint64_t address; /* 0: not known */
    uint16_t number; /* 0: not told yet */
    bool is_guess;
};

/* The link's half. The message's payload, 0 bytes to forget it all; a wire status. */
int callers_set_code(const void *code, size_t length);
/* A new debugger: nothing is known, and no address was told. */
void callers_begin_session(void);

/* On the vCPU's own thread at a trap. `rbp` is called with `context` where RBP is needed, which is seldom. */
struct caller caller_find(unsigned vcpu, uint64_t rip, uint64_t rsp, uint64_t (*rbp)(void *context), void *context);
/* The number that an address is to be told by, and that it was; 0: there are no more. */
uint16_t caller_next_number(unsigned vcpu);
void caller_told(unsigned vcpu, uint64_t address);

#pragma GCC visibility pop

#endif
