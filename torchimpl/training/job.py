"""A training as people ask for it: a task, a model, files and a recipe; the run, and the model folder that it leaves.

OUT/run/     state, tables, loss.svg, events: torchimpl/training/run.py and journal.py
OUT/model/   the best weights as a model folder, with the tokenizer
OUT/classes.json, OUT/adapter/   the names of the classes; the adapter alone, as PEFT has it
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from refimpl import check, config
from refimpl.tokenizer import MASK, AnyTokenizer
from torchimpl import checkpoint, lora
from torchimpl import model as modules
from torchimpl.training import distributed, finetune, journal, loop, pretrain, text, vocabulary
from torchimpl.training import start as starting
from torchimpl.training.run import STATE, Epoch, Journal, Step, TrainError
from torchimpl.training.task import Task
from torchimpl.training.vocabulary import Vocabulary

TASKS = ("finetune", "mlm", "causal")
# What a run does that is told nothing else. LAMB's rate and missing bias correction are RoFormerV2's.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "finetune": {
        "epochs": 3, "batch_size": 32, "learning_rate": 3e-5, "schedule": "linear", "warmup": 0.1, "final": 0.0,
        "weight_decay": 0.01, "clip": 1.0, "seed": 0, "save_every": 200,
    },
    "mlm": {
        "epochs": 1, "batch_size": 256, "learning_rate": 1.76e-3, "schedule": "linear", "warmup": 0.1, "final": 0.0,
        "weight_decay": 0.01, "clip": 1.0, "seed": 0, "save_every": 500, "optimizer": "lamb",
        "bias_correction": False, "epsilon": 1e-6,
    },
    "causal": {
        "epochs": 1, "batch_size": 64, "learning_rate": 3e-4, "schedule": "cosine", "warmup": 0.05, "final": 0.1,
        "weight_decay": 0.1, "clip": 1.0, "seed": 0, "save_every": 500, "beta2": 0.95,
    },
}  # fmt: skip
# What LoRA adapts where no names are given, by the encoder: as in the paper, queries and values.
LORA_TARGETS = {
    "roformer": ("w_q", "w_v"), "roformer_v2": ("w_q", "w_v"), "gau_alpha": ("w_in", "w_out"),
    "flash": ("w_in", "w_out"), "flash_quad": ("w_in", "w_out"),
}  # fmt: skip
CORPUS_ARRAYS = ("token_ids", "mask", "words")
# Who is given lines for people.
Told = Callable[[str], None]

# What other tasks have no use for is refused, not ignored.
_OF_TASKS = {"pooling": ("finetune",), "mask_id": ("mlm",), "segmenter": ("mlm", "causal")}


@dataclass(frozen=True)
class Request:
    """What to train on what.

    model: a model folder, or the JSON file of a model for new weights. validation: another file of the kind of `data`;
    without it, the share `hold_out` of the data. cased: None for what the tokenizer's folder says, else lower case.
    segmenter: "" for wordpiece. lora_rank: 0 to train all weights. dropout: instead of 0.1.
    pooling: of the classifier; "" for that of the model, or the mean of the tokens.
    """

    task: str
    model: Path
    data: Path
    out: Path
    recipe: loop.TrainConfig
    validation: Path | None = None
    hold_out: float = 0.1
    tokenizer: Path | None = None
    cased: bool | None = None
    length: int = 128
    segmenter: str = ""
    mask_id: int | None = None
    pooling: str = ""
    dropout: float | None = None
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()
    device: str = "cpu"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        op = "training.Request"
        check.domain(op, self.task in TASKS, f"one of {TASKS}", task=self.task)
        check.domain(op, 0 < self.hold_out < 1, "hold_out between 0 and 1", hold_out=self.hold_out)
        check.domain(
            op, self.dropout is None or 0 <= self.dropout < 1, "dropout from 0 to below 1", dropout=self.dropout
        )
        check.domain(op, self.lora_rank >= 0, "lora_rank >= 0", lora_rank=self.lora_rank)
        for name, tasks in _OF_TASKS.items():
            given, fits = getattr(self, name), self.task in tasks
            check.domain(op, fits or given in (None, ""), f"{name} with {' or '.join(tasks)} alone", task=self.task)
        fits = not (self.lora_rank and self.recipe.parallel == "fsdp")
        check.domain(op, fits, "parallel ddp with adapters", parallel=self.recipe.parallel)


def recipe(task: str, file: Path | None, changes: Mapping[str, Any]) -> loop.TrainConfig:
    """The recipe of a task, changed by a JSON object of fields of TrainConfig, then by `changes`.

    Raises: DomainError for an unknown key, a value of another type, and as TrainConfig.
    """
    check.domain("train.recipe", task in TASKS, f"one of {TASKS}", task=task)
    given: Any = {} if file is None else config.read_json(file)
    check.domain("train.recipe", isinstance(given, dict), f"a JSON object in {file}", received=given)
    kinds = get_type_hints(loop.TrainConfig)
    config.check_keys("train.recipe", given, known=list(kinds), required=())
    merged = {**RECIPES[task], **given, **changes}
    for name, value in merged.items():
        expected = get_args(kinds[name]) or (kinds[name],)
        allowed = (*expected, int) if float in expected else expected
        fits = value in expected if get_origin(kinds[name]) is Literal else type(value) in allowed
        told = " or ".join(getattr(kind, "__name__", repr(kind)) for kind in expected)
        check.domain("train.recipe", fits, f"{name} to be {told}", **{name: value})
    return loop.TrainConfig(**merged)


def run(
    request: Request,
    told: Told = lambda line: None,
    progress: Callable[[loop.Progress], None] | None = None,
) -> loop.Fitted:
    """Train what the request asks for, or go on with it, and leave the best weights as a model folder.

    told: receives lines about texts that were cut, what is trained and every evaluation. Every process of torchrun
        calls this alike.
    Raises: TrainError, CheckpointError, DomainError and LoraError, each in words for a person.
    """
    with distributed.joined(request.device) as device:
        source = starting.read(request.model)
        words = vocabulary.find(request.tokenizer, request.model, request.cased)
        tokenizer = words.tokenizer() if words is not None and _reads(request) else None
        model, task, classes = _PREPARED[request.task](request, source, tokenizer, told)
        module = starting.start(source, model, seed=request.recipe.seed, dropout=request.dropout)
        if request.lora_rank:
            _adapt(request, module)
        told(_summary(request, module, task, device))
        logs: list[Journal] = [
            _Told(told, request.recipe.steps(task.size)),
            journal.Plot(request.out / "run"),
            *_events(request),
        ]
        task = dataclasses.replace(task, origin={**task.origin, **_origin(request, source)})
        fitted = loop.fit(module, task, request.recipe, request.out / "run", progress, logs, device=device)
        if distributed.place().first:
            _keep(request, module, fitted, classes, words)
    return fitted


def figures(epoch: Epoch) -> str:
    """The figures of an evaluation, for people."""
    return ", ".join(f"{name} {value:.4f}" for name, value in epoch.figures.items())


class _Told:
    """A log of the evaluations, for who sits before it."""

    def __init__(self, told: Told, total: int) -> None:
        self.told, self.total = told, total

    def begin(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        if steps:
            self.told(f"going on after step {len(steps)} of {self.total}")

    def step(self, step: Step) -> None:
        pass

    def evaluated(self, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
        last = epochs[-1]
        self.told(f"epoch {last.epoch}, step {last.step}: {figures(last)} (validation)")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def saved_step(out: Path) -> int:
    """The step behind which the last state of a run was saved; 0 where there is none."""
    file = out / "run" / STATE
    if not file.is_file():
        return 0
    with safe_open(file, "pt") as held:
        return int(held.get_slice("steps").get_shape()[0])


def _reads(request: Request) -> bool:
    """Whether there are texts; arrays need a tokenizer for the id of [MASK] at most."""
    files = [file for file in (request.data, request.validation) if file is not None]
    return any(file.suffix != ".npz" for file in files) or (request.task == "mlm" and request.mask_id is None)


def _finetune(request: Request, source: starting.Source, tokenizer: AnyTokenizer | None, told: Told) -> Any:
    share, seed, length = request.hold_out, request.recipe.seed, request.length
    data = finetune.read(
        request.data, request.validation, tokenizer=tokenizer, length=length, share=share, seed=seed, told=told
    )
    sizes = source.model.config
    for name, size in (("token_ids", sizes.vocab_size), ("segment_ids", sizes.segments)):
        _check_ids(request.data, name, (getattr(part, name) for part in data[:2]), size)
    model = starting.classifier(source.model, len(data.classes), request.pooling or starting.pooling(source.model))
    task = loop.classification(data.train, data.validation)
    origin = {"data": _hash([*data.train, *data.validation]), "classes": list(data.classes)}
    return model, dataclasses.replace(task, origin=origin), data.classes


def _mlm(request: Request, source: starting.Source, tokenizer: AnyTokenizer | None, told: Told) -> Any:
    learnt, judged = _corpora(request, tokenizer)
    _check_ids(request.data, "token_ids", (learnt.token_ids, judged.token_ids), source.model.config.vocab_size)
    rule = pretrain.Masking(_mask_id(request, tokenizer), source.model.config.vocab_size)
    task = pretrain.masked_lm(learnt, judged, rule)
    origin = {"data": _hash([*learnt, *judged]), "masking": dataclasses.asdict(rule)}
    return starting.language_model(source.model, "bidirectional"), dataclasses.replace(task, origin=origin), ()


def _causal(request: Request, source: starting.Source, tokenizer: AnyTokenizer | None, told: Told) -> Any:
    learnt, judged = _corpora(request, tokenizer)
    _check_ids(request.data, "token_ids", (learnt.token_ids, judged.token_ids), source.model.config.vocab_size)
    task = dataclasses.replace(pretrain.causal_lm(learnt, judged), origin={"data": _hash([*learnt, *judged])})
    return starting.language_model(source.model, "causal"), task, ()


# A corpus is cut into windows, of which none is lost: there `told` has nothing to receive.
_PREPARED: Mapping[str, Callable[[Request, starting.Source, AnyTokenizer | None, Told], Any]] = {
    "finetune": _finetune, "mlm": _mlm, "causal": _causal,
}  # fmt: skip


def _corpora(request: Request, tokenizer: AnyTokenizer | None) -> tuple[pretrain.Corpus, pretrain.Corpus]:
    learnt = _corpus(request.data, request, tokenizer)
    if request.validation is not None:
        return learnt, _corpus(request.validation, request, tokenizer)
    size = len(learnt.token_ids)
    left = max(1, round(request.hold_out * size))
    if left >= size:
        raise TrainError(f"train: {request.data} has {size} rows, of which {left} are to be held out: too few")
    drawn = torch.from_numpy(np.random.default_rng(request.recipe.seed).permutation(size))
    parts = (drawn[left:].sort().values, drawn[:left].sort().values)
    one, two = (pretrain.Corpus(*(tensor[rows] for tensor in learnt)) for rows in parts)
    return one, two


def _corpus(file: Path, request: Request, tokenizer: AnyTokenizer | None) -> pretrain.Corpus:
    if file.suffix == ".npz":
        held = {name: torch.from_numpy(a) for name, a in text.arrays(file, ("token_ids",), CORPUS_ARRAYS).items()}
        return pretrain.corpus(held["token_ids"], held.get("mask"), held.get("words"))
    if tokenizer is None:
        raise TrainError(f"train: {file} holds texts, for which a tokenizer is needed: tokenizer.json or vocab.txt")
    segment = text.segmenter(request.segmenter or "wordpiece")
    made = text.windows(text.documents(file), tokenizer, request.length, segment)
    return pretrain.corpus(*(torch.from_numpy(array) for array in made))


def _mask_id(request: Request, tokenizer: AnyTokenizer | None) -> int:
    if tokenizer is None:
        if request.mask_id is None:
            raise TrainError("train: arrays do not tell the id of [MASK]: give --mask-id, or the tokenizer")
        return request.mask_id
    found = text.special(tokenizer, MASK)
    if request.mask_id not in (None, found):
        raise TrainError(f"train: {MASK} has the id {found} in the tokenizer, received --mask-id {request.mask_id}")
    return found


def _check_ids(file: Path, name: str, ids: Iterable[Tensor | None], size: int) -> None:
    """An id beyond its table would be an error of the device that does not say which."""
    for held in ids:
        if held is None:
            continue
        least, most = int(held.min()), int(held.max())
        if least < 0 or most >= size:
            raise TrainError(
                f"train: {file} holds {name} from {least} to {most}, and the model has {size} from 0; is this the "
                "tokenizer of this model?"
            )


def _adapt(request: Request, module: modules.Model) -> None:
    """Adapters in the encoder; what stands on it is trained whole."""
    targets = request.lora_targets or LORA_TARGETS[module.specification.config.model]
    generator = torch.Generator().manual_seed(request.recipe.seed)
    alpha = request.lora_alpha or 2.0 * request.lora_rank
    lora.attach(module, targets, r=request.lora_rank, alpha=alpha, rslora=False, generator=generator)
    module.heads.requires_grad_(True)


def _events(request: Request) -> list[journal.TensorBoard]:
    return [journal.TensorBoard(request.out / "run")] if request.tensorboard else []


def _summary(request: Request, module: modules.Model, task: Task, device: torch.device) -> str:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    steps, processes = request.recipe.steps(task.size), distributed.place().processes
    shared = f"{processes} processes, " if processes > 1 else ""
    return (
        f"{module.specification.config.model}: {trained:,} of {total:,} weights trained on {task.size:,} examples in "
        f"{steps:,} steps ({shared}{device}, {request.recipe.precision})"
    )


def _origin(request: Request, source: starting.Source) -> dict[str, Any]:
    """What a run must agree in besides the recipe and the data."""
    told = ("task", "pooling", "dropout", "lora_rank", "lora_alpha")
    held = {name: getattr(request, name) for name in told}
    return {
        **held,
        "lora_targets": list(request.lora_targets),
        "first weights": source.sha256,
        "device": request.device,
    }


def _keep(
    request: Request, module: modules.Model, fitted: loop.Fitted, classes: Iterable[str], words: Vocabulary | None
) -> None:
    weights: Mapping[str, Tensor] = fitted.weights
    if request.lora_rank:
        module.load_state_dict(fitted.weights)
        lora.save(module, request.out / "adapter")
        weights = lora.merged_weights(module)
    held = modules.flat(module.specification, weights)
    checkpoint.save(request.out / "model", module.specification, held, words.files() if words else None)
    names = list(classes)
    if names:
        checkpoint.write(request.out / "classes.json", (json.dumps(names, ensure_ascii=False) + "\n").encode())


def _hash(tensors: Iterable[Tensor | None]) -> str:
    made = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            made.update(b"none")
        else:
            made.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(np.ascontiguousarray(tensor.numpy()).data)
    return made.hexdigest()
