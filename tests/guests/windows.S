// Threads of a made-up Windows that write MSRs.
//
// The Windows is memory that a test lays out (tests/guest/windows/fake_windows.py) and that QEMU loads behind the guest's own
// image: page tables, KPCRs, processes, threads. This guest takes its page tables and becomes its processors: it executes one
// thread after the other as the kernel does, by changing KPRCB.CurrentThread, at CPL 0 with the KPCR in GS. Code executes where it is linked, below 4 GB, except the WRMSR, which is the kernel's own: a function
// in the made-up image is called, WRMSR and RET.
//
// Defines: ROOT (page tables, physical), KPCR (address), ENTRY (what LSTAR is given), WRITER (address of the function), THREADS
// (address of a table: an ETHREAD and the value that it writes, each 8 bytes; an ETHREAD of 0 ends it), MSR (default MISC_ENABLE,
// 1a0).//
// Trap log: windows_lstar = ENTRY; then for each row of THREADS a WRMSR of MSR at WRITER with its value.
//
// Prints `threads=<8 digits>`, how many have written. Status 33.
#ifndef ROOT
#define ROOT 0x2000000
#endif
#ifndef KPCR
#define KPCR 0
#endif
#ifndef ENTRY
#define ENTRY 0
#endif
#ifndef WRITER
#define WRITER 0
#endif
#ifndef THREADS
#define THREADS 0
#endif
#ifndef MSR
#define MSR 0x1a0
#endif
#include "boot.inc"

#define CURRENT_THREAD 0x188

main:
        mov $ROOT, %eax
        mov %rax, %cr3
        mov $0xc0000101, %ecx           // GS_BASE: the KPCR
        movabs $KPCR, %rax
        mov %rax, %rdx
        shr $32, %rdx
windows_gs:
        wrmsr
        mov $0xc0000102, %ecx           // KERNEL_GS_BASE: a program's
        mov $0x1000, %eax
        mov $0x7f, %edx
windows_kernel_gs:
        wrmsr
        mov $MSR_LSTAR, %ecx
        movabs $ENTRY, %rax
        mov %rax, %rdx
        shr $32, %rdx
windows_lstar:
        wrmsr
        movabs $THREADS, %rbx
        movabs $WRITER, %rsi
        xor %edi, %edi
1:      mov (%rbx), %rax
        test %rax, %rax
        jz 2f
        mov %rax, %gs:CURRENT_THREAD
        mov 8(%rbx), %rax
        mov %rax, %rdx
        shr $32, %rdx
        mov $MSR, %ecx
        call *%rsi
        add $16, %rbx
        inc %edi
        jmp 1b
2:      PRINT "threads="
        PRINT_HEX %rdi, 8
        PRINT "\n"
        EXIT EXIT_OK
