"""Train a network with dropout: data set in, checkpoint out."""
