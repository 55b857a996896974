"""What `dil_kernels.data` and `dil_kernels.tokenization` are made of."""
