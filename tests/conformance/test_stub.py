"""What `refimpl ops MODEL` and its file to fill in tell: enough to write the model, read from the specification."""

import ast
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from typer.testing import CliRunner

from conformance import model, stub
from conformance.adapters import AdapterError, load
from conformance.case import OPERATORS, Unsupported
from conformance.command import app
from refimpl.models import _encoder
from refimpl.ops import mixed_chunk_attention as mca

NAMES = list(model.MODELS())


def shown(*words):
    done = CliRunner().invoke(app, ["ops", *words])
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_are_told_are_those_of_every_case(name):
    told = dict(line.split(None, 1) for line in stub.weights(name))
    for case in model.CASES()[name].values():
        sizes = {field.name: getattr(case.config, field.name) for field in fields(case.config)}
        equal = sizes.get("embedding_size") == sizes["hidden_size"]
        made = {}
        for weight, text in told.items():
            shape, _, where = text.partition("), ")
            if where and equal:
                continue
            of = eval(shape.rstrip(")") + ")", {}, sizes)
            layers = range(case.config.layers) if ".i." in weight else (0,)
            made |= {weight.replace(".i.", f".{i}."): of for i in layers}
        assert made == {weight: array.shape for weight, array in case.weights.items()}


def test_shapes_are_told_by_the_names_of_sizes():
    assert stub.weights("flash")[4] == "layers.i.w_in        (hidden_size, 2 * expanded_size + key_size)"
    assert stub.weights("flash")[-1] == "final_norm.bias      (hidden_size,)"
    mapped = "mlm.mapping.kernel           (hidden_size, embedding_size), where embedding_size is not hidden_size"
    assert stub.weights("roformer_v2")[-1] == mapped
    assert not any("embedding_size" in line for line in stub.weights("gau_alpha"))


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_config_is_told_with_its_type_and_its_comment(name):
    lines = stub.config_fields(name)
    case = next(iter(model.CASES()[name].values()))
    assert [line.partition(":")[0] for line in lines if line[0] != "#"] == [f.name for f in fields(case.config)]
    assert "layers: int" in lines and "rotary_base: float" in lines
    if name in ("flash", "flash_quad"):
        assert lines[lines.index("epsilon: float") - 1] == "# Of every norm."
        assert 'kernel: "squared_relu" | "laplace"' in lines


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_a_config_may_hold_is_explained(name):
    text = stub.model_documentation(name)
    config = type(next(iter(model.CASES()[name].values())).config)
    for field, kind in get_type_hints(config).items():
        for option in get_args(kind) if get_origin(kind) is Literal else ():
            explained = f'{field} "{option}": ' in text or field == "divisor"
            assert explained, (field, option)
    # Divisors are explained by the comment on the field and its property, or by the table of the module.
    if name == "flash":
        assert "# Scores are divided by the root of key_size (article) or by chunk" in text
        assert "scale: What scores are multiplied by." in text and "1 / math.sqrt(self.key_size)" in text
        assert 'rows "lucidrains": (0, 2, 1, 3)' in text and 'normaliser "su": N_loc = c, N_lin = c times' in text
    if name == "flash_quad":
        assert "| visible | kernel(q kᵀ / n_i), n_i the keys that token i sees" in text


def test_a_model_is_told_by_its_operators_and_its_parts():
    text = stub.model_documentation("roformer")
    listed = text.partition("operators that it is made of")[2].partition("\n\n")[0].splitlines()[1:]
    due = {"attention.multi_head_attention", "attention.project", "attention_kernel.softmax", "norm.layer_norm"}
    assert {line.strip() for line in listed} == due | {"rope.frequencies", "rope.rotate_interleaved"}
    assert due <= OPERATORS().keys()
    assert "feed_forward: activation(x W_in + b_in) W_out + b_out" in text
    assert "logits = layer_norm(activation(hidden W + b)) tableᵀ + bias" in text


