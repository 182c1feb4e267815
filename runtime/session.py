"""One exported model in ONNX Runtime: what is asked is checked before it runs, threads are those that the process has.

session = Session("model.onnx");   session.run(token_ids)["logits"]
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from refimpl import check, config
from refimpl import model as specification
from refimpl.model import Model

# Of refimpl.format in the file's metadata; a file with a larger one was written by a newer refimpl.
FORMAT = 2
INPUTS = ("token_ids", "segment_ids", "mask")
PROVIDERS = ("CPUExecutionProvider",)


class SessionError(ValueError):
    """A file that is no exported model, or that cannot be run here."""


class Session:
    """A model file, loaded. `run` may be called from several threads at once.

    model: what the file tells of the model; outputs: the names of what it gives, which `model` has as heads.
    metadata: everything that the file tells. threads: of one call; by default as many as the process may use.
    max_batch, max_length: larger requests are refused; where the model chooses, max_batch counts all choices.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = PROVIDERS,
        *,
        max_batch: int = 1024,
        max_length: int = 4096,
    ) -> None:
        self.path, self.max_batch, self.max_length = Path(path), max_batch, max_length
        if not self.path.is_file():
            raise SessionError(f"runtime: there is no file {path}")
        absent = [name for name in providers if name not in onnxruntime.get_available_providers()]
        if absent:
            there = ", ".join(onnxruntime.get_available_providers())
            raise SessionError(f"runtime: this onnxruntime has no {', '.join(absent)}; it has {there}")
        self.threads = available_threads() if threads is None else threads
        check.domain("runtime.Session", self.threads >= 1, "threads >= 1", threads=threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Threads that wait by spinning take the cores of every other session of the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Errors are raised, with our words; the library's own lines on stderr would come on top.
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(self.path), options, providers=list(providers))
        except Exception as error:
            raise SessionError(
                f"runtime: {path} cannot be loaded: it is damaged or cut off, or {_first(error)}"
            ) from None
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.model = _model(path, self.metadata)
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        found = tuple(entry.name for entry in self._session.get_inputs())
        if found != INPUTS:
            raise SessionError(f"runtime: {path} takes {', '.join(found)}; expected {', '.join(INPUTS)}")
        due = specification.outputs(self.model)
        if self.outputs != due:
            raise SessionError(f"runtime: {path} gives {', '.join(self.outputs)}; its model gives {', '.join(due)}")

    def run(self, token_ids: Any, segment_ids: Any = None, mask: Any = None) -> dict[str, np.ndarray]:
        """The outputs by name for token ids (batch, length), or (batch, choices, length) where the model chooses.

        Without segment_ids every token is of segment 0, without a mask every token is real.

        Raises: ShapeError unless all have one shape of at least one and at most max_batch rows and max_length tokens;
            DomainError for ids that are no integers or outside their table, and for a mask that is not boolean.
        """
        operation = "runtime.run"
        ids = check.integer(operation, "token_ids", token_ids)
        sizes = "(b, k, n) with 1 <= b k" if self.model.choosing else "(b, n) with 1 <= b"
        expected = f"token_ids {sizes} <= {self.max_batch} and 1 <= n <= {self.max_length}"
        fits = ids.ndim == 2 + self.model.choosing
        fits = fits and 1 <= math.prod(ids.shape[:-1]) <= self.max_batch and 1 <= ids.shape[-1] <= self.max_length
        check.shape(operation, fits, expected, token_ids=ids)
        segments = np.zeros_like(ids) if segment_ids is None else check.integer(operation, "segment_ids", segment_ids)
        real = np.ones(ids.shape, np.bool_) if mask is None else check.boolean(operation, "mask", mask)
        fits = ids.shape == segments.shape == real.shape
        expected = "token_ids, segment_ids and mask of one shape"
        check.shape(operation, fits, expected, token_ids=ids, segment_ids=segments, mask=real)
        _within(operation, "token_ids", ids, self.model.config.vocab_size)
        _within(operation, "segment_ids", segments, self.model.config.segments)
        results = self._session.run(None, dict(zip(INPUTS, (ids, segments, real), strict=True)))
        return dict(zip(self.outputs, results, strict=True))


def available_threads() -> int:
    """The CPUs that this process may use: those of its affinity, and no more than the quota of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min(count, cpu_quota())))


def cpu_quota(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the control groups of a process grant (v2 or v1): where a container's limit stands."""
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return math.inf
    quotas = [math.inf]
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        # In a container the name may be that of the host: its folder is missing, the limit stands at the root.
        for folder in [base / name.strip("/"), *(base / name.strip("/")).parents]:
            if folder.is_relative_to(base):
                quotas.append(_quota(folder, v2=not controllers))
    return min(quotas)


def _quota(folder: Path, *, v2: bool) -> float:
    try:
        if v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def _model(path: str | Path, metadata: dict[str, str]) -> Model:
    try:
        found = int(metadata["refimpl.format"])
    except (KeyError, ValueError):
        raise SessionError(
            f"runtime: {path} was not written by `refimpl export`: its metadata lacks refimpl.format"
        ) from None
    if found > FORMAT:
        raise SessionError(f"runtime: {path} has format {found} of a newer refimpl; this one reads {FORMAT}")
    if found < FORMAT:
        raise SessionError(
            f"runtime: {path} has format {found} of an older refimpl, this one reads {FORMAT}: export the model again"
        )
    if "refimpl.model" not in metadata:
        raise SessionError(f"runtime: {path} was not written by `refimpl export`: its metadata lacks refimpl.model")
    try:
        return specification.from_dict(config.parsed(metadata["refimpl.model"], "refimpl.model in the metadata"))
    except check.SpecError as error:
        raise SessionError(f"runtime: {path} tells no model that this refimpl knows: {error}") from None


def _within(operation: str, name: str, ids: np.ndarray, size: int) -> None:
    # A negative id would read the table from its end, without an error.
    outside = (ids < 0) | (ids >= size)
    if outside.any():
        *rows, column = (int(i) for i in np.argwhere(outside)[0])
        raise check.DomainError(
            f"{operation}: expected {name} from 0 to {size - 1}, received {ids[*rows, column]} in row "
            f"{', choice '.join(map(str, rows))}, column {column}"
        )


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
