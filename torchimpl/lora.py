"""LoRA on whole models: adapters beside frozen weights, merging, and PEFT's folders.

    y = x W + scale (x A) B

Operators: torchimpl/ops/lora.py. Source: Hu et al., arXiv:2106.09685. The same training without adapters, as an
optimiser of W, is torchimpl/lora_optimizer.py.

A matrix is named as PEFT names it, by the path of its nn.Linear or nn.Embedding; a matrix that a module holds itself,
as the kernels (in, out) of torchimpl/models are held, by its own path, such as `layers.0.attention.w_q`, and is taken
as (in, out). In a PEFT folder such a path stands where a module's would.

Weights keep their names; an adapter is a child `lora_<name>` of the module that holds the matrix, such as
`fc1.lora_weight`. Linear and Embedding add its part to their output and never form A B. Of a matrix that a module
holds itself every use sees W + scale A B, formed and rounded to the dtype of W; so is its gradient formed, from which
those of A and B follow. benchmarks/lora.py prints what that costs. Checkpoints are written from `merged_weights`,
adapters by `save`.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor, nn
from torch.nn import functional

from torchimpl import check, checkpoint
from torchimpl.ops import lora as ops

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT puts before the path of a module.
PREFIX = "base_model.model."
LONGEST_CONFIG = 1 << 20
# Keys of adapter_config.json that this file acts on, and those that tell a reader something or belong to an option
# that is off. Any other key is an option: it must be off, whether this file knows it or not.
READ = (
    "peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern",
    "bias", "init_lora_weights",
)  # fmt: skip
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# Whether W lies as (in, out) is seen from the module, so fan_in_fan_out says nothing new.
TOLD = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
)  # fmt: skip
# Starts that leave the base weight as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) move a part of it into the factors.
STARTS = (True, False, "gaussian")


class LoraError(ValueError):
    """Targets that a model does not have, a step out of order (merging twice), or a folder that is no adapter of it."""


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how.

    targets: names, each of which a matrix has or ends in after a dot; or one regular expression for whole names.
    rslora: scale is alpha / sqrt(r) instead of alpha / r.
    dropout: of the input of A, in training.
    rank_pattern, alpha_pattern: r and alpha of matrices whose name, or its end after a dot, is matched by the key; the
        first that matches counts.
    """

    targets: tuple[str, ...] | str
    r: int
    alpha: float
    rslora: bool
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        op = "lora.LoraConfig"
        named = (self.targets,) if isinstance(self.targets, str) else self.targets
        fits = isinstance(named, tuple) and named and all(isinstance(name, str) and name for name in named)
        check.domain(op, bool(fits), "targets a tuple of names or one regular expression", targets=self.targets)
        check.domain(op, type(self.rslora) is bool, "rslora true or false", rslora=self.rslora)
        fits = type(self.dropout) in (int, float) and 0 <= self.dropout < 1
        check.domain(op, fits, "dropout from 0 to below 1", dropout=self.dropout)
        for name in ("rank_pattern", "alpha_pattern"):
            check.domain(
                op, isinstance(getattr(self, name), Mapping), f"{name} a mapping", **{name: getattr(self, name)}
            )
        for pattern in [*self.rank_pattern, *self.alpha_pattern, *(named if isinstance(self.targets, str) else ())]:
            check.domain(op, _compiles(pattern), "a regular expression", pattern=pattern)
        # Every scale that can come of this is one.
        for r in (self.r, *self.rank_pattern.values()):
            for alpha in (self.alpha, *self.alpha_pattern.values()):
                check.domain(op, type(alpha) in (int, float), "alpha a number", alpha=alpha)
                for whole in (alpha, r):
                    # Python's integers may be too large for a quotient.
                    fits = type(whole) is not int or abs(whole) <= 2**53
                    check.domain(op, fits, "r and alpha of at most 2^53", received=whole)
                ops.scale_lora(alpha=alpha, r=r)

    def rank(self, name: str) -> int:
        """r of the matrix `name`."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """The factor of A B for the matrix `name`."""
        rule = ops.scale_rslora if self.rslora else ops.scale_lora
        return rule(alpha=_by_pattern(self.alpha_pattern, name, self.alpha), r=self.rank(name))


class Adapter(nn.Module):
    """The factors beside one matrix: A (d, r), B (r, e); `base` is W as it was, while the two are merged.

    transposed: the matrix lies as (out, in).
    """

    def __init__(
        self, A: Float[Tensor, "d r"], B: Float[Tensor, "r e"], *, scale: float, dropout: float, transposed: bool
    ) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale, self.dropout, self.transposed = scale, dropout, transposed
        # A buffer, so that the state of a merged model is not taken for that of an unmerged one.
        self.register_buffer("base", None)

    @property
    def merged(self) -> bool:
        return self.base is not None

    def dense(self, W: Float[Tensor, "d e"]) -> Float[Tensor, "d e"]:
        """W + scale A B, formed in the wider format of the two, at least float32, and rounded once."""
        wide = torch.promote_types(check.island(W).dtype, check.island(self.A).dtype)
        return ops.merge(W.to(wide), self.A.to(wide), self.B.to(wide), scale=self.scale).to(W.dtype)

    def on_rows(self, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        """y + scale (x A) B in the dtype of y, for y = x W."""
        rows = functional.dropout(x.to(self.A.dtype), self.dropout, self.training)
        return (y + (self.scale * (rows @ self.A)) @ self.B).to(y.dtype)

    def on_ids(self, ids: Tensor, y: Float[Tensor, "*b e"], padding: int | None) -> Float[Tensor, "*b e"]:
        """The same for y = W[ids]; nothing can be dropped of an id, and the row of `padding` learns nothing."""
        return (y + (self.scale * functional.embedding(ids, self.A, padding)) @ self.B).to(y.dtype)

    def used(self, held: Tensor) -> Tensor:
        """What stands for a matrix that a module holds itself."""
        if self.merged:
            return held
        return self.dense(held.T).T if self.transposed else self.dense(held)

    def extra_repr(self) -> str:
        (d, r), e = self.A.shape, self.B.shape[1]
        return f"d={d}, e={e}, r={r}, scale={self.scale:g}{', merged' if self.merged else ''}"


def attach(
    model: nn.Module,
    targets: Sequence[str] | str,
    *,
    r: int,
    alpha: float,
    rslora: bool,
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Adapter]:
    """Put adapters beside the matrices that `targets` name; everything else is frozen until `detach`.

    As in PEFT, A starts uniform within 1 / sqrt(d) and B at zero, and at an embedding A at zero and B normal: the
    model computes what it did. dtype: of A and B; the default is that of the matrix, float32 where it has 16 bits.
    Raises: LoraError where a target names nothing (the message lists what there is), what is no matrix or a matrix
        that two names share, for dropout beside a matrix that a module holds itself, and for a model with adapters;
        DomainError for values that LoraConfig refuses.
    Differs: PEFT passes over a name that matches nothing if another does, and warns of shared matrices.
    """
    named = targets if isinstance(targets, str) else tuple(targets)
    config = LoraConfig(named, r, alpha, rslora, dropout, rank_pattern or {}, alpha_pattern or {})
    check.domain("lora.attach", dtype is None or dtype in check.FLOATS, "a floating dtype", dtype=dtype)
    places = _selected(model, config, every=True)
    factors = {}
    for place in places:
        W = _matrix(model, place)
        factors[place] = first_factors(
            W.shape, config.rank(place.name), dtype=dtype or check.island(W).dtype, device=W.device,
            generator=generator, of_ids=place.hook is _embedding_hook,
        )  # fmt: skip
    return _attach(model, config, factors)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by the names of their matrices.

    Raises: LoraError for a model without.
    """
    return {place.name: _adapter(model, place) for place in _attached("adapters", model).places}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write W + scale A B over every adapted W, which then acts alone; the bits of W are kept for `unmerge`.

    Raises: LoraError where an adapter is merged already: its change would be added twice.
    """
    attached = _attached("merge", model)
    found = {place: _adapter(model, place) for place in attached.places}
    if any(adapter.merged for adapter in found.values()):
        raise LoraError("lora.merge: the adapters are merged already; lora.unmerge restores the base weights")
    for place, adapter in found.items():
        W = _matrix(model, place)
        base = W.detach().clone(memory_format=torch.contiguous_format)
        W.copy_(adapter.dense(W))
        adapter.base = base


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put every W back, bit for bit, whatever A and B have become since.

    Raises: LoraError where no adapter is merged.
    """
    attached = _attached("unmerge", model)
    merged = [place for place in attached.places if _adapter(model, place).merged]
    if not merged:
        raise LoraError("lora.unmerge: the adapters are not merged")
    for place in merged:
        adapter = _adapter(model, place)
        _matrix(model, place).copy_(adapter.base)
        adapter.base = None


