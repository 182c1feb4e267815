"""The originals' models in PyTorch: every array that they gave, from end to end and part by part.

Bounds of layers multiply, and with weights as large as these the judge permits anything behind three of them. So every
part, the embedding, a layer or a head, is judged on what entered it in the original.
"""

import dataclasses
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from conformance.budget import Arithmetic, Profile, affine, tanh, unit_roundoff
from conformance.models import _encoder as judge
from conformance.ops import attention_kernel as judged_kernel
from conformance.ops import gau as judged_gau
from conformance.ops import norm as judged_norm
from refimpl import bundle
from refimpl.models import _encoder as specified
from refimpl.models import _heads as heads_of
from refimpl.models import gau_alpha, roformer, roformer_v2
from tests.golden import originals
from torchimpl.models import _encoder, _heads
from torchimpl.models import gau_alpha as modules_of_gau_alpha
from torchimpl.models.roformer import Roformer
from torchimpl.models.roformer_v2 import RoformerV2
from torchimpl.ops import attention_kernel

DOUBLE, SINGLE = 1e-12, 5e-6
MODELS = {
    "roformer": (roformer, Roformer, "TransformedLM"),
    "roformer_v2": (roformer_v2, RoformerV2, "TiedLM"),
    "gau_alpha": (gau_alpha, modules_of_gau_alpha.GauAlpha, "TiedLM"),
}
TRANSFORMER = ("vocab_size", "segments", "embedding_size", "hidden_size", "layers", "heads", "intermediate_size")
GAU = ("vocab_size", "segments", "hidden_size", "layers", "expanded_size", "key_size")
FOLDERS = {
    "b4k_roformer": ("roformer", (120, 2, 48, 48, 3, 4, 96)),
    "b4k_roformer_emb": ("roformer", (117, 2, 32, 64, 2, 4, 160)),
    "jy_roformer": ("roformer", (115, 2, 32, 48, 2, 4, 96)),
    "hf_roformer": ("roformer", (112, 2, 48, 48, 2, 3, 80)),
    "b4k_roformer_v2": ("roformer_v2", (120, 2, 48, 48, 3, 3, 192)),
    "jy_roformer_v2": ("roformer_v2", (120, 2, 48, 48, 3, 4, 192)),
    "b4k_gau_alpha": ("gau_alpha", (120, 2, 48, 3, 96, 16)),
    "jy_gau_alpha": ("gau_alpha", (118, 2, 48, 3, 96, 16)),
}
DIALECTS = {"b4k": "bert4keras-0.11.5", "jy": "junnyu", "hf": "huggingface"}
FORMATS = [(torch.float64, DOUBLE), (torch.float32, SINGLE)]
TANH, NEXT = heads_of.Pooler("tanh"), heads_of.NextSentence()


def of_folder(folder, **changes):
    name, sizes = FOLDERS[folder]
    names = GAU if name == "gau_alpha" else TRANSFORMER
    config = MODELS[name][0].dialect(DIALECTS[folder.split("_")[0]], **dict(zip(names, sizes, strict=True)))
    return dataclasses.replace(config, **changes)


