"""Property-based checks in your own test file: pytest examples/test_my_rope.py

A strategy draws cases (shapes, positions, bases) in one storage format; a law is a plain function over your
implementation. What fails is shrunk by Hypothesis to the smallest case that still fails.
"""

from hypothesis import given, settings
from my_rope import rotate

from conformance import laws, strategies


@given(strategies.rope())
def test_composition(case):
    laws.rope.composition(rotate, case)


@given(strategies.rope(dtype="bfloat16"))
@settings(max_examples=50)
def test_relative_position_in_bfloat16(case):
    laws.rope.relative_position(rotate, case)
