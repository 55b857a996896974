"""Stands in for ms-swift 4.6.0: the functions that the adapter replaces or calls, by their signatures."""
