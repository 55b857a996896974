"""The name that OpenRLHF imports."""

all_gather = None
