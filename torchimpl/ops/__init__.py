"""One file per operator family, as in refimpl/ops."""
