"""Context parallelism: which rank holds which tokens of a row, and what must travel."""
