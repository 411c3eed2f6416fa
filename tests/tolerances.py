"""The tolerances of the tests, one per use, each with its reason. Never loosened without a note.

An error bound of a kernel is `TORCH_ERROR_FACTOR` times the error of PyTorch in the same dtype
against fp64, plus a floor for results where PyTorch happens to be exact.
"""

# Kernels: another order of the same additions may double the rounding error, not more.
TORCH_ERROR_FACTOR = 2.0

# Kernels: floors, about one rounding of a value of size 1 to 4 in that dtype.
FLOOR_FP64 = 1e-14
FLOOR_FP32 = 1e-6
FLOOR_FP16 = 2e-3
FLOOR_BF16 = 1.6e-2

# Attention: the same fp32 numbers by another cut of keys or rows. Measured at most 1.5e-6 on
# standard normal inputs; sums of up to 1,000 terms of size about 1.
ATTENTION_SPLIT_FP32 = 1e-5

# Attention: log-sum-exp in fp32 against fp64; values up to 10, one fp32 rounding there is 1e-6.
ATTENTION_LSE_FP32 = 5e-6

# RoPE: the table is fp64 rounded once to fp32 (3e-8), times values up to 4.
ROPE_FP32 = 1e-6

# Linear cross entropy: losses in nats, summed over 50 tokens of about 4 each, in fp32.
CROSS_ENTROPY_FP32 = 1e-4

# Linear cross entropy: gradients per token are at most 1 in size, summed over 50 tokens.
CROSS_ENTROPY_GRAD_FP32 = 5e-6

# Logits of a three-layer fp32 Llama, two implementations that add in different orders. Logits are
# about 10 in size there, so this is 1e-5 of them; a wrong row or pairing changes them by over 1.
MINI_LLAMA_LOGITS = {"rtol": 0.0, "atol": 1e-4}

# Loss and gradient norm of another layout, relative, over four AdamW steps in fp32. Sums are taken
# in another order (about 1e-7), and AdamW's first steps divide by the size of the gradient, which
# lifts rounding noise of nearly-zero gradients into the weights.
LAYOUT_REL = 1e-5

# Loss and gradients (norm of the difference) of packed documents against the same documents alone,
# relative, fp32: the same terms in another order.
PACKED_REL = 5e-6

# Loss and gradient norm after resuming on another layout, relative: as LAYOUT_REL.
RESUME_REL = 1e-5

# Logits of the trainer against transformers' on the exported folder, absolute, fp32, random
# initial weights: logits are below 10 in size.
HF_LOGITS_ABS = 1e-4

# Attention over context ranks against one process, norm of the difference over norm, fp32: the
# same terms in another order. Measured at most 3e-7.
CONTEXT_PARITY_FP32 = 2e-6

# AdamW, 20 steps of size 1e-2 in fp32 against fp64, weights of size 1 to 4: each step rounds the
# weight once and the moments a few times.
ADAMW_FP32 = 3e-6

# AdamW with bf16 moments against fp32 moments, five steps of size 1e-2: moments below 2 in size
# lose up to 2^-9 of it per step, and the weight five times 1e-2 times as much.
ADAMW_BF16_STATE = 1e-2

# Loss and gradient norm with the rows of a step dealt out by cost or in order, relative, fp32: the
# same sums in another order.
DEALT_REL = 1e-6

# Truths of the kernel benchmark, computed in fp32 by blocks, against dense fp64 attention, norm of
# the difference over norm. Measured at most 5e-7.
BENCHMARK_TRUTH_FP32 = 3e-6
