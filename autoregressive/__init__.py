"""The autoregressive backend of dllm_sparsity: any causal language model of transformers, as lm-eval asks for it."""
