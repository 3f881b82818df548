"""Where MSR accesses are trapped: the machines that vmexit starts or finds."""
