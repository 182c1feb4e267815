"""The known wrong steps are named for steps that are written another way, and no other step by their names."""

import math

import numpy as np
import pytest

from conformance import model, runner
from conformance.adapters import load
from conformance.budget import Profile
from conformance.models import flash, gau_alpha
from conformance.models._encoder import INPUTS, Streaming
from conformance.models._streams import Stream

FLOAT64, FLOAT32 = (Profile(dtype, "strict", "A64") for dtype in ("float64", "float32"))
IGNORED = "given positions ignored in a piece"


@pytest.fixture(scope="module", autouse=True)
def _known_once():
    """What a known wrong step or model gives on a stream is the same for every test."""
    found, kept = Stream.found, {}
    known = {id(m.call) for name in model.MODELS() for m in (*model.wrong_steps(name), *model.wrong_models(name))}

    def once(stream, wrong, profile):
        if id(wrong) not in known:
            return found(stream, wrong, profile)
        inputs = [None if a is None else a.tobytes() for a in (getattr(stream.told, name) for name in INPUTS)]
        key = id(wrong), stream.told.config, str(stream.rows), stream.pieces, stream.once, *inputs, profile
        if key not in kept:
            kept[key] = found(stream, wrong, profile)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "found", once)
        yield


def told(step, name="gau_alpha", profile=FLOAT64):
    """What the judge says of a right model with a step of one's own, by law: the outcome and the bugs it names."""
    mine = Streaming(model.MODELS()[name].model, step)
    found = {law: model.judge_law("mine", mine, name, law, profile) for law in ("streamed", "branched")}
    assert all(v.outcome in ("pass", "logic") for v in found.values()), found
    return {law: v.equals if v.failed else "pass" for law, v in found.items()}


def told_or_not(ids, segments, mask):
    """Segments and mask of a piece: segment 0 and real where nothing is told."""
    return np.zeros_like(ids) if segments is None else segments, np.ones(ids.shape, bool) if mask is None else mask


def in_every_layer(change):
    def changed(layers, tokens):
        return [change(memory) for memory in layers], tokens

    return changed


# GAU-alpha's step written anew: token by token over lists, one for each layer, of (key, value, which rows are real).
# What becomes of the layers and of the count of tokens where a piece begins.
KNOWN = {
    "second layer starts anew in every piece": lambda layers, tokens: ([layers[0], []], tokens),
    "positions start anew in every piece": lambda layers, tokens: (layers, 0),
    "keys of the last piece forgotten": in_every_layer(lambda memory: []),
    "padding of earlier pieces visible": in_every_layer(lambda memory: [(k, v, real | True) for k, v, real in memory]),
}
OTHERS = {
    "first layer starts anew": lambda layers, tokens: ([[], layers[1]], tokens),
    "layers exchanged": lambda layers, tokens: (layers[::-1], tokens),
    "positions go on one further": lambda layers, tokens: (layers, tokens + 1),
    "positions backwards": lambda layers, tokens: (layers, -tokens),
    "last token forgotten": in_every_layer(lambda memory: memory[:-1]),
    "first token forgotten": in_every_layer(lambda memory: memory[1:]),
    "four tokens kept": in_every_layer(lambda memory: memory[-4:]),
    "last token twice": in_every_layer(lambda memory: memory + memory[-1:]),
    "values decay": in_every_layer(lambda memory: [(k, 0.999 * v, real) for k, v, real in memory]),
    "keys negated": in_every_layer(lambda memory: [(-k, v, real) for k, v, real in memory]),
    "keys of another row": in_every_layer(lambda memory: [(k[::-1], v[::-1], real[::-1]) for k, v, real in memory]),
    "padding of the first row": in_every_layer(
        lambda memory: [(k, v, real & False | real[:1]) for k, v, real in memory]
    ),
}
# The state itself is written: all of it, or what every layer keeps; by slots in the place of adding.
KNOWN_SHARED = {
    "state updated in place": {"layers": (0, 1), "tokens": True},
    "layers updated in place, tokens counted by value": {"layers": (0, 1)},
    "one buffer of keys for all continuations": {"layers": (0, 1), "slots": True},
}
OTHERS_SHARED = {
    "first layer in place": {"layers": (0,)},
    "tokens in place": {"tokens": True},
    "buffer of the second layer": {"layers": (1,), "slots": True},
}


