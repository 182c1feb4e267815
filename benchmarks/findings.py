"""Claim: every figure of docs/findings.md, computed from the installed packages or from the golden arrays.

    python benchmarks/findings.py
    python benchmarks/findings.py --check docs/findings.md

One line per figure. --check exits with 1 where a line that is printed does not stand in the page: the last digit of
what float32 rounds may differ on another machine. flash-linear-attention, KMnP/can, bert4keras and JunnYu's ports are
read from the arrays in tests/golden that they wrote; the rest is run here.
"""

import argparse
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from refimpl.models import gau_alpha, roformer
from refimpl.ops import activation, attention_kernel, can, norm, rope
from refimpl.ops import mixed_chunk_attention as mca
from tests.golden import collection, fla, originals
from tests.golden.lucidrains import bucket

GOLDEN = Path(collection.__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="PAGE", help="exit with 1 unless PAGE holds every line printed")
    page = parser.parse_args().check
    # What torch and onnxruntime say about graphs that are made to go wrong is not asked for.
    logging.disable(logging.WARNING)
    text = None if page is None else page.read_text(encoding="utf-8")
    missing = []
    for finding in FINDINGS:
        for line in finding():
            print(line, flush=True)
            if text is not None and f"`{line}`" not in text:
                missing.append(line)
    for line in missing:
        print(f"not in {page}: {line}")
    raise SystemExit(1 if missing else 0)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# FLASH-pytorch


def flash_bias() -> Iterator[str]:
    """A module as it is built, rel_pos_bias False and True, and the same with the bias zeroed by hand."""
    import flash_pytorch
    import torch

    x = torch.randn(2, 256, 512, generator=torch.Generator().manual_seed(0))

    def outputs(kind, gamma=None, **options):
        """Without the output's own bias and the residual path: as it is built, and with the position bias zeroed."""
        torch.manual_seed(0)
        module = getattr(flash_pytorch, kind)(dim=512, **options)
        last = module.to_out[0] if kind == "GAU" else module.to_out
        torch.nn.init.zeros_(last.bias)
        if gamma is not None:
            torch.nn.init.constant_(module.offsetscale.gamma, gamma)
        with torch.no_grad():
            return module(x) - x, _zeroed(module)(x) - x

    (one, plain), (other, _) = (outputs("GAU", rel_pos_bias=flag) for flag in (False, True))
    yield f"GAU with rel_pos_bias=False and True: {(one - other).abs().max().item():.0f} apart"
    yield f"a new GAU without its position bias: {(plain.norm() / one.norm()).item():.1e} of its output is left"
    for gamma in (1.0, 8.0):
        one, plain = outputs("GAU", gamma)
        moved = ((one - plain).norm() / plain.norm()).item()
        yield f"the same at gamma = {gamma:g}: the bias moves the output by {moved:.2g} of its norm"
    one, plain = outputs("FLASH")
    yield f"a new FLASH without it: {(plain.norm() / one.norm()).item():.1e} of its output is left"
    weight = np.random.default_rng(0).normal(size=32)
    high = {n: np.abs(weight[bucket(n, causal=False)]).max() * math.sqrt(512) / n for n in (64, 512)}
    yield f"what GAU adds to the divided products: up to {high[64]:.2f} at 64 tokens, {high[512]:.2f} at 512"


def _zeroed(module):
    import torch

    torch.nn.init.zeros_(module.rel_pos_bias.relative_attention_bias.weight)
    return module


def flash_padding() -> Iterator[str]:
    """64 tokens alone, and the same followed by as many masked ones; no position bias."""
    import flash_pytorch
    import torch

    torch.manual_seed(0)
    x = torch.randn(1, 128, 64, dtype=torch.float64)
    mask = torch.arange(128)[None] < 64
    with torch.no_grad():
        unit = _zeroed(flash_pytorch.GAU(dim=64, query_key_dim=32, add_residual=False)).double()
        torch.nn.init.normal_(unit.offsetscale.gamma)
        torch.nn.init.zeros_(unit.to_out[0].bias)
        alone, padded = unit(x[:, :64]), unit(x, mask=mask)[:, :64]
        yield f"GAU, 64 tokens padded to 128: {(padded.norm() / alone.norm()).item():.4f} of its output is left"
        layer = _zeroed(flash_pytorch.FLASH(dim=64, query_key_dim=32, group_size=32)).double()
        torch.nn.init.normal_(layer.qk_offset_scale.gamma)
        torch.nn.init.zeros_(layer.to_out.bias)
        alone, padded = layer(x[:, :64]) - x[:, :64], layer(x, mask=mask)[:, :64] - x[:, :64]
        yield f"FLASH, the same: the output moves by {((padded - alone).norm() / alone.norm()).item():.2f} of its norm"
        layer.attn_fn = torch.nn.Threshold(math.inf, 0.0)
        alone, padded = layer(x[:, :64]) - x[:, :64], layer(x, mask=mask)[:, :64] - x[:, :64]
        yield f"FLASH, its linear part alone: {(padded.norm() / alone.norm()).item():.4f} is left"


