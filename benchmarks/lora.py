"""Claim: LoRAAdamW holds the numbers that PEFT with AdamW holds, and far fewer than AdamW; our adapters cost no more.

    python benchmarks/lora.py

An encoder of RoFormer-small's matrices (6 layers of width 384, 6 heads, feed-forward 1536) learns random targets in
float32, with every matrix adapted at the same rank. The variants: AdamW on all weights; PEFT; torchimpl.lora beside
nn.Linear, and beside kernels (in, out) that a module holds itself, where W + scale A B is formed; LoRAAdamW, which
moves the weights. All but the first start from the same factors and must give the same losses, which is checked.

Bytes are counted over the tensors that are there after a step: the optimiser's state, the factors that stand in the
model, the gradients. LoRAAdamW has its factors in the state, and dense gradients. Steps (forward, backward, optimiser)
alternate within a round; a ratio of times is the median over rounds, with the quartiles beside it. Exit status 1 where
LoRAAdamW holds over 1 % more than PEFT, or where a step with our adapters beside nn.Linear takes over 5 % longer than
PEFT's in the lower quartile too.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimpl import lora
from torchimpl.lora_optimizer import LoRAAdamW, state_bytes

LAYERS, WIDTH, HEADS, INNER = 6, 384, 6, 1536
NAMES = ("query", "key", "value", "out", "up", "down")
RULE = {"lr": 1e-3, "weight_decay": 0.01}
FULL, PEFT, LINEAR, KERNEL, OPTIMISER = (
    "AdamW, all weights", "PEFT, AdamW", "attach, nn.Linear, AdamW", "attach, kernels, AdamW", "LoRAAdamW",
)  # fmt: skip


class Kernel(nn.Module):
    """A dense layer whose kernel (in, out) is a parameter of its own, as those of torchimpl/models are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.kernel.T, self.bias)


class Layer(nn.Module):
    """Attention and a feed-forward, each added to its input and normalised."""

    def __init__(self, dense: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        for name in NAMES[:4]:
            self.add_module(name, dense(WIDTH, WIDTH))
        self.up, self.down = dense(WIDTH, INNER), dense(INNER, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.out(mixed))
        return self.norms[1](x + self.down(functional.gelu(self.up(x))))


class Variant(NamedTuple):
    """A way to train: the model, its optimiser, and the factors that stand in the model."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    factors: list[Tensor]


def variants(r: int, alpha: int) -> dict[str, Variant]:
    """All of them, with the same weights and the same first factors."""
    torch.manual_seed(0)
    full = nn.Sequential(*(Layer(nn.Linear) for _ in range(LAYERS)))
    kernels = nn.Sequential(*(Layer(Kernel) for _ in range(LAYERS)))
    state = full.state_dict()
    for name in NAMES:
        for layer in range(LAYERS):
            state[f"{layer}.{name}.kernel"] = state.pop(f"{layer}.{name}.weight").T.contiguous()
    kernels.load_state_dict(state)
    learnt = partial(torch.optim.AdamW, **RULE)
    rank = {"r": r, "alpha": alpha, "rslora": False}
    seeded = partial(torch.Generator().manual_seed, 1)

    made = {FULL: Variant(full, learnt(full.parameters()), [])}
    beside = copy.deepcopy(full)
    adapters = lora.attach(beside, NAMES, **rank, generator=seeded())
    theirs = peft.get_peft_model(
        copy.deepcopy(full), peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(NAMES), lora_dropout=0.0)
    )
    with torch.no_grad():
        for name, adapter in adapters.items():
            layer = theirs.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(adapter.A.T)
            layer.lora_B["default"].weight.copy_(adapter.B.T)
    lora.attach(kernels, [f"{name}.kernel" for name in NAMES], **rank, generator=seeded())
    for label, model in ((PEFT, theirs), (LINEAR, beside), (KERNEL, kernels)):
        factors = [p for p in model.parameters() if p.requires_grad]
        made[label] = Variant(model, learnt(factors), factors)
    moved = copy.deepcopy(full).requires_grad_(False)
    weights = [moved.get_parameter(f"{name}.weight").requires_grad_() for name in adapters]
    made[OPTIMISER] = Variant(moved, LoRAAdamW(weights, **rank, layout="out_in", **RULE, generator=seeded()), [])
    return made


def trained(variant: Variant, x: Tensor, target: Tensor) -> float:
    """One step; the loss before it. The gradients stay, so that they can be counted."""
    variant.optimizer.zero_grad()
    loss = functional.mse_loss(variant.model(x), target)
    loss.backward()
    variant.optimizer.step()
    return float(loss.detach())


def held(variant: Variant) -> tuple[int, int, int]:
    """Bytes of the optimiser's state, of the factors in the model, of the gradients."""
    gradients = sum(p.grad.nbytes for p in variant.model.parameters() if p.grad is not None)
    return state_bytes(variant.optimizer), sum(factor.nbytes for factor in variant.factors), gradients


def quartiles(slow: list[float], fast: list[float]) -> list[float]:
    return statistics.quantiles([one / other for one, other in zip(slow, fast, strict=True)], n=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    made = variants(options.rank, 2 * options.rank)
    weights = sum(p.nbytes for p in made[FULL].model.parameters())
    print(
        f"{LAYERS} layers of width {WIDTH}, {weights / 2**20:.1f} MiB of weights, r={options.rank}, float32, "
        f"b={options.batch} n={options.length}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"peft {peft.__version__}"
    )
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(options.batch, options.length, WIDTH, generator=generator) for _ in range(2))
    spent: dict[str, list[float]] = {label: [] for label in made}
    gap, first, last = 0.0, 0.0, 0.0
    # The first two rounds warm up; in the first B is still zero.
    for turn in range(options.rounds + 2):
        losses = {}
        for label, variant in made.items():
            begun = time.perf_counter()
            losses[label] = trained(variant, x, target)
            if turn > 1:
                spent[label].append(time.perf_counter() - begun)
        gap = max(gap, *(abs(losses[label] / losses[PEFT] - 1) for label in (LINEAR, KERNEL, OPTIMISER)))
        first, last = first or losses[PEFT], losses[PEFT]
    print(f"losses: PEFT {first:.4f} to {last:.4f} in {options.rounds + 2} steps; ours are off by {gap:.1e} at most")
    if gap > 1e-4:
        print("not the same training: there is nothing to compare")
        return 1

    total = {label: sum(held(variant)[:2]) for label, variant in made.items()}
    print(f"\n{'':26}{'state':>13}{'factors':>11}{'both / PEFT':>13}{'AdamW / both':>14}{'gradients':>12}  bytes")
    for label, variant in made.items():
        state, factors, gradients = held(variant)
        ratios = f"{total[label] / total[PEFT]:>13.3f}{total[FULL] / total[label]:>14.1f}"
        print(f"{label:26}{state:>13,}{factors:>11,}{ratios}{gradients:>12,}")
    print(f"\n{'':26}{'s per step':>11}{'of PEFT':>9}  quartiles")
    slower = []
    for label, times in spent.items():
        low, middle, high = quartiles(times, spent[PEFT])
        print(f"{label:26}{statistics.median(times):>11.3f}{middle:>9.2f}  {low:.2f} to {high:.2f}")
        if label == LINEAR and low > 1.05:
            slower.append(label)
    missed = [*slower, *(["bytes of LoRAAdamW"] if total[OPTIMISER] > 1.01 * total[PEFT] else [])]
    print(f"missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
