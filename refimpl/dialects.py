"""What the dialects of a model are, and what it makes of its result to take one for another.

A dialect is a set of constants that an implementation has, by its name in DIALECTS of the model's file. `measured` runs
the same small random model through all of them; `BESIDES` says what differs and is no constant of ours.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl import check
from refimpl import model as models
from refimpl.model import Model
from refimpl.models import _heads

# What implementations do beyond their constants, by model; a key is the beginning of the dialects' names.
BESIDES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "roformer": {
        "bert4keras": (
            "hides id 0, except at position 0, when it is given no mask",
            "has two kinds of segments up to 0.11.3, whatever the configuration says",
            'has the tanh form of gelu after set_gelu("tanh")',
        ),
        "junnyu": (
            "derives no mask from ids; adds -1e4 to hidden scores, so that a token that sees none attends to all",
        ),
        "huggingface": ("derives no mask from ids; has no pooler",),
    },
    "roformer_v2": {
        "bert4keras": (
            "hides id 0, except at position 0, when it is given no mask",
            "has a matrix before the token table where widths differ",
        ),
        "junnyu": (
            "derives no mask from ids; adds -1e4 to hidden scores, so that a token that sees none attends to all",
            "has a bias in the mapping of embeddings where widths differ, and no matrix before the token table",
        ),
    },
    "gau_alpha": {
        "bert4keras": (
            "hides id 0, except at position 0, when it is given no mask",
            "up to 0.11.3 attends to all tokens alike where a token sees one, padding among them",
        ),
        "junnyu": (
            "hides pad_token_id, at position 0 too, when it is given no mask; puts -1e4 in the place of hidden scores",
        ),
    },
}
# The model that is measured: small, but with the depth of a small model and both norms at work.
_SIZES: Mapping[str, Mapping[str, int]] = {
    "roformer": {"embedding_size": 64, "hidden_size": 64, "heads": 4, "intermediate_size": 128},
    "roformer_v2": {"embedding_size": 64, "hidden_size": 64, "heads": 4, "intermediate_size": 128},
    "gau_alpha": {"hidden_size": 64, "expanded_size": 128, "key_size": 16},
}
_COMMON = {"vocab_size": 97, "segments": 2, "layers": 6}
# Tokens of the long text and of the short one, which is padded to the same length.
LONG, SHORT = 48, 6


@dataclass(frozen=True)
class Measured:
    """How far a dialect is from another on the same weights: of the last hidden state, and of the logits above it.

    Each is the largest difference on real tokens against the largest magnitude.
    """

    dialect: str
    hidden_long: float
    hidden_short: float
    logits_long: float
    logits_short: float


def preset(model: str, size: str, dialect: str, changed: Mapping[str, int]) -> Model:
    """The encoder of a published size with a dialect's constants and without heads; `changed` replaces sizes of it.

        preset("roformer_v2", "small", "bert4keras-0.11.5", {"vocab_size": 21128})

    Raises: DomainError for a model, a size, a dialect or a name among `changed` that is not listed, and as its Config.
    """
    of(model)
    module: Any = importlib.import_module(f"refimpl.models.{model}")
    check.domain("dialects.preset", size in module.SIZES, "one of " + ", ".join(module.SIZES), size=size)
    unknown = sorted(changed.keys() - module.SIZES[size].keys())
    check.domain("dialects.preset", not unknown, "sizes among " + ", ".join(module.SIZES[size]), received=unknown)
    return Model(module.dialect(dialect, **{**module.SIZES[size], **changed}), (), "bidirectional")


def of(model: str) -> Mapping[str, Mapping[str, Any]]:
    """The dialects of a model, by name.

    Raises: DomainError for a model that has none.
    """
    check.domain("dialects.of", model in _SIZES, f"a model with dialects: {', '.join(_SIZES)}", model=model)
    dialects: Mapping[str, Mapping[str, Any]] = importlib.import_module(f"refimpl.models.{model}").DIALECTS
    return dialects


def replaced(config: Any, dialect: str) -> Any:
    """A Config with the constants of a dialect in the place of its own; the activation, which files tell, is kept.

    Raises: DomainError for another name.
    """
    dialects = of(config.model)
    check.domain("dialects.replaced", dialect in dialects, "one of " + ", ".join(dialects), dialect=dialect)
    return dataclasses.replace(config, **{k: v for k, v in dialects[dialect].items() if k != "activation"})


def besides(model: str, dialect: str) -> tuple[str, ...]:
    """What an implementation does beyond its constants."""
    return next((said for name, said in BESIDES[model].items() if dialect.startswith(name)), ())


def measured(model: str, reference: Mapping[str, Any], *, seed: int = 0) -> tuple[Measured, ...]:
    """Every dialect of a model against the constants `reference`, on the same random weights and texts.

    Token and segment vectors are N(0, 0.02²), as BERT's are at the start, and kernels N(0, 1 / inputs); norms have the
    scale 1 and no bias. A text of 48 tokens, and one of 6 in a row of that length.

    Raises: DomainError for a model without dialects, and for constants that its Config refuses.
    """
    dialects = of(model)
    # Of the configuration, whatever dialect it is read in.
    kept = {key: reference[key] for key in ("activation",) if key in reference}
    rng = np.random.default_rng(seed)
    module = importlib.import_module(f"refimpl.models.{model}")
    head = _heads.TransformedLM() if model == "roformer" else _heads.TiedLM()

    def made(constants: Mapping[str, Any]) -> Model:
        return Model(module.Config(**_COMMON, **_SIZES[model], **{**constants, **kept}), (head,), "bidirectional")

    weights = {name: _drawn(rng, name, shape) for name, shape in models.shapes(made(reference)).items()}
    ids = rng.integers(1, _COMMON["vocab_size"], (2, LONG))
    mask = np.arange(LONG) < np.array([[LONG], [SHORT]])

    def run(constants: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        given = models.forward(weights, np.where(mask, ids, 0), None, mask, model=made(constants))
        return given["last_hidden_state"], given["mlm_logits"]

    expected = run(reference)
    found = []
    for name, constants in dialects.items():
        got = run(constants)
        far = [
            float(np.abs(one[row][mask[row]] - other[row][mask[row]]).max() / np.abs(other[row][mask[row]]).max())
            for one, other in zip(got, expected, strict=True)
            for row in (0, 1)
        ]
        found.append(Measured(name, *far))
    return tuple(found)


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.startswith("embedding.") and len(shape) == 2:
        return 0.02 * rng.standard_normal(shape)
    if len(shape) == 2:
        return rng.standard_normal(shape) / np.sqrt(shape[0])
    return np.ones(shape) if name.endswith(("scale", "gamma_q", "gamma_k")) else np.zeros(shape)
