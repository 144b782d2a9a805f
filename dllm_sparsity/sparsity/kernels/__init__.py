"""Kernels of the core: naive.py is the definition, fast paths stand beside it and are tested against it."""
