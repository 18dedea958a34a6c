"""Monte Carlo dropout: masks of the passes, and statistics of their outputs."""
