"""A Windows in the guest: where its kernel lies, its symbols, processes, threads and modules, from its memory and a PDB."""
