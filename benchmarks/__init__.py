"""`python -m benchmarks`: the loss layers of the field side by side, on one machine, in one process.

shapes      the problems: N rows, C classes, D features, by name
data        the operands: what the logits look like, with fixed seeds
trained     the states of a language model that was really trained
candidate   what a candidate is, and what it may ask of a problem
candidates  who takes part: floors, peers, ours
timing      interleaved rounds, medians
memory      peak memory of one candidate, in a process of its own
reference   what the answer should have been, in float64
measure     one case (shape, dtype, data) from operands to figures
machine     the hardware and the versions
report      the tables, the JSON file and the plot of time against memory
scaling     `--scaling`: time and memory against N and against C
gpu         `python -m benchmarks.gpu`: everything a GPU can tell, in stages; limits, rates and kernel_times are its parts
compare     `python -m benchmarks compare`: two result files side by side
"""
