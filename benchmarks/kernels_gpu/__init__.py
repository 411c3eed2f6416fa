"""Times every operator on an NVIDIA GPU beside its peers; `benchmarks/kernels.py` runs it.

`contest.py` checks and times, `problems.py` and `attention_problem.py` make inputs and truths,
`*_peers.py` know the peers, `worker.py` runs one operator's contests in a process of its own,
`supervisor.py` starts workers and outlives their crashes, `report.py` prints and records.
"""
