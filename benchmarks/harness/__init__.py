"""The frame that all benchmarks share; what differs between them is a `Family` in benchmarks/families/.

A run takes every case of a family in turn: it makes the inputs, checks each provider against fp64 on them, times those
that are right in interleaved rounds beside the machine's own ceilings, and writes NAME.csv and its pictures.

To add a benchmark, write one file families/NAME.py, as families/loss.py is, and a command bench_NAME.py of two lines:

1. A `Case`: a frozen dataclass with `name` (for --cases), `title` (for people), `columns` (into the CSV; the x axes of
   curves are among them), `dtype`, and `rotated_bytes` (what one call reads, so that calls rotate past the last cache).
2. `make_inputs(case, device)`, and `fresh(inputs)`: equal inputs in other memory.
3. One or more `Pass`es: what one timed call runs, and the bytes and FLOPs that no implementation can avoid. The floor
   of a pass is the longer of its bytes at the measured copy rate and its FLOPs at the measured GEMM rate of `dtype`.
4. `make_truth(inputs)` in fp64 and `measure_errors(fn, inputs, truth)` -> {name: relative error}; every pass names one
   of these as its own. A provider may err `check.MULTIPLE` times as much as the family's `yardstick` (eager PyTorch in
   the same dtype), or as one rounding; what no number can say (a gradient where there is none) is raised as
   `WrongResultError`.
5. `Provider`s in a dictionary by name, ours first; each with a `build()` that returns the function to time, called by
   its public, importable name, and a `problem(device)`, why it cannot run here ("not installed" is shown, not hidden).
6. A `Family` of all these, with a grid of cases for "cpu", "cuda" and "quick" (seconds, for the tests).

Files: family (the types above), check, machine, ceilings, timing, trace (peak memory, launches), runner (one case),
records (the CSV, and what of an earlier run may stay), report (what is printed), plot (the pictures), peers (how a
package is described that may not be installed), command (the arguments, the loop over the cases).
"""
