"""`refimpl train`: what is asked for is trained, a stopped run is taken up, and what cannot be is refused in words."""

import csv
import io
import json
import re
import signal
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from refimpl import cli
from refimpl import model as specification
from refimpl.check import DomainError
from tests.torchimpl.test_layers import CONFIGS
from torchimpl import checkpoint, lora
from torchimpl import model as modules
from torchimpl.training import command, distributed, job, journal, loop, run

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without weights, texts that repeat two letters in turn, and classes: the first letter is a or not."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("roformer_v2", "gau_alpha", "flash", "flash_quad"):
        specification.write(specification.Model(CONFIGS[name], (), "bidirectional"), folder / f"{name}.json")
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    random = np.random.default_rng(0)
    pairs = [random.choice(list("abcd"), 2, replace=False).tolist() for _ in range(60)]
    (folder / "corpus.txt").write_text("\n".join(" ".join(pair * 4) for pair in pairs))
    rows = [f"{' '.join(pair * 2)}\t{'yes' if pair[0] == 'a' else 'no'}" for pair in pairs]
    (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]))
    ids = np.array([[TOKENS.index(letter) for letter in pair * 4] for pair in pairs])
    np.savez(folder / "corpus.npz", token_ids=ids)
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """test_journal.py draws; a picture takes as long as a hundred steps of these models."""
    monkeypatch.setattr(journal, "plotted", lambda steps, epochs: b"<svg/>")


def asked(files, *words, data="rows.tsv", out, task="finetune", model="roformer_v2.json", stop=None):
    """stop: the step behind which Ctrl-C is pressed."""
    arguments = ["train", task, files / model if isinstance(model, str) else model, files / data, out, *words]
    real = command.said

    def stopping(now):
        if now.step == stop:
            raise KeyboardInterrupt
        return real(now)

    with pytest.MonkeyPatch.context() as patched:
        if stop is not None:
            patched.setattr(command, "SECONDS", 0.0)
            patched.setattr(command, "said", stopping)
        return CliRunner().invoke(command.app, [str(word) for word in arguments])


def test_a_classifier_is_trained_from_texts(files, tmp_path):
    words = ("--tokenizer", files / "vocab.txt", "--epochs", 4, "--batch-size", 9, "--learning-rate", 0.02,
             "--validation", files / "rows.tsv", "--pooling", "first_token", "--dropout", 0.0)  # fmt: skip
    done = asked(files, *words, out=tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "weights trained on 60 examples in 28 steps (cpu, float32)" in done.output
    assert "step 28/28, loss" in done.output and "tokens/s, 0:00:00 left" in done.output
    evaluations = re.findall(r"epoch (\d), step (\d+): loss \d\.\d{4}, accuracy \d\.\d{4} \(validation\)", done.output)
    assert evaluations == [("1", "7"), ("2", "14"), ("3", "21"), ("4", "28")]
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["no", "yes"]
    kept = checkpoint.load(tmp_path / "out/model")
    assert (kept.model.heads[0].labels, kept.model.heads[0].pooling) == (2, "first_token")
    with (tmp_path / "out/run/epochs.csv").open(newline="") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["accuracy"]))
    # The model of the folder is the best one, and says of the texts what the table says.
    assert float(best["accuracy"]) > 0.9
    assert f"accuracy {float(best['accuracy']):.4f}, at step {best['step']} of 28" in done.output
    module = checkpoint.module(kept.model, kept.weights).eval()
    lines = (files / "rows.tsv").read_text().splitlines()[1:]
    ids = torch.tensor([[2, *(TOKENS.index(t) for t in line.partition("\t")[0].split()), 3] for line in lines])
    right = module(ids)["logits"].argmax(dim=-1) == torch.tensor([line.endswith("yes") for line in lines])
    assert right.double().mean().item() == pytest.approx(float(best["accuracy"]))
    assert (tmp_path / "out/run/loss.svg").is_file()
    # Given again, the run is at its end, and another recipe is refused.
    assert asked(files, *words, out=tmp_path / "out").output.splitlines()[-2:] == done.output.splitlines()[-2:]
    other = asked(files, *words, "--seed", 1, out=tmp_path / "out")
    assert other.exit_code == 2
    assert "is the state of another run, which differs in seed (0 then, 1 now)" in " ".join(other.output.split())