def detach(model: nn.Module) -> None:
    """Take the adapters away. The weights stay as they are, merged ones merged; what was trainable is so again.

    Raises: LoraError for a model without adapters.
    """
    attached = _attached("detach", model)
    for place in attached.places:
        owner = model.get_submodule(place.owner)
        if place.hook is None:
            owner.__class__ = getattr(type(owner), "without_lora", type(owner))
        else:
            _adapter(model, place).handle.remove()
        delattr(owner, place.child)
    del model.lora_attached
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attached.trainable.get(name, parameter.requires_grad))


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict that the model would have without adapters, with their change added: for checkpoint.save.

    Raises: LoraError for a model without adapters.
    """
    attached = _attached("merged_weights", model)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for place in attached.places:
        prefix = f"{place.owner}." if place.owner else ""
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}{place.child}.")}
        adapter, W = _adapter(model, place), _matrix(model, place).detach()
        W = W.clone() if adapter.merged else adapter.dense(W).detach()
        state[f"{prefix}{place.tensor}"] = (W.T if place.transposed else W).contiguous()
    return state


def save(model: nn.Module, folder: Path) -> None:
    """Write the adapters as PEFT would: adapter_config.json and adapter_model.safetensors, A and B in their dtype.

    Other files of the folder are left alone. A writer that is stopped leaves the folder as it was, or without
    adapter_config.json and therefore no adapter.
    Raises: LoraError for a model without adapters, and for numbers that are not finite.
    """
    attached = _attached("save", model)
    config = attached.config
    tensors = {}
    for place in attached.places:
        adapter = _adapter(model, place)
        for name, factor in zip(_peft_names(place), (adapter.A, adapter.B), strict=True):
            if not torch.isfinite(factor).all():
                raise LoraError(f"lora.save: {name} holds numbers that are not finite")
            tensors[name] = factor.detach().cpu().T.contiguous()
    told = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": all(place.hook is None and not place.transposed for place in attached.places),
        "init_lora_weights": True,
    }
    data = write_tensors(tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    checkpoint.write(folder / WEIGHTS, data)
    checkpoint.write(folder / CONFIG, (json.dumps(told, indent=2) + "\n").encode())


def load(model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None) -> dict[str, Adapter]:
    """Attach the adapters of a PEFT folder. A and B keep the dtype that they have there, unless `dtype` is given.

    Raises: LoraError for a missing or damaged file, an option of PEFT that is on and not supported (by its name),
        tensors that are missing, too many or of another shape than the configuration and the model ask for, numbers
        that are not finite, and as attach; DomainError as attach.
    """
    config = _read_config(folder / CONFIG)
    # PEFT's own writer lists targets that a model of this kind need not have.
    places = _selected(model, config, every=False)
    expected: dict[str, tuple[int, int]] = {}
    for place in places:
        (d, e), r = _matrix(model, place).shape, config.rank(place.name)
        expected |= dict(zip(_peft_names(place), ((r, d), (e, r)), strict=True))
    check.domain("lora.load", dtype is None or dtype in check.FLOATS, "a floating dtype", dtype=dtype)
    tensors = _read_tensors(folder / WEIGHTS, expected)
    factors = {}
    for place in places:
        A, B = (tensors[name].T.contiguous() for name in _peft_names(place))
        device = _matrix(model, place).device
        factors[place] = A.to(device=device, dtype=dtype or A.dtype), B.to(device=device, dtype=dtype or B.dtype)
    return _attach(model, config, factors)


def first_factors(
    shape: Sequence[int],
    r: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
    of_ids: bool = False,
) -> tuple[Tensor, Tensor]:
    """A (d, r) uniform within 1 / sqrt(d) and B (r, e) zero; of ids A zero and B normal. Drawn in PEFT's orientation.

    Source: PEFT, kaiming_uniform_ with a = sqrt(5) on (r, d).
    """
    d, e = shape
    # Drawn where the generator is, so that a seed means the same on every device.
    place = torch.device("cpu") if generator is None else generator.device
    A, B = torch.zeros(r, d, dtype=dtype, device=place), torch.zeros(e, r, dtype=dtype, device=place)
    if of_ids:
        B.normal_(generator=generator)
    elif d:
        A.uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator)
    return A.T.contiguous().to(device), B.T.contiguous().to(device)


class _Place(NamedTuple):
    """Where a matrix is: its name, the path of its module, its name there.

    transposed: it lies as (out, in). hook: what adds the adapter's part to the module's output; None where every use
    of the matrix sees the sum.
    """

    name: str
    owner: str
    tensor: str
    transposed: bool
    hook: Callable[..., Tensor | None] | None

    @property
    def child(self) -> str:
        """What the adapter is called in its module."""
        return f"lora_{self.tensor}"


@dataclass(frozen=True)
class _Attached:
    """What `detach` and `save` must know: the configuration, the matrices, and which parameters were trainable."""

    config: LoraConfig
    places: tuple[_Place, ...]
    trainable: dict[str, bool]


def _linear_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    x = args[0] if args else kwargs["input"]
    return None if module.lora_weight.merged else module.lora_weight.on_rows(x, output)


def _embedding_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    ids = args[0] if args else kwargs["input"]
    return None if module.lora_weight.merged else module.lora_weight.on_ids(ids, output, module.padding_idx)


@functools.cache
def _with_lora(kind: type[nn.Module], tensors: frozenset[str]) -> type[nn.Module]:
    """A class of modules like `kind`, in which these tensors are read with their adapters.

    torch.nn.utils.parametrize also derives a class, but changes it when a parametrisation goes, under the feet of
    copies of the module; it also renames the tensors.
    """

    def read(tensor: str) -> property:
        return property(lambda module: module._modules[f"lora_{tensor}"].used(module._parameters[tensor]))

    return type(f"{kind.__name__}WithLora", (kind,), {"without_lora": kind} | {name: read(name) for name in tensors})


def _attach(
    model: nn.Module, config: LoraConfig, factors: Mapping[_Place, tuple[Tensor, Tensor]]
) -> dict[str, Adapter]:
    inside = [place.name for place in factors if place.hook is None]
    if config.dropout and inside:
        raise LoraError(
            f"lora.attach: dropout acts on the input of an nn.Linear; {_listed(inside)} is held by its module itself, "
            f"where W + scale A B is formed: expected dropout 0, received {config.dropout}"
        )
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for place, (A, B) in factors.items():
        owner = model.get_submodule(place.owner)
        adapter = Adapter(
            A, B, scale=config.scale(place.name), dropout=config.dropout, transposed=place.transposed
        ).train(owner.training)
        owner.add_module(place.child, adapter)
        if place.hook is not None:
            adapter.handle = owner.register_forward_hook(place.hook, with_kwargs=True)
    for path in {place.owner for place in factors if place.hook is None}:
        owner = model.get_submodule(path)
        tensors = frozenset(place.tensor for place in factors if place.owner == path)
        owner.__class__ = _with_lora(type(owner), tensors)  # type: ignore[arg-type]
    model.lora_attached = _Attached(config, tuple(factors), trainable)
    return adapters(model)


def _names(model: nn.Module) -> dict[str, _Place | str]:
    """All that a target may name: matrices with their places, and for everything else why it is none."""
    found: dict[str, _Place | str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # What derives from Linear need not be called (in MultiheadAttention it is not), but its weight is used.
            hook = _linear_hook if type(module) is nn.Linear else None
            found[path] = _Place(path, path, "weight", True, hook)
            continue
        if type(module) is nn.Embedding:
            found[path] = _Place(path, path, "weight", False, _embedding_hook)
            continue
        found[path] = f"a {type(module).__name__}"
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if parameter.ndim == 2 and parameter.is_floating_point():
                found[name] = _Place(name, path, own, False, None)
            else:
                found[name] = f"of shape {tuple(parameter.shape)} and {parameter.dtype}"
    found.pop("")
    return found


def _selected(model: nn.Module, config: LoraConfig, *, every: bool) -> list[_Place]:
    """The matrices that the targets name; with `every`, each target must name one."""
    if hasattr(model, "lora_attached"):
        raise LoraError("lora.attach: the model has adapters already; lora.detach takes them away")
    names = _names(model)
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    hits = {target: [name for name in names if _hit(config, target, name)] for target in targets}
    vain = [target for target, hit in hits.items() if not hit]
    if len(vain) == len(hits) or (every and vain):
        there = [name for name, place in names.items() if isinstance(place, _Place)]
        raise LoraError(f"lora.attach: no matrix is named {_listed(vain)}; the model has {_listed(there)}")
    wanted = set().union(*hits.values())
    chosen = []
    for name, place in names.items():
        if name in wanted:
            if not isinstance(place, _Place):
                raise LoraError(f"lora.attach: expected a matrix as target, received {name}, {place}")
            _check_place(model, place)
            chosen.append(place)
    return chosen


def _check_place(model: nn.Module, place: _Place) -> None:
    owner = model.get_submodule(place.owner)
    held = owner._parameters.get(place.tensor)
    if held is None:
        raise LoraError(f"lora.attach: {place.name} is no parameter but computed from others")
    if hasattr(owner, place.child):
        raise LoraError(f"lora.attach: {place.name} has {place.child} beside it already")
    if held.dtype not in check.FLOATS:
        raise LoraError(f"lora.attach: expected {place.name} of a floating dtype, received {held.dtype}")
    same = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is held]
    if len(same) > 1:
        raise LoraError(
            f"lora.attach: {_listed(same)} are one tensor: an adapter beside one of them would change the others only "
            "when it is merged"
        )


def _hit(config: LoraConfig, target: str, name: str) -> bool:
    if isinstance(config.targets, str):
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _compiles(pattern: object) -> bool:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError):
        return False
    return True


def _attached(operation: str, model: nn.Module) -> _Attached:
    found = getattr(model, "lora_attached", None)
    if found is None:
        raise LoraError(f"lora.{operation}: the model has no adapters")
    return found


def _adapter(model: nn.Module, place: _Place) -> Adapter:
    found: Adapter = model.get_submodule(place.owner).get_submodule(place.child)
    return found


def _matrix(model: nn.Module, place: _Place) -> Tensor:
    """The matrix (d, e) that is held, without its adapter: a view, so that it can be written."""
    held = model.get_submodule(place.owner)._parameters[place.tensor]
    return held.T if place.transposed else held


def _peft_names(place: _Place) -> tuple[str, str]:
    name = PREFIX + place.name
    if place.hook is _embedding_hook:
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _read_config(file: Path) -> LoraConfig:
    try:
        if file.stat().st_size > LONGEST_CONFIG:
            raise LoraError(f"lora.load: {file} has {file.stat().st_size} bytes, expected at most {LONGEST_CONFIG}")
        data = file.read_bytes()
    except FileNotFoundError:
        raise LoraError(f"lora.load: {file.parent} is no adapter folder: it has no {file.name}") from None
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        raise LoraError(f"lora.load: {file} is no JSON") from None
    if not isinstance(told, dict):
        raise LoraError(f"lora.load: {file}: expected a JSON object, received {type(told).__name__}")
    missing = [key for key in REQUIRED if told.get(key) is None]
    if missing:
        raise LoraError(f"lora.load: {file} lacks {_listed(missing)}")
    on = [key for key, value in told.items() if key not in (*READ, *TOLD) and value not in (None, False, {}, [])]
    for key, known in (("peft_type", ("LORA",)), ("bias", ("none",)), ("init_lora_weights", STARTS)):
        if key in told and not any(told[key] == value and type(told[key]) is type(value) for value in known):
            on.append(key)
    if on:
        received = ", ".join(f"{key}={told[key]!r:.80}" for key in sorted(on))
        raise LoraError(f"lora.load: {file}: not supported, expected to be off: {received}")
    targets = told["target_modules"]
    return LoraConfig(
        targets if isinstance(targets, str) else tuple(targets) if isinstance(targets, list) else (),
        told["r"],
        told["lora_alpha"],
        told.get("use_rslora", False),
        told.get("lora_dropout", 0.0),
        told.get("rank_pattern") or {},
        told.get("alpha_pattern") or {},
    )


def _read_tensors(file: Path, expected: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors of a file, after their names and shapes; nothing is read before these are right."""
    if not file.is_file():
        other = next(file.parent.glob("adapter_model.*"), None)
        hint = f"; {other.name} is not read, pickle runs code" if other is not None and other.suffix == ".bin" else ""
        raise LoraError(f"lora.load: {file} is missing{hint}")
    try:
        with safe_open(file, "pt") as held:
            found = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
            missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            if missing or unknown:
                raise LoraError(
                    f"lora.load: {file}: the tensors are not those of the targets; missing: {_listed(missing)}; "
                    f"unknown: {_listed(unknown)}"
                )
            for name, shape in expected.items():
                if found[name] != shape:
                    raise LoraError(f"lora.load: {file}: expected {name} of shape {shape}, received {found[name]}")
            tensors = {name: held.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise LoraError(f"lora.load: {file} is no safetensors file ({error})") from None
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(check.FLOATS):
        raise LoraError(f"lora.load: {file}: expected tensors of one floating dtype, received {dtypes}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LoraError(f"lora.load: {file}: {name} holds numbers that are not finite")
    return tensors


def _listed(names: Sequence[str]) -> str:
    """At most twenty names."""
    shown = ", ".join(names[:20]) or "none"
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
