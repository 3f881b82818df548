// Several vCPUs writing the same MSR at once.
//
// Defines: COUNT writes on each vCPU (default 1000; 1 to 0xffffffff), CORES vCPUs (default 2, at most 16),
// MSR (default STAR), PATIENCE, how long to wait for the other vCPUs, in 2^32 ticks of the time stamp
// counter (default 8). QEMU needs -smp CORES.
//
// Trap log: on each vCPU smp_wrmsr COUNT times, with the values core:COUNT, core:COUNT-1, ... core:1 in
// this order (upper half : lower half), then smp_rdmsr once = core:1. Between vCPUs there is no order; all
// begin together.
//
// Prints `core=<2 digits> sum=<16 digits> last=<16 digits>` for each vCPU from 0 upward: the sum of the
// values as they stood in EDX:EAX after each write (COUNT * (COUNT + 1) / 2 + core * COUNT * 2^32, modulo
// 2^64, unless a debugger changed them), and what RDMSR gives at the end. Status 33, or 39 if vCPUs are
// missing.
#ifndef COUNT
#define COUNT 1000
#endif
#ifndef CORES
#define CORES 2
#endif
#ifndef MSR
#define MSR MSR_STAR
#endif
#ifndef PATIENCE
#define PATIENCE 8
#endif
#if COUNT < 1 || COUNT > 0xffffffff
#error COUNT must be 1 to 0xffffffff
#endif
#if CORES < 2 || CORES > 16
#error CORES must be 2 to 16
#endif
#include "boot.inc"

main:
        mov $CORES, %edi
        mov $PATIENCE, %esi
        call start_cores
        movl $1, begin
        xor %edi, %edi
        call work
1:      pause
        cmpl $CORES, finished
        jb 1b

        xor %ebx, %ebx
2:      PRINT "core="
        PRINT_HEX %rbx, 2
        PRINT " sum="
        PRINT_HEX "sums(,%rbx,8)"
        PRINT " last="
        PRINT_HEX "lasts(,%rbx,8)"
        PRINT "\n"
        inc %ebx
        cmp $CORES, %ebx
        jb 2b
        EXIT EXIT_OK

core_main:
        cmp $CORES, %edi
        jae 2f
1:      pause
        cmpl $0, begin
        je 1b
        call work
2:      ret

work:
        mov $MSR, %ecx
        mov $COUNT, %esi
        xor %ebx, %ebx
1:      mov %esi, %eax
        mov %edi, %edx
smp_wrmsr:
        wrmsr
        shl $32, %rdx
        add %rax, %rbx
        add %rdx, %rbx
        dec %esi
        jnz 1b
smp_rdmsr:
        rdmsr
        shl $32, %rdx
        or %rdx, %rax
        mov %rbx, sums(,%rdi,8)
        mov %rax, lasts(,%rdi,8)
        lock incl finished
        ret

        .bss
        .balign 8
sums:   .skip 8 * CORES
lasts:  .skip 8 * CORES
begin:  .skip 4
finished:
        .skip 4
