"""Dropout whose masks cost little on a processor, where torch draws one number for every element in one thread.

`python benchmarks/training.py --part dropout` times both.
"""

import torch
from torch import Tensor, nn

# A draw of 64 bits decides on four elements.
_DRAWS = 2**16


class Dropout(nn.Dropout):
    """torch.nn.Dropout, in training on a processor and not compiled by draws of 16 bits.

    There the probability is the nearest multiple of 2^-16, by whose complement what is kept is divided: the mean is
    exact. The numbers come from torch's generator, in an order of their own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zeros with probability p, all else divided by 1 - p; in evaluation x itself."""
        dropped = round(self.p * _DRAWS)
        elsewhere = x.device.type != "cpu" or torch.compiler.is_compiling() or self.inplace
        if elsewhere or not self.training or dropped in (0, _DRAWS):
            return super().forward(x)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _DRAWS // 2
        return x * kept.to(x.dtype).mul_(_DRAWS / (_DRAWS - dropped))
