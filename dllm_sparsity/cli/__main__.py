"""python -m dllm_sparsity.cli: the same as the command dllm-sparsity."""

from dllm_sparsity.cli.main import main

main()
