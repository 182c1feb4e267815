"""Whole models under the judge: what is claimed, which state is named, which known wrong model, and every law."""

import json
import math
from dataclasses import replace
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance import model, report, runner
from conformance.adapters import AdapterError, load
from conformance.budget import Profile
from conformance.case import OPERATORS, Unsupported, families
from conformance.command import app
from conformance.models import _encoder, flash, gau_alpha, roformer
from refimpl.models import gau_alpha as spec
from refimpl.models.roformer import DIALECTS
from refimpl.ops.attention_kernel import softmax

FLOAT64, FLOAT32 = (Profile(dtype, "strict", "A64") for dtype in ("float64", "float32"))
COUNTS = {"flash": 14, "flash_quad": 15, "gau_alpha": 11, "roformer": 17, "roformer_v2": 17}
LAWS = {
    "padding": "padded keys visible",
    "unseen_tokens": "every real key visible",
    "positions_shift": "positions count real tokens only",
    "one_by_one": "the mask of the first row for all",
    "segments_enter": "segment ids dropped",
}


def adapter(tmp_path, body, **claims):
    """A file that claims models by expressions, in float64."""
    listed = ", ".join(f"{name!r}: {expression}" for name, expression in claims.items())
    lines = "from conformance.models import _encoder, flash, gau_alpha, roformer\n" + body
    (tmp_path / "mine.py").write_text(f"{lines}\nIMPLEMENTS = {{{listed}}}\nPROFILE = {{'float64': 'strict'}}\n")
    return f"python:{tmp_path / 'mine.py'}"


def cases(name):
    return model.CASES()[name]


def judged(whole, name="gau_alpha", case="padded", profile=FLOAT64):
    return model.judge("mine", whole, name, cases(name)[case], profile)


def test_models_are_counted_and_have_names_of_their_own():
    assert {name: len(model.CASES()[name]) for name in model.MODELS()} == COUNTS
    assert not model.MODELS().keys() & {*OPERATORS(), *families()}
    slugs = [slug for name in COUNTS for slug in (*cases(name), *model.laws(name))]
    assert all(" " not in slug and "," not in slug for slug in slugs)
    assert all(not cases(name).keys() & model.laws(name).keys() for name in COUNTS)


@pytest.mark.parametrize("name", ["spec", "torchimpl"])
def test_both_own_adapters_claim_every_model_where_bounds_say_something(name):
    claimed = {(i.profile.dtype, whole) for i in load(name) for whole in i.models}
    assert claimed == {(dtype, whole) for dtype in ("float64", "float32") for whole in COUNTS}
    assert not any(i.models for i in load(name) if i.variant)


@pytest.mark.parametrize(("name", "names"), [("spec", ["gau_alpha"]), ("torchimpl", ["gau_alpha", "roformer"])])
def test_both_own_adapters_pass(name, names):
    run = runner.check(name, names=names, dtype="float32")
    assert run.ok and {v.outcome for v in run.verdicts} == {"pass"}
    members = sum(bool(i.models) for i in run.implementations)
    assert run.judged == run.promised == members * sum(COUNTS[op] for op in names)
    laws = {(v.op, v.case) for v in run.verdicts if v.kind == "law"}
    assert laws == {(op, law) for op in names for law in model.laws(op)}
    assert {v.kind for v in run.verdicts} == {"model", "law"} and not run.unclaimed


def test_sixteen_bits_say_too_little_to_be_claimed():
    for name in ("flash", "gau_alpha"):
        for dtype in ("bfloat16", "float16"):
            made = [judged(model.MODELS()[name].model, name, c, Profile(dtype, "eager")) for c in cases(name)]
            assert not any(v.failed for v in made)
            share = sum(v.unverifiable for v in made) / sum(v.elements for v in made)
            assert share > (0.6 if dtype == "bfloat16" else 0.1), (name, dtype)


