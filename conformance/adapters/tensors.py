"""NumPy arrays in the storage format to torch tensors and back, bit for bit (bfloat16 through ml_dtypes)."""

from __future__ import annotations

from typing import Any

import numpy as np

from conformance.case import Function, as_tuple, storage_type


def to_tensor(array: np.ndarray) -> Any:
    """A tensor that owns its memory."""
    import torch

    array = np.array(array)
    # Only NumPy's own formats are of these kinds.
    if array.dtype.kind not in "fiub" and array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_tensors(*arrays: np.ndarray | None) -> Any:
    """Several tensors; None stays None."""
    return tuple(None if a is None else to_tensor(a) for a in arrays)


def to_array(tensor: Any) -> np.ndarray:
    """A NumPy array in the tensor's own format."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(storage_type("bfloat16"))
    return tensor.numpy()


def to_arrays(made: Any) -> Any:
    """What an operator returned, tensors turned into arrays: one, or a flat tuple of several."""
    import torch

    found = tuple(to_array(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in as_tuple(made))
    return found if isinstance(made, tuple) else found[0]


def on_arrays(function: Function, device: str = "cpu") -> Function:
    """A function on tensors, as the judge calls it: arrays in, arrays out, no gradients."""

    def call(**arguments: Any) -> Any:
        import torch

        with torch.no_grad():
            given = {k: to_tensor(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
            if device != "cpu":
                given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            return to_arrays(function(**given))

    return call