def flash_masks() -> Iterator[str]:
    """What masked keys do after all: nothing inside the attention, but the token shift carries one feature half on."""
    import flash_pytorch
    import torch

    torch.manual_seed(0)
    x = torch.randn(1, 32, 64, dtype=torch.float64)
    mask = torch.ones(1, 32, dtype=torch.bool)
    mask[:, 9] = False
    changed = x.clone()
    changed[:, 9] = torch.randn(64, dtype=torch.float64)
    kept = mask[0].nonzero()[:, 0]
    with torch.no_grad():
        for kernel in (False, True):
            unit = flash_pytorch.GAU(dim=64, query_key_dim=32, laplace_attn_fn=kernel).double()
            moved = (unit(changed, mask=mask) - unit(x, mask=mask))[:, kept].abs().max().item()
            name = "Laplace" if kernel else "squared ReLU"
            yield f"GAU, {name}: another masked token moves the others by {moved:.0f}"
        layer = flash_pytorch.FLASH(dim=64, query_key_dim=32, group_size=16, shift_tokens=True).double()
        torch.nn.init.normal_(layer.qk_offset_scale.gamma)
        torch.nn.init.zeros_(layer.to_out.bias)
        one, other = layer(x, mask=mask) - x, layer(changed, mask=mask) - x
        moved = ((other - one)[:, 10].norm() / one[:, 10].norm()).item()
        yield f"FLASH with shift_tokens: the token after a masked one moves by {moved:.2f} of its norm"


def flash_causal() -> Iterator[str]:
    """Equal tokens, the quadratic part taken out: what is left of the linear part, group by group."""
    import flash_pytorch
    import torch

    torch.manual_seed(0)
    layer = flash_pytorch.FLASH(dim=16, query_key_dim=8, group_size=8, causal=True).double()
    layer.attn_fn = torch.nn.Threshold(math.inf, 0.0)
    torch.nn.init.zeros_(layer.to_out.bias)
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 256, 16)
    with torch.no_grad():
        size = (layer(x) - x).norm(dim=-1)[0, ::8]
    yield f"equal tokens, linear part of group 32 over that of group 2: {(size[31] / size[1]).item():.2f}"
    ones, zeros = np.ones((256, 1)), np.zeros((256, 1))
    rule = {"chunk": 8, "scale": 1.0, "kernel": mca.identity}
    for normaliser in (mca.paper, mca.lucidrains_causal):
        made = mca.causal(zeros, zeros, ones, ones, ones, normaliser=normaliser, **rule)[::8, 0]
        yield f"the specification with the lengths {normaliser.__name__}: {made[31] / made[1]:.2f}"


# CAN


def can_epsilon() -> Iterator[str]:
    sums, gaps = {}, {}
    for path in sorted((GOLDEN / "can").glob("rsa_*.npz")):
        given = collection.load("can", path.stem)
        prior = given.get("prior", np.full(given["X_ambiguous"].shape[1], 1 / given["X_ambiguous"].shape[1]))
        last = given[f"V{int(given['depth'])}"].T
        options = {"alpha": float(given["alpha"]), "iterations": int(given["depth"])}
        right = can.alternating_normalization(given["X_confident"], given["X_ambiguous"], prior, **options)
        sums[path.stem] = np.abs(last.sum(axis=1) - 1).max()
        gaps[path.stem] = np.abs(last - right).max()
    name = max(sums, key=sums.__getitem__)
    yield f"rows of the authors' results miss the sum 1 by up to {sums[name]:.1e} ({name})"
    name = max(gaps, key=gaps.__getitem__)
    yield f"and the formula by up to {gaps[name]:.1e} ({name})"


def can_split() -> Iterator[str]:
    row = np.array([[0.4, 0.2, 0.2, 0.2]])
    three, four = (can.top_entropy(row, top=top)[0] for top in (3, 4))
    yield f"(0.4, 0.2, 0.2, 0.2): {three:.3f} of its 3 largest, where max_k = 4 stops, {four:.3f} of 4"
    half = np.array([[0.5, 0.5]])
    article = -(half * np.log(half)).sum() / math.log(3)
    yield f"(1/2, 1/2), top 3: {article:.3f} by the article's snippet, {can.top_entropy(half, top=3)[0]:.3f} clamped"


