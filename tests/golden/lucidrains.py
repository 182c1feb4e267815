"""FLASH-pytorch's GAU, FLASH and FLASHTransformer, made of our operators: they deviate from our own models.

`of` is a package of operators (refimpl.ops, torchimpl.ops), `put` makes its arrays of NumPy's. `balls` are the same in
the judge's arithmetic: what they give is right within its radius for every order of evaluation in its precision.
"""

import math
from functools import partial

import numpy as np

from conformance.budget import Arithmetic, Profile, affine, silu, unit_roundoff
from conformance.ops import gau as judged_gau
from conformance.ops import mixed_chunk_attention as judged_chunks
from conformance.ops import norm as judged_norm
from conformance.ops import rope as judged_rope

GAU = ("gau_mask", "gau_causal_mask_laplace", "gau_scalenorm_extbias", "gau_causal", "gau_plain", "gau_long")
FLASH = (
    "flash_pad_mask", "flash_causal_pad_mask", "flash_rotary_shift_laplace", "flash_pergroup",
    "flash_plain", "flash_pad_nomask", "flash_causal", "flash_long",
)  # fmt: skip
# Of the transformer.
LAYERS = 2
BASE = 10000.0
NORM_EPSILON = 1e-5


class State:
    """The weights of a module, or of one of its layers, under their own names; the file notes which are asked for."""

    def __init__(self, given, layer=""):
        self.given, self.prefix = given, f"state.{layer}"

    def __contains__(self, name):
        return self.prefix + name in self.given

    def __getitem__(self, name):
        return self.given[self.prefix + name]

    def get(self, name):
        return self.given.get(self.prefix + name)


