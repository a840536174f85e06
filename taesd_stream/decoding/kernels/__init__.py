"""Our own kernels for the tiny decoder's 64-channel layers, on Hopper GPUs."""
