"""Training: `python -m lclm.train run.toml key=value ...`."""
