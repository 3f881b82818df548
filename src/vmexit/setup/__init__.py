"""Prepares a machine: a kernel and an initramfs to boot, and a report on what is missing."""
