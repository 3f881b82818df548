"""Linux in the guest: its kernel image, symbols, types, processes and modules."""
