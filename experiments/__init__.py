"""Experiments that check what the method's paper claims, each one command on a CPU; README.md says what was seen."""
