"""Train a network with dropout on a data set, evaluate it, and save it as a checkpoint."""