def steps(change=None, *, shared=None, forgets=False, placed=True, names="qk", counts=False):
    """A right step, or one with a fault."""
    shared = {"layers": (), "tokens": False, "slots": False} | (shared or {})

    def normed(x, config):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.epsilon)

    def turned(x, places, config):
        angles = places[:, None] * config.rotary_base ** (-np.arange(0, config.key_size, 2) / config.key_size)
        turns = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack([turns.real, turns.imag], axis=-1).reshape(x.shape).astype(x.dtype)

    def attended(q, seen, config):
        keys, values, real = (np.stack(parts, axis=1) for parts in zip(*seen, strict=True))
        scores = (keys @ q[..., None])[..., 0] / math.sqrt(config.key_size)
        count = np.full(len(q), len(seen)) if counts else real.sum(axis=1)
        scores = scores * (np.log(np.maximum(count, config.n_min)) / math.log(512))[:, None]
        share = np.where(real, np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
        share = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-30)
        return (share[:, None].astype(q.dtype) @ values)[:, 0]

    def read(w, x, real, places, layers, slot, config):
        """The results for one token of every row."""
        states = [normed(x, config)]
        for i, memory in enumerate(layers):
            y = states[-1] @ w[f"layers.{i}.w_in"]
            u, v, z = np.split(y / (1 + np.exp(-y)), [config.expanded_size, 2 * config.expanded_size], axis=1)
            q, k = (turned(z * w[f"layers.{i}.gamma_{name}"], places, config) for name in names)
            # A buffer has slots, which another text may have written; a list grows.
            end = slot if shared["slots"] and i in shared["layers"] else len(memory)
            memory[end : end + 1] = [(k, v, real)]
            added = (u * attended(q, memory[: end + 1], config)) @ w[f"layers.{i}.w_out"]
            states.append(normed(states[-1] + added, config))
        return states[-1] @ w["embedding.token"].T, *states

    def step(weights, state, ids, segments, mask, positions, *, config, visible):
        (b, n), wide = ids.shape, np.result_type(*weights.values(), np.float32)
        w = {name: array.astype(wide) for name, array in weights.items()}
        segments, mask = told_or_not(ids, segments, mask)
        layers, count = ([[] for _ in range(config.layers)], [0]) if state is None else state
        layers = [memory if i in shared["layers"] else list(memory) for i, memory in enumerate(layers)]
        count = count if shared["tokens"] else list(count)
        if change and count[0]:
            layers, count[0] = change(layers, count[0])
        if forgets and n == 0:
            layers = [[] for _ in layers]
        places = np.broadcast_to(count[0] + np.arange(n) if positions is None or not placed else positions, (b, n))
        x = w["embedding.token"][ids] + w["embedding.segment"][segments]
        made = [read(w, x[:, t], mask[:, t], places[:, t], layers, count[0] + t, config) for t in range(n)]
        count[0] += n
        # Of no token there is nothing, of the widths that the results have.
        results = [np.zeros((b, 0, config.vocab_size)), *[x] * (config.layers + 1)]
        if made:
            results = [np.stack(parts, axis=1) for parts in zip(*made, strict=True)]
        return results, (layers, count)

    return step


@pytest.mark.parametrize("profile", [FLOAT64, FLOAT32], ids=str)
def test_a_right_step_written_another_way_passes(profile):
    assert told(steps(), profile=profile) == {"streamed": "pass", "branched": "pass"}


@pytest.mark.parametrize("bug", KNOWN)
def test_what_a_step_keeps_wrongly_is_named(bug):
    assert told(steps(KNOWN[bug])) == {"streamed": (bug,), "branched": "pass"}


@pytest.mark.parametrize("bug", KNOWN_SHARED)
def test_a_state_that_a_step_changes_is_named(bug):
    assert told(steps(shared=KNOWN_SHARED[bug])) == {"streamed": "pass", "branched": (bug,)}


def test_float32_is_enough_to_name_a_step():
    bug, shared = "padding of earlier pieces visible", "one buffer of keys for all continuations"
    assert told(steps(KNOWN[bug]), profile=FLOAT32) == {"streamed": (bug,), "branched": "pass"}
    assert told(steps(shared=KNOWN_SHARED[shared]), profile=FLOAT32) == {"streamed": "pass", "branched": (shared,)}


