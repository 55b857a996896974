"""The benchmarks, one file a family; harness says how to add one."""
