/* MSRs of a vCPU that stands still, read and written for the debugger. */
#if defined(__x86_64__)
#include "kvm.h"
#include "msr_register.h"

bool access_peek_msr(struct cpu *cpu, uint32_t msr, uint64_t *value)
{
    int number = msr_register(msr);
    bool found = false;
    if (number >= 0) {
        uint64_t registers[KVM_REGISTERS];
        found = state_get(cpu, UINT64_C(1) << number, registers);
        if (found)
            *value = registers[number];
        return found;
    }
    pthread_mutex_lock(&kvm_lock);
    for (unsigned i = 0; i < cpu->write_count && !found; i++)
        if ((found = cpu->writes[i].msr == msr))
            *value = cpu->writes[i].value;
    pthread_mutex_unlock(&kvm_lock);
    return found || (!msrs_own_denies(msr, false) && state_get_msr(cpu, msr, value));
}

/* Under the lock. */
static bool keep(struct cpu *cpu, uint32_t msr, uint64_t value)
{
    unsigned i = 0;
    while (i < cpu->write_count && cpu->writes[i].msr != msr)
        i++;
    if (i == KVM_MOST_WRITES)
        return false;
    cpu->writes[i].msr = msr;
    cpu->writes[i].value = value;
    cpu->write_count += i == cpu->write_count;
    __atomic_store_n(&cpu->changed, cpu->changed | CHANGED_MSRS, __ATOMIC_RELAXED);
    return true;
}

int access_write_msr(struct cpu *cpu, uint32_t msr, uint64_t value)
{
    uint64_t before;
    int number = msr_register(msr);
    if (msrs_own_denies(msr, true))
        return VMEXIT_NO_MSR;
    if (msrs_refuse_guest(cpu, msr, value))
        return VMEXIT_NO_VALUE;
    if (!state_set_msr(cpu, msr, value))
        return state_get_msr(cpu, msr, &before) ? VMEXIT_NO_VALUE : VMEXIT_NO_MSR;
    if (number >= 0) {
        state_change(cpu, (unsigned)number, value);
        return VMEXIT_OK;
    }
    /* What the processor makes of it, where that is something else. */
    if (state_get_msr(cpu, msr, &before))
        value = before;
    pthread_mutex_lock(&kvm_lock);
    bool kept = keep(cpu, msr, value);
    pthread_mutex_unlock(&kvm_lock);
    return kept ? VMEXIT_OK : VMEXIT_UNAVAILABLE;
}

void access_apply(struct cpu *cpu)
{
    pthread_mutex_lock(&kvm_lock);
    for (unsigned i = 0; i < cpu->write_count; i++)
        state_set_msr(cpu, cpu->writes[i].msr, cpu->writes[i].value);
    cpu->write_count = 0;
    pthread_mutex_unlock(&kvm_lock);
}
#endif
