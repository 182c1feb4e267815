"""torchimpl.training.memory: a block that was freed is used again, its pages not asked for anew."""

import os
import platform
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from torchimpl.training import command, memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
PAGES = 64 * 2**20 // 4096
PROGRAM = """
import resource, sys, torch
from torchimpl.training import memory
kept = memory.keep_freed() if sys.argv[1] == "keep" else None
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(mode: str, **extra: str) -> tuple[str, int]:
    """What keep_freed said, and the pages that ten blocks of 64 MiB asked for, one after another and after others."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=ours | extra, capture_output=True, text=True, check=True
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@glibc
def test_freed_blocks_are_used_again():
    said, faults = run("keep")
    assert said == "True"
    assert faults < PAGES, "ten blocks ask for fewer pages than one has"
    # In huge pages, where the system has them always, even blocks that are mapped anew ask for few.
    assert run("leave")[1] > faults


@glibc
@pytest.mark.parametrize("variable", ["MALLOC_TOP_PAD_", "GLIBC_TUNABLES"])
def test_an_environment_that_tunes_malloc_is_left_alone(variable):
    value = "glibc.malloc.arena_max=4" if variable == "GLIBC_TUNABLES" else "4096"
    assert run("keep", **{variable: value})[0] == "False"


@pytest.mark.parametrize(("device", "asked"), [("cpu", 1), ("cuda", 0)])
def test_training_on_a_processor_keeps_what_it_frees(monkeypatch, tmp_path, device, asked):
    calls = []
    monkeypatch.setattr(memory, "keep_freed", lambda: calls.append(1))
    absent = [str(tmp_path / name) for name in ("model.json", "corpus.npz", "out")]
    told = CliRunner().invoke(command.app, ["train", "mlm", *absent, "--device", device])
    assert (told.exit_code, len(calls)) == (2, asked)