@pytest.mark.parametrize("name", NAMES)
def test_inputs_results_and_how_to_decline_are_told_with_the_clauses_and_in_the_file(name):
    text = shown(name)
    head, _, file = text.partition("An adapter to fill in")
    for part in (head, file):
        assert "token_ids: int64 array; (4,11) in the cases" in part and "positions: None or int64 array" in part
        assert (
            "mask: None or bool array" in part and "(logits, state, state, ...): a tuple of 2 + config.layers" in part
        )
        assert "conformance.case.Unsupported" in part and "layers: int" in part and "embedding.token " in part
        modes = '"bidirectional" or "causal"'
        assert f"visible: a string, {modes}" + (", the same" if name == "flash" else ' or "unilm"') in part
        last = "the norm of the last one's: x_0 ... x_(L-1), y." if "flash" in name else "x_0 ... x_L."
        assert last in part
    assert "C1. " in head and "C1. " not in file


def test_a_filled_in_file_may_decline_a_mode(tmp_path):
    text = stub.model_adapter("gau_alpha")
    assert ast.get_docstring(ast.parse(text)).startswith("An adapter of the model gau_alpha")
    assert all(len(line) <= 120 for name in NAMES for line in stub.model_adapter(name).splitlines())
    assert f"raise {Unsupported.__module__}.{Unsupported.__name__}(" in text
    body = "import conformance.case; raise conformance.case.Unsupported('no modes')"
    (tmp_path / "mine.py").write_text(text.replace("raise NotImplementedError", body))
    made = load(f"python:{tmp_path / 'mine.py'}")[0]
    found = model.verdicts("mine", made.models["gau_alpha"], "gau_alpha", made.profile, with_laws=False)
    assert {(v.outcome, v.message) for v in found} == {("skipped", "no modes")}


def test_what_clauses_say_of_padding_and_of_counts_is_what_the_specification_does():
    x, mask = np.ones((1, 11, 2)), np.arange(11)[None] != 4
    counts = {}
    for mode in ("bidirectional", "causal"):

        def kept(reach, mode=mode):
            counts[mode] = [normaliser(reach) for normaliser in (mca.su, mca.paper, mca.visible)]
            return counts[mode][0]

        getattr(mca, mode)(x, x, x, x, x, mask, chunk=3, scale=1.0, kernel=mca.identity, normaliser=kept)
    su, paper, _ = counts["bidirectional"]
    # Eleven tokens are four chunks of three.
    assert np.unique(su.linear).tolist() == [11] and np.unique(paper.linear).tolist() == [12]
    assert "not n rounded up" in mca.su.__doc__ and "su no more than the n" in mca.bidirectional.__doc__
    # The fifth token is padded: the rows of its chunk count 1, 1 and 2 keys, itself not among them.
    assert counts["causal"][2].local.ravel()[:6].tolist() == [1, 2, 3, 1, 1, 2]
    assert "j <= i" in mca.visible.__doc__
    hidden = np.array([[True, False, True]])
    assert _encoder.causal(hidden, None)[0].astype(int).tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert "A padded one does not see itself" in _encoder.causal.__doc__
    text = shown("flash")
    for said in ("A padded one does not see itself", "not n rounded up", "the visible keys j <= i", "none sees itself"):
        assert said in text


def test_a_step_that_cannot_be_called_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def whole(*_, **__): ...\nwhole.step = None\nIMPLEMENTS = {'gau_alpha': whole}\n"
    )
    with pytest.raises(AdapterError, match=r"the step of IMPLEMENTS\['gau_alpha'\] is not callable: None"):
        load(f"python:{tmp_path / 'mine.py'}")


@pytest.mark.parametrize("profile", ["'A32'", "{'float32': 'A32'}"])
def test_an_angle_class_alone_is_refused_with_the_form_that_is_due(tmp_path, profile):
    (tmp_path / "mine.py").write_text(f"IMPLEMENTS = {{'norm.rms_norm': len}}\nPROFILE = {profile}\n")
    with pytest.raises(AdapterError, match='"strict A32"'):
        load(f"python:{tmp_path / 'mine.py'}")