@pytest.mark.parametrize(
    ("name", "bug", "place"),
    [
        ("gau_alpha", "layers swapped", "x_1, behind layer 0, is the first that is off"),
        ("roformer", "positions off by one behind the first, in layer 1", "x_2, behind layer 1, is the first that is"),
        ("gau_alpha", "segment added behind the norm", "x_0, the embedding, is the first that is off"),
        ("flash", "table read as (in, out)", "every hidden state is right, the head is off"),
    ],
)
def test_a_wrong_model_fails_by_its_name_and_the_first_wrong_state(tmp_path, name, bug, place):
    mine = adapter(tmp_path, "", **{name: f"{name}.WRONG[{bug!r}]"})
    run = runner.check(mine, examples=0)
    assert not run.ok and run.judged == run.promised == COUNTS[name]
    told = [runner.message(v, (), mine) for v in run.failures]
    assert told and all(v.outcome == "logic" and bug in v.equals[0] and len(v.equals) == 1 for v in run.failures)
    assert all(text.startswith(f"{name} case ") and place in text and "should be" in text for text in told)
    assert f"Reproduce: refimpl repro {name}/" in told[0]


def test_operators_and_models_stand_in_one_file_and_one_report(tmp_path):
    body = "import numpy as np\ndef relu(x):\n    return np.maximum(x, 0)"
    mine = adapter(tmp_path, body, **{"gau_alpha": "gau_alpha.WRONG['no residual']", "activation.relu": "relu"})
    run = runner.check(mine, names=["gau_alpha", "activation.relu"], examples=1)
    assert run.judged == run.promised > COUNTS["gau_alpha"]
    assert report.rows(run) == ["activation.relu", "gau_alpha"]
    found = report.cells(run)["gau_alpha", "float64"]
    assert (found.cases, found.laws, found.outcome) == (11, 16, "logic") and found.ratio > 1e6
    lines = [json.loads(line) for line in report.json_lines(run).splitlines()]
    assert {line["model"] for line in lines if "model" in line} == set(cases("gau_alpha"))
    suites = {s.get("name"): s for s in ElementTree.fromstring(report.junit(run))}
    assert int(suites["gau_alpha"].get("tests")) == 27 and int(suites["gau_alpha"].get("failures")) == found.failed
    assert "| gau_alpha | logic" in report.markdown(run) and "gau_alpha" in report.html([run])


def test_cases_that_are_lost_are_missed(tmp_path, monkeypatch):
    mine = adapter(tmp_path, "", gau_alpha="gau_alpha.model")
    every = model.verdicts
    monkeypatch.setattr(runner.model, "verdicts", lambda *a, **b: every(*a, **b)[1:])
    run = runner.check(mine, examples=0)
    assert not run.failures and run.judged == 10 and run.promised == 11 and not run.ok


def test_names_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"no operator or family 'roformers', nor a model"):
        runner.check("spec", names=["roformers"])
    with pytest.raises(AdapterError, match="'roformer_v3', which is no operator or model"):
        load(adapter(tmp_path, "", roformer_v3="roformer.model"))
    run = runner.check(adapter(tmp_path, "", flash="flash.model"), names=["roformer"], examples=0)
    assert run.unclaimed == ("roformer",) and not run.ok


def test_an_expected_failure_may_name_a_model(tmp_path):
    (tmp_path / "xfails.txt").write_text("gau_alpha/*  # known\nflash/padded  # idle\nroformers/padded  # misspelt\n")
    lines = runner.read_expected_failures(tmp_path / "xfails.txt")
    run = runner.check(adapter(tmp_path, "", gau_alpha="gau_alpha.WRONG['no rotation']"), expected=lines, examples=0)
    assert not run.failures and run.expected
    assert run.complaints == ("xfails line 3: roformers/padded matches no case that ran",)


