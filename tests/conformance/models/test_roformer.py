"""The judge of roformer and roformer_v2: right models of every format pass, and every known wrong one is found out."""

from functools import cache

import numpy as np
import pytest

from conformance.budget import Arithmetic, Profile
from conformance.case import storage_type
from conformance.law import LawFailed
from conformance.models import _encoder, roformer, roformer_v2

JUDGES = {"roformer": roformer, "roformer_v2": roformer_v2}
DTYPES = ("float64", "float32", "float16", "bfloat16")
CASES = {name: {case.name: case for case in judge.cases()} for name, judge in JUDGES.items()}
BOTH = [(name, case) for name, cases in CASES.items() for case in cases]
WRONG = [(name, wrong) for name, judge in JUDGES.items() for wrong in judge.WRONG]
# The law that each of these breaks, and a case; all wrong models are found by their numbers.
BROKEN_LAW = {
    "segment ids dropped": ("segments_enter", "padded"),
    "padded keys visible": ("padding", "padded"),
    "queries hidden in the place of keys": ("padding", "padded"),
    "everything where nothing is seen": ("padding", "rows without tokens"),
    "positions off by one behind the first, in layer 1": ("padding", "no segment ids"),
    "every real key visible": ("unseen_tokens", "causal"),
    "the mask of the first row for all": ("one_by_one", "padded"),
    "positions of the first row for all": ("one_by_one", "positions of every row"),
    "positions count real tokens only": ("positions_shift", "padded"),
    "queries rotated only": ("positions_shift", "one layer"),
    "values rotated too": ("positions_shift", "one layer"),
}


def profile_of(dtype, name="strict"):
    return Profile(dtype, name, "A64")


@cache
def due(name, case, profile):
    """The results of a case, and its states."""
    expected = JUDGES[name].reference(Arithmetic(profile), CASES[name][case])
    return [ball.finished() for ball in expected.results().values()]


def worst(model, name, case, profile):
    found = _encoder.run(model, CASES[name][case], profile)
    return max(_encoder._ratio(value, ball) for value, ball in zip(found, due(name, case, profile), strict=True))


def breaks(law, model, name, case, profile=None):
    try:
        law(model, CASES[name][case], JUDGES[name].reference, profile or profile_of("float64"))
    except LawFailed:
        return True
    return False


