"""The project's own PyTorch operators as torch.compile's default backend compiles them; takes many minutes."""

from __future__ import annotations

from conformance.adapters import Implementation
from conformance.adapters.torchimpl import rows


def implementations() -> tuple[Implementation, ...]:
    """Generated code for one format of each kind."""
    return rows(eager=(), captured=("float32", "bfloat16"), backend="inductor")
