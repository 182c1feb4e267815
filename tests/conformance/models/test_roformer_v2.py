"""What the judge asks of roformer_v2 alone; what it shares with roformer is tested in test_roformer.py."""

import numpy as np
import pytest

from conformance.budget import Profile
from conformance.models import _encoder, roformer_v2

FLOAT64 = Profile("float64", "strict", "A64")
CASES = {case.name: case for case in roformer_v2.cases()}


def with_a_vector_of_zeros():
    """Token 3 and segment 0 add up to nothing, so that the norm of the embedding divides 0 by almost 0."""
    case = CASES["padded"]
    token, segment = (case.weights[f"embedding.{name}"].copy() for name in ("token", "segment"))
    token[3], segment[0] = -segment[1], segment[1]
    ids, segments = case.token_ids.copy(), case.segments.copy()
    ids[:, 5], segments[:, 5] = 3, 0
    weights = {**case.weights, "embedding.token": token, "embedding.segment": segment}
    return case.with_(weights=weights, token_ids=ids, segment_ids=segments)


def test_a_vector_of_zeros_is_judged():
    case = with_a_vector_of_zeros()
    states = roformer_v2.hidden_states(
        case.weights, case.token_ids, case.segment_ids, case.mask, None, config=case.config, visible="bidirectional"
    )
    assert not states[0][:, 5].any() and states[1][:, 5].any()
    assert _encoder.worst(roformer_v2.model, roformer_v2.reference, case, FLOAT64) <= 0.1

    def undefined(*inputs, **options):
        logits, embedded, *states = roformer_v2.model(*inputs, **options)
        return (logits, np.where(embedded == 0, np.nan, embedded), *states)

    assert _encoder.worst(undefined, roformer_v2.reference, case, FLOAT64) == np.inf


@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_a_bias_or_a_scale(case):
    names = CASES[case].weights.keys()
    assert not [name for name in names if "bias" in name or "scale" in name or ".b_" in name]
    widths = CASES[case].config.embedding_size != CASES[case].config.hidden_size
    assert ("mlm.mapping.kernel" in names, "embedding.mapping.kernel" in names) == (widths, widths)


@pytest.mark.parametrize("changed", ["bias", "scale"])
def test_what_version_one_has_is_found_out(changed):
    def normed(weights, name, x, config):
        # As small as a step of the weights.
        right = roformer_v2._normed(weights, name, x, config)
        return right + 2.0**-7 if changed == "bias" else right * (1 + 2.0**-7)

    model = roformer_v2._with(norm=normed)
    for case in CASES.values():
        assert _encoder.worst(model, roformer_v2.reference, case, FLOAT64) > 1e8
