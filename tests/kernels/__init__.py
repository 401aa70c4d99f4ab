"""One way to call the kernels on two backends: the emulator, which is there on every Linux, and a GPU where there is one."""
