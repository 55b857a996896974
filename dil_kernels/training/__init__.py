"""What `dil_kernels.trainer` is made of."""
