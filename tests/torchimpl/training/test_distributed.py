"""Two processes learn what one learns from the same batches, and go on bit for bit where they were stopped."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refimpl import model as specification
from refimpl.check import DomainError
from tests.torchimpl import processes
from torchimpl.training import distributed
from torchimpl.training.run import TrainError

ROOT = Path(__file__).parents[3]
# Seconds; it takes 15 to 35 on two cores that others use too.
PATIENCE = 150


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes learnt, all runs after each other: starting them takes most of the time."""
    folder = tmp_path_factory.mktemp("two")
    status, told = launched(folder / "told", str(Path(processes.__file__)), str(folder))
    assert status == 0, told[-3000:]
    return folder


def launched(told, *words):
    """The exit status of two processes of torchrun, and what both and torchrun say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with told.open("w") as file:
        started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            status = started.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            # One waits for a sum that the other has no part in. torchrun takes both with it.
            started.terminate()
            started.wait()
            status = "no end"
    return status, told.read_text()


@pytest.mark.parametrize("name", processes.RUNS)
def test_two_processes_learn_what_one_learns(two, tmp_path, name):
    # One process with the whole batch at once: neither divided nor computed again.
    config = replace(processes.RUNS[name], accumulate=1, recompute=False, parallel="ddp")
    fitted, shared = processes.learn(config, tmp_path), json.loads((two / f"{name}.json").read_text())
    # Sums of some hundred float32 numbers in another order; eight steps hand it on.
    assert len(shared["losses"]) == 8
    assert shared["losses"] == pytest.approx([step.loss for step in fitted.steps], rel=2e-6)
    assert shared["norms"] == pytest.approx([step.gradient_norm for step in fitted.steps], rel=2e-5)
    assert shared["figures"] == pytest.approx([epoch.figures["loss"] for epoch in fitted.epochs], rel=2e-6)
    weights = load_file(two / f"{name}.safetensors")
    assert weights.keys() == fitted.weights.keys()
    for key, tensor in fitted.weights.items():
        np.testing.assert_allclose(weights[key], tensor, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", processes.RUNS)
def test_two_stopped_processes_go_on_bit_for_bit(two, name):
    assert (two / f"{name}-again.json").read_text() == (two / f"{name}.json").read_text()
    whole, again = (load_file(two / f"{n}.safetensors") for n in (name, f"{name}-again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())


def test_a_state_of_two_processes_is_refused_by_one(two):
    with pytest.raises(TrainError, match=r"differs in processes \(2 then, 1 now\)"):
        processes.learn(processes.RUNS["ddp"], two / "ddp")


def test_one_process_needs_no_group():
    assert distributed.place() == (0, 1) and distributed.place().first
    model = processes.module()
    assert distributed.spread(model, "fsdp", torch.device("cpu")) is model
    with distributed.joined("cpu") as device:
        assert device == torch.device("cpu") and not distributed.joined_any()
    assert distributed.total(torch.tensor(3.0)) == 3
    assert distributed.from_first({"a": float("nan"), "b": 2.0}, device)["b"] == 2


def test_devices_and_ways_that_are_unknown_are_refused():
    with pytest.raises(DomainError, match="a device cpu or cuda, received device='meta'"), distributed.joined("meta"):
        pass
    with pytest.raises(DomainError, match="one of .*received parallel='zero'"):
        distributed.spread(processes.module(), "zero", torch.device("cpu"))


def test_two_processes_tell_what_they_read_and_what_is_wrong_once(tmp_path):
    specification.write(specification.Model(processes.MODEL.config, (), "bidirectional"), tmp_path / "model.json")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    (tmp_path / "rows.tsv").write_text("text\tlabel\na b c d\tyes\na\tno\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "no"}\n{"text"\n')
    model, rows, broken, vocabulary, out = (
        str(tmp_path / name) for name in ("model.json", "rows.tsv", "broken.jsonl", "vocab.txt", "out")
    )
    words = ["--validation", broken, "--tokenizer", vocabulary, "--length", "5"]
    command = ("-m", "refimpl.cli", "train", "finetune", model, rows, out)
    status, told = launched(tmp_path / "told", *command, *words)
    assert status == 1
    assert told.count("1 of 2 texts cut to --length 5, the longest from 6 tokens") == 1
    assert told.count("broken.jsonl, line 2: no JSON") == 1
    # What torchrun says of each.
    assert [line.split()[2] for line in told.splitlines() if "exitcode  :" in line] == ["2", "2"]


def test_an_error_of_one_process_alone_is_told_by_it(monkeypatch):
    told = []
    distributed.once(lambda: told.append("alone"))
    assert told == ["alone"]
    with socket.socket() as held:
        # Nobody answers there.
        held.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": held.getsockname()[1]}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        distributed.once(lambda: told.append("second"), patience=0.1)
    assert told == ["alone", "second"]
    monkeypatch.setenv("RANK", "0")
    distributed.once(lambda: told.append("first"), patience=0.1)
    assert told == ["alone", "second", "first"]