def test_a_step_that_ignores_positions_or_computes_as_a_wrong_model_is_named():
    assert told(steps(placed=False)) == {"streamed": (IGNORED,), "branched": "pass"}
    # The whole is right: it is the layer of the step that is written wrongly.
    assert told(steps(names="kq")) == {"streamed": ("gammas exchanged",), "branched": "pass"}


def test_two_faults_are_named_by_law():
    both = steps(KNOWN["positions start anew in every piece"], shared=KNOWN_SHARED["state updated in place"])
    assert told(both) == {"streamed": ("positions start anew in every piece",), "branched": ()}


@pytest.mark.parametrize("bug", OTHERS)
def test_another_fault_has_no_name(bug):
    assert told(steps(OTHERS[bug])) == {"streamed": (), "branched": "pass"}


@pytest.mark.parametrize("bug", OTHERS_SHARED)
def test_another_state_that_is_changed_has_no_name(bug):
    assert told(steps(shared=OTHERS_SHARED[bug])) == {"streamed": "pass", "branched": ()}


def test_what_happens_in_one_stream_only_has_no_name():
    assert told(steps(forgets=True)) == {"streamed": (), "branched": "pass"}
    assert told(steps(counts=True)) == {"streamed": (), "branched": "pass"}


def test_sixteen_bits_tell_that_a_step_is_wrong_but_not_how():
    profile = Profile("bfloat16", "eager")
    assert told(steps(KNOWN["keys of the last piece forgotten"]), profile=profile) == {
        "streamed": (),
        "branched": "pass",
    }
    assert told(steps(shared=OTHERS_SHARED["first layer in place"]), profile=profile)["branched"] == ()


# FLASH's step written anew: the whole text is read again, of which some is not kept as it was.
def hidden(text, count):
    """So many hidden tokens behind a text of ids, segments, mask and positions."""
    return [np.pad(array, ((0, 0), (0, count))) for array in text]


def cut(text, start, stop):
    return [array[:, start:stop] for array in text]


def closed(text, chunk):
    """The length of the chunks that are complete."""
    return text[0].shape[1] // chunk * chunk


def backwards(text, chunk):
    end = closed(text, chunk)
    return [np.concatenate([array[:, :end], array[:, end:][:, ::-1]], axis=1) for array in text]


KNOWN_CHUNKS = {
    "open chunk dropped": lambda text, chunk: cut(text, 0, closed(text, chunk)),
    "chunk closed a token early": lambda text, chunk: (
        hidden(text, 1) if text[0].shape[1] % chunk == chunk - 1 else text
    ),
}
OTHER_CHUNKS = {
    "every piece closes its chunk": lambda text, chunk: hidden(text, -text[0].shape[1] % chunk),
    "last token of the open chunk dropped": lambda text, chunk: cut(
        text, 0, max(closed(text, chunk), text[0].shape[1] - 1)
    ),
    "first chunk dropped": lambda text, chunk: cut(text, chunk if closed(text, chunk) > chunk else 0, None),
    "open chunk backwards": backwards,
}


def again(change=lambda text, chunk: text, *, in_place=False):
    """A right step, or one with a fault."""

    def step(weights, state, ids, segments, mask, positions, *, config, visible):
        b, n = ids.shape
        segments, mask = told_or_not(ids, segments, mask)
        state = {"text": cut([ids, segments, mask, ids], 0, 0), "tokens": 0} if state is None else state
        state = state if in_place else dict(state)
        places = np.broadcast_to(state["tokens"] + np.arange(n) if positions is None else positions, (b, n))
        pairs = zip(state["text"], (ids, segments, mask, places), strict=True)
        text = [np.concatenate(pair, axis=1) for pair in pairs]
        # Nothing is no text.
        whole = hidden(text, int(text[0].shape[1] == 0))
        made = flash.model(weights, *whole, config=config, visible=visible)
        state["text"], state["tokens"] = change(text, config.chunk), state["tokens"] + n
        return [array[:, text[0].shape[1] - n : text[0].shape[1]] for array in made], state

    return step


def test_a_text_that_is_read_again_passes():
    assert told(again(), "flash") == {"streamed": "pass", "branched": "pass"}


@pytest.mark.parametrize("bug", KNOWN_CHUNKS)
def test_an_open_chunk_that_is_kept_wrongly_is_named(bug):
    assert told(again(KNOWN_CHUNKS[bug]), "flash") == {"streamed": (bug,), "branched": "pass"}


