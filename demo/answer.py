"""Answers of an exported model in a process of its own, in which importing torch or onnx is an error.

python -m demo.answer MODEL.onnx ASKED.npz ANSWERS.npz
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

FORBIDDEN = ("torch", "onnx", "torchimpl", "export")
BATCH = 64


class Forbidding(MetaPathFinder):
    """Refuses what training needs and serving must not."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} must not be imported where a model is served")


def main(model: str, asked: str, answers: str) -> None:
    """Answer every part of an archive, write logits and sentence vectors, print what it took as JSON."""
    sys.meta_path.insert(0, Forbidding())
    import numpy as np

    from runtime.session import Session

    started = time.perf_counter()
    session = Session(model)
    loaded = time.perf_counter() - started
    made: dict[str, Any] = {}
    with np.load(asked, allow_pickle=False) as held:
        parts = {name.partition("/")[0] for name in held.files}
        requests = {part: (held[f"{part}/0"], held[f"{part}/1"]) for part in sorted(parts)}
    for part, inputs in requests.items():
        batches = [session.run(*(a[i : i + BATCH] for a in inputs)) for i in range(0, len(inputs[0]), BATCH)]
        made[f"{part}/0"] = np.concatenate([batch["logits"] for batch in batches])
        made[f"{part}/1"] = np.concatenate([batch["embedding"] for batch in batches])
    # Under its name only when whole.
    part = f"{answers}.part.npz"
    np.savez(part, **made)
    os.replace(part, answers)
    token_ids, segment_ids = requests["test"]

    def milliseconds(batch: int) -> float:
        """The median of 40 calls after 5 to warm up."""
        taken = []
        for _ in range(45):
            begun = time.perf_counter()
            session.run(token_ids[:batch], segment_ids[:batch])
            taken.append(1e3 * (time.perf_counter() - begun))
        return statistics.median(taken[5:])

    told = {
        "threads": session.threads,
        "load_ms": 1e3 * loaded,
        "one_ms": milliseconds(1),
        "batch": min(BATCH, len(token_ids)),
        "batch_ms": milliseconds(BATCH),
        "loaded": sorted(name for name in FORBIDDEN if name in sys.modules),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