class Modules:
    """torchimpl under the weights of one folder, in one format: arrays in, arrays out."""

    def __init__(self, folder, original, dtype, **changes):
        self.config, self.original, self.dtype = of_folder(folder, **changes), original, dtype
        self.keras, self.gau = folder.startswith("b4k"), self.config.model == "gau_alpha"
        self.model, self.kind, self.lm = MODELS[self.config.model]
        self.encoder = self.weights(self.model.shapes(self.config))

    def weights(self, shapes):
        if self.keras:
            return originals.weights_bert4keras(self.original, shapes)
        names = originals.TORCH_GAU_ALPHA if self.gau else originals.TORCH
        return originals.weights_torch(self.original, shapes, names)

    def put(self, array):
        tensor = torch.as_tensor(array)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def loaded(self, module, weights):
        module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        return module.to(self.dtype).eval()

    def module(self, config=None):
        return self.loaded(self.kind(config or self.config), self.encoder)

    def states(self, ids, segments, mask=None, *, visible="bidirectional", config=None):
        given = (None if array is None else torch.tensor(array) for array in (ids, segments, mask))
        return [taken(x) for x in self.module(config).hidden_states(*given, visible=_encoder.VISIBLE[visible])]

    def layer(self, index, x, ids, segments, mask, *, visible="bidirectional", config=None):
        """What a layer makes of x and what is made inside, by the names that the folders have for it."""
        module, made = self.module(config), {}
        layer = module.layers[index]
        keys = _encoder.VISIBLE[visible](torch.tensor(mask), torch.tensor(segments))
        given = (
            self.put(x),
            module.seen(keys),
            torch.arange(ids.shape[-1]),
            _encoder.frequencies_of(module.config, None),
        )
        if self.gau:
            layer.attention_dropout.register_forward_pre_hook(lambda _, given: made.update(attentions=given[0]))
            layer.hidden_dropout.register_forward_pre_hook(lambda _, given: made.update(gau_out=given[0]))
        else:
            # Weights are formed where some are to be dropped; here all are kept.
            dropout = layer.attention.dropout
            dropout.register_forward_pre_hook(lambda _, given: made.update(attentions=given[0]))
            dropout.register_forward_hook(lambda _, given, __: given[0])
            layer.attention.train()(*given)
            layer.attention.eval()
            layer.attention.register_forward_hook(lambda _, __, out: made.update(attn_out=out))
            layer.feed_forward.register_forward_hook(
                lambda _, given, out: made.update(attn_norm=given[0], ffn_out=out)
            )  # fmt: skip
        made["output"] = layer(*given)
        return {name: taken(tensor) for name, tensor in made.items()}

    def head(self, kind, head, hidden, *more, config=None):
        module = getattr(_heads, kind)(config or self.config, head)
        module = self.loaded(module, self.weights(head.shapes(module.config)))
        return module, module(self.put(hidden), *more)

    def logits(self, hidden, config=None):
        head = getattr(heads_of, self.lm)()
        return taken(self.head(self.lm, head, hidden, self.put(self.encoder["embedding.token"]), config=config)[1])

    def behind(self, hidden, of):
        """What stands on the last state besides the logits, as far as `of` names it."""
        made = {}
        if "io/mlm_transform" in of:
            table = self.put(self.encoder["embedding.token"])
            head = self.head(self.lm, heads_of.TransformedLM(), hidden, table)[0]
            made["mlm_transform"] = taken(head.transform(self.put(hidden)))
        if "io/pooler_output" in of:
            pooled = self.head("Pooler", TANH, hidden)[1]
            made["pooler_output"] = taken(pooled)
            made["nsp_proba"] = taken(attention_kernel.softmax(self.head("NextSentence", NEXT, pooled)[1], None))
        return made

    def embedding_norm(self, ids, segments):
        module, made = self.module(), []
        module.embedding.norm.register_forward_hook(lambda _, __, out: made.append(taken(out)))
        module.embedding(_encoder.checked_inputs("", torch.tensor(ids), torch.tensor(segments), None, None))
        return made[0]


def taken(tensor):
    return tensor.double().numpy()


def alike(scores, mask, n_min):
    """softmax_plus with equal weights for all tokens in the rows that see none."""
    nothing = ~mask.expand_as(scores).any(dim=-1, keepdim=True)
    return torch.where(nothing, 1 / scores.shape[-1], attention_kernel.softmax_plus(scores, mask, n_min=n_min))


