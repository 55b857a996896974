"""The frame of the benchmarks: cases, providers, correctness, timing, the machine's own ceilings, reports."""
