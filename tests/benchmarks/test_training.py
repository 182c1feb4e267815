"""benchmarks/training.py: every part is reached, operations are sorted by what they do, lines tell what was timed."""

import io
import re
from types import SimpleNamespace

import pytest

from benchmarks import training


def event(name, above=None):
    return SimpleNamespace(name=name, cpu_parent=above)


def test_operations_are_sorted_by_what_they_do():
    found = {name: training.kind(event(name)) for name in ("aten::bmm", "aten::addmm", "mkldnn::_linear_pointwise")}
    assert list(found.values()) == [
        "batched products",
        "the same by torch.mm",
        "dense layers and their gradients, oneDNN",
    ]
    assert training.kind(event("aten::silu")) == training.REST
    # What AdamW does is AdamW's, whatever it is, however deep it lies.
    step = event("Optimizer.step#AdamW.step")
    assert training.kind(step) == training.kind(event("aten::mm", event("aten::matmul", step))) == training.OPTIMISER
    assert training.kind(event("aten::mm", event("MmBackward0"))) == "the same by torch.mm"
    names = [name for names in training.KINDS.values() for name in names]
    assert len(names) == len(set(names))


def test_every_part_is_made(monkeypatch):
    monkeypatch.setattr(training, "DEVICE", "cpu")
    made = [part for part, *_ in training.comparisons(quick=True)]
    assert {*made, *training.ON_A_PROCESSOR} == set(training.PARTS) and made.count("compiled") == 2
    compared = [(first, second) for part, first, second, *_ in training.comparisons(quick=False) if part == "compiled"]
    assert all(first.label == "FLASH, compiled" for first, _ in compared)
    assert [second.label for _, second in compared] == ["FLASH-pytorch, compiled", "FLASH-pytorch"]
    # On a GPU everything is compiled in turn, and processors are not spoken of.
    monkeypatch.setattr(training, "DEVICE", "cuda")
    assert "compiled" not in {part for part, *_ in training.comparisons(quick=True)}


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training.py", "--part", "speed"])
    with pytest.raises(SystemExit):
        training.main()
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_a_process_takes_a_step_for_every_line(monkeypatch, capsys):
    steps = []

    class Fake:
        def __init__(self, variant, batch, length):
            steps.append((variant.name, batch, length))

        def step(self):
            steps.append("warm")

        def seconds(self):
            return 0.25

    faults = iter([1000, 1007, 1500, 1511])
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_minflt=next(faults)))
    monkeypatch.setattr(training, "resource", usage)
    monkeypatch.setattr(training, "high_water", lambda: 5 * 2**20)
    monkeypatch.setattr(training, "Trained", Fake)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    training.take_steps(["FLASH", "given back", "64"])
    assert steps == [("FLASH", 1, 64), "warm", "warm"]
    assert capsys.readouterr().out == "0.25 7 5\n0.25 11 5\n"


def test_memory_that_cannot_be_kept_is_no_comparison(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with pytest.raises(SystemExit, match="nothing to compare"):
        training.take_steps(["FLASH", "kept", "64"])


def test_a_line_about_memory_tells_the_middle_of_the_rounds(monkeypatch):
    answers = {
        ("FLASH", "kept"): iter(["1 10 100", "2 30 100", "4 20 100"]),
        ("FLASH", "given back"): iter(["2 900 80", "3 1900 90", "8 1000 90"]),
        ("FLASH", "in huge pages"): iter(["1 5 70", "2 5 70", "4 5 70"]),
        ("FLASH-pytorch", "given back"): iter(["3 7 60", "6 7 60", "12 7 60"]),
    }

    class Process(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def stepping(name, way, length):
        return Process(stdin=io.StringIO(), stdout=SimpleNamespace(readline=lambda: next(answers[name, way])))

    monkeypatch.setattr(training, "_stepping", stepping)
    (line,) = training.kept_memory(quick=True)
    assert line == (
        "memory  b 1, n 512, what is freed: FLASH kept 2.00 s, 20 page faults a step, 100 MiB; "
        "FLASH given back 3.00 s, 2.00 (1.50 to 2.00) times that, 1,000 page faults a step, 90 MiB; "
        "FLASH in huge pages 2.00 s, 1.00 (1.00 to 1.00) times that, 5 page faults a step, 70 MiB; "
        "FLASH-pytorch given back 6.00 s, 3.00 (3.00 to 3.00) times that, 7 page faults a step, 60 MiB"
    )


def test_dropouts_are_timed():
    (line,) = training.dropouts(quick=True)
    numbers = r"([\d.]+)"
    found = re.fullmatch(
        rf"dropout 64 x 384: torch {numbers} ms, ours {numbers} ms; torch / ours {numbers} \({numbers} to {numbers}\)",
        line,
    )
    assert all(float(number) > 0 for number in found.groups())


def test_shares_of_a_profile_are_all_of_it(monkeypatch):
    class Small(training.Trained):
        def __init__(self, variant, batch, length):
            super().__init__(training.Variant("FLASH", variant.dropout), 1, 64)

    monkeypatch.setattr(training, "Trained", Small)
    head, *lines = training.profiles(quick=True)
    assert "GAU-α 8 x 128" in head and len(lines) == len(training.KINDS) + 2
    shares = [[float(number) for number in line[42:].split()] for line in lines]
    for column in zip(*shares, strict=True):
        assert sum(column) == pytest.approx(100, abs=0.5)
    by_name = {line[:42].strip(): values for line, values in zip(lines, shares, strict=True)}
    assert min(by_name[training.OPTIMISER]) > 0 and min(by_name["batched products"]) > 0


def test_memory_beside_a_compiler_is_not_measured(monkeypatch):
    monkeypatch.setattr(training, "DEVICE", "cpu")
    assert training.peak(training.Variant("FLASH", 0.0, compiled=True), 1, 64) == -1
    row = training.Row("compiled", "a", "b", 1, 64, 10.0, 5.0, 2.0, 1.5, 2.5, -1, -1)
    assert training.told(row) == "compiled b 1, n 64: a 10 tokens/s, 2.00 (1.50 to 2.50) times b; memory not measured"
