"""Stands in for LLaMA-Factory 0.9.5, as that for ms-swift."""
