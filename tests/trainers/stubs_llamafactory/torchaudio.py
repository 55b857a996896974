"""Stands in for a package that LLaMA-Factory imports, and needs for sound only."""
