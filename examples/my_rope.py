# refimpl check python:examples/my_rope.py
import numpy as np


def rotate(x, positions, base):
    angle = positions[..., None, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    even, odd = x[..., 0::2].astype(np.float64), x[..., 1::2].astype(np.float64)
    turned = [even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)]
    return np.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


IMPLEMENTS = {"rope.rotate_interleaved": rotate}
PROFILE = {"float64": "strict", "float32": "strict A64", "bfloat16": "strict A64"}
