"""The masked-diffusion backend: a denoising loop, a likelihood bound, and a clock for loops written elsewhere."""
