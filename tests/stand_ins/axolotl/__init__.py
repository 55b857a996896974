"""Stands in for axolotl 0.21.0, as that for ms-swift."""
