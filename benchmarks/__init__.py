"""`python -m benchmarks`: the loss layers of the field side by side, on one machine, in one process.

shapes      the problems: N rows, C classes, D features, by name
data        the operands: what the logits look like, with fixed seeds
candidates  who computes the loss, and who cannot here and why
timing      interleaved rounds, medians
memory      peak memory of one candidate, in a process of its own
reference   what the answer should have been, in float64
measure     one case (shape, dtype, data) from operands to figures
machine     the hardware and the versions
report      the tables, the JSON file and the plot
"""