def test_a_crash_is_an_error_and_a_refusal_is_skipped():
    def crash(*_, **__):
        raise SystemExit("out of memory")

    def refuse(*_, **__):
        raise Unsupported("no rotation here")

    for verdict in (judged(crash), model.judge_law("mine", crash, "gau_alpha", "padding", FLOAT64)):
        assert verdict.outcome == "errored" and verdict.failed and "out of memory" in verdict.message
    for verdict in (judged(refuse), model.judge_law("mine", refuse, "gau_alpha", "padding", FLOAT64)):
        assert (verdict.outcome, verdict.message) == ("skipped", "no rotation here")
    made = model.verdicts("mine", crash, "gau_alpha", FLOAT64, with_laws=True)
    assert len(made) == 11 + 16 and {v.outcome for v in made if v.case not in ("streamed", "branched")} == {"errored"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda logits, *states: states, "4 results, expected 5 (logits, x_0, x_1, x_2, x_3)"),
        (lambda logits, *states: (logits[..., :1], *states), "logits has shape (4, 11, 1), expected (4, 11, 29)"),
        (lambda logits, *states: (np.nan * logits, *states), "should be"),
    ],
)
def test_results_that_cannot_be_compared_are_wrong(change, told):
    found = judged(lambda *a, **b: change(*gau_alpha.model(*a, **b)))
    assert found.outcome == "logic" and found.ratio == math.inf and told in found.message


@pytest.mark.parametrize("place", [0, 1, 3])
def test_weights_and_inputs_come_back_unmodified(place):
    def careless(*given, **options):
        made = gau_alpha.model(*given, **options)
        array = given[0]["layers.1.w_in"] if place == 0 else given[place]
        array[0] = ~array[0] if array.dtype == bool else array[0] + 1
        return made

    found = judged(careless)
    assert found.outcome == "logic" and "was modified by the call" in found.message
    assert judged(gau_alpha.model).outcome == "pass"


def test_float32_inside_a_float64_model_is_a_fault_of_precision():
    whole = next(i for i in load("spec") if i.name == "spec float32 split").models

    def narrow(weights, *given, name, **options):
        return whole[name]({k: w.astype(np.float32) for k, w in weights.items()}, *given, **options)

    made = model.verdicts("mine", partial(narrow, name="gau_alpha"), "gau_alpha", FLOAT64, with_laws=True)
    assert {v.outcome for v in made if v.failed} == {"precision"}
    assert all(v.failed and not v.equals for v in made if v.kind == "model")
    assert "passes float32-strict" in made[0].message


def test_a_fault_where_float32_says_nothing_is_one_of_logic():
    # As many layers as it takes.
    case = cases("roformer")["padded"]
    config = replace(case.config, layers=9)
    layers = {
        f"layers.{i}.{k[9:]}": w for k, w in case.weights.items() for i in range(9) if k[:9] == f"layers.{i % 3}."
    }
    deep = case.with_(config=config, weights={**case.weights, **layers})

    def late(weights, *given, **options):
        last = "layers.8.feed_forward.w_out"
        return roformer.model({**weights, last: 1.0001 * weights[last]}, *given, **options)

    found = model.judge("mine", late, "roformer", deep, FLOAT64)
    assert found.outcome == "logic" and "x_9, behind layer 8, is the first that is off" in found.message
    assert model.judge("mine", late, "roformer", deep, FLOAT32).unverifiable > 0


@pytest.mark.parametrize("name", COUNTS)
def test_float32_says_something_about_every_element(name):
    for case in cases(name).values():
        assert judged(model.MODELS()[name].model, name, case.slug, FLOAT32).unverifiable == 0


def test_a_wrong_model_that_is_right_on_a_case_explains_nothing():
    def beside(weights, ids, *_, **__):
        case = next(case for case in cases("gau_alpha").values() if np.array_equal(case.token_ids, ids))
        return [ball.value + 1.5 * ball.rad for ball in model.due("gau_alpha", case, FLOAT64).values()]

    made = model.verdicts("mine", beside, "gau_alpha", FLOAT64, with_laws=False)
    assert {v.outcome for v in made} == {"precision"} and all(1.4 < v.ratio < 1.7 and not v.equals for v in made)


def test_every_law_is_held_against_some_case():
    assert {law for name in COUNTS for law in model.laws(name)} == set(_encoder.TELLING)
    for name in COUNTS:
        due = {law.__name__ for law in _encoder.LAWS}
        assert model.laws(name).keys() >= (due - {"padding"} if name == "flash" else due)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("law", LAWS)
