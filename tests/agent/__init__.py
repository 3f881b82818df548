"""Tests of the C agent, in a small program that plays QEMU for it."""
