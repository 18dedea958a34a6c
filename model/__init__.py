"""Train a network with dropout: data set in, checkpoint out.

Array shapes, here and in the other packages, are written with these letters:

    B  rows of a request or of a data set       T  passes of one row
    C  outputs (classes or targets)             N  row-passes: the sum of T over rows
    D  features, or the input's own axes        H  units of a layer
"""
