"""The script language: from its text to machine code, and running that without a machine."""
