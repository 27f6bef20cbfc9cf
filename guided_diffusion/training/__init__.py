"""Training: options, data, losses, what a run starts from, the loop, and the files that it leaves."""
