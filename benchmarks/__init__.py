"""Measurements of what a trap costs, beside other tools and an untouched QEMU: `python -m benchmarks`."""
