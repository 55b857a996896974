"""Stands in for flash-attn, which OpenRLHF imports and calls for packed samples only."""
