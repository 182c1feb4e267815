"""More than one process: who this one is, how gradients meet, and whole tensors where shards are held.

A batch is drawn whole by every process, from the same random numbers; process r of p learns its rows r, r + p, r + 2p
and so on. Started with `torchrun --nproc-per-node=P`, gloo carries the sums between CPUs and nccl between GPUs.

    ddp    torch's DistributedDataParallel: every process holds all weights, gradients are averaged
    fsdp   torch's fully_shard (FSDP2): weights, gradients and optimiser state are split, layer by layer
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from refimpl import check
from torchimpl import layers

PARALLEL = ("ddp", "fsdp")


class Place(NamedTuple):
    """Which of how many processes this one is."""

    rank: int
    processes: int

    @property
    def first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0


def place() -> Place:
    """This process among those of the group that it has joined; the only one where it has joined none."""
    if not joined_any():
        return Place(0, 1)
    return Place(distributed.get_rank(), distributed.get_world_size())


def joined_any() -> bool:
    """Whether a group has been joined."""
    return bool(distributed.is_available() and distributed.is_initialized())


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Inside, this process is one of those that torchrun started, if it did; gives the device that is this one's.

    Raises: DomainError for a device that this machine does not have.
    """
    kind = device.partition(":")[0]
    check.domain("distributed.joined", kind in ("cpu", "cuda"), "a device cpu or cuda", device=device)
    check.domain("distributed.joined", kind == "cpu" or torch.cuda.is_available(), "a device of here", device=device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device(device)
        return
    own = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield own
        # None leaves while another still talks to it: a process of gloo may abort then, at its very end.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def once(tell: Callable[[], None], patience: float = 10.0) -> None:
    """Tell what all processes may have met alike: the first does, and all leave when all have met it.

    One that waits `patience` seconds for the first in vain tells it itself: it alone has met it. No group is needed.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        tell()
    if processes == 1:
        return
    # torchrun ends all processes as soon as one has ended: who is quiet must not be the first to go.
    others = range(1, processes) if rank == 0 else range(1)
    try:
        limit = timedelta(seconds=patience)
        store, *_ = next(distributed.rendezvous("env://", timeout=limit))
        store.set(f"refimpl/met/{rank}", "")
        store.wait([f"refimpl/met/{other}" for other in others], limit)
    except (RuntimeError, ValueError):
        if rank:
            tell()


def spread(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """What is called in place of `model`, on the device, so that gradients meet; all start from the first's weights.

    With "fsdp" the parameters of `model` itself become shards, a layer after another: the device never holds more than
    the shards and one layer, or what is in no layer.
    Raises: DomainError for another name.
    """
    check.domain("distributed.spread", parallel in PARALLEL, f"one of {PARALLEL}", parallel=parallel)
    if place().processes == 1:
        return model.to(device)
    if parallel == "ddp":
        _as_first(model.to(device))
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (place().processes,))
    for part in (*layers.layers(model), model):
        for tensor in (*part.parameters(), *part.buffers()):
            if not hasattr(tensor, "full_tensor"):
                tensor.data = tensor.data.to(device)
        _as_first(part)
        fully_shard(part, mesh=mesh)
    return model


def _as_first(module: nn.Module) -> None:
    """The numbers of the first process in all; what is in shards already has them."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if not hasattr(tensor, "full_tensor"):
                distributed.broadcast(tensor, 0)


def unsynchronised(spreading: nn.Module) -> AbstractContextManager[Any]:
    """Backward inside adds to the gradients of this process alone: all micro-batches but the last."""
    if isinstance(spreading, nn.parallel.DistributedDataParallel):
        return spreading.no_sync()
    if hasattr(spreading, "set_requires_gradient_sync"):
        return _unsynchronised_shards(spreading)
    return nullcontext()


@contextmanager
def _unsynchronised_shards(spreading: Any) -> Iterator[None]:
    spreading.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        spreading.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that shards make up; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's shard of it; all processes must ask for it."""
    with torch.no_grad():
        target.copy_(as_held(source, target))


def as_held(source: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, in shards where `like` is and has the same shape."""
    source = source.to(like.device)
    if not hasattr(like, "full_tensor") or source.shape != like.shape:
        return source
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source, like.device_mesh, like.placements)


def total(value: Tensor) -> Tensor:
    """The sum of a number over all processes."""
    if joined_any():
        distributed.all_reduce(value)
    return value


def from_all(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """The tensor of every process, in their order, on the host; all of one shape."""
    if not joined_any():
        return [tensor]
    own = tensor.to(device)
    held = [torch.empty_like(own) for _ in range(place().processes)]
    distributed.all_gather(held, own)
    return [other.cpu() for other in held]


def from_first(figures: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The figures of the first process, so that all decide alike."""
    if not joined_any():
        return dict(figures)
    held = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    distributed.broadcast(held, 0)
    return dict(zip(figures, held.tolist(), strict=True))
