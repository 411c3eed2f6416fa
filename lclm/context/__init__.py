"""Context parallelism: several ranks share one row, and its keys travel to who sees them.

A row of 16 tokens in documents of 2, 10 and 4, on two ranks, planned in chunks of 2:

    token        0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
    document     a  a  b  b  b  b  b  b  b  b  b  b  c  c  c  c
    held by      1  1  0  0  1  1  1  1  0  0  1  1  0  0  0  0

A token sees its own document up to itself. The short documents a and c stay whole on a rank, so
none of their keys travel. Document b is split, and for it alone

    rank 0 receives the keys of tokens 4-7       (its tokens 8-9 see them)
    rank 1 receives the keys of tokens 2-3, 8-9  (its tokens 4-7 see 2-3; 10-11 see 2-3 and 8-9)

Each rank holds 8 tokens, sorted by position, so the keys that a query sees are one interval of any
rank's keys. Gradients of keys go home the same way. `lclm.context.plan` decides who holds what and
predicts what it costs (NumPy and C++, no torch); the modules here move the keys and attend.
"""