def plain(dtype, every):
    """Both models written anew, in float32 with 16-bit inputs and outputs; `every` rounds what a kernel may store."""
    storage, working = storage_type(dtype), np.float64 if dtype == "float64" else np.float32

    def kept(x):
        return x.astype(storage).astype(working) if every else x

    def turned(x, positions, base):
        width = x.shape[-1]
        phi = positions[..., None, None] * base ** (-np.arange(0, width, 2) / width)
        c, s = np.cos(phi).astype(working), np.sin(phi).astype(working)
        made = np.empty_like(x)
        made[..., 0::2], made[..., 1::2] = x[..., 0::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., 0::2] * s
        return kept(made)

    def model(weights, token_ids, segment_ids, mask, positions, *, config, visible):
        w = {name: array.astype(working) for name, array in weights.items()}
        n = token_ids.shape[1]
        segment_ids = np.zeros_like(token_ids) if segment_ids is None else segment_ids
        positions = np.arange(n) if positions is None else positions
        keys = np.ones((*token_ids.shape, n), bool) if mask is None else np.repeat(mask[:, None], n, axis=1)
        if visible == "causal":
            keys = keys & np.tri(n, dtype=bool)
        if visible == "unilm":
            order = segment_ids.cumsum(axis=-1)
            keys = keys & (order[:, None, :] <= order[:, :, None])

        def dense(x, name, bias):
            return kept(x @ w[name] + w.get(bias, working(0)))

        def normed(x, name, epsilon):
            if config.model == "roformer":
                x = x - x.mean(axis=-1, keepdims=True)
            y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + working(epsilon))
            return kept(y * w.get(f"{name}.scale", working(1)) + w.get(f"{name}.bias", working(0)))

        def active(x):
            from scipy.special import erf

            cubic = np.sqrt(working(2 / np.pi)) * (x + working(0.044715) * x**3)
            forms = {
                "relu": lambda: np.maximum(x, 0),
                "silu": lambda: x / (1 + np.exp(-x)),
                "gelu_erf": lambda: x * (1 + erf(x / np.sqrt(working(2)))) / 2,
                "gelu_tanh": lambda: x * (1 + np.tanh(cubic)) / 2,
            }
            return kept(forms[config.activation]().astype(working))

        x = normed(
            w["embedding.token"][token_ids] + w["embedding.segment"][segment_ids], "embedding.norm", config.epsilon
        )
        if "embedding.mapping.kernel" in w:
            x = dense(x, "embedding.mapping.kernel", "embedding.mapping.bias")
        states = [x]
        for index in range(config.layers):
            at, fed = f"layers.{index}.attention", f"layers.{index}.feed_forward"
            q, k, v = (
                dense(x, f"{at}.w_{part}", f"{at}.b_{part}").reshape(*x.shape[:2], config.heads, -1) for part in "qkv"
            )
            q, k = turned(q, positions, config.rotary_base), turned(k, positions, config.rotary_base)
            scores = np.where(
                keys[:, None], np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(working(q.shape[-1])), -np.inf
            )
            top = np.where(keys.any(axis=-1), 0, -1)[:, None, :, None] + scores.max(axis=-1, keepdims=True)
            share = np.exp(scores - np.where(np.isfinite(top), top, 0)).astype(working)
            share = kept(share / np.maximum(share.sum(axis=-1, keepdims=True), working(1e-30)))
            o = kept(np.einsum("bhnm,bmhd->bnhd", share, v)).reshape(x.shape)
            x = normed(kept(x + dense(o, f"{at}.w_o", f"{at}.b_o")), f"{at}_norm", config.epsilon)
            inner = active(dense(x, f"{fed}.w_in", f"{fed}.b_in"))
            x = normed(kept(x + dense(inner, f"{fed}.w_out", f"{fed}.b_out")), f"{fed}_norm", config.epsilon)
            states.append(x)
        if config.model == "roformer":
            x = normed(active(dense(x, "mlm.transform.kernel", "mlm.transform.bias")), "mlm.norm", config.mlm_epsilon)
        elif "mlm.mapping.kernel" in w:
            x = dense(x, "mlm.mapping.kernel", "")
        logits = x @ w["embedding.token"].T + w.get("mlm.bias", working(0))
        assert logits.dtype == working
        return [array.astype(storage) for array in (logits, *states)]

    return model


@pytest.mark.parametrize("name", JUDGES)
def test_the_specification_is_never_accused(name):
    for case in CASES[name]:
        for dtype in DTYPES:
            for rounding in ("strict", "fused"):
                assert worst(JUDGES[name].model, name, case, profile_of(dtype, rounding)) <= 0.1, (
                    case,
                    dtype,
                    rounding,
                )
        ratios = _encoder.by_layer(
            JUDGES[name].hidden_states, JUDGES[name].reference, CASES[name][case], profile_of("float64")
        )
        assert len(ratios) == 1 + CASES[name][case].config.layers
        assert max(ratios) <= 0.1


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_right_model_in_this_format_is_never_accused(name, dtype):
    for case in CASES[name]:
        assert worst(plain(dtype, every=False), name, case, profile_of(dtype)) <= 1, case
        if dtype in ("float16", "bfloat16"):
            assert worst(plain(dtype, every=True), name, case, profile_of(dtype, "fused")) <= 1, case


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_right_models_keep_every_law(name, case):
    for dtype, model in (("float64", JUDGES[name].model), ("float32", plain("float32", every=False))):
        broken = [law.__name__ for law in _encoder.LAWS if breaks(law, model, name, case, profile_of(dtype))]
        assert broken == [], dtype


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_wrong_model_is_found_out(name, wrong):
    model = JUDGES[name].WRONG[wrong]
    # Not by a hair: even the bounds of shorter formats tell.
    assert max(worst(model, name, case, profile_of("float64")) for case in CASES[name]) > 1e8
    for dtype in DTYPES[1:]:
        assert any(worst(model, name, case, profile_of(dtype)) > 1 for case in CASES[name]), dtype
    if wrong in BROKEN_LAW:
        broken, case = BROKEN_LAW[wrong]
        (law,) = (law for law in _encoder.LAWS if law.__name__ == broken)
        assert breaks(law, model, name, case)


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_the_wrong_models_are_right_but_for_their_fault(name, case):
    assert worst(JUDGES[name]._with(), name, case, profile_of("float64")) <= 0.1