def test_the_laws_alone_reject(name, law):
    wrong = model.MODELS()[name].WRONG
    of_flash = {"unseen_tokens": "reads both ways", "positions_shift": "positions within the chunk"}
    bug = of_flash.get(law, LAWS[law]) if name == "flash" else LAWS[law]
    here = "right_padding" if (law, name) == ("padding", "flash") else law
    found = model.judge_law("mine", wrong[bug], name, here, FLOAT64)
    assert found.outcome == "logic" and found.kind == "law" and found.message, bug
    right = model.judge_law("mine", model.MODELS()[name].model, name, here, FLOAT64)
    assert right.outcome == "pass"


@pytest.mark.parametrize("name", COUNTS)
def test_a_text_that_grows_is_the_same_text(name):
    right = model.MODELS()[name].model

    def counts_tokens(weights, ids, *given, **options):
        return tuple(array * (1 + 1e-9 * ids.shape[1]) for array in right(weights, ids, *given, **options))

    found = model.judge_law("mine", counts_tokens, name, "prefix", FLOAT64)
    assert found.outcome == "logic" and "causal law prefix, 1 tokens" in found.message
    assert model.judge_law("mine", right, name, "prefix", FLOAT32).outcome == "pass"


def test_dialects_of_gau_alpha_are_one_where_sixteen_keys_are_seen():
    def added(n_min):
        def kernel(scores, mask):
            count = np.broadcast_to(mask, scores.shape).sum(axis=-1, keepdims=True) + n_min
            return softmax(scores * (np.log(count) / math.log(512)), mask)

        return kernel

    found = model.judge_law("mine", gau_alpha._with(kernel=added), "gau_alpha", "floors_meet", FLOAT64)
    assert found.outcome == "logic" and "floors_meet, 16 tokens" in found.message
    assert {dialect["n_min"] for dialect in spec.DIALECTS.values()} == {1, 16}
    # With fewer keys the dialects are two models.
    case = cases("gau_alpha")["one-layer"]
    one, other = (_encoder.run(gau_alpha.model, case.with_(config=spec_with(case, n)), FLOAT64) for n in (1, 16))
    assert not np.allclose(one[-1], other[-1], rtol=0, atol=1e-3)


def spec_with(case, n_min):
    return replace(case.config, n_min=n_min)


def test_epsilons_of_the_dialects_of_roformer_are_one_in_float32_and_two_in_float64():
    case = cases("roformer")["one-layer"]
    found = []
    for dialect in ("bert4keras-0.11.3", "bert4keras-0.11.5"):
        constants = {name: DIALECTS[dialect][name] for name in ("epsilon", "mlm_epsilon")}
        dialect_case = case.with_(config=replace(case.config, **constants))
        found.append(_encoder.run(roformer.model, dialect_case, FLOAT64))
        assert judged_as(dialect_case, found[-1], FLOAT64)
    assert judged_as(dialect_case, found[0], FLOAT32) and not judged_as(dialect_case, found[0], FLOAT64)


def judged_as(case, results, profile):
    return model.judge("mine", lambda *_, **__: results, "roformer", case, profile).outcome == "pass"


def test_references_are_remembered_by_all_that_they_depend_on():
    case = gau_alpha.cases()[1]
    due = partial(_encoder.finished, gau_alpha.reference)
    kept = due(case, FLOAT64)
    assert due(case, FLOAT64) is kept and due(case.with_(visible="bidirectional"), FLOAT64) is kept
    others = [case.with_(visible="causal"), case.with_(mask=None), case.with_(segment_ids=None)]
    others += [case.with_(positions=case.places * 2), case.with_(token_ids=case.token_ids[::-1])]
    others += [case.with_(config=spec_with(case, 1)), case.with_(weights={k: 0.5 * w for k, w in case.weights.items()})]
    for other in others:
        fresh = gau_alpha.cases()[1].with_(**{n: getattr(other, n) for n in (*_encoder.INPUTS, "visible")})
        fresh = fresh.with_(config=other.config, weights=other.weights)
        assert np.array_equal(due(other, FLOAT64)["logits"].value, due(fresh, FLOAT64)["logits"].value)
        assert not np.array_equal(due(other, FLOAT64)["logits"].value, kept["logits"].value)
    assert due(case, FLOAT32)["logits"].rad.max() > kept["logits"].rad.max()


