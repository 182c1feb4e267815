"""Claims about training speed: against Hugging Face's RoFormer and FLASH-pytorch, and of our models among each other.

    python benchmarks/training.py                      # everything; over half an hour on two cores
    python benchmarks/training.py --part peers         # one of PARTS, again for more
    python benchmarks/training.py --quick              # small sizes, to see that it runs

A step is a forward pass with a loss at 15 % of the tokens, as masked language models have it, a backward pass, and
AdamW. On a processor freed memory stays with the process, as in `refimpl train`. The models of a part take turns, one
step each in a round; a ratio is the median over rounds of the ratio of one round. Peak memory is what a fresh process
adds to the built model by two steps. On a CUDA device every part also runs in bfloat16 autocast and compiled. What
comes out is also written to out/training.csv, and drawn in out/training.svg.

Three parts are about a processor and are left out elsewhere: memory takes steps in turn in processes that keep what is
freed, give it back, or ask for huge pages, and in one of FLASH-pytorch that gives it back, as PyTorch does by itself;
dropout has torch's layer and ours in turn; profile tells what kinds of operations a step consists of.
"""

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from refimpl.model import Model as Specification
from refimpl.models import _heads, flash, gau_alpha, roformer, roformer_v2
from torchimpl.dropout import Dropout
from torchimpl.model import Model
from torchimpl.training import memory

PARTS = ("peers", "flash", "compiled", "growth", "v2", "gau", "memory", "dropout", "profile")
VOCAB = 12000
# Of the tokens are to be told.
SHARE = 0.15
# The published small RoFormerV2, and models of its size. Two gated units stand for one layer of a transformer.
SMALL = {"vocab_size": VOCAB, "segments": 2, "hidden_size": 384}
TRANSFORMER = {"embedding_size": 384, "layers": 6, "heads": 6, "intermediate_size": 1536}
GATED = {"layers": 12, "expanded_size": 768, "key_size": 128}
CHUNKED = {"vocab_size": 256, "segments": 1, "hidden_size": 512, "layers": 2, "expanded_size": 1024, "key_size": 128}
CHUNK = 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Variant(NamedTuple):
    """A model to time: its name among MODELS, the dropout, whether it is compiled, whether it runs in bfloat16."""

    name: str
    dropout: float
    compiled: bool = False
    half: bool = False

    @property
    def label(self) -> str:
        return self.name + ", compiled" * self.compiled + ", bfloat16" * self.half


class Row(NamedTuple):
    """One comparison: tokens per second of both, the middle ratio and its quartiles, peak memory of both in MiB."""

    part: str
    first: str
    second: str
    batch: int
    length: int
    first_tokens_per_second: float
    second_tokens_per_second: float
    ratio: float
    low: float
    high: float
    first_mib: int
    second_mib: int


def whole(config: Any, head: Any, dropout: float) -> nn.Module:
    options = {"hidden_dropout": dropout} | ({} if config.model == "flash" else {"attention_dropout": dropout})
    visible = "causal" if getattr(config, "mix", "") == "causal" else "bidirectional"
    return Logits(Model(Specification(config, (head,), visible), **options))