# flash-linear-attention


def fla_float32() -> Iterator[str]:
    worst: dict[str, float] = {}
    for name in fla.FORMS:
        if (GOLDEN / "fla_naive" / f"{name}.npz").exists():
            run = fla.Run(name)
            family = re.split("_(?:recurrent|chunk|parallel)", name)[0]
            worst[family] = max(worst.get(family, 0.0), off(run.single[0], run.double[0]))
    for family, error in sorted(worst.items()):
        yield f"{family}: off by up to {error:.1e} from the same functions in float64"


# Rotary positions


def hf_rotary() -> Iterator[str]:
    """The table of a Llama of head width 128 and base 10000, asked for in float64."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(LlamaConfig(hidden_size=128, num_attention_heads=1)).double()
    theta = rope.frequencies(128, base=10000.0)
    for position in (10, 100, 1000, 10000, 100000, 1000000):
        cos, _ = module(torch.zeros(1, dtype=torch.float64), torch.tensor([[position]]))
        gap = np.abs(cos[0, 0, :64].double().numpy() - np.cos(rope.angles(np.array(position), theta))).max()
        yield f"cos at position {position}: off by {gap:.1e}"


def rotary_embedding_torch() -> Iterator[str]:
    import torch
    from rotary_embedding_torch import RotaryEmbedding

    module = RotaryEmbedding(64, cache_if_possible=False)
    theta = rope.frequencies(64, base=10000.0)
    x = np.tile([1.0, 0.0], 32)
    for position in (255, 257, 511, 4095):
        right = rope.rotate_interleaved(x, rope.angles(np.array(position), theta))
        found = module.rotate_queries_or_keys(torch.tensor(x)[None, None].bfloat16(), offset=position)
        yield f"bfloat16 queries at position {position}: off by {np.abs(found.double().numpy() - right).max():.2f}"
    for position in (1000, 100000):
        right = rope.rotate_interleaved(x, rope.angles(np.array(position), theta))
        found = module.rotate_queries_or_keys(torch.tensor(x)[None, None], offset=position)
        yield f"float64 queries at position {position}: off by {np.abs(found.numpy() - right).max():.1e}"
    try:
        RotaryEmbedding(2)
        yield "width 2: built"
    except ZeroDivisionError:
        yield "width 2: ZeroDivisionError"


# bert4keras and JunnYu


def bert4keras() -> Iterator[str]:
    given = collection.load("gau_alpha", "b4k_gau_alpha")
    last = {release: given[f"{release}/last_hidden_state"] for release in ("0.11.3", "0.11.4", "0.11.5")}
    lengths = (given["token_ids"] != 0).sum(axis=1)
    yield f"0.11.3 against 0.11.4, epsilon 1e-12 and 1e-7: {off(last['0.11.3'], last['0.11.4']):.1e}"
    for i, n in enumerate(lengths):
        gap = off(last["0.11.5"][i, :n], last["0.11.4"][i, :n])
        yield f"0.11.5 against 0.11.4, a text of {n} tokens (floor 16, none): {gap:.0e}"
    x = 0.02 * np.random.default_rng(0).normal(size=(100, 768))
    one, other = (norm.rms_norm(x, epsilon=epsilon) for epsilon in (1e-7, 1e-12))
    yield f"rms_norm of rows of 0.02: {off(one, other):.1e}"
    # ln 1 = 0 multiplies the scores and the -1e12 that hides a key alike.
    hidden = np.zeros(26)
    hidden[1:] = -1e12
    scores = hidden * math.log(1) / math.log(512)
    weight = np.exp(scores - scores.max())
    right = attention_kernel.softmax_plus(np.zeros(26), hidden == 0, n_min=1)[0]
    share = weight[0] / weight.sum()
    yield f"one visible key of 26: weight {share:.3f} by the expression of 0.11.3, {right:.0f} by the formula"


def junnyu() -> Iterator[str]:
    original = originals.copy("jy_roformer")
    config = roformer.dialect(
        "junnyu", vocab_size=115, segments=2, embedding_size=32, hidden_size=48, layers=2, heads=4, intermediate_size=96
    )
    weights = originals.weights_torch(original, roformer.shapes(config))
    arrays = original.double
    ids, segments = arrays["io/edge_input_ids"], arrays["io/edge_token_type_ids"]
    mask = arrays["io/edge_attention_mask"] == 1
    nothing = np.flatnonzero(~mask.any(axis=1))
    last = roformer.hidden_states(weights, ids, segments, mask, config=config)[-1]
    alike = roformer.hidden_states(weights, ids, segments, mask | ~mask.any(axis=1, keepdims=True), config=config)[-1]
    theirs = arrays["io/edge_last_hidden_state"]
    gap = off(last[nothing], theirs[nothing])
    yield f"a text of nothing but padding: {gap:.2f} off zeros, {off(alike, theirs):.0e} off equal weights"
    junnyu_, newest = (gau_alpha.DIALECTS[name]["n_min"] for name in ("junnyu", "bert4keras-0.11.5"))
    scores = np.array([[2.0, 0.0, 0.0]])
    one, other = (attention_kernel.softmax_plus(scores, None, n_min=n)[0, 0] for n in (junnyu_, newest))
    yield f"scores (2, 0, 0): first weight {one:.3f} by JunnYu, {other:.3f} by bert4keras 0.11.5"


# ONNX Runtime


def onnx_runtime() -> Iterator[str]:
    from conformance.adapters import onnx_runtime_kernels as kernels

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64))
    for deviation in (1.0, 0.02, 0.001):
        found = kernels.rms_norm_pattern(deviation * x, 1e-12)
        right, other = (norm.rms_norm(deviation * x, epsilon=e) for e in (1e-12, float(np.float32(1e-5))))
        yield f"rms_norm, epsilon 1e-12, rows of {deviation:g}: off by {off(found, right):.1e}"
    yield f"and from epsilon = float32(1e-5) by {off(found, other):.0e}"
    yield f"float64 x W 0.3: off by {_scaled_product(0.3):.1e}, x W 0.25 by {_scaled_product(0.25):.1e}"
    for number in (-8.0, -18.0):
        at = np.array([number], np.float32)
        right = activation.silu(at)[0]
        yield f"QuickGelu in float32 at {number:g}: {abs(kernels.silu(at)[0] / right - 1):.1e} of silu off"


def _scaled_product(number: float) -> float:
    import onnx
    import onnxruntime

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 16)), rng.normal(size=(16, 8))
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["p"]), onnx.helper.make_node("Mul", ["p", "c"], ["y"])]
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in "xwy"]
    constant = onnx.numpy_helper.from_array(np.array(number), "c")
    graph = onnx.helper.make_graph(nodes, "g", infos[:2], infos[2:], [constant])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return off(session.run(None, {"x": x, "w": w})[0], number * (x @ w))


# PyTorch


def torch_compile() -> Iterator[str]:
    """A shape rule before and after two lengths; backend eager, so that no compiler is needed."""
    import torch

    def compiled(rule: Callable[[int, int], bool]) -> str:
        def call(x, bias=None):
            if bias is None:
                return x + 0
            return x + 1 if rule(bias.shape[0], x.shape[0]) else x + 0

        torch._dynamo.reset()
        run = torch.compile(call, backend="eager")
        for n in (3, 5):
            run(torch.zeros(n))
        return str(bool(run(torch.zeros(7), torch.zeros(7))[0]))

    found = compiled(lambda own, size: own in (1, size))
    yield f"own in (1, size) with own = size = 7, after lengths 3 and 5: {found}"
    found = compiled(lambda own, size: own == 1 or own == size)
    yield f"own == 1 or own == size, the same: {found}"


def torch_kernels() -> Iterator[str]:
    import torch

    zero = torch.nn.functional.rms_norm(torch.zeros(1, 4), (4,), eps=0.0)
    yield f"rms_norm of a row of zeros, epsilon 0: {zero[0, 0].item()}"
    hidden = torch.softmax(torch.full((1, 4), -math.inf), dim=-1)
    yield f"softmax of a row of -inf: {hidden[0, 0].item()}"
    x = torch.linspace(-4, -3, 4096)
    found = torch.nn.functional.gelu(x).double().numpy()
    error = np.abs(found - activation.gelu_erf(x.double().numpy())).max()
    yield f"gelu in float32 between -4 and -3: off by up to {error:.1e}"


# The papers themselves


def printed() -> Iterator[str]:
    n, c, g = 1024, 128, 3
    yield f"n = {n}, c = {c}, chunk {g}: (g-1) n/c = {(g - 1) * n // c}, tokens summed (g-1) c = {(g - 1) * c}"


FINDINGS = (
    flash_bias, flash_padding, flash_masks, flash_causal, can_epsilon, can_split, fla_float32, hf_rotary,
    rotary_embedding_torch, bert4keras, junnyu, onnx_runtime, torch_compile, torch_kernels, printed,
)  # fmt: skip


if __name__ == "__main__":
    main()
