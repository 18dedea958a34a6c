"""Questions of speed, one file each; each prints a table of ratios from one run."""
