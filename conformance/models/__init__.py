"""One file per model, as in refimpl/models: CASES, the reference with its bounds, and known wrong models."""
