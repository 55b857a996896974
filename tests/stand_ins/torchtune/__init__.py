"""Stands in for torchtune 0.6.1, as that for ms-swift."""
