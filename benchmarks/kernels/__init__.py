"""Times the operators of `lclm_kernels`: `gpu.py` beside their peers, `cpu.py` beside PyTorch.

On a GPU, `operators.py` makes inputs and truths, `peers.py` (with `cudnn_thd.py`) knows who else
computes them, `contest.py` checks and times, `worker.py` does so for one operator and one peer in a
process of its own, and `gpu.py` starts the workers and prints and records what they answer.
"""
