"""NumPy arrays in the storage format to torch tensors and back, bit for bit (NumPy knows bfloat16 by ml_dtypes only)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from conformance.case import storage_type

if TYPE_CHECKING:
    import torch


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor that owns its memory."""
    import torch

    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_tensors(*arrays: np.ndarray | None) -> Any:
    """Several tensors; None stays None."""
    return tuple(None if a is None else to_tensor(a) for a in arrays)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy array in the tensor's own format."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(storage_type("bfloat16"))
    return tensor.numpy()
