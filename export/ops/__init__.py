"""One file per operator family, as in refimpl/ops: the same names and arguments, on the values of a graph."""
