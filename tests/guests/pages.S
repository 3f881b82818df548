// Memory in pages of every size, and structures as an operating system has them.
//
// Define: COUNT writes (default 4). Needs a processor that has 1 GB pages (QEMU: -cpu max).
//
// Beside the memory at its own addresses there are, from 0xffff800000000000 on,
//     00000000    a page of 1 GB: the first GB once more
//     40000000    a page of 2 MB
//     40200000    three pages of 4 KB that are no neighbours in physical memory; the third is read-only
//     40203000    nothing
// GS holds the address of something like a KPCR, which holds at 188h that of a KTHREAD, which holds at b8h
// that of an EPROCESS, which holds at 450h the name of its image: all addresses in the page of 1 GB.
//
// Trap log:
//     pages_gs       GS_BASE = pcr + 0xffff800000000000
//     pages_wrmsr    STAR = 0:COUNT, 0:COUNT-1 ... 0:1
// At the odd values of these the process is svchost.exe, at the even ones explorer.exe; R8 is 47424448h.
//
// Prints `tags=<16 digits>`, the sum of R8 as it was after each write, then words of memory, each
// `<name>=<16 digits>`: `huge` at huge_word in the page of 1 GB, `large` at 40000008, `small` at 40200008,
// `fixed` at 40202008, and two that lie across an edge: `mixed` at 401ffffc, `edge` at 40200ffc. Status 33,
// or 35 where the processor has no 1 GB pages.
#ifndef COUNT
#define COUNT 4
#endif
#if COUNT < 1
#error COUNT must be 1 or more
#endif
#include "boot.inc"

#define HALF 0xffff800000000000
#define LARGE 0x4000000                 // where the page of 2 MB is in physical memory
#define MSR_GS_BASE 0xc0000101
#define TAG 0x47424448

// VALUE, of 64 bits, into memory.
.macro PUT value:req, to:req
        movabs $\value, %rax
        mov %rax, \to
.endm

.macro SHOW name:req, address:req
        movabs $\address, %rax
        mov (%rax), %rdx
        PRINT "\name\()="
        PRINT_HEX %rdx
        PRINT "\n"
.endm

main:
        mov $0x80000001, %eax
        cpuid
        bt $26, %edx
        jc 1f
        PRINT "no 1 GB pages\n"
        EXIT EXIT_FAILED
1:      movq $high_pdpt + 3, pml4 + 256 * 8
        movq $0x83, high_pdpt
        movq $high_pd + 3, high_pdpt + 8
        movq $LARGE + 0x83, high_pd
        movq $high_pt + 3, high_pd + 8
        movq $second + 3, high_pt
        movq $first + 3, high_pt + 8
        movq $third + 1, high_pt + 16
        mov %cr3, %rax
        mov %rax, %cr3
        mov %cr0, %rax
        or $0x10000, %eax               // WP
        mov %rax, %cr0

        PUT 0x1111111111111111, huge_word
        PUT 0x2222222222222222, LARGE + 8
        movl $0x44444444, LARGE + 0x1ffffc
        movl $0x55555555, second
        PUT 0x3333333333333333, second + 8
        movl $0x66666666, second + 0xffc
        movl $0x77777777, first
        PUT 0x8888888888888888, third + 8

        movabs $pcr + HALF, %rax
        mov %rax, %rdx
        shr $32, %rdx
        mov $MSR_GS_BASE, %ecx
pages_gs:
        wrmsr
        xor %ebp, %ebp
        mov $COUNT, %esi
1:      mov %esi, %eax
        and $1, %eax
        mov threads(,%rax,8), %rax
        mov %rax, pcr + 0x188
        mov $TAG, %r8d
        mov $MSR_STAR, %ecx
        mov %esi, %eax
        xor %edx, %edx
pages_wrmsr:
        wrmsr
        add %r8, %rbp
        dec %esi
        jnz 1b

        PRINT "tags="
        PRINT_HEX %rbp
        PRINT "\n"
        SHOW huge, HALF + huge_word
        SHOW large, HALF + 0x40000008
        SHOW small, HALF + 0x40200008
        SHOW fixed, HALF + 0x40202008
        SHOW mixed, HALF + 0x401ffffc
        SHOW edge, HALF + 0x40200ffc
        EXIT EXIT_OK

        .data
        .balign 8
huge_word:
        .quad 0
threads:
        .quad thread_explorer + HALF, thread_svchost + HALF
thread_explorer:
        .skip 0xb8
        .quad process_explorer + HALF
thread_svchost:
        .skip 0xb8
        .quad process_svchost + HALF
process_explorer:
        .skip 0x450
        .asciz "explorer.exe"
        .skip 3
process_svchost:
        .skip 0x450
        .asciz "svchost.exe"
        .skip 4

        .bss
        .balign 4096
first:  .skip 4096
second: .skip 4096
third:  .skip 4096
high_pdpt:
        .skip 4096
high_pd:
        .skip 4096
high_pt:
        .skip 4096
pcr:    .skip 0x190
