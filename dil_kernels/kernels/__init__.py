"""Triton kernels: vocabulary-sized work, no loss math."""
