"""Models that every case and every other law takes for right ones: each is told by one law, and by no other."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from conformance import model
from conformance.budget import Profile
from conformance.models import _encoder, flash, gau_alpha, roformer_v2
from refimpl.ops.attention_kernel import softmax, softmax_plus

FLOAT64, FLOAT32, BFLOAT16 = Profile("float64", "strict"), Profile("float32", "strict"), Profile("bfloat16", "eager")


def judged(mine, name, law, profile=FLOAT64):
    return model.judge_law("mine", mine, name, law, profile)


# What a model makes of its inputs.
def without_order(right, weights, ids, segments, mask, positions, *, config, visible):
    """Causality is a part of the mask, and lost with it."""
    if mask is None:
        visible = "unilm" if visible == "unilm" else "bidirectional"
        if hasattr(config, "mix"):
            others = {"lucidrains_causal": "lucidrains"}
            config = replace(config, mix="bidirectional", normaliser=others.get(config.normaliser, config.normaliser))
    return right(weights, ids, segments, mask, positions, config=config, visible=visible)


def sixteen_places(right, weights, ids, segments, mask, positions, **options):
    """A buffer of positions that has sixteen."""
    positions = np.minimum(np.arange(ids.shape[1]), 15) if positions is None else positions
    return right(weights, ids, segments, mask, positions, **options)


def one_more_chunk(right, weights, ids, segments, mask, positions, *, config, visible):
    """Where chunks are whole, one of padding stands behind them."""
    b, n = ids.shape
    if mask is not None or n % config.chunk:
        return right(weights, ids, segments, mask, positions, config=config, visible=visible)
    around = (0, 0), (0, config.chunk)
    given = np.pad(ids, around), segments, np.pad(np.ones((b, n), bool), around), positions
    return [array[:, :n] for array in right(weights, *given, config=config, visible=visible)]


def no_places_of_unilm(right, weights, ids, segments, mask, positions, *, config, visible):
    positions = None if visible == "unilm" else positions
    return right(weights, ids, segments, mask, positions, config=config, visible=visible)


def at(change):
    def moved(right, weights, ids, segments, mask, positions, **options):
        positions = positions if positions is None else change(positions)
        return right(weights, ids, segments, mask, positions, **options)

    return moved


def rounded(right, weights, *inputs, **options):
    narrow = {name: array.astype(np.float16).astype(array.dtype) for name, array in weights.items()}
    return right(narrow, *inputs, **options)


def as_text(right, weights, *inputs, config, **options):
    """Layers in the order of their names."""
    order = sorted(str(i) for i in range(config.layers))
    parts = {name: name.split(".") for name in weights}
    named = {n: ".".join([p[0], str(order.index(p[1])), *p[2:]] if p[0] == "layers" else p) for n, p in parts.items()}
    return right({named[name]: array for name, array in weights.items()}, *inputs, config=config, **options)


INPUTS = {
    "causality lost without a mask": (without_order, "bare"),
    "sixteen positions": (sixteen_places, "bare"),
    "positions in a table of 512": (at(lambda places: np.minimum(places, 511)), "positions_shift"),
    "positions modulo 512": (at(lambda places: places % 512), "positions_shift"),
    "no position below 0": (at(lambda places: np.maximum(places, 0)), "positions_shift"),
    "positions in float16": (at(lambda places: places.astype(np.float16).astype(int)), "positions_shift"),
    "weights in float16": (rounded, "fine_weights"),
    "layers sorted as text": (as_text, "eleven_layers"),
}


@pytest.mark.parametrize("bug", INPUTS)
@pytest.mark.parametrize("name", ["flash", "gau_alpha"])
def test_one_law_alone_tells_what_becomes_of_inputs(name, bug):
    change, law = INPUTS[bug]
    mine = partial(change, model.MODELS()[name].model)
    made = model.verdicts("mine", mine, name, FLOAT64, with_laws=True)
    assert {v.case for v in made if v.failed} == {law} and {v.outcome for v in made if v.failed} == {"logic"}


@pytest.mark.parametrize("bug", INPUTS)
@pytest.mark.parametrize("name", ["flash_quad", "roformer", "roformer_v2"])
def test_the_law_tells_it_of_other_models_too(name, bug):
    change, law = INPUTS[bug]
    right = model.MODELS()[name].model
    assert judged(partial(change, right), name, law).outcome == "logic"
    assert judged(right, name, law).outcome == "pass"


def test_what_a_mode_or_a_length_makes_of_a_model_is_told():
    for name, change, law in (("gau_alpha", no_places_of_unilm, "placed"), ("flash", one_more_chunk, "bare")):
        made = model.verdicts("m", partial(change, model.MODELS()[name].model), name, FLOAT64, with_laws=True)
        assert {v.case for v in made if v.failed} == {law}


# Kernels that are right as long as scores are small.
def clipped(scores, mask, kernel):
    return kernel(np.clip(scores, -30, 30), mask)


def capped(scores, mask, kernel):
    return kernel(50 * np.tanh(scores / 50), mask)


def large(scores, mask, kernel):
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(scores) * mask
        return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


@pytest.mark.parametrize("wrong", [clipped, large])
def test_large_scores_tell_a_kernel_of_small_ones(wrong):
    def of(n_min):
        count = partial(softmax_plus, n_min=n_min)
        return partial(clipped, kernel=count) if wrong is clipped else scaled(n_min)

    def scaled(n_min):
        def kernel(scores, mask):
            seen = np.broadcast_to(mask, scores.shape).sum(axis=-1, keepdims=True)
            return large(scores * np.log(np.maximum(seen, n_min)) / np.log(512), mask, None)

        return kernel

    made = model.verdicts("mine", gau_alpha._with(kernel=of), "gau_alpha", FLOAT64, with_laws=True)
    assert {v.case for v in made if v.failed} == {"large_scores"}
    mine = roformer_v2._with(kernel=partial(wrong, kernel=softmax))
    made = model.verdicts("mine", mine, "roformer_v2", FLOAT64, with_laws=True)
    assert {v.case for v in made if v.failed} == {"large_scores"}
    for profile in (FLOAT64, FLOAT32):
        assert judged(
            roformer_v2._with(kernel=partial(capped, kernel=softmax)), "roformer_v2", "large_scores", profile
        ).failed


@pytest.mark.parametrize("name", model.MODELS())
@pytest.mark.parametrize("law", ["large_scores", "fine_weights", "eleven_layers"])
def test_bounds_of_other_weights_say_something(name, law, monkeypatch):
    shares = []

    def within(law, found, due, case, radii, profile):
        shares.extend(radius.max() / np.abs(value).max() for radius, value in zip(radii.values(), due, strict=True))

    monkeypatch.setattr(_encoder, "within", within)
    (check, case), *_ = model.laws(name)[law]
    check(model.MODELS()[name].model, case, model.MODELS()[name].reference, FLOAT64)
    assert len(shares) == (13 if law == "eleven_layers" else 3) and max(shares) < 1e-7


def test_sixteen_bits_hold_no_fine_weights():
    def crash(*_, **__):
        raise AssertionError

    assert judged(crash, "gau_alpha", "fine_weights", BFLOAT16).outcome == "pass"
    assert judged(crash, "gau_alpha", "fine_weights", FLOAT32).outcome == "errored"


# Results that are not the caller's own.
def in_buffers(right):
    held = {}

    def mine(*inputs, **options):
        made = right(*inputs, **options)
        key = tuple((array.shape, array.dtype.str) for array in made)
        for buffer, array in zip(held.setdefault(key, [np.empty_like(a) for a in made]), made, strict=True):
            buffer[...] = array
        return held[key]

    return mine


def remembered(right):
    held = {}

    def mine(weights, *inputs, **options):
        key = tuple(None if a is None else a.tobytes() for a in (*weights.values(), *inputs)), repr(options)
        if key not in held:
            held[key] = right(weights, *inputs, **options)
        return held[key]

    return mine


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(in_buffers, "logits of one call was overwritten by a later one"), (remembered, "law results_stay")],
)
def test_results_are_the_callers_own(wrong, said):
    made = model.verdicts("mine", wrong(gau_alpha.model), "gau_alpha", FLOAT64, with_laws=True)
    (found,) = (v for v in made if v.failed)
    assert (found.case, found.outcome) == ("results_stay", "logic") and said in found.message
    assert judged(in_buffers(flash.model), "flash", "results_stay").outcome == "logic"


def test_results_that_may_not_be_written_are_left_alone():
    def frozen(*inputs, **options):
        made = gau_alpha.model(*inputs, **options)
        for array in made:
            array.flags.writeable = False
        return made

    assert judged(frozen, "gau_alpha", "results_stay").outcome == "pass"
