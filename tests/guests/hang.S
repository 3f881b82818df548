// Never ends: a write now and then, for tests that interrupt or kill.
//
// Defines: SPIN turns of an empty loop before each write (default 1000), TICK writes between two lines
// (default 20,000), MSR (default STAR).
//
// Trap log: hang_wrmsr without end, with the values 1, 2, 3 ... (both halves count).
//
// Prints `tick <16 digits>`, the number of writes so far, after every TICK writes.
#ifndef SPIN
#define SPIN 1000
#endif
#ifndef TICK
#define TICK 20000
#endif
#ifndef MSR
#define MSR MSR_STAR
#endif
#if SPIN < 1 || TICK < 1
#error SPIN and TICK must be 1 or more
#endif
#include "boot.inc"

main:
        xor %ebx, %ebx
1:      mov $TICK, %esi
2:      mov $SPIN, %edi
3:      dec %edi
        jnz 3b
        inc %rbx
        mov $MSR, %ecx
        mov %ebx, %eax
        mov %rbx, %rdx
        shr $32, %rdx
hang_wrmsr:
        wrmsr
        dec %esi
        jnz 2b
        PRINT "tick "
        PRINT_HEX %rbx
        PRINT "\n"
        jmp 1b
