"""Serving: what an exported file answers, what is refused before it runs, and that torch and onnx stay away."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from refimpl import model as specification
from refimpl.check import DomainError, ShapeError
from refimpl.models import gau_alpha
from refimpl.models._heads import MultipleChoice, Pooler, SequenceClassifier
from runtime import session
from runtime.session import Session, SessionError

onnx = pytest.importorskip("onnx")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = gau_alpha.Config(
    vocab_size=11, segments=3, hidden_size=7, layers=2, expanded_size=13, key_size=4, rotary_base=10000.0,
    n_min=1, epsilon=1e-12,
)  # fmt: skip
MODEL = specification.Model(CONFIG, (SequenceClassifier(labels=5, pooling="mean_of_tokens"),), "bidirectional")
OUTPUTS = ["last_hidden_state", "logits", "embedding"]


def weights(model=MODEL):
    drawn = np.random.default_rng(0)
    shapes = specification.shapes(model)
    return {name: drawn.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from export import model
    from torchimpl import checkpoint

    folder = tmp_path_factory.mktemp("served")
    checkpoint.save(folder / "gau", MODEL, {name: torch.from_numpy(array) for name, array in weights().items()})
    model.export(folder / "gau", folder / "gau.onnx")
    return folder / "gau.onnx"


@pytest.fixture(scope="module")
def loaded(file):
    return Session(file, threads=1)


def request(b=3, n=6):
    drawn = np.random.default_rng(b * n)
    mask = np.arange(n) < np.arange(1, b + 1)[:, None] + 2
    return drawn.integers(0, 11, (b, n)), drawn.integers(0, 3, (b, n)), mask


@pytest.mark.parametrize(("b", "n"), [(1, 1), (3, 6), (2, 130)])
def test_it_answers_as_the_specification(loaded, b, n):
    asked = request(b, n)
    expected = specification.forward(weights(), *asked, model=MODEL)
    made = loaded.run(*asked)
    assert list(made) == list(loaded.outputs) == OUTPUTS
    for name, reference in expected.items():
        assert made[name].dtype == np.float32
        np.testing.assert_allclose(made[name], reference, rtol=0, atol=5e-6 * np.abs(reference).max())


def test_without_segments_and_mask_all_tokens_are_real(loaded):
    ids, _, _ = request()
    expected = specification.forward(weights(), ids, model=MODEL)["logits"]
    np.testing.assert_allclose(loaded.run(ids)["logits"], expected, atol=1e-4)
    made = loaded.run(ids.astype(np.uint8), np.zeros(ids.shape, np.int32), np.ones(ids.shape, bool))
    np.testing.assert_array_equal(made["logits"], loaded.run(ids.tolist())["logits"])


def test_padding_changes_nothing(loaded):
    ids, segments, _ = request(2, 5)
    padded = [np.concatenate([a, np.zeros((2, 4), int)], axis=1) for a in (ids, segments)]
    made = loaded.run(*padded, np.arange(9)[None].repeat(2, 0) < 5)
    np.testing.assert_allclose(made["logits"], loaded.run(ids, segments)["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"token_ids": [[1, 11]]}, DomainError, "token_ids from 0 to 10, received 11 in row 0, column 1"),
        ({"token_ids": [[1, -1]]}, DomainError, "token_ids from 0 to 10, received -1 in row 0, column 1"),
        ({"token_ids": [[1, 1]], "segment_ids": [[0, 3]]}, DomainError, "segment_ids from 0 to 2, received 3"),
        ({"token_ids": [[1.0, 1.0]]}, DomainError, "token_ids must be integers, received dtype float64"),
        ({"token_ids": [[True, False]]}, DomainError, "token_ids must be integers, received dtype bool"),
        ({"token_ids": [["a"]]}, DomainError, "token_ids must be integers"),
        ({"token_ids": [[1, 1]], "mask": [[1, 0]]}, DomainError, "mask must be boolean"),
        ({"token_ids": [[1, 1]], "mask": [[True]]}, ShapeError, r"mask of shape \(1, 1\)"),
        ({"token_ids": [[1, 1]], "segment_ids": [[0]]}, ShapeError, r"segment_ids of shape \(1, 1\)"),
        ({"token_ids": [1, 1]}, ShapeError, r"received token_ids of shape \(2,\)"),
        ({"token_ids": np.zeros((0, 3), int)}, ShapeError, r"1 <= b <= 4"),
        ({"token_ids": np.zeros((3, 0), int)}, ShapeError, r"1 <= n <= 9"),
        ({"token_ids": np.zeros((5, 3), int)}, ShapeError, r"1 <= b <= 4"),
        ({"token_ids": np.zeros((1, 10), int)}, ShapeError, r"1 <= n <= 9"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(file, asked, error, message):
    small = Session(file, threads=1, max_batch=4, max_length=9)
    with pytest.raises(error, match=message):
        small.run(**asked)


def test_calls_from_many_threads_agree_bit_for_bit(loaded):
    asked = [request(3, n) for n in range(1, 17)]
    expected = [loaded.run(*each)["logits"] for each in asked]
    with ThreadPoolExecutor(8) as pool:
        for made, reference in zip(pool.map(lambda each: loaded.run(*each)["logits"], asked), expected, strict=True):
            np.testing.assert_array_equal(made, reference)


def with_metadata(file, target, **changes):
    model = onnx.load(file)
    told = {entry.key: entry.value for entry in model.metadata_props} | {f"refimpl.{k}": v for k, v in changes.items()}
    onnx.helper.set_model_props(model, {key: value for key, value in told.items() if value is not None})
    onnx.save(model, target)
    return target


def test_files_that_are_not_ours_are_told_apart(file, tmp_path):
    with pytest.raises(SessionError, match="there is no file .*absent.onnx"):
        Session(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(SessionError, match="text.onnx cannot be loaded: it is damaged or cut off"):
        Session(tmp_path / "text.onnx")
    with pytest.raises(SessionError, match="has format 3 of a newer refimpl; this one reads 2"):
        Session(with_metadata(file, tmp_path / "newer.onnx", format="3"))
    with pytest.raises(SessionError, match="has format 1 of an older refimpl, .* 2: export the model again"):
        Session(with_metadata(file, tmp_path / "older.onnx", format="1"))
    told = specification.to_dict(MODEL)
    for number, (other, message) in enumerate(
        (
            ("{}", 'missing key "encoder"'),
            ("[]", "expected a JSON object"),
            ("{", "refimpl.model in the metadata is no JSON"),
            (json.dumps({**told, "heads": [{"head": "crf"}]}), "received 'crf'"),
        )
    ):
        with pytest.raises(SessionError, match=f"tells no model that this refimpl knows: .*{message}"):
            Session(with_metadata(file, tmp_path / f"unknown_{number}.onnx", model=other))
    other = json.dumps({**told, "heads": []})
    with pytest.raises(SessionError, match="gives last_hidden_state, logits, embedding; its model gives last_h"):
        Session(with_metadata(file, tmp_path / "other.onnx", model=other))
    for number, change in enumerate(({"format": None}, {"format": "new"}, {"model": None})):
        with pytest.raises(SessionError, match="was not written by `refimpl export`"):
            Session(with_metadata(file, tmp_path / f"foreign_{number}.onnx", **change))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_file_that_is_cut_off_is_refused(file, tmp_path, share):
    data = file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(SessionError, match=r"cut\.onnx"):
        Session(tmp_path / "cut.onnx")


def test_a_provider_that_is_absent_is_named(file):
    with pytest.raises(SessionError, match="has no AbsentExecutionProvider; it has .*CPUExecutionProvider"):
        Session(file, providers=["AbsentExecutionProvider"])
    with pytest.raises(DomainError, match="threads >= 1"):
        Session(file, threads=0)


def test_the_file_tells_what_it_is(loaded):
    assert loaded.model == MODEL
    assert json.loads(loaded.metadata["refimpl.parity"])[0]["bound"] == 1e-12
    assert loaded.threads == 1


CHOOSING = specification.Model(CONFIG, (MultipleChoice("mean_of_tokens"), Pooler("linear")), "causal")


@pytest.fixture(scope="module")
def choosing(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from export import model
    from torchimpl import checkpoint

    folder = tmp_path_factory.mktemp("choosing")
    held = {name: torch.from_numpy(array) for name, array in weights(CHOOSING).items()}
    checkpoint.save(folder / "gau", CHOOSING, held)
    model.export(folder / "gau", folder / "gau.onnx")
    return Session(folder / "gau.onnx", threads=1, max_batch=6, max_length=9)


def test_questions_with_choices(choosing):
    ids, segments, mask = (array.reshape(2, 3, 7) for array in request(6, 7))
    mask[1, 2] = False
    expected = specification.forward(weights(CHOOSING), ids, segments, mask, model=CHOOSING)
    found = choosing.run(ids, segments, mask)
    assert list(found) == list(expected) == ["last_hidden_state", "pooled", "choice_logits"]
    assert found["choice_logits"][1, 2] == -np.inf
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.ones((2, 3), int), ShapeError, r"token_ids \(b, k, n\) with 1 <= b k <= 6 and 1 <= n <= 9"),
        (np.ones((2, 4, 3), int), ShapeError, "1 <= b k <= 6"),
        (np.ones((2, 0, 3), int), ShapeError, "1 <= b k <= 6"),
        (np.full((2, 3, 4), 11), DomainError, "from 0 to 10, received 11 in row 0, choice 0, column 0"),
    ],
)
def test_questions_that_do_not_fit_are_refused(choosing, ids, error, message):
    with pytest.raises(error, match=message):
        choosing.run(ids)


def group(root, name, **files):
    folder = root / name.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)


def test_the_quota_of_control_groups(tmp_path):
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    assert session.cpu_quota(tmp_path / "absent", root) == math.inf
    process.write_text("0::/a/b\n")
    group(root, "/a/b", cpu__max="max 100000\n")
    assert session.cpu_quota(process, root) == math.inf
    group(root, "/a", cpu__max="150000 100000\n")
    assert session.cpu_quota(process, root) == 1.5
    group(root, "/a/b", cpu__max="50000 100000\n")
    assert session.cpu_quota(process, root) == 0.5
    # The host's name of the group means nothing inside a container; its limit stands at the root.
    process.write_text("0::/docker/0123\n")
    group(root, "/", cpu__max="300000 100000\n")
    assert session.cpu_quota(process, root) == 3
    # Version 1.
    process.write_text("5:cpuset:/x\n4:cpu,cpuacct:/x\n")
    group(root, "/cpu/x", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert session.cpu_quota(process, root) == math.inf
    group(root, "/cpu/x", cpu__cfs_quota_us="400000\n", cpu__cfs_period_us="100000\n")
    assert session.cpu_quota(process, root) == 4


@pytest.mark.parametrize(("quota", "threads"), [(math.inf, 4), (2.7, 2), (0.2, 1), (9.0, 4)])
def test_threads_are_those_that_the_process_has(monkeypatch, quota, threads):
    monkeypatch.setattr(session.os, "sched_getaffinity", lambda process: {0, 3, 5, 7}, raising=False)
    monkeypatch.setattr(session, "cpu_quota", lambda: quota)
    assert session.available_threads() == threads


def test_serving_loads_neither_torch_nor_onnx(file):
    script = (
        "import sys, numpy as np\n"
        "from runtime.session import Session\n"
        "print(Session(sys.argv[1]).run(np.ones((1, 3), int))['logits'].shape)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'onnx', 'torchimpl', 'export'}))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(1, 5)", "[]"], done.stderr
