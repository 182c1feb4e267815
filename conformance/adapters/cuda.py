"""The project's own PyTorch operators on a CUDA device, eager and compiled, and PyTorch's fused attention there.

Matrix products keep float32: TF32 and sums in 16 bits are off, as they are no profile that a case declares.
"""

from __future__ import annotations

from functools import partial

from conformance.adapters import AdapterError, Implementation
from conformance.adapters.pytorch import attend
from conformance.adapters.tensors import on_arrays
from conformance.adapters.torchimpl import rows
from conformance.budget import DTYPES, Profile

# Backends of scaled_dot_product_attention, and the formats that each has a kernel for.
BACKENDS = {
    "MATH": DTYPES,
    "EFFICIENT_ATTENTION": ("float32", "bfloat16", "float16"),
    "FLASH_ATTENTION": ("bfloat16", "float16"),
    "CUDNN_ATTENTION": ("bfloat16", "float16"),
}


def implementations() -> tuple[Implementation, ...]:
    """Eager in four formats, compiled in three, and every backend of fused attention under the arithmetic it has."""
    import torch

    if not torch.cuda.is_available():
        raise AdapterError("adapter cuda: PyTorch sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    own = rows(captured=("float32", "bfloat16", "float16"), backend="inductor", device="cuda")
    fused = []
    for backend, formats in BACKENDS.items():
        for dtype in formats:
            profile = "fused" if Profile(dtype).sixteen_bit and backend != "MATH" else "strict"
            functions = {"attention.attend": on_arrays(partial(attend, backend=backend), "cuda")}
            name = backend.lower().replace("_", " ")
            fused.append(
                Implementation(
                    f"torch {name}", functions, Profile(dtype, profile, "A64"), torch.__version__, variant=name
                )
            )
    return (*own, *fused)