class Logits(nn.Module):
    """A module that gives the logits of the tokens to be told: ours forms no others, peers form all."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, told: Tensor) -> Tensor:
        if isinstance(self.inner, Model):
            return self.inner(ids, told=told)["mlm_logits"]
        made = self.inner(ids)
        return (made if isinstance(made, Tensor) else made["logits"])[told]


def hugging_face(dropout: float) -> nn.Module:
    from transformers import RoFormerConfig, RoFormerForMaskedLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 384, "embedding_size": 384, "num_hidden_layers": 6}
    more = {"num_attention_heads": 6, "intermediate_size": 1536, "max_position_embeddings": 8192}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return Logits(RoFormerForMaskedLM(RoFormerConfig(**sizes, **more, **drops)))


def flash_pytorch(dropout: float) -> nn.Module:
    from flash_pytorch import FLASHTransformer

    sizes = {"num_tokens": 256, "dim": 512, "depth": 2, "group_size": CHUNK, "query_key_dim": 128}
    return Logits(FLASHTransformer(**sizes, expansion_factor=2.0, causal=True, shift_tokens=False))


def ours_flash(dropout: float) -> nn.Module:
    rule = {"chunk": CHUNK, "mix": "causal", "kernel": "squared_relu", "divisor": "chunk", "rows": "lucidrains"}
    numbers = {"normaliser": "lucidrains_causal", "rotation": "interleaved", "rotary_base": 10000.0, "epsilon": 1e-5}
    return whole(flash.Config(**CHUNKED, **rule, **numbers), _heads.TiedLM(), dropout)


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "RoFormer": lambda p: whole(roformer.dialect("huggingface", **SMALL, **TRANSFORMER), _heads.TransformedLM(), p),
    "RoFormerV2": lambda p: whole(roformer_v2.dialect("bert4keras-0.11.5", **SMALL, **TRANSFORMER), _heads.TiedLM(), p),
    "GAU-α": lambda p: whole(gau_alpha.dialect("bert4keras-0.11.5", **SMALL, **GATED), _heads.TiedLM(), p),
    "FLASH": ours_flash,
    "Hugging Face RoFormer": hugging_face,
    "FLASH-pytorch": flash_pytorch,
}


class Trained:
    """A model with its optimiser and a batch; `step` is one update."""

    def __init__(self, variant: Variant, batch: int, length: int) -> None:
        torch.manual_seed(0)
        built = MODELS[variant.name](variant.dropout).to(DEVICE)
        self.parameters = sum(p.numel() for p in built.parameters())
        self.optimizer = torch.optim.AdamW(built.parameters(), lr=1e-4)
        self.model = torch.compile(built) if variant.compiled else built
        vocab = 256 if variant.name.startswith("FLASH") else VOCAB
        self.ids = torch.randint(5, vocab, (batch, length), device=DEVICE)
        self.told = torch.rand(batch, length, device=DEVICE) < SHARE
        self.half = variant.half

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16) if self.half else nullcontext():
            functional.cross_entropy(self.model(self.ids, self.told), self.ids[self.told]).backward()
        self.optimizer.step()

    def seconds(self) -> float:
        _wait()
        begun = time.perf_counter()
        self.step()
        _wait()
        return time.perf_counter() - begun


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def high_water() -> int:
    """Bytes of the device, or the peak of this process's resident memory; ru_maxrss would begin with the parent's."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def peak(variant: Variant, batch: int, length: int) -> int:
    """MiB that two steps add to the built model, in a process of their own; -1 where a compiler is in it."""
    if variant.compiled and DEVICE == "cpu":
        return -1
    told = [variant.name, str(variant.dropout), str(int(variant.compiled)), str(int(variant.half))]
    call = [sys.executable, __file__, "--peak", *told, str(batch), str(length)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(told: Sequence[str]) -> None:
    name, dropout, compiled, half, batch, length = told
    trained = Trained(Variant(name, float(dropout), compiled == "1", half == "1"), int(batch), int(length))
    before = high_water()
    for _ in range(2):
        trained.step()
    print((high_water() - before) // 2**20)


def compared(part: str, first: Variant, second: Variant, batch: int, length: int, rounds: int) -> Row:
    """The speed of `first` as a multiple of the speed of `second`."""
    pair = [Trained(variant, batch, length) for variant in (first, second)]
    # Compiles, once more where a model had to fill a table first, and warms up.
    for trained in (*pair, *pair):
        trained.seconds()
    turns = [[trained.seconds() for trained in pair] for _ in range(rounds)]
    low, middle, high = statistics.quantiles([b / a for a, b in turns], n=4)
    speeds = (batch * length / statistics.median(column) for column in zip(*turns, strict=True))
    memory = (peak(variant, batch, length) for variant in (first, second))
    return Row(part, first.label, second.label, batch, length, *speeds, middle, low, high, *memory)


def comparisons(quick: bool) -> Iterator[tuple[str, Variant, Variant, int, int, int]]:
    """Part, the two models, batch, length and rounds of every comparison."""
    kinds = [{}] if DEVICE == "cpu" else [{}, {"half": True}, {"compiled": True}, {"half": True, "compiled": True}]
    for kind in kinds:
        for batch, length in ((8, 64),) if quick else ((8, 128), (2, 512)):
            for name in ("RoFormer", "GAU-α"):
                peer = Variant("Hugging Face RoFormer", 0.1, **kind)
                yield "peers", Variant(name, 0.1, **kind), peer, batch, length, 3 if quick else 9
        length = 512 if quick else 4096
        mixed, peer = Variant("FLASH", 0.0, **kind), Variant("FLASH-pytorch", 0.0, **kind)
        yield "flash", mixed, peer, 1, length, 3 if quick else 7
        if DEVICE == "cpu":
            fast = mixed._replace(compiled=True)
            for other in (peer._replace(compiled=True), peer):
                yield "compiled", fast, other, 1, length, 3 if quick else 7
        for length in (512,) if quick else (2048, 4096, 8192):
            yield "growth", mixed, mixed, 1, length, 3 if quick else 5
        first, second, third = (Variant(name, 0.0, **kind) for name in ("RoFormer", "RoFormerV2", "GAU-α"))
        for batch, length in ((4, 64),) if quick else ((8, 128), (2, 512)):
            yield "v2", second, first, batch, length, 3 if quick else 9
        for length in (128,) if quick else (256, 512, 1024, 2048, 4096):
            yield "gau", third, second, max(1, 1024 // length), length, 3 if quick or length > 1024 else 5


def grown(variant: Variant, length: int, rounds: int) -> Row:
    """One model at a length and at twice the length, in turn."""
    short, long = Trained(variant, 1, length), Trained(variant, 1, 2 * length)
    for trained in (short, long):
        trained.seconds()
    turns = [(short.seconds(), long.seconds()) for _ in range(rounds)]
    low, middle, high = statistics.quantiles([b / a for a, b in turns], n=4)
    speeds = (length / statistics.median(a for a, _ in turns), 2 * length / statistics.median(b for _, b in turns))
    memory = (peak(variant, 1, length), peak(variant, 1, 2 * length))
    return Row("growth", variant.label, f"{variant.label}, twice", 1, length, *speeds, middle, low, high, *memory)


# How a process of the part memory comes by its memory, and what its environment says of that.
WAYS: dict[str, dict[str, str]] = {"kept": {}, "given back": {}, "in huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
# The first is `refimpl train`, which all others are compared with.
PROCESSES = (*(("FLASH", way) for way in WAYS), ("FLASH-pytorch", "given back"))


def take_steps(told: Sequence[str]) -> None:
    """A step for every line that comes in; its seconds and page faults go out, and the most MiB that were resident."""
    name, way, length = told
    if way == "kept" and not memory.keep_freed():
        raise SystemExit("training: malloc is tuned already, or not glibc's: there is nothing to compare")
    trained = Trained(Variant(name, 0.0), 1, int(length))
    # The heap has grown to what a step needs only when blocks of all sizes have been freed and taken anew.
    for _ in range(2):
        trained.step()
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = trained.seconds()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(seconds, faults, high_water() // 2**20, flush=True)


def kept_memory(quick: bool) -> Iterator[str]:
    for length in (512,) if quick else (4096, 16384):
        with ExitStack() as stack:
            processes = [stack.enter_context(_stepping(name, way, length)) for name, way in PROCESSES]
            turns = [[_asked(process) for process in processes] for _ in range(3 if quick else 7)]
        cells = []
        for number, (name, way) in enumerate(PROCESSES):
            seconds, faults, mib = (statistics.median(turn[number][i] for turn in turns) for i in range(3))
            low, middle, high = statistics.quantiles([turn[number][0] / turn[0][0] for turn in turns], n=4)
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f}) times that, " if number else ""
            cells.append(f"{name} {way} {seconds:.2f} s, {ratio}{faults:,.0f} page faults a step, {mib:.0f} MiB")
        yield f"memory  b 1, n {length}, what is freed: " + "; ".join(cells)


def _stepping(name: str, way: str, length: int) -> "subprocess.Popen[str]":
    call, pipe = [sys.executable, __file__, "--steps", name, way, str(length)], subprocess.PIPE
    return subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **WAYS[way]})


def _asked(process: "subprocess.Popen[str]") -> list[float]:
    print(file=process.stdin, flush=True)
    return [float(number) for number in process.stdout.readline().split()]


def dropouts(quick: bool) -> Iterator[str]:
    calls = 3 if quick else 30
    for shape in ((64, 384),) if quick else ((1024, 384), (96, 128, 128), (4096, 1024)):
        x, layers = torch.randn(shape), (nn.Dropout(0.1), Dropout(0.1))
        turns = [[_spent(layer, x, calls) for layer in layers] for _ in range(15)]
        theirs, ours = (1e3 * statistics.median(column) for column in zip(*turns, strict=True))
        low, middle, high = statistics.quantiles([a / b for a, b in turns], n=4)
        size = " x ".join(map(str, shape))
        yield (
            f"dropout {size}: torch {theirs:.3f} ms, ours {ours:.3f} ms; torch / ours "
            f"{middle:.2f} ({low:.2f} to {high:.2f})"
        )


def _spent(layer: nn.Module, x: Tensor, calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        layer(x)
    return (time.perf_counter() - begun) / calls


# Operators by what they do; the first that has a name counts.
KINDS = {
    "dense layers and their gradients, oneDNN": ("mkldnn::_linear_pointwise",),
    "the same by torch.mm": ("aten::mm", "aten::addmm"),
    "batched products": ("aten::bmm", "aten::baddbmm"),
    "random numbers": ("aten::random_", "aten::bernoulli_"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_"),
    "sums and norms": ("aten::sum", "aten::mean", "aten::native_layer_norm", "aten::native_layer_norm_backward"),
}
OPTIMISER, REST = "AdamW", "elementwise passes and all else"


def kind(event: Any) -> str:
    """What an event of the profiler belongs to: all that AdamW does is AdamW's."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return OPTIMISER
        above = above.cpu_parent
    return next((kind for kind, names in KINDS.items() if event.name in names), REST)


def profiles(quick: bool) -> Iterator[str]:
    """Shares of the time that operators spend themselves, in %."""
    short, long = (0.1, 8, 128), (0.0, 1, 512 if quick else 4096)
    sizes = {"RoFormer": short, "GAU-α": short, "FLASH": long, "FLASH-pytorch": long}
    shares = []
    for name, (dropout, batch, length) in sizes.items():
        trained = Trained(Variant(name, dropout), batch, length)
        trained.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(1 if quick else 5):
                trained.step()
        spent = dict.fromkeys((*KINDS, OPTIMISER, REST), 0.0)
        for event in profiler.events():
            spent[kind(event)] += event.self_cpu_time_total
        shares.append({name: 100 * part / sum(spent.values()) for name, part in spent.items()})
    heads = [f"{name} {batch} x {length}" for name, (_, batch, length) in sizes.items()]
    yield f"{'profile: % of the time in operators':42}" + "".join(f"{head:>25}" for head in heads)
    for name in shares[0]:
        yield f"  {name:40}" + "".join(f"{share[name]:25.1f}" for share in shares)


ON_A_PROCESSOR: dict[str, Callable[[bool], Iterator[str]]] = {
    "memory": kept_memory, "dropout": dropouts, "profile": profiles,
}  # fmt: skip


def told(row: Row) -> str:
    memory = "memory not measured" if row.first_mib < 0 else f"peak memory {row.first_mib} and {row.second_mib} MiB"
    if row.part == "growth":
        memory += f", {row.second_mib / max(row.first_mib, 1):.2f} times"
        return (
            f"{row.part:7} {row.first} from n {row.length} to {2 * row.length}: {row.ratio:.2f} times the time "
            f"({row.low:.2f} to {row.high:.2f}); {memory}"
        )
    return (
        f"{row.part:7} b {row.batch}, n {row.length}: {row.first} {row.first_tokens_per_second:.0f} tokens/s, "
        f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) times {row.second}; {memory}"
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Ratios of time and memory over the length, GAU-α against RoFormerV2 and RoFormerV2 against RoFormer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for part in ("gau", "v2"):
        kind = [row for row in rows if row.part == part]
        for first in dict.fromkeys(row.first for row in kind):
            mine = [row for row in kind if row.first == first]
            label, lengths = f"{first} / {mine[0].second}", [row.length for row in mine]
            axes[0].plot(lengths, [row.ratio for row in mine], marker="o", label=label)
            axes[1].plot(lengths, [row.first_mib / max(row.second_mib, 1) for row in mine], marker="o", label=label)
    for axis, title in zip(axes, ("speed of training, ratio", "peak memory, ratio"), strict=True):
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="length (tokens)", xscale="log")
        axis.set_xticks(ticks := sorted({row.length for row in rows if row.part in ("gau", "v2")}), map(str, ticks))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="again for more; all of them if not given")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--steps", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        take_steps(options.steps)
        return 0
    # As `refimpl train` does; it serves all that is compared.
    memory.keep_freed()
    if options.peak:
        print_peak(options.peak)
        return 0
    parts = options.part or PARTS
    chosen = [job for job in comparisons(options.quick) if job[0] in parts]
    print(f"float32 unless said, {DEVICE}, {torch.get_num_threads()} threads; speed of the first over the second")
    for name in MODELS if chosen else ():
        print(f"  {name}: {sum(p.numel() for p in MODELS[name](0.0).parameters()):,} parameters")
    rows = []
    for part, first, second, batch, length, rounds in track(chosen, console=Console(stderr=True), transient=True):
        growth = part == "growth"
        row = grown(first, length, rounds) if growth else compared(part, first, second, batch, length, rounds)
        rows.append(row)
        print(told(row), flush=True)
    for part, lines in ON_A_PROCESSOR.items():
        if part in parts and DEVICE == "cpu":
            for line in lines(options.quick):
                print(line, flush=True)
    out = Path("out")
    out.mkdir(exist_ok=True)
    if rows:
        with (out / "training.csv").open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    if any(row.part in ("gau", "v2") for row in rows):
        draw(rows, out / "training.svg")
    least = {"peers": 1.2, "flash": 1.3, "compiled": 1.3}
    missed = [row for row in rows if row.ratio < least.get(row.part, 0)]
    missed += [r for r in rows if r.part == "growth" and max(r.ratio, r.second_mib / max(r.first_mib, 1)) > 2.2]
    print("missed: " + ("; ".join(f"{row.part} n {row.length} {row.first}" for row in missed) or "none"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
