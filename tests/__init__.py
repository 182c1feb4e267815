"""The tests: one folder per package, the same path as the file under test."""
