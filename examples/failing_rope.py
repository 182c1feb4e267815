"""A law that fails, and the counter-example that Hypothesis shrinks it to: pytest examples/failing_rope.py

The bug: base^(-i/width) instead of base^(-2i/width). Norms are kept and scores depend on distances only, so that only
a law that looks at the frequencies sees it.
"""

import numpy as np
from hypothesis import given

from conformance import laws, strategies


def rotate(x, positions, base):
    angle = positions[..., None, None] * base ** (-np.arange(x.shape[-1] // 2) / x.shape[-1])
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = [even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)]
    return np.stack(turned, axis=-1).reshape(x.shape)


@given(strategies.rope())
def test_impulse_response(case):
    laws.rope.impulse_response(rotate, case)
