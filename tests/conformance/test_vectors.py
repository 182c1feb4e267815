"""The frozen corpus: nothing is added, lost or changed without being seen."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from conformance import vectors
from conformance.case import Case, cases
from conformance.vectors import CorpusError

OP = "norm.rms_norm"


@pytest.fixture
def folder(tmp_path):
    """A copy of the corpus of one operator."""
    vectors.export(tmp_path / "corpus", names=[OP])
    return tmp_path / "corpus"


def first(folder):
    return folder / vectors.read_manifest(folder)["cases"][0]["file"]


def test_a_copy_is_whole_and_minimal(folder):
    assert {e["operator"] for e in vectors.verify(folder)["cases"]} == {OP}
    assert len(vectors.load(folder)) == vectors.read_manifest(folder)["minimum"] >= 6


def test_export_refuses_an_existing_folder(folder):
    with pytest.raises(CorpusError, match="exists already"):
        vectors.export(folder)


def test_a_flipped_byte_is_refused(folder):
    data = bytearray(first(folder).read_bytes())
    data[-1] ^= 1
    first(folder).write_bytes(data)
    with pytest.raises(CorpusError, match="SHA-256"):
        vectors.verify(folder)
    with pytest.raises(CorpusError, match="SHA-256"):
        vectors.load(folder)


def test_a_deleted_file_is_refused(folder):
    first(folder).unlink()
    with pytest.raises(CorpusError, match="missing"):
        vectors.load(folder)


def test_a_longer_file_is_refused_before_it_is_read(folder):
    with first(folder).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CorpusError, match="bytes, expected"):
        vectors.load(folder)


def test_a_stray_file_is_refused(folder):
    (folder / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CorpusError, match="not in the manifest"):
        vectors.verify(folder)


def edited(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_case_cannot_be_dropped_from_the_manifest(folder):
    edited(folder, lambda m: m["cases"].pop())
    with pytest.raises(CorpusError, match="promises"):
        vectors.load(folder)


def test_a_name_may_not_leave_the_folder(folder):
    edited(folder, lambda m: m["cases"][0].update(file="../../etc/passwd"))
    with pytest.raises(CorpusError, match="leaves the corpus"):
        vectors.load(folder)


def test_an_unknown_schema_is_refused(folder):
    edited(folder, lambda m: m.update(schema=99))
    with pytest.raises(CorpusError, match="schema"):
        vectors.load(folder)


def test_no_manifest(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(CorpusError, match="no manifest"):
        vectors.load(folder)


def test_a_vector_comes_back_as_it_was_built(folder):
    case = next(c for c in cases([OP]) if c.name == "dense")
    built, read = vectors.build(case), vectors.load_case(f"{OP}/dense", folder)
    assert read.case.dtypes == case.dtypes and read.case.clauses == case.clauses
    for name, value in built.expected.items():
        assert np.array_equal(read.expected[name], value)
    for profile, named in built.bounds.items():
        for name, value in named.items():
            assert np.array_equal(read.bounds[profile][name], value)


def test_unknown_case_names_its_neighbours(folder):
    with pytest.raises(CorpusError, match="dense"):
        vectors.load_case(f"{OP}/no-such-case", folder)


def test_the_frozen_corpus_is_whole_and_small():
    manifest = vectors.verify()
    assert sum(e["bytes"] for e in manifest["cases"]) <= 10_000_000
    assert manifest["minimum"] == len(manifest["cases"]) == len(cases())


def test_no_lazy_answer_passes_any_vector():
    assert vectors.weaknesses(vectors.load()) == []


def test_weak_vectors_are_found():
    zeros = Case(OP, "zeros", {"x": np.zeros((2, 3)), "epsilon": 1e-6})
    assert any("all zeros" in line for line in vectors.weaknesses([vectors.build(zeros)]))
    constant = Case(OP, "constant", {"x": np.full((2, 3), 2.0), "epsilon": 0.0})
    assert any("mean everywhere" in line for line in vectors.weaknesses([vectors.build(constant)]))


def test_regeneration_is_byte_identical(tmp_path):
    """The first cases of every operator; `refimpl vectors regenerate --compare` does all of them."""
    seen: dict[str, int] = {}
    stored = {e["id"]: e for e in vectors.read_manifest()["cases"]}
    for case in cases():
        seen[case.op] = seen.get(case.op, 0) + 1
        if seen[case.op] <= 2:
            entry, data = vectors._serialised(case)
            assert entry == stored[case.id], case.id
            assert data == (vectors.FOLDER / entry["file"]).read_bytes(), case.id


def test_every_multilinear_operator_has_five_exact_vectors():
    from conformance.case import OPERATORS

    entries = vectors.read_manifest()["cases"]
    for name, operator in OPERATORS().items():
        exact = sum(e["operator"] == name and e["exact"] for e in entries)
        assert exact >= 5 or not operator.multilinear, f"{name}: {exact} exact vectors"


def test_round_up_never_rounds_down():
    values = np.array([0.0, 1.0, 1 + 2.0**-20, 3e-45, 1e-60, np.inf])
    up = vectors.round_up(values).astype(np.float64)
    assert (up >= values).all() and up[0] == 0 and up[1] == 1 and up[2] <= 1 + 2.0**-11 and np.isinf(up[5])


def test_an_interrupted_regeneration_leaves_the_corpus_alone(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    vectors.export(folder, names=[OP])
    before = sorted(p.name for p in tmp_path.iterdir())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vectors, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vectors.regenerate(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    vectors.verify(folder)
    shutil.rmtree(folder)


def rooted(change):
    """A change of the manifest whose root was computed anew."""

    def apply(manifest):
        change(manifest)
        manifest["sha256"] = vectors._root(manifest["cases"])

    return apply


@pytest.mark.parametrize("change", [{"exact": True}, {"dtypes": []}, {"ill_conditioned": True}, {"attributes": {}}])
def test_what_a_file_is_for_is_part_of_the_root(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(i for i, e in enumerate(manifest["cases"]) if not e["exact"])
    edited(folder, lambda m: m["cases"][entry].update(change))
    with pytest.raises(CorpusError, match="root"):
        vectors.load(folder)


def test_a_case_may_not_stand_twice_in_the_manifest(folder):
    edited(folder, rooted(lambda m: m["cases"].__setitem__(1, m["cases"][0])))
    with pytest.raises(CorpusError, match="twice"):
        vectors.load(folder)


def test_a_name_may_not_go_out_and_come_back(folder, tmp_path):
    """Inside the folder when read; a copy of the corpus would write it beside the target."""
    edited(folder, rooted(lambda m: m["cases"][0].update(file=f"a/../../corpus/{m['cases'][0]['file']}")))
    with pytest.raises(CorpusError, match="leaves the corpus"):
        vectors.export(tmp_path / "copy" / "deep", folder)


@pytest.mark.parametrize(
    "content", ["[]", '{"schema": 1}', '{"schema": 1, "cases": [{}]}', '{"schema": 1, "cases": 3}']
)
def test_what_is_not_a_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match="not a manifest"):
        vectors.verify(folder)


def test_an_empty_corpus_is_not_a_corpus(folder):
    edited(folder, rooted(lambda m: m.update(cases=[], operators={}, minimum=0)))
    with pytest.raises(CorpusError, match="promises 0 cases"):
        vectors.verify(folder)


def test_a_copy_of_nothing_is_refused(folder, tmp_path):
    with pytest.raises(CorpusError, match="no case of rope"):
        vectors.export(tmp_path / "copy", folder, ["rope"])
    assert not (tmp_path / "copy").exists()


def replaced(folder, data):
    """The first file with other content, and a manifest that agrees."""
    first(folder).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edited(folder, rooted(lambda m: m["cases"][0].update(sha256=digest, bytes=len(data))))


def test_a_truncated_file_with_the_right_hash_is_refused(folder):
    replaced(folder, first(folder).read_bytes()[:-4])
    with pytest.raises(CorpusError, match="cannot be read"):
        vectors.load(folder)


def test_a_file_without_a_bound_that_it_owes_is_refused(folder):
    from safetensors.numpy import load, save

    held = load(first(folder).read_bytes())
    key = next(k for k in held if k.startswith("bound/") and k.endswith("float32-strict"))
    replaced(folder, save({k: v for k, v in held.items() if k != key}))
    with pytest.raises(CorpusError, match="no usable bound for float32-strict"):
        vectors.load(folder)
    replaced(folder, save(held | {key: np.full_like(held[key], np.nan)}))
    with pytest.raises(CorpusError, match="no usable bound"):
        vectors.load(folder)


def test_an_exchange_that_stops_half_way_puts_the_old_corpus_back(folder, tmp_path, monkeypatch):
    fresh = tmp_path / ".vectors-new"
    shutil.copytree(folder, fresh)
    (fresh / "new").touch()
    replace = vectors.os.replace

    def stopped(source, target):
        if source == fresh:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(vectors.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        vectors._put(fresh, folder)
    vectors.verify(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".vectors-new", "corpus"]
