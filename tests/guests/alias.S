// One WRMSR in memory, executed through three addresses in turn.
//
// Define: COUNT rounds (default 4).
//
// The page that holds alias_wrmsr is seen at its own address, 1 GB (0x40000000) above, and at
// 0xffff800000000000 above.
//
// Trap log, for i = 1, 2, ... 3 * COUNT:
//     alias_wrmsr + OFFSET   STAR = i:~i         (upper half : lower half)
//     alias_rdmsr            STAR = i:~i         (always at its own address)
// where OFFSET is 0, 0x40000000, 0xffff800000000000, and again. Some releases of QEMU (7.2 before 7.2.9 for
// one) translate a piece of code once for all the addresses at which it is mapped; what a debugger must
// report is the address of each time.
//
// Prints `rip=<16 digits> value=<16 digits>` for each: the address of the WRMSR that the guest itself found
// out there, and what RDMSR gives. Status 33 always.
#ifndef COUNT
#define COUNT 4
#endif
#include "boot.inc"

main:
        mov pml4, %rax
        mov %rax, pml4 + 256 * 8
        mov pdpt, %rax
        mov %rax, pdpt + 8
        mov %cr3, %rax
        mov %rax, %cr3
        xor %ebx, %ebx
1:      xor %ebp, %ebp
2:      inc %ebx
        mov offsets(,%rbp,8), %rdi
        add $routine, %rdi
        mov $MSR_STAR, %ecx
        mov %ebx, %edx
        mov %ebx, %eax
        not %eax
        call *%rdi
alias_rdmsr:
        rdmsr
        shl $32, %rdx
        or %rdx, %rax
        PRINT "rip="
        PRINT_HEX %rsi
        PRINT " value="
        PRINT_HEX %rax
        PRINT "\n"
        inc %ebp
        cmp $3, %ebp
        jb 2b
        cmp $3 * COUNT, %ebx
        jb 1b
        EXIT EXIT_OK

// Write EDX:EAX to the MSR ECX; RSI becomes the address at which that was done.
routine:
        lea alias_wrmsr(%rip), %rsi
alias_wrmsr:
        wrmsr
        ret

        .section .rodata
        .balign 8
offsets:
        .quad 0, 0x40000000, 0xffff800000000000
