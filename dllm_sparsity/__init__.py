"""dllm_sparsity"""
