// Writes to many MSRs, in every encoding that a WRMSR has, each read back.
//
// No defines. The lines below, in order. A name is the label of the WRMSR, NAME_end the instruction after
// it, which is an RDMSR of the same MSR. The values are ones that every processor keeps (canonical
// addresses, valid memory types).
//
//     name        MSR       value               instruction bytes
//     star        c0000081  1122334455667788    0f 30
//     lstar       c0000082  ffff923344556677    0f 30
//     cstar       c0000083  ffffa23344556677    0f 30
//     fmask       c0000084  0000000000047700    0f 30
//     sysenter_cs 00000174  0000000000008877    0f 30
//     sysenter_sp 00000175  ffff813344556677    0f 30
//     sysenter_ip 00000176  00007f3344556677    0f 30
//     fs_base     c0000100  00007e3344556677    0f 30
//     gs_base     c0000101  ffff833344556677    0f 30
//     kernel_gs   c0000102  ffff843344556677    0f 30                 left out when no MSR is named
//     pat         00000277  0100070405060706    0f 30
//     rex_w       c0000081  0000000100000001    48 0f 30
//     rex         c0000081  0000000200000002    40 0f 30
//     ds          c0000081  0000000300000003    3e 0f 30
//     data16      c0000081  0000000400000004    66 0f 30
//     addr32      c0000081  0000000500000005    67 0f 30
//     fs          c0000081  0000000600000006    64 0f 30
//     data16_rex  c0000081  0000000700000007    66 48 0f 30
//     longest     c0000081  0000000800000008    13 times 3e, 0f 30   the longest there can be
//     two_pages   c0000081  0000000900000009    0f 30                 0f ends a page, 30 begins the next
//     garbage     c0000081  a1b2c3d4e5f60718    0f 30                 RCX, RAX, RDX have more above 32 bits
// and then, each alone, without an RDMSR, with value 0, the other MSRs that are left out when none is named
// (a processor may refuse them with #GP, on which the guest goes on; TCG takes them):
//     spec_ctrl   00000048
//     pred_cmd    00000049
//     mperf       000000e7
//     aperf       000000e8
//
// Before rex_w the guest executes `0f 30` twice where it is not a WRMSR: inside of constants.
//
// Prints `msr=<8 digits> value=<16 digits>` for each RDMSR. Status 33 always.
#include "boot.inc"

// Write VALUE to MSR by the instruction with these BYTES, read it back and print it.
.macro WRITE name, msr, value, bytes:vararg
        mov $\msr, %ecx
        mov $(\value) & 0xffffffff, %eax
        mov $((\value) >> 32) & 0xffffffff, %edx
        INSTRUCTION \name, \bytes
.endm

.macro INSTRUCTION name, bytes:vararg
\name:  .byte \bytes
\name\()_end:
        rdmsr
        call report
.endm

main:
        WRITE star,        MSR_STAR,   0x1122334455667788, 0x0f, 0x30
        WRITE lstar,       MSR_LSTAR,  0xffff923344556677, 0x0f, 0x30
        WRITE cstar,       0xc0000083, 0xffffa23344556677, 0x0f, 0x30
        WRITE fmask,       0xc0000084, 0x0000000000047700, 0x0f, 0x30
        WRITE sysenter_cs, 0x174,      0x0000000000008877, 0x0f, 0x30
        WRITE sysenter_sp, 0x175,      0xffff813344556677, 0x0f, 0x30
        WRITE sysenter_ip, 0x176,      0x00007f3344556677, 0x0f, 0x30
        WRITE fs_base,     0xc0000100, 0x00007e3344556677, 0x0f, 0x30
        WRITE gs_base,     0xc0000101, 0xffff833344556677, 0x0f, 0x30
        WRITE kernel_gs,   0xc0000102, 0xffff843344556677, 0x0f, 0x30
        WRITE pat,         0x277,      0x0100070405060706, 0x0f, 0x30

        mov $0x300f300f, %eax
        movabs $0x0f300f300f300f30, %rax

        WRITE rex_w,       MSR_STAR,   0x0000000100000001, 0x48, 0x0f, 0x30
        WRITE rex,         MSR_STAR,   0x0000000200000002, 0x40, 0x0f, 0x30
        WRITE ds,          MSR_STAR,   0x0000000300000003, 0x3e, 0x0f, 0x30
        WRITE data16,      MSR_STAR,   0x0000000400000004, 0x66, 0x0f, 0x30
        WRITE addr32,      MSR_STAR,   0x0000000500000005, 0x67, 0x0f, 0x30
        WRITE fs,          MSR_STAR,   0x0000000600000006, 0x64, 0x0f, 0x30
        WRITE data16_rex,  MSR_STAR,   0x0000000700000007, 0x66, 0x48, 0x0f, 0x30
        WRITE longest,     MSR_STAR,   0x0000000800000008, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, \
                                                           0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x0f, 0x30
        mov $MSR_STAR, %ecx
        mov $9, %eax
        mov $9, %edx
        jmp two_pages
        .balign 4096
        .skip 4095
        INSTRUCTION two_pages, 0x0f, 0x30

        movabs $0xdeadbeef00000000 + MSR_STAR, %rcx
        movabs $0x12345678e5f60718, %rax
        movabs $0x9abcdef0a1b2c3d4, %rdx
        INSTRUCTION garbage, 0x0f, 0x30

        movq $2, gp_skip
        xor %eax, %eax
        xor %edx, %edx
        mov $0x48, %ecx
spec_ctrl:
        wrmsr
        mov $0x49, %ecx
pred_cmd:
        wrmsr
        mov $0xe7, %ecx
mperf:  wrmsr
        mov $0xe8, %ecx
aperf:  wrmsr
        EXIT EXIT_OK

report:
        shl $32, %rdx
        or %rdx, %rax
        PRINT "msr="
        PRINT_HEX %rcx, 8
        PRINT " value="
        PRINT_HEX %rax
        PRINT "\n"
        ret