def command(*words):
    return CliRunner().invoke(app, words)


def test_a_failure_is_shown_again_state_by_state(tmp_path):
    mine = adapter(tmp_path, "", gau_alpha="gau_alpha.WRONG['positions off by one behind the first, in layer 1']")
    done = command("repro", "gau_alpha/padded", mine)
    assert done.exit_code == 1 and "worst elements" in done.stdout and "x_2, behind layer 1" in done.stdout
    assert "error / bound: x_0 " in done.stdout and done.stdout.index("x_3 ") < done.stdout.index("logits ")
    assert command("repro", "gau_alpha/prefix", mine, "--dtype=float64").exit_code == 0
    unknown = command("repro", "gau_alpha/no-such", mine)
    assert unknown.exit_code == 2 and "rows-without-tokens" in unknown.output and "Traceback" not in unknown.output


def test_ops_tells_how_a_model_is_called():
    done = command("ops", "gau_alpha")
    assert done.exit_code == 0 and "model(weights, token_ids, segment_ids, mask, positions" in done.stdout
    assert "cases (11):\n  one-layer\n" in done.stdout and "known wrong models (41):\n  layers swapped\n" in done.stdout
    # Names that hold commas stand on lines of their own.
    assert "\n  positions off by one behind the first, in layer 1\n" in done.stdout and "\n  branched\n" in done.stdout


def test_ops_tells_what_a_step_must_do_and_writes_a_file_to_fill_in(tmp_path):
    done = command("ops", "flash", "--stub", str(tmp_path / "mine.py"))
    assert done.exit_code == 0 and "C3. The given state must not be changed." in done.stdout
    assert "  initial_state(config, *, batch)\n" in done.stdout and "  streamed\n  branched\n" in done.stdout
    options = "segment_ids=None, mask=None, positions=None, *, config"
    assert f"  step(weights, state, token_ids, {options})\n" in done.stdout
    assert "known wrong steps (10):\n" in done.stdout and "\n  chunk closed a token early\n" in done.stdout
    mine = f"python:{tmp_path / 'mine.py'}"
    (empty, _) = load(mine)
    for law in ("right_padding", "streamed", "branched"):
        found = model.judge_law("mine", empty.models["flash"], "flash", law, FLOAT64)
        assert found.outcome == "errored" and "NotImplementedError" in found.message
    text, given = (tmp_path / "mine.py").read_text(), "token_ids, segment_ids, mask, positions"
    # From the last to the first.
    for call in (f"step(weights, state, {given}, ", f"model(weights, {given}, "):
        before, _, behind = text.rpartition("raise NotImplementedError  #")
        text = f"{before}return judge.{call}config=config, visible=visible)  #{behind}"
    (tmp_path / "mine.py").write_text(f"from conformance.models import flash as judge\n{text}")
    made = load(mine)[0].models["flash"]
    assert {v.outcome for v in model.verdicts("mine", made, "flash", FLOAT64, with_laws=True)} == {"pass"}


def test_a_graph_of_a_model_is_refused_by_ops(tmp_path):
    done = command("ops", "flash", "--onnx", str(tmp_path / "flash.onnx"))
    assert done.exit_code == 2 and "expected one operator, received 'flash'" in done.output
    assert not (tmp_path / "flash.onnx").exists()


def test_a_wrong_step_is_named_when_its_law_is_repeated(tmp_path):
    mine = adapter(tmp_path, "", gau_alpha="gau_alpha.WRONG_STREAMS['state updated in place']")
    done = command("repro", "gau_alpha/branched", mine)
    assert done.exit_code == 1 and 'Equals the known bug "state updated in place"' in done.stdout
    assert "go on from one state, which no step may change" in done.stdout
    assert command("repro", "gau_alpha/streamed", mine).exit_code == 0


def test_flash_counts_what_some_rules_forbid():
    rules = {case.name: {law.__name__ for law in flash.laws(case)} for case in flash.cases()}
    assert {name for name, held in rules.items() if "prefix" not in held} == {"article", "paper", "lucidrains"}