@torch.no_grad()
def found(modules, arrays):
    """What the modules have for the arrays of a folder, asked as if they were the specification."""
    config = modules.config
    if modules.gau:

        def read(ids, segments, mask, *, visible="bidirectional", config=None, alike_without_keys=False):
            kernel = alike if alike_without_keys else attention_kernel.softmax_plus
            with mock.patch.object(modules_of_gau_alpha, "softmax_plus", kernel):
                return modules.states(ids, segments, mask, visible=visible, config=config)

        if modules.keras:
            got = originals.gau_of_bert4keras(read, modules.logits, config, modules.encoder, arrays)
        else:
            got = originals.gau_of_junnyu(read, modules.logits, arrays)
    else:

        def hidden_states(_, *given, config, visible=specified.bidirectional):
            return modules.states(*given, visible=visible.__name__, config=config)

        def layer(*_, **__):
            # Asked below.
            return specified.Sublayers(None, None, None, None)

        model = modules.model
        behind = SimpleNamespace(hidden_states=hidden_states, layer=layer, dialect=model.dialect, SIZES=model.SIZES)
        gather = originals.of_bert4keras if modules.keras else originals.of_torch
        got = gather(behind, config, modules.encoder, modules.logits, arrays)
    ids, segments, mask = inputs_of(arrays, modules.keras)
    for i in range(config.layers):
        inside = modules.layer(i, got[f"io/hidden_{i}"], ids, segments, mask)
        got |= {f"io/{name}_{i}": array for name, array in inside.items() if name != "output"}
    got |= {f"io/{name}": array for name, array in modules.behind(got["io/last_hidden_state"], arrays).items()}
    if "io/embedding_norm" in arrays:
        got["io/embedding_norm"] = modules.embedding_norm(ids, segments)
    return got


def inputs_of(arrays, keras, kind="io", prefix=""):
    """Ids, segments and the mask that the original had."""
    if keras:
        ids, segments = arrays[f"{kind}/token_ids"], arrays[f"{kind}/segment_ids"]
        return ids, segments, specified.mask_from_ids_bert4keras(ids)
    ids, segments, mask = (arrays[f"io/{prefix}{n}"] for n in ("input_ids", "token_type_ids", "attention_mask"))
    return ids, segments, mask == 1


# From end to end