@pytest.mark.parametrize("name", JUDGES)
def test_the_first_wrong_layer_is_named(name):
    def states(weights, *arguments, **options):
        other = {**weights, "layers.1.feed_forward.w_out": 1.5 * weights["layers.1.feed_forward.w_out"]}
        return JUDGES[name].hidden_states(other, *arguments, **options)

    ratios = _encoder.by_layer(states, JUDGES[name].reference, CASES[name]["padded"], profile_of("float64"))
    assert len(ratios) == 4
    assert max(ratios[:2]) <= 1 < min(ratios[2:])


@pytest.mark.parametrize("name", JUDGES)
def test_the_order_of_the_batch_is_noticed(name):
    def model(*arguments, **options):
        logits, *states = JUDGES[name].model(*arguments, **options)
        return (logits - logits[:1], *states)

    for law in (_encoder.batch_permutes, _encoder.one_by_one):
        assert breaks(law, model, name, "padded")


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_one_side_is_noticed_at_every_size_of_the_batch(name, size, side):
    def model(weights, ids, segments, mask, *rest, **options):
        made = JUDGES[name].model(weights, ids, segments, mask, *rest, **options)
        reached = mask is not None and len(ids) == size and not mask[:, 0 if side == "left" else -1].any()
        return [array + 1e-3 * reached for array in made]

    with pytest.raises(LawFailed, match=f"law padding on the {side}, batch {size} "):
        _encoder.padding(model, CASES[name]["one layer"], JUDGES[name].reference, profile_of("float64"))


@pytest.mark.parametrize("name", JUDGES)
def test_one_bit_of_a_later_token_is_noticed(name):
    def model(weights, ids, *rest, **options):
        made = JUDGES[name].model(weights, ids, *rest, **options)
        return [array * (1 + 2.0**-50 * (ids[:, -1:, None] % 2)) for array in made]

    assert worst(model, name, "causal", profile_of("float64")) <= 1
    with pytest.raises(LawFailed, match="causal law unseen_tokens .* depends on the ids of tokens"):
        _encoder.unseen_tokens(model, CASES[name]["causal"], JUDGES[name].reference, profile_of("float64"))


def test_who_sees_whom():
    case = CASES["roformer"]["padded"].with_(
        token_ids=np.zeros((1, 4), np.int64),
        mask=np.array([[True, True, False, True]]),
        segment_ids=np.array([[0, 0, 1, 1]]),
    )
    seen = {name: case.with_(visible=name).keys[0].astype(int).tolist() for name in _encoder.VISIBLE}
    assert seen == {
        "bidirectional": [[1, 1, 0, 1]] * 4,
        "causal": [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]],
        "unilm": [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]],
    }


@pytest.mark.parametrize(("name", "case"), BOTH)
def test_weights_are_exact_in_every_format(name, case):
    for array in CASES[name][case].weights.values():
        for dtype in DTYPES[1:]:
            assert np.array_equal(array.astype(storage_type(dtype)).astype(np.float64), array)


def test_cases_ask_for_every_weight_and_every_mode():
    for name, cases in CASES.items():
        assert {case.visible for case in cases.values()} == set(_encoder.VISIBLE)
        assert {case.config.activation for case in cases.values()} == {"gelu_erf", "gelu_tanh", "relu", "silu"}
        assert {case.config.heads for case in cases.values()} == {1, 2, 3}
        assert {np.ndim(case.positions) for case in cases.values() if case.positions is not None} == {1, 2}
        assert any((case.token_ids == 0).any() for case in cases.values()), name


def test_rows_of_a_case_take_their_positions_along():
    case = CASES["roformer"]["positions of every row"]
    assert np.array_equal(case.rows(slice(2, 3)).positions, case.positions[2:3])
    shared = CASES["roformer"]["positions"]
    assert np.array_equal(shared.rows(slice(2, 3)).positions, shared.positions)
