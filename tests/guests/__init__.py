"""Small bare-metal guests for tests and benchmarks, and their builder."""