@pytest.mark.parametrize(("dtype", "bound"), FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_array(folder, dtype, bound):
    original = originals.whole(folder)
    got = found(Modules(folder, original, dtype), original.double)
    errors = originals.errors(got, original.double)
    # Here alone the original kept sines and cosines in float32.
    tables = [errors.pop(name) for name in list(errors) if "float32tables" in name]
    assert len(errors) >= 9 and max(errors.values()) < bound, errors
    assert len(tables) == 2 * folder.startswith("jy") and all(1e-9 < error < bound + 2e-7 for error in tables)
    errors = originals.errors(got, original.single)
    assert len(errors) >= 4 and max(errors.values()) < SINGLE, errors


@pytest.mark.parametrize(("dtype", "bound"), FORMATS)
@pytest.mark.parametrize(
    ("folder", "copy", "changes", "left", "count"),
    [
        ("jy_roformer", "jy_roformer", {}, (), 6),
        # The last state is that of the third layer, which is not kept.
        ("b4k_roformer_v2", "b4k_roformer_v2", {"layers": 1}, ("io/last_hidden_state", "io/mlm_logits"), 4),
        ("b4k_gau_alpha", "b4k_gau_alpha_edge", {}, (), 10),
        ("jy_gau_alpha", "jy_gau_alpha", {"layers": 1}, (), 3),
    ],
)
def test_every_array_that_is_kept_here(folder, copy, changes, left, count, dtype, bound):
    original = originals.copy(copy)
    if copy == "b4k_gau_alpha_edge":
        own = bundle.read(Path(originals.__file__).parent / "bundle" / "gau_alpha" / "bert_model.ckpt")
        original = original._replace(weights=own)
    arrays = {name: array for name, array in original.double.items() if name not in left}
    errors = originals.errors(found(Modules(folder, original, dtype, **changes), arrays), arrays)
    assert len(errors) == count and max(errors.values()) < bound, errors


# Part by part


@contextmanager
def recorded(kernel):
    """The weights that the judge's reference of a kernel gives meanwhile."""
    reference, made = judged_kernel.REFERENCES[kernel], []

    def call(*arguments):
        made.append(reference(*arguments))
        return made[-1]

    with mock.patch.dict(judged_kernel.REFERENCES, {kernel: call}):
        yield made


def bounds(a, case, index, x):
    """The same as `Modules.layer` in the judge's arithmetic."""
    config, w = case.config, judge.layer_of(a, case, index)

    def normed(total, name):
        if f"{name}.scale" in w:
            return judged_norm.layer_norm(
                a, total.stored(), w[f"{name}.scale"], w[f"{name}.bias"], config.epsilon
            ).stored()  # fmt: skip
        return judged_norm.rms_norm(a, total.stored(), config.epsilon).stored()

    if config.model == "gau_alpha":
        kernel, absent = f"softmax_plus_{config.n_min}", dict.fromkeys(("b_in", "beta_q", "beta_k", "b_out"))
        with recorded(kernel) as weights:
            unit = judged_gau.unit(
                a, x=x, mask=case.keys, bias=None, positions=case.places, **w, **absent, layout="interleaved",
                base=config.rotary_base, kernel=kernel,
            ).stored()  # fmt: skip
        return {"attentions": weights[0], "gau_out": unit, "output": normed(x + unit, "")}
    with recorded("softmax") as weights:
        attended = judge.self_attention(a, case, x, w)
    middle = normed(x + attended, "attention_norm")
    fed = judge.feed_forward(a, case, middle, w)
    made = {"attentions": weights[0], "attn_out": attended, "attn_norm": middle, "ffn_out": fed}
    return made | {"output": normed(middle + fed, "feed_forward_norm")}


def bounds_behind(a, modules, config, x):
    """The same as `Modules.logits` and `Modules.behind` in the judge's arithmetic."""

    def held(head):
        return {name: a.exact(array) for name, array in modules.weights(head.shapes(config)).items()}

    softmax, table = judged_kernel.REFERENCES["softmax"], a.exact(modules.encoder["embedding.token"]).transpose(1, 0)
    made, bias = {}, None
    if modules.lm == "TransformedLM":
        w = held(heads_of.TransformedLM())
        inner = affine(x, w["mlm.transform.kernel"], w["mlm.transform.bias"]).stored()
        inner = judge.activated(a, SimpleNamespace(config=config), inner)
        inner = judged_norm.layer_norm(a, inner, w["mlm.norm.scale"], w["mlm.norm.bias"], config.mlm_epsilon)
        made["mlm_transform"], bias = inner.stored(), w["mlm.bias"]
    logits = affine(made.get("mlm_transform", x), table, bias)
    made |= {"logits": logits, "mlm_logits": logits, "mlm_probs": softmax(a, logits.stored(), None)}
    if "bert/pooler/dense/kernel" in modules.original.weights:
        w = held(TANH) | held(NEXT)
        pooled = tanh(affine(x[:, 0], w["pooler.kernel"], w["pooler.bias"]).stored()).stored()
        odds = affine(pooled, w["next_sentence.kernel"], w["next_sentence.bias"]).stored()
        made |= {"pooler_output": pooled, "nsp_proba": softmax(a, odds, None)}
    return made


def bounds_before(a, case):
    """The embedding in the judge's arithmetic, and its norm where a mapping stands behind that."""
    w, epsilon = {name: a.exact(array) for name, array in case.weights.items()}, case.config.epsilon
    if "embedding.norm.scale" not in w:
        return {"hidden_0": judge.embed(a, case).stored()}
    x = judged_norm.layer_norm(
        a, judge.embedded(a, case), w["embedding.norm.scale"], w["embedding.norm.bias"], epsilon
    ).stored()  # fmt: skip
    if "embedding.mapping.kernel" not in w:
        return {"hidden_0": x}
    return {
        "embedding_norm": x,
        "hidden_0": affine(x, w["embedding.mapping.kernel"], w["embedding.mapping.bias"]).stored(),
    }


def runs(modules, arrays):
    """Every run of a folder: what its arrays are called, its Config, its inputs, who sees whom, and the texts to ask.

    JunnYu's GAU-α attends to everything where nothing is seen, which is another function: that text is left out.
    """
    config, keras = modules.config, modules.keras
    inputs, every = inputs_of(arrays, keras), slice(None)
    yield "io/", config, inputs, "bidirectional", every
    if keras and "io/lm_last_hidden_state" in arrays:
        yield "io/lm_", config, inputs, "causal", every
        yield "io/unilm_", config, inputs, "unilm", every
    if keras:
        edge, sizes = inputs_of(arrays, keras, "edge"), next(iter(modules.model.SIZES.values()))
        yield "edge/", config, edge, "bidirectional", every
        for release in ("0.11.3", "0.11.4")[: 1 + modules.gau]:
            old = modules.model.dialect(f"bert4keras-{release}", **{name: getattr(config, name) for name in sizes})
            yield f"{release}/", old, inputs, "bidirectional", every
            yield f"{release}/edge_", old, edge, "bidirectional", every
        return
    ids, segments, mask = inputs
    real = ids != 0 if modules.gau else np.ones_like(mask)
    yield "io/nomask_", config, (ids, segments, real), "bidirectional", every
    if "io/mask3d_logits" in arrays:
        yield "io/mask3d_", config, inputs, "causal", every
        ids, segments, mask = inputs_of(arrays, keras, prefix="edge_")
        told = mask.any(axis=-1)
        mask = mask if modules.gau else mask | ~told[:, None]
        yield "io/edge_", config, (ids, segments, mask), "bidirectional", told if modules.gau else every


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_part_in_float32_is_within_the_bound_of_the_judge(folder):
    original, a, held = originals.whole(folder), Arithmetic(Profile("float32", "strict", "A64")), set()
    modules, arrays = Modules(folder, original, torch.float32), original.double

    def within(name, found, ball, rows=slice(None)):
        if name in arrays:
            error, bound = np.abs(found - arrays[name])[rows], ball.finished().rad[rows]
            # A bound without end would say nothing.
            assert np.isfinite(bound).all() and (error <= bound).all(), name
            held.add(name)

    def put(x):
        return a.ball(x, unit_roundoff("float32") * np.abs(x))

    for run, config, inputs, visible, rows in runs(modules, arrays):
        reads = {"config": config, "visible": specified.VISIBLE[visible]}
        *entering, last = modules.model.hidden_states(modules.encoder, *inputs, **reads)
        case = judge.Case(run, config, modules.encoder, *inputs, visible=visible)
        if run == "io/":
            due = bounds_before(a, case)
            within("io/hidden_0", modules.states(*inputs)[0], due["hidden_0"])
            if "embedding_norm" in due:
                within("io/embedding_norm", modules.embedding_norm(*inputs[:2]), due["embedding_norm"])
        for i, x in enumerate(entering):
            made, due = modules.layer(i, x, *inputs, visible=visible, config=config), bounds(a, case, i, put(x))
            assert made.keys() == due.keys()
            for name, ball in due.items():
                whole = f"hidden_{i + 1}" if name == "output" else f"{name}_{i}"
                within(f"{run}{whole}", made[name], ball, rows)
        within(f"{run}last_hidden_state", made["output"], due["output"], rows)
        due, logits = bounds_behind(a, modules, config, put(last)), modules.logits(last, config)
        probs = taken(attention_kernel.softmax(torch.tensor(logits).float(), None))
        made = {"logits": logits, "mlm_logits": logits, "mlm_probs": probs, **modules.behind(last, arrays)}
        for name, array in made.items():
            within(f"{run}{name}", array, due[name])
    asked = {name for name, array in arrays.items() if array.dtype.kind == "f" and "float32tables" not in name}
    assert held == asked
