/* What the way to the current thread needs of a virtual machine of KVM's: where GS leads to, and guest memory where its VMM keeps it. */
#if defined(__x86_64__)
#include "kvm.h"
#include "qemu.h"

enum { IA32_KERNEL_GS_BASE = 0xc0000102, EFER_LMA = 1 << 10 };

int task_set_events(const struct vmexit_event *events, size_t count)
{
    bool ask = false;
    for (size_t i = 0; i < count; i++)
        ask |= events[i].process != VMEXIT_ALL_PROCESSES || (events[i].flags & VMEXIT_WITH_PROCESS);
    __atomic_store_n(&vm.syncs_sregs, ask, __ATOMIC_RELAXED);
    return msrs_want(events, count);
}

/* KVM leaves them in struct kvm_run while events ask for processes. */
bool task_get_registers(unsigned vcpu, struct task_registers *registers)
{
    const struct cpu *cpu = vm.cpus[vcpu];
    struct kvm_sregs asked;
    const struct kvm_sregs *sregs = &asked;
    if (vm.has_sync_sregs && (cpu->run->kvm_valid_regs & KVM_SYNC_X86_SREGS))
        sregs = &cpu->run->s.regs.sregs;
    else if (kvm_plain(cpu->fd, KVM_GET_SREGS, &asked) != 0)
        return false;
    *registers = (struct task_registers){.is_long = sregs->efer & EFER_LMA, .gs_base = sregs->gs.base};
    return true;
}

bool task_get_kernel_gs_base(unsigned vcpu, uint64_t *base) { return state_get_msr(vm.cpus[vcpu], IA32_KERNEL_GS_BASE, base); }

bool task_read_physical(uint64_t physical, void *bytes, uint32_t length)
{
    return state_access_memory(false, physical, bytes, length);
}
#endif