def test_texts_that_are_cut_are_told_before_training_and_windows_are_not(files, tmp_path):
    words = ("--tokenizer", files / "vocab.txt", "--max-steps", 1)
    # [CLS], four letters, [SEP].
    lines = asked(files, *words, "--length", 5, out=tmp_path / "cut").output.splitlines()
    assert lines[0] == f"{files / 'rows.tsv'}: 60 of 60 texts cut to --length 5, the longest from 6 tokens"
    assert "weights trained" in lines[1] and "cut to" not in " ".join(lines[1:])
    for more in ({}, {"task": "causal", "data": "corpus.txt"}, {"task": "mlm", "data": "corpus.txt"}):
        done = asked(files, *words, "--length", 6, out=tmp_path / more.get("task", "whole"), **more)
        assert done.exit_code == 0 and "cut to" not in done.output


@pytest.mark.parametrize(("task", "model", "data"), [
    ("mlm", "roformer_v2.json", "corpus.txt"), ("mlm", "gau_alpha.json", "corpus.npz"),
    ("causal", "flash.json", "corpus.txt"), ("causal", "roformer_v2.json", "corpus.npz"),
])  # fmt: skip
def test_language_models_are_trained(files, tmp_path, task, model, data):
    words = ["--max-steps", 3, "--batch-size", 8, "--length", 10, "--tokenizer", files / "vocab.txt"]
    done = asked(files, *words, task=task, model=model, data=data, out=tmp_path)
    assert done.exit_code == 0, done.output
    kept = checkpoint.load(tmp_path / "model").model
    assert specification.outputs(kept) == ("last_hidden_state", "mlm_logits")
    assert kept.visible == ("causal" if task == "causal" else "bidirectional")
    with (tmp_path / "run/steps.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    # What was trained can be trained on: the encoder, the head and the tokenizer are there.
    again = asked(files, *words[:-2], task=task, model=tmp_path / "model", data="corpus.txt", out=tmp_path / "again")
    assert again.exit_code == 0, again.output
    for folder in (tmp_path, tmp_path / "again"):
        assert checkpoint.extra(folder / "model", "vocab.txt") == (files / "vocab.txt").read_bytes()
    (tmp_path / "model/vocab.txt").write_text("\n".join(TOKENS[::-1]))
    again = asked(files, task=task, model=tmp_path / "model", data=data, out=tmp_path / "damaged")
    assert again.exit_code == 2 and "vocab.txt is not the file that was written" in " ".join(again.output.split())


def test_case_is_kept_where_it_is_asked_for(files, tmp_path):
    """A is no token of the vocabulary, a is."""
    (tmp_path / "rows.tsv").write_text((files / "rows.tsv").read_text().replace("a ", "A "))
    words = ["--validation", files / "rows.tsv", "--max-steps", 7, "--batch-size", 60, "--dropout", 0.0, "--seed", 3]
    given, data = ["--tokenizer", files / "vocab.txt"], tmp_path / "rows.tsv"
    losses = []
    for name, more, model in (
        ("plain", given, "roformer_v2.json"), ("cased", [*given, "--cased"], "roformer_v2.json"),
        ("lower", [*given, "--lower-case"], "roformer_v2.json"), ("again", [], tmp_path / "cased/model"),
    ):  # fmt: skip
        done = asked(files, *words, *more, data=data, model=model, out=tmp_path / name)
        assert done.exit_code == 0, done.output
        losses.append((tmp_path / name / "run/steps.csv").read_text())
    assert losses[0] == losses[2] != losses[1]
    told = [json.loads((tmp_path / name / "model/tokenizer_config.json").read_text()) for name in ("plain", "again")]
    assert told == [{"do_lower_case": True}, {"do_lower_case": False}]


def test_arrays_need_no_tokenizer(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = ("--max-steps", 1, "--mask-id", 4)
    # The vocabulary is passed on all the same.
    done = asked(files, *words, "--tokenizer", files / "vocab.txt", task="mlm", data="corpus.npz", out=tmp_path)
    assert done.exit_code == 0, done.output
    assert checkpoint.extra(tmp_path / "model", "vocab.txt") == (files / "vocab.txt").read_bytes()
    done = asked(files, *words, task="mlm", data="corpus.npz", out=tmp_path / "bare")
    assert checkpoint.listed(tmp_path / "bare/model") == ("config.json", "model.safetensors")


def test_a_package_that_is_missing_is_named_with_what_to_install(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = ["finetune", files / "roformer_v2.json", files / "rows.tsv", tmp_path / "out", "--tokenizer"]
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", *map(str, words), str(files / "vocab.txt")])
    told = capsys.readouterr().err
    assert raised.value.code == 2 and "Traceback" not in told and not (tmp_path / "out").exists()
    assert "tokenizers, which is not installed. Install it with: pip install 'refimpl[train]'" in told


def test_adapters_are_trained_and_merged(files, tmp_path):
    words = ("--tokenizer", files / "vocab.txt", "--max-steps", 5, "--learning-rate", 0.05)
    assert asked(files, *words, out=tmp_path / "base").exit_code == 0
    lo = ("--lora-rank", 2, "--lora-targets", "w_q, w_v", "--save-every", 2)
    done = asked(files, *words, *lo, model=tmp_path / "base/model", out=tmp_path / "out")
    assert done.exit_code == 0, done.output
    base, merged = (checkpoint.load(tmp_path / name / "model") for name in ("base", "out"))
    moved = {name for name, tensor in merged.weights.items() if not torch.equal(tensor, base.weights[name])}
    adapted = {f"layers.{layer}.attention.w_{kind}" for layer in (0, 1) for kind in "qv"}
    assert moved == adapted | {"classifier.kernel", "classifier.bias"}
    # PEFT's folder, on the base with the head that was trained beside it, is the merged model.
    heads = {name: merged.weights[name] for name in ("classifier.kernel", "classifier.bias")}
    module = modules.Model(base.model)
    module.load_weights(base.weights | heads)
    lora.load(module, tmp_path / "out/adapter")
    found = modules.flat(base.model, lora.merged_weights(module))
    for name, tensor in merged.weights.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_run_that_is_stopped_says_how_to_go_on(files, tmp_path):
    words = ("--tokenizer", files / "vocab.txt", "--max-steps", 6, "--batch-size", 9, "--tensorboard")
    early = asked(files, *words, out=tmp_path / "early", stop=1)
    assert early.exit_code == 130 and "before a state was saved; the same command begins anew" in early.output
    words = (*words, "--save-every", 1)
    whole = asked(files, *words, out=tmp_path / "whole")
    done = asked(files, *words, out=tmp_path / "out", stop=4)
    assert done.exit_code == 130
    told = " ".join(done.output.split())
    assert f"stopped; {tmp_path / 'out/run'} has the state after step 4, and the same command goes on from" in told
    assert not (tmp_path / "out/model").exists()
    again = asked(files, *words, out=tmp_path / "out")
    assert "going on after step 4 of 6" in again.output and "going on" not in whole.output
    assert again.exit_code == whole.exit_code == 0
    for name in ("run/steps.csv", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list((tmp_path / "out/run/tensorboard").iterdir())


@pytest.mark.parametrize(("words", "told"), [
    ((), "for which a tokenizer is needed"),
    (("--tokenizer", "absent.txt"), "absent.txt is no file"),
    (("--epochs", 0), "epochs >= 1, received epochs=0"),
    (("--optimizer", "sgd"), "optimizer to be adamw' or 'adafactor' or 'lamb', received optimizer='sgd'"),
    (("--device", "tpu"), "a device cpu or cuda, received device=tpu"),
    (("--lora-rank", -1), "lora_rank >= 0"),
    (("--hold-out", 1.0), "hold_out between 0 and 1"),
    (("--recipe", "absent.json"), "absent.json"),
    (("--segmenter", "jieba"), "segmenter with mlm or causal alone, received task='finetune'"),
    (("--mask-id", 0), "mask_id with mlm alone, received task='finetune'"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(files, tmp_path, words, told):
    done = asked(files, *words, out=tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert told.replace("'", "") in " ".join(done.output.split()).replace("'", "")
    assert not (tmp_path / "out").exists()


def test_data_that_the_model_does_not_fit_is_refused(files, tmp_path):
    np.savez(tmp_path / "a.npz", token_ids=np.full((9, 4), 23), labels=np.arange(9) % 2)
    done = asked(files, data=tmp_path / "a.npz", out=tmp_path / "out")
    assert done.exit_code == 2
    assert "holds token_ids from 23 to 23, and the model has 23 from 0" in " ".join(done.output.split())
    np.savez(tmp_path / "a.npz", token_ids=np.full((9, 4), 3), segment_ids=np.full((9, 4), 2), labels=np.arange(9) % 2)
    assert "holds segment_ids from 2 to 2" in " ".join(
        asked(files, data=tmp_path / "a.npz", out=tmp_path).output.split()
    )
    done = asked(files, task="mlm", data="corpus.npz", out=tmp_path / "out")
    assert "do not tell the id of [MASK]: give --mask-id" in " ".join(done.output.split())
    words = ("--tokenizer", files / "vocab.txt", "--mask-id", 9)
    done = asked(files, *words, task="mlm", data="corpus.txt", out=tmp_path / "out")
    assert "[MASK] has the id 4 in the tokenizer, received --mask-id 9" in " ".join(done.output.split())
    (tmp_path / "vocab.txt").write_text("\n".join(token for token in TOKENS if token != "[MASK]"))
    done = asked(files, *words[:1], tmp_path / "vocab.txt", task="mlm", data="corpus.txt", out=tmp_path / "out")
    assert "the tokenizer has no [MASK]" in " ".join(done.output.split())


def test_the_help_page_teaches():
    done = CliRunner().invoke(command.app, ["train", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for words in ("refimpl train finetune MODEL", "torchrun", "goes on where it was", "--lora-rank", "--accumulate"):
        assert words in done.output
    lines = [line.strip() for line in done.output.splitlines()]
    for task in job.TASKS:
        made = job.recipe(task, None, {})
        epochs = f"{made.epochs} epoch{'s' if made.epochs > 1 else ''}"
        rate = f"{made.optimizer}, rate {made.learning_rate}"
        assert f"{task:<9} {epochs}, batches of {made.batch_size}, {rate}" in lines


def test_recipes_are_complete_and_strict(tmp_path):
    for task in job.TASKS:
        assert job.recipe(task, None, {}) == loop.TrainConfig(**job.RECIPES[task])
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"epochs": 7, "learning_rate": 1, "clip": None, "recompute": True, "seed": 5}))
    made = job.recipe("mlm", file, {"seed": 6})
    assert (made.epochs, made.learning_rate, made.clip, made.recompute, made.seed) == (7, 1, None, True, 6)
    # What a run was trained with can be given to another.
    file.write_text(json.dumps(asdict(made)))
    assert job.recipe("causal", file, {}) == made
    # RoFormerV2's.
    assert (made.optimizer, made.bias_correction) == ("lamb", False)
    assert job.RECIPES["mlm"]["learning_rate"] == 1.76e-3
    for wrong, told in (
        ({"epoch": 1}, 'unknown key "epoch"'), ({"epochs": 1.5}, "epochs to be int, received epochs=1.5"),
        ({"epochs": True}, "epochs to be int"), ({"clip": "no"}, "clip to be float or NoneType"),
        ({"optimizer": "sgd"}, "optimizer to be 'adamw' or"), ([], "a JSON object"), ({"warmup": 2}, "warmup from 0"),
    ):  # fmt: skip
        file.write_text(json.dumps(wrong))
        with pytest.raises(DomainError, match=told):
            job.recipe("mlm", file, {})
    with pytest.raises(DomainError, match="one of"):
        job.recipe("sop", None, {})


NOW = loop.Progress(3, 10, 1, 1, 0.12345, 5.0, 3661.4, 1234.5)


def test_a_terminal_sees_a_bar_and_a_file_sees_lines(monkeypatch):
    shown = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        monkeypatch.setattr(command, "console", console)
        with command._shown() as (told, progress):
            told("[what] is trained")
            progress(NOW)
            progress(NOW)
        shown.append(console.file.getvalue())
    bar = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[0])
    assert "[what] is trained" in bar and command.said(NOW) in bar and bar != shown[0]
    # Ten seconds have not passed.
    assert shown[1] == f"[what] is trained\n{command.said(NOW)}\n"
    monkeypatch.setenv("RANK", "1")
    with command._shown() as (told, progress):
        told("nothing")
    assert progress is None and console.file.getvalue() == shown[1]


def test_time_left_is_told_in_hours():
    assert command.said(NOW) == "step 3/10, loss 0.1235, 1,234 tokens/s, 1:01:01 left"


def test_a_state_is_whole_before_it_is_named(files, tmp_path):
    asked(files, "--tokenizer", files / "vocab.txt", "--max-steps", 2, out=tmp_path)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {run.STATE, run.STEPS, run.EPOCHS, "loss.svg"}


@pytest.mark.parametrize(("processes", "ignored"), [(1, []), (2, [signal.SIGTERM])])
def test_a_process_that_ends_with_the_others_is_not_ended_by_torchrun(files, tmp_path, monkeypatch, processes, ignored):
    """Of several processes the first that ends has torchrun send SIGTERM to those that are about to."""
    found = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: found.append((number, handler)))
    monkeypatch.setattr(distributed, "once", lambda tell: tell())
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    done = asked(files, "--epochs", 0, out=tmp_path)
    assert done.exit_code == 2 and "epochs >= 1" in done.output
    assert found == [(number, signal.SIG_IGN) for number in ignored]
