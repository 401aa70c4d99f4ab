"""Operators and their backends: native PyTorch, CUDA kernels and oneDNN."""
