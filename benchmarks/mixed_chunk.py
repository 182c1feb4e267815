"""Claim: the mixed chunk unit is at least 1.2 times as fast as FLASH-pytorch's layer of equal size and parameters.

    python benchmarks/mixed_chunk.py

Both compute the same function from the same numbers: layer norm, [gate | value | shared] projection, relative bias,
squared ReLU inside chunks, linear attention between them, gate, projection, residual; the largest difference of the
outputs is printed. Theirs, ours and ours compiled take turns; a ratio is the median over rounds of the ratio of one
round, so that what else the machine does falls on both. Peak memory is what a fresh process adds to its inputs.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from flash_pytorch import FLASH
from torch import Tensor

from torchimpl.ops import attention_kernel, norm, rope
from torchimpl.ops import mixed_chunk_attention as mca

SQUARED_RELU = partial(attention_kernel.squared_relu_constant, length=1)


def ours(flash: FLASH, causal: bool, chunk: int):
    """The layer of `flash`, its parameters included, through torchimpl."""
    hidden, shared, out = flash.to_hidden[0], flash.to_qk[0], flash.to_out
    e = out.in_features
    # FLASH-pytorch projects [value | gate] and the shared features apart.
    cut = [hidden.weight[e:], hidden.weight[:e], shared.weight]
    w_in = torch.cat(cut).detach().T.contiguous().requires_grad_()
    b_in = torch.cat([hidden.bias[e:], hidden.bias[:e], shared.bias]).detach().requires_grad_()
    heads = flash.qk_offset_scale
    mix, normaliser = (mca.causal, mca.lucidrains_causal) if causal else (mca.bidirectional, mca.lucidrains)
    options = {"mix": mix, "normaliser": normaliser, "rows": mca.ROWS_LUCIDRAINS, "chunk": chunk, "scale": 1 / chunk}

    def layer(x: Tensor) -> Tensor:
        bias = flash.rel_pos_bias(x.new_empty(chunk, chunk))
        normed = norm.layer_norm(x, flash.norm.weight, flash.norm.bias, epsilon=flash.norm.eps)
        weights = (w_in, b_in, heads.gamma, heads.beta, out.weight.T, out.bias)
        return x + mca.unit(
            normed, None, None, bias, None, None, *weights,
            rotate=rope.rotate_interleaved, kernel=SQUARED_RELU, **options,
        )  # fmt: skip

    return layer


def built(options: argparse.Namespace, causal: bool):
    torch.manual_seed(0)
    expansion = options.e / options.d
    sizes = {"dim": options.d, "group_size": options.chunk, "query_key_dim": options.s, "expansion_factor": expansion}
    flash = FLASH(**sizes, causal=causal)
    # As drawn for training the heads are so small that hardly anything attends.
    torch.nn.init.normal_(flash.qk_offset_scale.gamma)
    return flash, ours(flash, causal, options.chunk), torch.randn(1, options.n, options.d)


def once(layer, x: Tensor, backward: bool) -> float:
    begin = time.perf_counter()
    if backward:
        layer(x.requires_grad_()).sum().backward()
    else:
        with torch.no_grad():
            layer(x)
    return time.perf_counter() - begin


def peak(options: argparse.Namespace) -> None:
    """In a fresh process: by how much one call raises the peak of resident memory, in MiB."""
    which, causal, backward = options.peak.split(",")
    flash, layer, x = built(options, causal == "causal")
    before = high_water()
    once(flash if which == "theirs" else layer, x, backward == "backward")
    print((high_water() - before) // 1024)


def high_water() -> int:
    """Peak of resident memory in KiB. ru_maxrss would begin with that of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("n", 8192), ("d", 512), ("e", 1024), ("s", 128), ("chunk", 256), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peak(options)

    sizes = [f"{name}={getattr(options, name)}" for name in ("n", "d", "e", "s", "chunk")]
    print(f"{' '.join(sizes)}, float32, {options.rounds} rounds")
    for mode in ("bidirectional", "causal"):
        flash, layer, x = built(options, mode == "causal")
        layers = {"FLASH-pytorch": flash, "ours": layer}
        if not options.no_compile:
            layers["ours compiled"] = torch.compile(layer, fullgraph=True)
        with torch.no_grad():
            print(f"{mode}: largest difference {float((flash(x) - layer(x)).abs().max()):.1e}")
        for direction in ("forward", "backward"):
            times = {name: [] for name in layers}
            for turn in range(options.rounds + 1):
                for name, f in layers.items():
                    spent = once(f, x.detach().clone(), direction == "backward")
                    # The first turn warms up, and compiles.
                    if turn:
                        times[name].append(spent)

            def ratio(one: str, other: str, times: dict = times) -> float:
                return float(torch.tensor([a / b for a, b in zip(times[one], times[other], strict=True)]).median())

            label = "forward" if direction == "forward" else "forward + backward"
            text = f"  {label}: FLASH-pytorch / ours {ratio('FLASH-pytorch', 'ours'):.2f}"
            if not options.no_compile:
                text += f"; eager / compiled {ratio('ours', 'ours compiled'):.2f}"
            text += f" (ours {1e3 * sorted(times['ours'])[len(times['ours']) // 2]:.0f} ms)"
            memory = []
            for which in ("theirs", "ours"):
                call = [
                    sys.executable,
                    __file__,
                    *(f"--{size}" for size in sizes),
                    f"--peak={which},{mode},{direction}",
                ]
                memory.append(int(subprocess.run(call, capture_output=True, text=True, check=True).stdout))
            print(f"{text}; peak memory {memory[0]} MiB theirs, {memory[1]} MiB ours", flush=True)


if __name__ == "__main__":
    main()
