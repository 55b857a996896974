"""Stands in for NeMo-RL 0.7.0, as that for ms-swift."""
