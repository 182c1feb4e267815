"""kill -9 at random points: a run that is started again has the losses and weights of one that nothing stopped."""

import multiprocessing
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.torchimpl import processes
from torchimpl.training import loop, run

KILLS = 10


@pytest.fixture(scope="module")
def forking():
    """A process that has loaded torch once and forks: each run starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    # torch loads torch._dynamo, which takes seconds, when the first optimiser is made.
    context.set_forkserver_preload(["tests.torchimpl.processes", "torch._dynamo"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing stopped, the module that it leaves, and its last state."""
    folder, module = tmp_path_factory.mktemp("whole"), processes.module(0.1)
    fitted = loop.fit(module, processes.task(), processes.LONG, folder)
    return fitted, module.state_dict(), load_file(folder / run.STATE)


def killed(forking, folder, step, delay):
    """Whether a run was killed so long after this step, before its end."""
    here, there = forking.Pipe(duplex=False)
    process = forking.Process(target=processes.tell_every_step, args=(folder, there))
    process.start()
    there.close()
    try:
        while here.recv() != step:
            pass
        time.sleep(delay)
    finally:
        process.kill()
        process.join()
    return process.exitcode == -signal.SIGKILL


def assert_goes_on(folder, whole):
    """Losses, weights, and all of the last state: moments, random numbers, log."""
    fitted, last, state = whole
    module = processes.module(0.1)
    again = loop.fit(module, processes.task(), processes.LONG, folder)
    assert again.steps == fitted.steps and again.epochs == fitted.epochs and again.best == fitted.best
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in last.items())
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in fitted.weights.items())
    found = load_file(folder / run.STATE)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    # What was being written when the process died is gone.
    assert {file.name for file in folder.iterdir()} == {run.STATE, run.STEPS, run.EPOCHS}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, forking, whole):
    drawn, steps = random.Random(0), len(whole[0].steps)
    assert steps == 24
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        # Somewhere in a step, its evaluation or the saving of its state, which takes a third of the time.
        assert killed(forking, folder, drawn.randint(1, 12), drawn.uniform(0, 0.03))
        assert 0 < len(load_file(folder / run.STATE)["steps"]) < steps
        assert_goes_on(folder, whole)


@pytest.mark.parametrize("save", [1, 8])
def test_a_run_killed_while_it_writes_its_state_goes_on_bit_for_bit(tmp_path, forking, whole, save):
    process = forking.Process(target=processes.die_while_saving, args=(tmp_path, save))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([file for file in tmp_path.iterdir() if file.name.startswith(f".{run.STATE}.")]) == 1
    assert (tmp_path / run.STATE).is_file() == (save > 1)
    assert_goes_on(tmp_path, whole)
