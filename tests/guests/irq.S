// Writes in a loop that a fast timer interrupts, whose handler writes another MSR; nothing may be done
// twice or not at all.
//
// Defines: COUNT writes in the loop and IRQS interrupts, the guest ends when it has seen both (defaults
// 10,000 and 20), PERIOD of the timer in nanoseconds (default 200,000; a debugger that needs longer than
// this for one interrupt's two traps starves the loop), MSR that the loop writes (default STAR).
//
// Trap log: the loop's, for i = 1, 2, ... W
//     main_wrmsr   MSR = aaaaaaaa:i               (upper half : lower half)
//     main_rdmsr   MSR = aaaaaaaa:i
// and between any two instructions of these the handler's, for j = 1, 2, ... I
//     irq_wrmsr    LSTAR = ffffbbbb:j
//     irq_rdmsr    LSTAR = ffffbbbb:j
//
// Prints `writes=<16 digits> irqs=<16 digits> bad=<16 digits>`: W, at least COUNT; I, at least IRQS; how
// often a value read was not the one just written, or what was counted before a write and after it
// differed. Status 33 if bad is 0, else 35.
#ifndef COUNT
#define COUNT 10000
#endif
#ifndef IRQS
#define IRQS 20
#endif
#ifndef PERIOD
#define PERIOD 200000
#endif
#ifndef MSR
#define MSR MSR_STAR
#endif
#if PERIOD < 1000
#error PERIOD must be 1000 or more
#endif
#include "boot.inc"

#define TIMER           0x40            // interrupt vectors
#define SPURIOUS        0xff

// Count at BEFORE, write UPPER:count to MSR, count at AFTER, read back and compare. Changes RAX, RCX, RDX,
// R8.
.macro STEP name, msr, upper, before, after
        incq \before
        mov \before, %r8d
        mov $\msr, %ecx
        mov $\upper, %edx
        mov %r8d, %eax
\name\()_wrmsr:
        wrmsr
        incq \after
        xor %eax, %eax
        xor %edx, %edx
\name\()_rdmsr:
        rdmsr
        cmp %r8d, %eax
        jne 1f
        cmp $\upper, %edx
        jne 1f
        mov \before, %rax
        cmp \after, %rax
        je 2f
1:      lock incq bad
2:
.endm

main:
        mov $TIMER, %edi
        mov $irq, %esi
        mov $GATE, %edx
        call set_gate
        mov $SPURIOUS, %edi
        mov $spurious, %esi
        call set_gate
        mov $LAPIC, %ebx
        movl $0x100 | SPURIOUS, 0xf0(%rbx)      // enable
        movl $0xb, 0x3e0(%rbx)                  // count at the full rate, which QEMU and KVM have at 1 GHz
        movl $0x20000 | TIMER, 0x320(%rbx)      // periodic
        movl $PERIOD, 0x380(%rbx)
        sti
again:
        STEP main, MSR, 0xaaaaaaaa, writes, writes_after
        cmpq $COUNT, writes
        jb again
        cmpq $IRQS, irqs
        jb again
        cli

        PRINT "writes="
        PRINT_HEX writes
        PRINT " irqs="
        PRINT_HEX irqs
        PRINT " bad="
        PRINT_HEX bad
        PRINT "\n"
        cmpq $0, bad
        jne 1f
        EXIT EXIT_OK
1:      EXIT EXIT_FAILED

irq:
        push %rax
        push %rcx
        push %rdx
        push %r8
        STEP irq, MSR_LSTAR, 0xffffbbbb, irqs, irqs_after
        mov $LAPIC, %eax
        movl $0, 0xb0(%rax)                     // end of interrupt
        pop %r8
        pop %rdx
        pop %rcx
        pop %rax
spurious:
        iretq

        .bss
        .balign 8
writes: .skip 8
writes_after:
        .skip 8
irqs:   .skip 8
irqs_after:
        .skip 8
bad:    .skip 8
