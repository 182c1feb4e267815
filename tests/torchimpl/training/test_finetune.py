"""Examples of a classification: classes in order, what is held out, and arrays that are refused in words."""

import numpy as np
import pytest
import torch

from refimpl import tokenizer as tokenizers
from torchimpl.training import finetune
from torchimpl.training.run import TrainError


def saved(file, **changes):
    held = {"token_ids": np.arange(40).reshape(10, 4), "labels": np.arange(10) % 3, **changes}
    np.savez(file, **{name: array for name, array in held.items() if array is not None})
    return file


def test_arrays_are_read_and_a_share_is_held_out(tmp_path):
    mask = np.ones((10, 4), dtype=bool)
    file = saved(tmp_path / "a.npz", mask=mask, segment_ids=np.zeros((10, 4), np.int32))
    data = finetune.read(file, None, share=0.3, seed=1)
    assert data.classes == ("0", "1", "2")
    assert (len(data.train.labels), len(data.validation.labels)) == (7, 3)
    rows = torch.cat([data.train.token_ids, data.validation.token_ids])[:, 0]
    assert sorted(rows.tolist()) == list(range(0, 40, 4))
    # A row keeps its label: that of row r is r mod 3.
    for part in data[:2]:
        assert part.labels.tolist() == [(row // 4) % 3 for row in part.token_ids[:, 0].tolist()]
        assert part.mask.dtype == torch.bool and part.segment_ids.dtype == torch.int64
    again, other = (finetune.read(file, None, share=0.3, seed=seed) for seed in (1, 2))
    assert torch.equal(again.validation.token_ids, data.validation.token_ids)
    assert not torch.equal(other.validation.token_ids, data.validation.token_ids)


def test_a_file_for_validation_is_taken_whole(tmp_path):
    files = saved(tmp_path / "a.npz"), saved(tmp_path / "b.npz", labels=np.full(10, 2))
    data = finetune.read(*files)
    assert (len(data.train.labels), data.validation.labels.tolist()) == (10, [2] * 10)
    assert data.train.segment_ids is None and data.train.mask is None
    with pytest.raises(TrainError, match="classes 7 are in the validation and never learnt"):
        finetune.read(files[0], saved(tmp_path / "c.npz", labels=np.full(10, 7)))


def test_classes_are_in_order():
    assert finetune._classes([["b", "a", "10"]]) == ("10", "a", "b")
    assert finetune._classes([["10", "9", "9"], ["9"]]) == ("9", "10")
    with pytest.raises(TrainError, match="two classes or more, received a"):
        finetune._classes([["a", "a"]])


@pytest.mark.parametrize(("change", "told"), [
    ({"labels": np.ones(10)}, r"received labels \(10,\) of float64"),
    ({"labels": np.ones((10, 1), int)}, r"received labels \(10, 1\)"),
    ({"token_ids": np.arange(10)}, r"received token_ids \(10,\)"),
    ({"mask": np.ones((10, 4), int)}, "received mask .* of int64"),
    ({"mask": np.ones((10, 3), bool)}, r"received mask \(10, 3\)"),
    ({"segment_ids": -np.ones((10, 4), int)}, "segment_ids holds -1"),
    ({"labels": None}, "has no labels"),
])  # fmt: skip
def test_arrays_that_are_no_examples(tmp_path, change, told):
    with pytest.raises(TrainError, match=told):
        finetune.read(saved(tmp_path / "a.npz", **change), None)


def test_texts_need_a_tokenizer_and_something_to_hold_out(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\none\ta\ntwo\tb\n")
    with pytest.raises(TrainError, match="a tokenizer is needed"):
        finetune.read(tmp_path / "a.tsv", None)
    file = saved(tmp_path / "a.npz", token_ids=np.ones((1, 4), int), labels=np.ones(1, int))
    with pytest.raises(TrainError, match="two classes"):
        finetune.read(file, None)
    file = saved(tmp_path / "a.npz", token_ids=np.ones((2, 4), int), labels=np.arange(2))
    with pytest.raises(TrainError, match="2 examples, of which 2 are to be held out"):
        finetune.read(file, None, share=0.9)


def test_texts_are_read(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]))
    (tmp_path / "a.tsv").write_text("text\tpair\tlabel\none\ttwo two\tyes\ntwo\tone\tno\none\tone\tno\n")
    data = finetune.read(tmp_path / "a.tsv", tmp_path / "a.tsv", tokenizer=tokenizers.read(tmp_path / "vocab.txt"))
    assert data.classes == ("no", "yes")
    assert data.train.token_ids.tolist() == [[2, 5, 3, 6, 6, 3], [2, 6, 3, 5, 3, 0], [2, 5, 3, 5, 3, 0]]
    assert data.train.labels.tolist() == [1, 0, 0]
    assert data.train.segment_ids.tolist()[0] == [0, 0, 0, 1, 1, 1]
    assert data.train.mask.sum(dim=1).tolist() == [6, 5, 5]


def test_a_file_of_which_texts_are_cut_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]))
    (tmp_path / "a.tsv").write_text("text\tlabel\none two one two\tyes\ntwo one two\tno\none\tno\n")
    (tmp_path / "b.tsv").write_text("text\tlabel\none two one\tyes\n")
    told, tokenizer = [], tokenizers.read(tmp_path / "vocab.txt")
    data = finetune.read(tmp_path / "a.tsv", tmp_path / "b.tsv", tokenizer=tokenizer, length=5, told=told.append)
    assert data.train.mask.sum(dim=1).tolist() == [5, 5, 3]
    assert told == [f"{tmp_path / 'a.tsv'}: 1 of 3 texts cut to --length 5, the longest from 6 tokens"]
