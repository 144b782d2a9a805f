"""The bench: what sparsification costs, timed beside the dense model and beside the code released with the paper."""
