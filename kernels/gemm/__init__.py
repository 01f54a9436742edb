"""Products of matrices with what becomes of their elements, for Hopper: one Gluon kernel with a generated epilogue."""
