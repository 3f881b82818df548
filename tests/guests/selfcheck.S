// Whether a WRMSR leaves all registers and flags alone; or, with DUMP, what a debugger has made of them.
//
// Defines: DUMP (default 0), SPOIL (default nothing), an instruction to execute after each WRMSR: shows
// that the check finds it.
//
// DUMP 0: each case below fills all 16 registers with patterns of their own (RCX, RAX, RDX with upper
// halves that are not zero), does one piece of arithmetic and saves everything; then the same again, with a
// WRMSR between the arithmetic and the saving; and compares. The flags are then known to an emulator only
// by the operands of the last operation.
//
// Trap log: for each case N = 1, 2, ... in the order of the cases
//     check_<case>   STAR = 40000004:N            (upper half : lower half)
//     check_rdmsr    STAR = 40000004:N
// but for the case mul, the 16th, which changes EAX and EDX: its value is 0000000f:fffffff0. The cases are
//     none add adc sub sbb neg inc dec and xor shl shr sar rol imul mul bt stc popf
// (none: flags loaded by POPF some time before; popf: right before, with ID AC NT IOPL OF DF IF SF ZF AF PF
// CF all 1).
//
// Prints for each case `ok <case>` or lines `bad <case> <register>=<16 digits> was=<16 digits>`, where the
// register may be rflags, or msr for the value written. Status 33, or 35 after a `bad`.
//
// DUMP 1: one WRMSR, then everything is printed. Trap log:
//     dump_wrmsr     STAR = 40000004:40000001
//     dump_rdmsr     STAR, or what the debugger has made of RCX
// At dump_wrmsr the registers hold
//     rax=1111111140000001 rbx=2222222222222222 rcx=33333333c0000081 rdx=4444444440000004
//     rsi=5555555555555555 rdi=6666666666666666 rbp=7777777777777777 rsp=8888888888888888
//     r8=9999999999999999 r9=aaaaaaaaaaaaaaaa r10=bbbbbbbbbbbbbbbb r11=cccccccccccccccc
//     r12=dddddddddddddddd r13=eeeeeeeeeeeeeeee r14=ffffffffffffffff r15=0123456789abcdef
//     rflags=0000000000000897 (OF SF AF PF CF)
// A debugger that moves RIP from there to dump_detour skips the write and makes `way` 1.
//
// Prints `<register>=<16 digits>` a line, those as they are after the WRMSR in the order above, then
// `msr=<16 digits>` (dump_rdmsr), then `way=<1 digit>`, 0 or 1. Status 33 always.
#ifndef DUMP
#define DUMP 0
#endif
#ifndef SPOIL
#define SPOIL
#endif
#include "boot.inc"

#define RAX 0                           // places in a set of saved registers, in bytes
#define RCX 16
#define RDX 24
#define RFLAGS 128
#define SAVED 136

// All registers from PATTERNS; the flags are those on top of the stack before this.
.macro LOAD
        popfq
        mov %rsp, stack
        mov patterns + 0, %rax
        mov patterns + 8, %rbx
        mov patterns + 16, %rcx
        mov patterns + 24, %rdx
        mov patterns + 32, %rsi
        mov patterns + 40, %rdi
        mov patterns + 48, %rbp
        mov patterns + 56, %rsp
        mov patterns + 64, %r8
        mov patterns + 72, %r9
        mov patterns + 80, %r10
        mov patterns + 88, %r11
        mov patterns + 96, %r12
        mov patterns + 104, %r13
        mov patterns + 112, %r14
        mov patterns + 120, %r15
.endm

.macro SAVE to
        mov %rax, \to + 0
        mov %rbx, \to + 8
        mov %rcx, \to + 16
        mov %rdx, \to + 24
        mov %rsi, \to + 32
        mov %rdi, \to + 40
        mov %rbp, \to + 48
        mov %rsp, \to + 56
        mov %r8, \to + 64
        mov %r9, \to + 72
        mov %r10, \to + 80
        mov %r11, \to + 88
        mov %r12, \to + 96
        mov %r13, \to + 104
        mov %r14, \to + 112
        mov %r15, \to + 120
        mov stack, %rsp
        pushfq
        popq \to + RFLAGS
        push $2
        popfq
.endm

        .data
        .balign 8
patterns:
        .quad 0x1111111140000001, 0x2222222222222222, 0x3333333300000000 + MSR_STAR, 0x4444444440000004
        .quad 0x5555555555555555, 0x6666666666666666, 0x7777777777777777, 0x8888888888888888
        .quad 0x9999999999999999, 0xaaaaaaaaaaaaaaaa, 0xbbbbbbbbbbbbbbbb, 0xcccccccccccccccc
        .quad 0xdddddddddddddddd, 0xeeeeeeeeeeeeeeee, 0xffffffffffffffff, 0x0123456789abcdef

        .section .rodata
        .balign 8
names:  .irp name, rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15, rflags
        .asciz "\name"
        .balign 8
        .endr

        .bss
        .balign 8