def test_a_text_that_is_kept_in_place_is_named():
    assert told(again(in_place=True), "flash") == {"streamed": "pass", "branched": (STATE,)}


@pytest.mark.parametrize("bug", OTHER_CHUNKS)
def test_an_open_chunk_that_is_kept_in_another_way_has_no_name(bug):
    assert told(again(OTHER_CHUNKS[bug]), "flash") == {"streamed": (), "branched": "pass"}


# Steps in PyTorch.
POSITIONS, STATE, SUMS = (
    "positions start anew in every piece",
    "state updated in place",
    "sums over chunks updated in place",
)


def in_torch(name, bug, dtype="float32"):
    own = next(i for i in load("torchimpl") if i.models and i.profile.dtype == dtype).models[name]

    def summed(before, now):
        """The sums of a layer, in the tensors that held them before."""
        summary, counted = before.summary.copy_(now.summary), before.counted.copy_(now.counted)
        return now._replace(summary=summary, counted=counted)

    def step(weights, state, *given, **options):
        box = [None] if state is None else state
        made, now = own.step(weights, box[0], *given, **options)
        if bug == POSITIONS:
            now = now._replace(tokens=0)
        if bug == SUMS and box[0] is not None:
            now = now._replace(layers=tuple(map(summed, box[0].layers, now.layers)))
        if bug == STATE:
            box[0] = now
        return made, box if bug == STATE else [now]

    return step


@pytest.mark.parametrize("name", model.MODELS())
def test_wrong_steps_of_every_model_are_named(name):
    assert told(in_torch(name, POSITIONS), name, FLOAT32) == {"streamed": (POSITIONS,), "branched": "pass"}
    assert told(in_torch(name, STATE), name, FLOAT32) == {"streamed": "pass", "branched": (STATE,)}


@pytest.mark.parametrize("profile", [FLOAT64, FLOAT32], ids=str)
def test_sums_that_a_step_changes_are_named(profile):
    assert told(in_torch("flash", SUMS, profile.dtype), "flash", profile) == {"streamed": "pass", "branched": (SUMS,)}


@pytest.mark.parametrize("name", model.MODELS())
def test_a_known_wrong_step_is_called_by_its_own_name_only(name):
    for bug, wrong in model.MODELS()[name].WRONG_STREAMS.items():
        law = "branched" if bug in (*KNOWN_SHARED, SUMS) else "streamed"
        assert model.judge_law("mine", wrong, name, law, FLOAT64).equals == (bug,)


def test_every_known_wrong_step_has_a_stranger():
    strangers = {*KNOWN, *KNOWN_SHARED, *KNOWN_CHUNKS, IGNORED, SUMS}
    assert strangers == {bug for module in model.MODELS().values() for bug in module.WRONG_STREAMS}


def test_a_named_step_is_a_fault_of_logic_beside_one_of_precision():
    right, bug = gau_alpha.model, "second layer starts anew in every piece"

    def coarse(weights, *given, **options):
        return tuple(np.float32(array) for array in right(weights, *given, **options))

    mine = Streaming(coarse, gau_alpha.WRONG_STREAMS[bug].step)
    made = {v.case: v for v in model.verdicts("mine", mine, "gau_alpha", FLOAT64, with_laws=True)}
    assert {v.outcome for v in made.values() if v.failed and v.kind == "model"} == {"precision"}
    assert (made["streamed"].outcome, made["streamed"].equals) == ("logic", (bug,))


# What a reader sees.
def test_a_report_names_the_wrong_step(tmp_path):
    bugs = "second layer starts anew in every piece", "state updated in place"
    for bug, law in zip(bugs, ("streamed", "branched"), strict=True):
        (tmp_path / "mine.py").write_text(
            "from conformance.models import gau_alpha\n"
            "def mine(*given, **options):\n    return gau_alpha.model(*given, **options)\n"
            f"mine.step = gau_alpha.WRONG_STREAMS[{bug!r}].step\n"
            "IMPLEMENTS = {'gau_alpha': mine}\nPROFILE = {'float64': 'strict'}\n"
        )
        run = runner.check(f"python:{tmp_path / 'mine.py'}", names=["gau_alpha"])
        (failure,) = run.failures
        assert (failure.kind, failure.case, failure.equals) == ("law", law, (bug,)) and not run.ok
        assert f'Equals the known bug "{bug}".' in runner.message(failure)
        assert f" {law}" in failure.message and "should be" in failure.message
