"""The figures of how_the_kernels_work.md, one module per subject."""
