"""Causal models piece by piece: the specification's step, streamed = whole in every format, gradients, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import model as spec
from refimpl.check import DomainError, ShapeError
from refimpl.models import gau_alpha
from tests.refimpl.test_model import BOTH_WAYS, CLASSES, GAU, TIED
from tests.refimpl.test_streams import MOST, WEIGHTS, WHOLE, inputs, pieces_of
from torchimpl.model import Model
from torchimpl.models import _encoder

every = pytest.mark.parametrize("name", WHOLE)


def module_of(name, dtype=torch.float64, **options):
    module = Model(WHOLE[name], **options).to(dtype).eval()
    module.load_weights({key: torch.tensor(array) for key, array in WEIGHTS[name].items()})
    return module


MODULES = {name: module_of(name) for name in WHOLE}


def tensors(*arrays):
    return tuple(None if array is None else torch.tensor(array) for array in arrays)


def streamed(module, given, cuts):
    """The outputs of all pieces put together, and the last state."""
    state, found = module.initial_state(batch=given[0].shape[:-1]), []
    for piece in pieces_of(given, cuts):
        made, state = module.step(state, *piece)
        found.append(made)
    return {key: torch.cat([made[key] for made in found], dim=-2) for key in found[0]}, state


def close(found, due, bound=1e-12):
    due = torch.as_tensor(due)
    scale = max(1.0, due.abs().max().item()) if due.numel() else 1.0
    torch.testing.assert_close(found, due, rtol=0, atol=bound * scale)


@every
@settings(max_examples=15)
@given(
    batch=st.sampled_from([(), (1,), (4,), (2, 3)]),
    cuts=st.lists(st.integers(0, MOST), max_size=5),
    positions=st.sampled_from(["own", "common", "none"]),
    seed=st.integers(0, 9),
)
def test_pieces_give_what_the_whole_gives(name, batch, cuts, positions, seed):
    with torch.no_grad():
        arrays = tensors(*inputs(*batch, positions=positions, seed=seed))
        due = MODULES[name](*arrays)
        found, state = streamed(MODULES[name], arrays, cuts)
    assert tuple(found) == tuple(due) == spec.outputs(WHOLE[name])
    for key, tensor in due.items():
        close(found[key], tensor)
    assert state.tokens == MOST


@every
@pytest.mark.parametrize("batch", [(1,), (4,)])
@pytest.mark.parametrize("positions", ["own", "none"])
def test_every_step_and_every_state_is_that_of_the_specification(name, batch, positions):
    arrays = inputs(*batch, positions=positions)
    due, state = spec.initial_state(WHOLE[name], batch=batch), MODULES[name].initial_state(batch=batch)
    with torch.no_grad():
        for piece in pieces_of(arrays, (1, 3, 3, 8)):
            expected, due = spec.step(WEIGHTS[name], due, *piece, model=WHOLE[name])
            made, state = MODULES[name].step(state, *tensors(*piece))
            for key, array in expected.items():
                close(made[key], array)
            assert state.tokens == due.tokens and len(state.layers) == len(due.layers)
            for kept, expected_kept in zip(state.layers, due.layers, strict=True):
                assert kept._fields == expected_kept._fields
                for one, other in zip(kept, expected_kept, strict=True):
                    close(torch.as_tensor(one).double(), torch.as_tensor(other).double())


@every
def test_token_by_token_without_segments_mask_and_positions(name):
    (ids,) = tensors(inputs(4)[0])
    with torch.no_grad():
        due = MODULES[name](ids)
        for key, tensor in streamed(MODULES[name], (ids,), range(1, MOST))[0].items():
            close(tensor, due[key])


@every
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-4), (torch.float16, 2.0**-7)]
)
def test_other_formats_and_what_a_state_is_kept_in(name, dtype, bound):
    module, arrays = module_of(name, dtype), tensors(*inputs(4))
    kept = module.initial_state(batch=(4,)).layers[0]
    held = [x for x in kept if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert len(held) >= 2 and {x.dtype for x in held} == {dtype}
    with torch.no_grad():
        due = module(*arrays)
        found, state = streamed(module, arrays, (1, 2, 9))
    for key, tensor in due.items():
        assert found[key].dtype == dtype
        close(found[key].float(), tensor.float(), bound)
    kept = state.layers[0]
    # A sum of many 16-bit products is kept in float32, and so is all of float16 between the dense layers.
    wide = {torch.float32} if dtype == torch.float16 and name == "flash" else {dtype, torch.float32}
    assert {x.dtype for x in kept if isinstance(x, torch.Tensor) and x.is_floating_point()} <= wide


@every
def test_a_state_stands_where_the_model_does(name):
    module, ids = module_of(name).to("meta"), torch.zeros(2, 5, dtype=torch.int64, device="meta")
    state = module.initial_state(batch=(2,))
    # Three tokens, then two more: those of flash close a chunk.
    for piece in (None, ids[:, :3], ids[:, 3:]):
        state = state if piece is None else module.step(state, piece)[1]
        assert {x.device.type for kept in state.layers for x in kept if isinstance(x, torch.Tensor)} == {"meta"}


@every
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)],
)
def test_a_state_goes_over_into_the_format_of_the_model(name, before, after):
    arrays = tensors(*inputs(2))
    first, last = pieces_of(arrays, (6,))
    one, other = module_of(name, before), module_of(name, after)
    with torch.no_grad():
        made, state = other.step(one.step(one.initial_state(batch=(2,)), *first)[1], *last)
        due = MODULES[name](*arrays)
    assert made["mlm_logits"].dtype == after and state.tokens == MOST
    close(made["mlm_logits"].double(), due["mlm_logits"][:, 6:], 2.0**-4 if after == torch.bfloat16 else 1e-5)


@every
def test_gradients_go_back_through_the_state(name):
    module, arrays = module_of(name), tensors(*inputs(2))
    toward = torch.randn(2, MOST, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (lambda: module(*arrays), lambda: streamed(module, arrays, (3, 7))[0]):
        module.zero_grad()
        # The tokens of the last piece alone: what they owe to the keys of earlier ones comes through the state.
        (run()["mlm_logits"] * toward)[:, 7:].sum().backward()
        found.append({key: parameter.grad.clone() for key, parameter in module.named_parameters()})
    for key, gradient in found[0].items():
        close(found[1][key], gradient)
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())


@every
def test_the_given_state_stays_as_it_is(name):
    arrays = tensors(*inputs(2, n=10))
    first, last = pieces_of(arrays, (6,))
    with torch.no_grad():
        _, state = MODULES[name].step(MODULES[name].initial_state(batch=(2,)), *first)
        before = [x.clone() for kept in state.layers for x in kept if isinstance(x, torch.Tensor)]
        one, _ = MODULES[name].step(state, *last)
        MODULES[name].step(state, (last[0] + 1) % 23, *last[1:])
        again, _ = MODULES[name].step(state, *last)
    assert torch.equal(one["mlm_logits"], again["mlm_logits"]) and state.tokens == 6
    held = [x for kept in state.layers for x in kept if isinstance(x, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


@pytest.mark.parametrize("name", ["roformer", "gau_alpha"])
def test_attention_weights_are_dropped_out_in_training(name):
    arrays = tensors(*inputs(2))
    still = module_of(name, hidden_dropout=0.0, attention_dropout=0.0).train()
    lossy = module_of(name, hidden_dropout=0.0, attention_dropout=0.5).train()
    due = MODULES[name](*arrays)["mlm_logits"]
    close(streamed(still, arrays, (4,))[0]["mlm_logits"], due)
    assert not torch.allclose(streamed(lossy, arrays, (4,))[0]["mlm_logits"], due, atol=1e-3)


@pytest.mark.parametrize("name", WHOLE)
def test_no_token(name):
    made, state = MODULES[name].step(MODULES[name].initial_state(batch=(2,)), torch.zeros(2, 0, dtype=torch.int64))
    assert made["mlm_logits"].shape == (2, 0, 23) and state.tokens == 0


def test_what_cannot_be_read_piece_by_piece_is_refused(monkeypatch):
    ids = torch.zeros(1, 1, dtype=torch.int64)
    state = MODULES["gau_alpha"].initial_state(batch=(1,))
    for whole, message in (
        (spec.Model(GAU, (TIED,), "bidirectional"), "visible causal"),
        (spec.Model(GAU, (TIED, CLASSES), "causal"), r"heads=\['sequence_classifier'\]"),
    ):
        module = Model(whole)
        with pytest.raises(DomainError, match=f"model.initial_state: .*{message}"):
            module.initial_state(batch=(1,))
        with pytest.raises(DomainError, match=f"model.step: .*{message}"):
            module.step(state, ids)
    monkeypatch.delattr(gau_alpha, "step")
    with pytest.raises(DomainError, match="an encoder with a step, received model='gau_alpha'"):
        MODULES["gau_alpha"].step(state, ids)


@every
def test_a_state_of_something_else_is_refused(name):
    def refused(state, error, message, size=2):
        with pytest.raises(error, match=message):
            MODULES[name].step(state, torch.zeros(size, 1, dtype=torch.int64))

    state = MODULES[name].initial_state(batch=(2,))
    spoken = spec.initial_state(WHOLE[name], batch=(2,))
    for other in (None, spoken, state._replace(tokens=-1), state._replace(tokens=torch.tensor(0))):
        refused(other, DomainError, rf"{name}\.step: expected a state of initial_state or of the step before")
    refused(state._replace(layers=state.layers[:1]), ShapeError, "a state of 2 layers, received layers=1")
    keeps, unlike = ("sums", "roformer") if name == "flash" else ("keys", "flash")
    refused(MODULES[unlike].initial_state(batch=(2,)), DomainError, f"a state that keeps {keeps} in every layer")
    refused(state, ShapeError, "a state of", size=3)
    refused(MODULES[name].initial_state(batch=()), ShapeError, "a state of")
    if name != "flash":
        refused(
            MODULES["gau_alpha" if name != "gau_alpha" else "roformer"].initial_state(batch=(2,)), ShapeError, "state"
        )


def test_a_bidirectional_flash_has_no_step():
    encoder = Model(spec.Model(BOTH_WAYS, (), "bidirectional")).encoder
    with pytest.raises(DomainError, match=r"flash\.step: expected mix causal"):
        encoder.step(_encoder.State(0, ()), torch.zeros(1, 1, dtype=torch.int64))


def test_the_mask_of_the_last_tokens():
    keys = _encoder.Keys(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.tensor([[True, False, True, True]]))
    assert _encoder.seen(keys, 2).int().tolist() == [[[1, 0, 1, 0], [1, 0, 1, 1]]]
    assert np.array_equal(_encoder.seen(keys, 0).shape, (1, 0, 4))
