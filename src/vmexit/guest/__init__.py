"""What the guest is doing: its registers and its code."""
