// Writes that are refused with #GP, by value and by privilege, among others that are not.
//
// Defines: COUNT rounds (default 3), FAULT_MSR and FAULT_VALUE, a write that the processor refuses (default
// PKRS with upper bits set: TCG refuses it, and KVM, which does not know that MSR). On #GP the guest goes
// on behind the instruction.
//
// Trap log, for i = 1 ... COUNT:
//     bad_wrmsr    FAULT_MSR = FAULT_VALUE        #GP: it has no post stage
//     good_wrmsr   STAR = i:i                     (upper half : lower half)
// then
//     good_rdmsr   STAR = COUNT:COUNT
// then at privilege level 3, for j = 1 ... COUNT, ring3_wrmsr (STAR = ffffffff:j) and ring3_rdmsr (STAR).
// Both are #GP by privilege, which a processor checks before it looks whether the instruction is to be
// intercepted: a hypervisor never sees them, and a debugger that behaves as one reports none. Then
//     last_rdmsr   STAR = COUNT:COUNT
//
// Prints `faults=<16 digits> good=<16 digits>` (COUNT; the value read by good_rdmsr) and `ring3=<16 digits>
// good=<16 digits>` (2 * COUNT; the value read by last_rdmsr). Status 33 if all of these are as said here,
// else 35.
#ifndef COUNT
#define COUNT 3
#endif
#ifndef FAULT_MSR
#define FAULT_MSR 0x6e1
#endif
#ifndef FAULT_VALUE
#define FAULT_VALUE 0x123456789abcdef0
#endif
#include "boot.inc"

// Print what gp_count and then RDMSR (in EDX:EAX) give; EBP is 1 from now on if they are not FAULTS and
// COUNT:COUNT.
.macro REPORT name, faults
        shl $32, %rdx
        or %rdx, %rax
        PRINT "\name\()="
        PRINT_HEX gp_count
        PRINT " good="
        PRINT_HEX %rax
        PRINT "\n"
        mov $COUNT, %edx
        shl $32, %rdx
        add $COUNT, %rdx
        cmp %rdx, %rax
        jne 1f
        cmpq $\faults, gp_count
        je 2f
1:      mov $1, %ebp
2:      movq $0, gp_count
.endm

main:
        xor %ebp, %ebp
        movq $2, gp_skip
        mov $1, %ebx
1:      mov $FAULT_MSR, %ecx
        mov $FAULT_VALUE & 0xffffffff, %eax
        mov $(FAULT_VALUE >> 32) & 0xffffffff, %edx
bad_wrmsr:
        wrmsr
        mov $MSR_STAR, %ecx
        mov %ebx, %eax
        mov %ebx, %edx
good_wrmsr:
        wrmsr
        inc %ebx
        cmp $COUNT, %ebx
        jbe 1b
good_rdmsr:
        rdmsr
        REPORT faults, COUNT

        mov %rsp, tss + 4               // the stack for whatever interrupts privilege level 3
        mov $tss, %eax
        mov %ax, gdt + TSS + 2
        shr $16, %eax
        mov %al, gdt + TSS + 4
        mov %ah, gdt + TSS + 7
        mov $TSS, %eax
        ltr %ax
        mov $6, %edi                    // UD2 is the way back
        mov $back, %esi
        mov $GATE, %edx
        call set_gate
        push $USER_DATA
        push $0                         // a stack that is not used
        push $2
        push $USER_CODE
        push $ring3
        iretq

ring3:
        mov $MSR_STAR, %ecx
        mov $-1, %edx
        mov $1, %ebx
1:      mov %ebx, %eax
ring3_wrmsr:
        wrmsr
ring3_rdmsr:
        rdmsr
        inc %ebx
        cmp $COUNT, %ebx
        jbe 1b
        ud2

back:
        mov $MSR_STAR, %ecx
last_rdmsr:
        rdmsr
        REPORT ring3, 2*COUNT
        test %ebp, %ebp
        jnz 1f
        EXIT EXIT_OK
1:      EXIT EXIT_FAILED

        .bss
        .balign 16
tss:    .skip 0x68
