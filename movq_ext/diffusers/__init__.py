"""diffusers' models on the operators of this package."""
