"""Stands in for OpenRLHF 0.11.2, as that for ms-swift."""
