// The benchmark's loop: COUNT writes to one MSR, as tight as they can be.
//
// Defines: COUNT (default 20,000,000; 1 to 0xffffffff), MSR (default STAR), HIGH, the value's upper half
// (default 0x5a5a5a5a).
//
// Trap log: loop_wrmsr COUNT times, with the values HIGH:COUNT, HIGH:COUNT-1, ... HIGH:1; then loop_rdmsr
// once = HIGH:1.
//
// Prints `sum=<16 digits> last=<16 digits>`: the sum of EAX as it was after each write (COUNT * (COUNT + 1)
// / 2, unless a debugger changed EAX), and what RDMSR gives at the end. Status 33 always.
#ifndef COUNT
#define COUNT 20000000
#endif
#ifndef MSR
#define MSR MSR_STAR
#endif
#ifndef HIGH
#define HIGH 0x5a5a5a5a
#endif
#if COUNT < 1 || COUNT > 0xffffffff
#error COUNT must be 1 to 0xffffffff
#endif
#include "boot.inc"

main:
        mov $MSR, %ecx
        mov $HIGH, %edx
        mov $COUNT, %esi
        xor %ebx, %ebx
        .balign 16
1:      mov %esi, %eax
loop_wrmsr:
        wrmsr
        add %rax, %rbx
        dec %esi
        jnz 1b

loop_rdmsr:
        rdmsr
        shl $32, %rdx
        or %rdx, %rax
        PRINT "sum="
        PRINT_HEX %rbx
        PRINT " last="
        PRINT_HEX %rax
        PRINT "\n"
        EXIT EXIT_OK
