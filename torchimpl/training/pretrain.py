"""Pre-training: masked language models with whole-word masking, and causal language models.

    masked   15 % of the words are chosen; of their tokens 80 % become [MASK], 10 % stay, 10 % become a random token
    causal   every token is told from those before it

The loss is the mean cross entropy over all tokens to be told of the whole batch, however they lie in it.
Source: arXiv:1810.04805; ZhuiyiTechnology/roformer-v2 (whole words, random ids 1 ... V-1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from refimpl import check
from torchimpl.training.task import Batch, Task, trimmed

# Of the masks of an evaluation, which are the same every time.
EVALUATION_SEED = 0
# What cross_entropy leaves out.
NO_TARGET = -100


class Corpus(NamedTuple):
    """Token ids (n, length), which of them are real, and which word each belongs to: -1 for one that is never masked.

    Words count from 0 in every row.
    """

    token_ids: Tensor
    mask: Tensor
    words: Tensor

    def take(self, rows: Tensor | slice) -> Batch:
        """Some of the texts."""
        taken = {name: part[rows] for name, part in self._asdict().items()}
        return trimmed({name: t if t.dtype == torch.bool else t.long() for name, t in taken.items()})


@dataclass(frozen=True)
class Masking:
    """Which tokens are hidden, and how.

    rate: the chance of a word. masked, random: the chances that a token of such a word becomes `mask_id`, or an id from
    1 to vocab_size - 1; it stays otherwise.
    """

    mask_id: int
    vocab_size: int
    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        op = "pretrain.Masking"
        check.domain(op, self.vocab_size >= 2, "vocab_size >= 2", vocab_size=self.vocab_size)
        check.domain(op, 0 <= self.mask_id < self.vocab_size, "mask_id below vocab_size", mask_id=self.mask_id)
        check.domain(op, 0 < self.rate <= 1, "rate above 0, up to 1", rate=self.rate)
        fits = min(self.masked, self.random) >= 0 and self.masked + self.random <= 1
        check.domain(op, fits, "chances that sum to at most 1", masked=self.masked, random=self.random)


def corpus(token_ids: Tensor, mask: Tensor | None = None, words: Tensor | None = None) -> Corpus:
    """A corpus of these token ids; without `mask` all are real, without `words` each is a word of its own.

    Raises: ShapeError unless all are (n, length), n and length above 0; DomainError for other dtypes.
    """
    op = "pretrain.corpus"
    given = {"token_ids": token_ids, "mask": mask, "words": words}
    held = {name: tensor for name, tensor in given.items() if tensor is not None}
    fits = token_ids.ndim == 2 and all(tensor.shape == token_ids.shape for tensor in held.values())
    check.shape(op, fits and token_ids.numel() > 0, "token_ids, mask and words (n, length), not empty", **held)
    for name in ("token_ids", "words"):
        whole = name not in held or not (held[name].is_floating_point() or held[name].dtype == torch.bool)
        check.domain(op, whole, f"{name} to be integers", dtype=held.get(name, token_ids).dtype)
    check.domain(op, mask is None or mask.dtype == torch.bool, "a boolean mask", dtype=getattr(mask, "dtype", None))
    real = torch.ones(token_ids.shape, dtype=torch.bool) if mask is None else mask
    each = torch.arange(token_ids.shape[1], dtype=torch.int32).expand(token_ids.shape)
    return Corpus(token_ids, real, torch.where(real, each if words is None else words, -1))


def hide(batch: Batch, rule: Masking, generator: torch.Generator) -> Batch:
    """Token ids with hidden tokens, and `targets`: the id where a token was chosen, NO_TARGET elsewhere.

    C1. All tokens of a chosen word must be chosen, and no others.
    C2. A token with word -1 must stay.
    """
    ids, words = batch["token_ids"], batch["words"]
    # One number per word that a row may have, the same for all its tokens.
    drawn = torch.rand((len(ids), int(words.max().clamp(min=0)) + 1), generator=generator)
    chosen = (drawn.gather(1, words.clamp(min=0)) < rule.rate) & (words >= 0)
    kind = torch.rand(ids.shape, generator=generator)
    other = torch.randint(1, rule.vocab_size, ids.shape, generator=generator)
    becomes = torch.where(kind < rule.masked, rule.mask_id, torch.where(kind < rule.masked + rule.random, other, ids))
    targets = torch.where(chosen, ids, NO_TARGET)
    return {"token_ids": torch.where(chosen, becomes, ids), "mask": batch["mask"], "targets": targets}


def follow(batch: Batch) -> Batch:
    """`targets` of a causal model: at every real token the next one, NO_TARGET where there is none."""
    ids, mask = batch["token_ids"], batch["mask"]
    targets = torch.full_like(ids, NO_TARGET)
    targets[:, :-1] = torch.where(mask[:, :-1] & mask[:, 1:], ids[:, 1:], NO_TARGET)
    return {"token_ids": ids, "mask": mask, "targets": targets}


def masked_lm(train: Corpus, validation: Corpus, rule: Masking) -> Task:
    """Hidden tokens are told from all others; the figures are loss and accuracy on hidden tokens of `validation`.

    Raises: DomainError for words that a row cannot have.
    """
    for held in (train, validation):
        most, length = int(held.words.max()), held.token_ids.shape[1]
        check.domain("pretrain.masked_lm", most < length, f"words below {length}", words=most)
    return _task(train, validation, lambda batch, generator: hide(batch, rule, generator))


def causal_lm(train: Corpus, validation: Corpus) -> Task:
    """Every token is told from those before it; `model` must see no others. The figures are those of masked_lm."""
    return _task(train, validation, lambda batch, generator: follow(batch))


def targets(batch: Batch) -> int:
    """How many tokens of a batch are to be told."""
    return int((batch["targets"] != NO_TARGET).sum())


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of the output mlm_logits at the targets; 0 where there is none."""
    logits, ids = _told(model, batch)
    return functional.cross_entropy(logits, ids, reduction="sum") / max(len(ids), 1)


def _task(train: Corpus, validation: Corpus, made: Callable[[Batch, torch.Generator], Batch]) -> Task:
    def draw(rows: Tensor, generator: torch.Generator) -> Batch:
        return made(train.take(rows), generator)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return _figures(model, validation, made)

    return Task(len(train.token_ids), draw, loss, evaluate, best="loss", smallest=True, count=targets)


def _figures(
    model: nn.Module, corpus: Corpus, made: Callable[[Batch, torch.Generator], Batch], batch_size: int = 64
) -> dict[str, float]:
    generator, device = torch.Generator().manual_seed(EVALUATION_SEED), next(model.parameters()).device
    total, told, right = 0.0, 0, 0
    for start in range(0, len(corpus.token_ids), batch_size):
        drawn = made(corpus.take(slice(start, start + batch_size)), generator)
        batch = {name: tensor.to(device) for name, tensor in drawn.items()}
        logits, ids = _told(model, batch)
        total += float(functional.cross_entropy(logits, ids, reduction="sum"))
        told, right = told + len(ids), right + int((logits.argmax(dim=-1) == ids).sum())
    return {"loss": total / told if told else math.nan, "accuracy": right / told if told else math.nan}


def _told(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of all tokens that are to be told, and their ids."""
    aimed = batch["targets"] != NO_TARGET
    logits = model(batch["token_ids"], None, batch["mask"], told=aimed)["mlm_logits"]
    return logits.float(), batch["targets"][aimed]