before: .skip SAVED
after:  .skip SAVED
stack:  .skip 8
way:    .skip 8
failed: .skip 4

        .text

#if DUMP

main:
        push $0x42
        LOAD
        cmp %r8, %rbp
dump_wrmsr:
        wrmsr
        SPOIL
dump_join:
        SAVE after
        mov after + RCX, %rcx
dump_rdmsr:
        rdmsr
        shl $32, %rdx
        or %rdx, %rax
        xor %ebx, %ebx
1:      lea names(,%rbx,8), %rdi
        call puts
        PRINT "="
        PRINT_HEX "after(,%rbx,8)"
        PRINT "\n"
        inc %ebx
        cmp $SAVED / 8, %ebx
        jb 1b
        PRINT "msr="
        PRINT_HEX %rax
        PRINT "\nway="
        PRINT_HEX way, 1
        PRINT "\n"
        EXIT EXIT_OK

dump_detour:
        movq $1, way
        jmp dump_join

#else

// Case NAME: the INSTRUCTION, after R8 and R9 were given values; the flags before it are CF PF AF ZF SF OF.
.macro CASE name, left, right, instruction:vararg
        incb patterns + RAX
        push $0x8d7
        LOAD
        movabs $\left, %r8
        movabs $\right, %r9
        \instruction
        SAVE before
        push $0x8d7
        LOAD
        movabs $\left, %r8
        movabs $\right, %r9
        \instruction
check_\name:
        wrmsr
        SPOIL
        SAVE after
        .pushsection .rodata
772:    .asciz "\name"
        .popsection
        mov $772b, %ebp
        call compare
.endm

// Flags from R8, on the stack that LOAD has put aside.
.macro POPF
        mov stack, %rsp
        push %r8
        popfq
.endm

main:
        movl $0, patterns + RAX
        CASE none, 0x0000000000000000, 0x0000000000000000
        CASE add, 0x7fffffffffffffff, 0x0000000000000001, add %r9, %r8
        CASE adc, 0xffffffffffffffff, 0x0000000000000000, adc %r9, %r8
        CASE sub, 0x0000000000000000, 0x0000000000000001, sub %r9, %r8
        CASE sbb, 0x8000000000000000, 0x0000000000000000, sbb %r9, %r8
        CASE neg, 0x8000000000000000, 0x0000000000000000, neg %r8
        CASE inc, 0x7fffffffffffffff, 0x0000000000000000, inc %r8
        CASE dec, 0x0000000000000001, 0x0000000000000000, dec %r8
        CASE and, 0x8000000000000000, 0x8000000000000000, and %r9, %r8
        CASE xor, 0x8000000000000000, 0x8000000000000000, xor %r9, %r8
        CASE shl, 0xc000000000000000, 0x0000000000000000, shl $1, %r8
        CASE shr, 0x8000000000000001, 0x0000000000000000, shr $1, %r8
        CASE sar, 0x8000000000000003, 0x0000000000000000, sar $2, %r8
        CASE rol, 0x8000000000000000, 0x0000000000000000, rol $1, %r8
        CASE imul, 0x4000000000000000, 0x0000000000000004, imul %r9, %r8
        CASE mul, 0x00000000ffffffff, 0x0000000000000000, mul %r8d
        CASE bt, 0x0000000000000002, 0x0000000000000001, bt %r9, %r8
        CASE stc, 0x0000000000000000, 0x0000000000000000, stc
        CASE popf, 0x0000000000247ed7, 0x0000000000000000, POPF
        cmpl $0, failed
        jne 1f
        EXIT EXIT_OK
1:      EXIT EXIT_FAILED

// Compare the two sets, and what was written with what EDX:EAX were before; RBP is the name of the case.
compare:
        mov before + RCX, %ecx
check_rdmsr:
        rdmsr
        shl $32, %rdx
        or %rax, %rdx
        xor %r12d, %r12d                // how many are bad
        xor %ebx, %ebx
1:      mov after(,%rbx,8), %rax
        mov before(,%rbx,8), %rcx
        lea names(,%rbx,8), %rdi
        call compare_one
        inc %ebx
        cmp $SAVED / 8, %ebx
        jb 1b
        mov %rdx, %rax
        mov before + RDX, %ecx
        shl $32, %rcx
        mov before + RAX, %edx
        or %rdx, %rcx
        .pushsection .rodata
773:    .asciz "msr"
        .popsection
        mov $773b, %edi
        call compare_one
        test %r12d, %r12d
        jnz 2f
        PRINT "ok "
        mov %rbp, %rdi
        call puts
        PRINT "\n"
2:      ret

// RAX against RCX, as it was; RDI is the name.
compare_one:
        cmp %rcx, %rax
        je 1f
        inc %r12d
        movl $1, failed
        PRINT "bad "
        push %rdi
        mov %rbp, %rdi
        call puts
        PRINT " "
        pop %rdi
        call puts
        PRINT "="
        PRINT_HEX %rax
        PRINT " was="
        PRINT_HEX %rcx
        PRINT "\n"
1:      ret

#endif