def bucket(length, *, causal, buckets=32, furthest=128):
    """T5's table of relative distances, in integers: (row, column) to the number of a bucket.

    Half of the buckets hold one distance each, the others grow geometrically up to `furthest`: distance n lies at or
    beyond step k of m when n^m >= exact^m (furthest / exact)^k.
    """
    size = buckets if causal else buckets // 2
    exact = size // 2
    steps = size - exact

    def of_distance(n):
        if n < exact:
            return n
        k = max(k for k in range(steps + 1) if n**steps >= exact**steps * (furthest // exact) ** k)
        return min(exact + k, size - 1)

    one = [of_distance(n) for n in range(length)]
    after = [0 if causal else size + one[n] for n in range(length)]
    return np.array([[after[j - i] if j > i else one[i - j] for j in range(length)] for i in range(length)])


def _dense(weights):
    """Its columns are v, gate and, in a layer of their own, z; ours are u, v, z."""
    e = len(weights["to_hidden.0.bias"]) // 2
    order = np.r_[e : 2 * e, :e]
    w_in = np.concatenate([weights["to_hidden.0.weight"][order], weights["to_qk.0.weight"]]).T
    return w_in, np.concatenate([weights["to_hidden.0.bias"][order], weights["to_qk.0.bias"]])


def _normalise(of, put, weights, d):
    # Its ScaleNorm divides by max(root mean square, 1e-5): no row of the collection is that small.
    if "norm.g" in weights:
        return partial(of.norm.rms_norm_scaled, scale=put(np.repeat(weights["norm.g"], d)), epsilon=0.0)
    scale, bias = put(weights["norm.weight"]), put(weights["norm.bias"])
    return partial(of.norm.layer_norm, scale=scale, bias=bias, epsilon=NORM_EPSILON)


def _position_bias(weights, table, width):
    """Its learned bias is scaled by the root of a width: that of x in GAU, of the keys in FLASH."""
    return weights["rel_pos_bias.relative_attention_bias.weight"][table, 0] * math.sqrt(width)


def _gau_mask(given, name):
    n = given["x"].shape[1]
    mask = given["mask"][:, None, :] if "mask" in given else np.ones((1, 1, n), dtype=bool)
    return mask & np.tri(n, dtype=bool) if "causal" in name else mask


def _gau_bias(given, weights):
    n, d = given["x"].shape[1:]
    bias = _position_bias(weights, given["rel_pos_bucket"], d)
    # It divides the bias by the length like the products.
    return (bias + given["rel_pos_bias"] if "rel_pos_bias" in given else bias) / n


def gau(of, put, given, name, x=None):
    """The output of one file of GAU; `x` in the place of the file's, where gradients are wanted."""
    weights, (n, d) = State(given), given["x"].shape[1:]
    x = put(given["x"]) if x is None else x
    (gamma_q, gamma_k), (beta_q, beta_k) = weights["offsetscale.gamma"], weights["offsetscale.beta"]
    dense = map(put, (*_dense(weights), gamma_q, beta_q, gamma_k, beta_k))
    block = of.gau.block_pre_norm(
        x, put(_gau_mask(given, name)), put(_gau_bias(given, weights)), None, None, *dense,
        put(weights["to_out.0.weight"].T), put(weights["to_out.0.bias"]), length=n, rotate=of.rope.rotate_half_split,
        kernel=of.attention_kernel.laplace if "laplace" in name else _bare(of), norm=_normalise(of, put, weights, d),
    )  # fmt: skip
    # This one was made without its residual path.
    return block - x if name == "gau_mask" else block


def flash(of, put, given, name, x=None):
    """The output of one file of FLASH."""
    x = put(given["x"]) if x is None else x
    return _layer(of, put, x, State(given), given.get("mask"), given["rel_pos_bucket"], name)


def transformer(of, put, given):
    """Logits of FLASHTransformer: tokens and scaled sinusoids, layers, a norm and the dense layer of the head."""
    weights = State(given)
    x = put(_embedded(given, weights))
    for i in range(LAYERS):
        x = layer(of, put, given, i, x)
    scale, bias = put(weights["to_logits.0.weight"]), put(weights["to_logits.0.bias"])
    hidden = of.norm.layer_norm(x, scale, bias, epsilon=NORM_EPSILON)
    return of.attention.project(hidden, put(weights["to_logits.1.weight"].T), put(weights["to_logits.1.bias"]))


def layer(of, put, given, i, x):
    """A layer of FLASHTransformer."""
    weights = State(given, f"layers.{i}.")
    return _layer(of, put, x, weights, given["mask"], given["rel_pos_bucket"], "shift")


def _embedded(given, weights):
    phi = np.arange(given["x"].shape[1])[:, None] * weights["abs_pos_emb.inv_freq"]
    places = np.concatenate([np.sin(phi), np.cos(phi)], axis=-1) * weights["abs_pos_emb.scale"]
    return weights["token_emb.weight"][given["x"]] + places


def _bare(of):
    return partial(of.attention_kernel.squared_relu_constant, length=1)


def _shift(n, d):
    """Rows and factors of the token shift: half of the features comes from the token before, from none at first."""
    late = np.arange(d) < d // 2
    return np.maximum(np.arange(n) - 1, 0), late * (np.arange(n) > 0)[:, None] * 1.0, 1.0 - late


def _layer(of, put, x, weights, mask, table, name):
    family, (n, d), c = of.mixed_chunk_attention, x.shape[1:], len(table)
    gamma = weights["qk_offset_scale.gamma"]
    normed = _normalise(of, put, weights, d)(x)
    if "shift" in name:
        before, late, kept = _shift(n, d)
        normed = normed[:, before] * put(late) + normed * put(kept)
    whole = family.lucidrains_causal if "causal" in name else family.lucidrains
    if "pergroup" in name:
        # Every chunk is a sequence of its own; only the divisor remembers the whole.
        normed = normed.reshape(-1, c, d)
        whole = lambda reach: family.Lengths(1, n)  # noqa: E731
    theta = weights.get("rotary_pos_emb.freqs")
    made = family.unit(
        normed, None if mask is None else put(mask), None, put(_position_bias(weights, table, gamma.shape[1])),
        None if theta is None else put(np.arange(n)), None if theta is None else put(theta),
        *map(put, (*_dense(weights), gamma, weights["qk_offset_scale.beta"])),
        put(weights["to_out.weight"].T), put(weights["to_out.bias"]),
        mix=family.causal if "causal" in name else family.bidirectional,
        rotate=partial(of.rope.rotate_contiguous, rotate=of.rope.rotate_interleaved),
        rows=family.ROWS_LUCIDRAINS, chunk=c, scale=1 / c,
        kernel=of.attention_kernel.laplace if "laplace" in name else _bare(of), normaliser=whole,
    )  # fmt: skip
    return x + made.reshape(x.shape)


class Balls:
    """The same three in the judge's arithmetic, every array once rounded to the storage format."""

    def __init__(self, dtype):
        self.arithmetic = Arithmetic(Profile(dtype, "strict", "A64"))
        self.unit = unit_roundoff(dtype)

    def put(self, array):
        return self.arithmetic.ball(array, self.unit * np.abs(array))

    def gau(self, given, name):
        weights, x, n = State(given), self.put(given["x"]), given["x"].shape[1]
        (gamma_q, gamma_k), (beta_q, beta_k) = (
            (self.put(row) for row in weights[f"offsetscale.{letter}"]) for letter in ("gamma", "beta")
        )
        w_in, b_in = map(self.put, _dense(weights))
        unit = judged_gau.unit_paper(
            self.arithmetic, n, x=self._normalise(x, weights), mask=_gau_mask(given, name),
            bias=self.put(_gau_bias(given, weights)), positions=None, w_in=w_in, b_in=b_in,
            gamma_q=gamma_q, beta_q=beta_q, gamma_k=gamma_k, beta_k=beta_k,
            w_out=self.put(weights["to_out.0.weight"].T), b_out=self.put(weights["to_out.0.bias"]),
            layout="half_split", base=BASE, kernel="laplace" if "laplace" in name else "squared_relu_1",
        )  # fmt: skip
        # The residual path is added and, for this one file, subtracted again.
        return ((x + unit) - x if name == "gau_mask" else x + unit).finished()

    def flash(self, given, name):
        x = self.put(given["x"])
        return self._layer(x, State(given), given.get("mask"), given["rel_pos_bucket"], name).finished()

    def transformer(self, given):
        weights = State(given)
        x = self.put(_embedded(given, weights))
        for i in range(LAYERS):
            x = self.layer(given, i, x)
        scale, bias = self.put(weights["to_logits.0.weight"]), self.put(weights["to_logits.0.bias"])
        hidden = judged_norm.layer_norm(self.arithmetic, x, scale, bias, NORM_EPSILON)
        return affine(hidden, *map(self.put, (weights["to_logits.1.weight"].T, weights["to_logits.1.bias"]))).finished()

    def layer(self, given, i, x):
        weights = State(given, f"layers.{i}.")
        return self._layer(x, weights, given["mask"], given["rel_pos_bucket"], "shift")

    def _normalise(self, x, weights):
        if "norm.g" in weights:
            scale = self.put(np.repeat(weights["norm.g"], x.shape[-1]))
            return judged_norm.rms_norm_scaled(self.arithmetic, x, scale, 0.0)
        scale, bias = self.put(weights["norm.weight"]), self.put(weights["norm.bias"])
        return judged_norm.layer_norm(self.arithmetic, x, scale, bias, NORM_EPSILON)

    def _layer(self, x, weights, mask, table, name):
        a, (n, d), c = self.arithmetic, x.shape[1:], len(table)
        normed = self._normalise(x, weights)
        if "shift" in name:
            before, late, kept = _shift(n, d)
            normed = normed[:, before] * late + normed * kept
        whole = silu(affine(normed, *map(self.put, _dense(weights))))
        e = len(weights["to_out.weight"].T)
        u, v, z = whole[..., :e], whole[..., e : 2 * e], whole[..., 2 * e :]
        gamma, beta = self.put(weights["qk_offset_scale.gamma"]), self.put(weights["qk_offset_scale.beta"])
        # It stores (q_quad, q_lin, k_quad, k_lin).
        heads = tuple(z * gamma[row] + beta[row] for row in (0, 2, 1, 3))
        if "rotary_pos_emb.freqs" in weights:
            width = 2 * len(weights["rotary_pos_emb.freqs"])
            heads = tuple(judged_rope.rotate(a, head, np.arange(n), BASE, rotary_width=width) for head in heads)
        valid = np.ones(x.shape[:2], dtype=bool) if mask is None else mask
        mode = "causal" if "causal" in name else "bidirectional"
        lengths = "lucidrains_causal" if mode == "causal" else "lucidrains"
        pairs = judged_chunks.dense(mode, valid, None, c, lengths, None)
        if "pergroup" in name:
            pairs = pairs._replace(far=pairs.far & (np.arange(n) // c == np.arange(n)[:, None] // c))
        bias = self.put(_position_bias(weights, table, gamma.shape[1]))
        kernel = "laplace" if "laplace" in name else "squared_relu"
        mixed = judged_chunks.mixed(a, pairs, (*heads, v), bias, c, 1 / c, kernel)
        return x + affine(u * mixed, self.put(weights["to_out.weight"].T), self.put(weights["to_out.bias"]))
