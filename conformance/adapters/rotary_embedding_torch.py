"""rotary-embedding-torch: its RotaryEmbedding as a user calls it.

Consecutive positions go through rotate_queries_or_keys(offset), any others through forward and apply_rotary_emb. The
module stays in float32, as it is built; queries come in the judged format.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np

from conformance.adapters import Implementation
from conformance.adapters.tensors import to_array, to_tensor
from conformance.budget import Profile
from conformance.case import Function, Unsupported


def _module(width: int, base: float, **options: Any) -> Any:
    from rotary_embedding_torch import RotaryEmbedding

    return RotaryEmbedding(width, theta=base, cache_if_possible=False, **options)


def rotate(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int | None = None) -> np.ndarray:
    """x (b, n, h, d); positions (n,) or (b, n)."""
    from rotary_embedding_torch import apply_rotary_emb

    module = _module(rotary_width or x.shape[-1], base)
    q = to_tensor(x).transpose(1, 2)
    rows = np.broadcast_to(positions, x.shape[:2])
    turned = []
    for row, values in zip(rows, q, strict=True):
        if row.size and np.array_equal(row, np.arange(row[0], row[0] + row.size)):
            turned.append(module.rotate_queries_or_keys(values[None], offset=int(row[0]))[0])
        else:
            turned.append(apply_rotary_emb(module(to_tensor(row)), values[None])[0])
    return np.stack([to_array(t.transpose(0, 1)) for t in turned]) if turned else x


def rotate_contiguous(x: np.ndarray, positions: np.ndarray, base: float, rotary_width: int, layout: str) -> np.ndarray:
    if layout != "interleaved":
        raise Unsupported("rotary-embedding-torch has the interleaved layout only")
    return rotate(x, positions, base, rotary_width) if rotary_width else x


def frequencies(width: int, base: float) -> np.ndarray:
    return to_array(_module(width, base).freqs)


def frequencies_ntk(width: int, base: float, factor: float) -> np.ndarray:
    return to_array(_module(width, base, theta_rescale_factor=factor).freqs)


def implementations() -> tuple[Implementation, ...]:
    """float32, and what happens to float64 and bfloat16 queries."""
    import rotary_embedding_torch  # noqa: F401  (an adapter that is not installed must say so when it is loaded)

    rotations: dict[str, Function] = {"rope.rotate_interleaved": rotate, "rope.rotate_contiguous": rotate_contiguous}
    version = metadata.version("rotary-embedding-torch")
    name = "rotary-embedding-torch"
    return (
        Implementation(
            name,
            {**rotations, "rope.frequencies": frequencies, "rope.frequencies_ntk": frequencies_ntk},
            Profile("float32"),
            version,
        ),
        Implementation(f"{name}, float64 queries", rotations, Profile("float64", "strict", "A64"), version),
        Implementation(f"{name}, bfloat16 queries", rotations, Profile("bfloat16", "eager"), version),
    )
