"""Other ways to run a decoder: several GPUs, CUDA graphs, compiled files."""
