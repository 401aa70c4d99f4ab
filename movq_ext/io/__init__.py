"""Weights, code files and images: atomic writes and safe reads."""
