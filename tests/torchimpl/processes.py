"""What test_distributed.py and test_killed.py run: small trainings in processes of their own.

torchrun ... processes.py FOLDER     every run of RUNS, each in a folder of its own; losses and weights in FOLDER
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from refimpl import model as specification
from refimpl.models import _heads, roformer_v2
from torchimpl import model as modules
from torchimpl.training import distributed, loop, pretrain, run

SIZES = {
    "vocab_size": 23, "segments": 2, "embedding_size": 12, "hidden_size": 12, "layers": 2, "heads": 3,
    "intermediate_size": 20,
}  # fmt: skip
MODEL = specification.Model(roformer_v2.dialect("bert4keras-0.11.5", **SIZES), (_heads.TiedLM(),), "bidirectional")
CONFIG = loop.TrainConfig(
    epochs=2, batch_size=6, learning_rate=0.01, schedule="linear", warmup=0.2, final=0.1, weight_decay=0.1, clip=0.5,
    seed=3, save_every=2, evaluate_every=3,
)  # fmt: skip
# 19 texts in batches of 6: the last of an epoch is one text, and the second process has none.
RUNS = {
    "ddp": CONFIG,
    "accumulated": replace(CONFIG, accumulate=2, optimizer="lamb", recompute=True, residual_warmup=0.5),
    "fsdp": replace(CONFIG, parallel="fsdp"),
    "fsdp_lamb": replace(CONFIG, parallel="fsdp", accumulate=2, optimizer="lamb", recompute=True),
}
# The step behind which a process to be killed waits for it, on a machine that is busy with other things.
ENOUGH = 20


class Stopped(BaseException):
    """Between two steps."""


# Everything that a state must keep: dropout, masks, two moments, micro-batches, evaluations in between.
LONG = replace(CONFIG, epochs=6, accumulate=2, optimizer="lamb", residual_warmup=0.3, save_every=1, evaluate_every=7)


def module(dropout=0.0):
    """Of the second process other weights, which are not those that are learnt from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(distributed.place().rank)
        return modules.Model(MODEL, hidden_dropout=dropout, attention_dropout=dropout)


def task():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 23, (25, 11), generator=generator)
    # Texts of different length, so that processes have different numbers of targets.
    mask = torch.arange(11) < torch.randint(4, 12, (25, 1), generator=generator)
    corpora = (pretrain.corpus(ids[rows], mask[rows]) for rows in (slice(0, 19), slice(19, 25)))
    return pretrain.masked_lm(*corpora, pretrain.Masking(1, 23, rate=0.4))


def learn(config, folder, progress=None):
    return loop.fit(module(), task(), config, folder, progress)


def tell_every_step(folder, pipe):
    """A process to be killed: it says when it has made a step, and goes on, but not to its end."""

    def tell(now):
        pipe.send(now.step)
        if now.step == ENOUGH:
            time.sleep(600)

    torch.set_num_threads(1)
    loop.fit(module(0.1), task(), LONG, folder, tell)


def die_while_saving(folder, save):
    """A process that is killed when it has written half of the state, the `save`-th time."""
    real, saves = run.save_file, []

    def torn(tensors, name, metadata):
        real(tensors, name, metadata)
        saves.append(name)
        if len(saves) == save:
            os.truncate(name, os.path.getsize(name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    run.save_file = torn
    torch.set_num_threads(1)
    loop.fit(module(0.1), task(), LONG, folder)


def taken_up(config, folder):
    """The same, stopped after a state was saved and once after none."""

    def stop(now):
        if now.step in (2, 5):
            raise Stopped

    for _ in range(2):
        try:
            learn(config, folder, stop)
        except Stopped:
            continue
    return learn(config, folder)


def told(fitted, folder, name):
    losses = {"losses": [step.loss for step in fitted.steps], "norms": [step.gradient_norm for step in fitted.steps],
              "figures": [epoch.figures["loss"] for epoch in fitted.epochs]}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(losses))
    save_file(fitted.weights, folder / f"{name}.safetensors")


def main(folder):
    with distributed.joined("cpu"):
        for name, config in RUNS.items():
            fitted = learn(config, folder / name)
            again = taken_up(config, folder / f"{name}-again")
            if distributed.place().first:
                told(fitted, folder, name)
                told(again, folder, f"{name}-again")
            else:
                assert fitted.weights == {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
