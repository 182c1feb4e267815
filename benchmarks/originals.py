"""Claim: every original gives what we give in its dialect: 1e-13 in NumPy float64, 1e-5 in torch float32.

    python benchmarks/originals.py --golden FOLDER

FOLDER holds one folder for each original: the checkpoint as its own code wrote it, and io_float64.npz with what that
code gave for the ids in it; dialect_RELEASE.npz is what another release of bert4keras gave. Without --golden the two
originals are run whose weights are kept in tests/golden.

An error is the largest difference of last_hidden_state or of the logits, as a share of the largest magnitude. The last
column is the next dialect that has other constants: what it costs to take that one.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export import running
from refimpl import dialects
from refimpl import model as specification
from refimpl.model import Model
from refimpl.models import _encoder
from tests.golden import checkpoints
from torchimpl import convert, source

BOUNDS = {("numpy", "float64"): 1e-13, ("torch", "float32"): 1e-5}
BERT4KERAS = "bert4keras-0.11.5"
CONFIGS = ("bert_config.json", "config.json")


class Original(NamedTuple):
    """A checkpoint, the inputs of its own run, and what it gave, by the dialect that gave it."""

    name: str
    path: Path
    inputs: Mapping[str, np.ndarray]
    mask_from_ids: str | None
    given: Mapping[str, Mapping[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="the published figures")
    golden = parser.parse_args().golden
    print("| original | dialect | NumPy float64 | torch float32 | digits | next constants | NumPy float64 there |")
    print("|---|---|---|---|---|---|---|")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for original in kept(Path(folder)) if golden is None else published(golden):
            for dialect, expected in original.given.items():
                errors = {key: worst(original, dialect, expected, *key) for key in BOUNDS}
                missed += [(original.name, dialect, key) for key, error in errors.items() if error > BOUNDS[key]]
                numpy, torch = errors.values()
                digits = f"{-np.log10(numpy):.0f} / {-np.log10(torch):.0f}"
                other, far = nearest(original, dialect, expected)
                print(f"| {original.name} | {dialect} | {numpy:.1e} | {torch:.1e} | {digits} | {other} | {far:.0e} |")
    for name, dialect, (backend, dtype) in missed:
        print(f"missed: {name}, {dialect}, {backend} {dtype}: beyond {BOUNDS[backend, dtype]:.0e}")
    raise SystemExit(1 if missed else 0)


def kept(folder: Path) -> Iterator[Original]:
    """The originals in tests/golden."""
    arrays = checkpoints.gau_alpha(folder / "gau")
    inputs = {name: arrays[name].astype(np.int64) for name in ("token_ids", "segment_ids")}
    releases = sorted({name.partition("/")[0] for name in arrays if "/" in name}, reverse=True)
    # Logits are kept of every fifth token, so the vectors have to do.
    given = {
        f"bert4keras-{release}": {"last_hidden_state": arrays[f"{release}/last_hidden_state"]} for release in releases
    }
    yield Original("GAU-α of bert4keras", folder / "gau", inputs, "bert4keras", given)
    tensors, io = checkpoints.junnyu()
    path = checkpoints.write(folder / "junnyu", tensors, checkpoints.JUNNYU)
    outputs = {"last_hidden_state": io["last_hidden_state"], "mlm_logits": io["logits"]}
    yield Original("RoFormer of JunnYu", path, theirs(io), None, {"junnyu": outputs})


def published(golden: Path) -> Iterator[Original]:
    """The originals in a folder of published figures."""
    for path in sorted(golden.iterdir()):
        if not (path / "io_float64.npz").is_file() or not any((path / n).is_file() for n in CONFIGS):
            continue
        io = dict(np.load(path / "io_float64.npz"))
        bert4keras = (path / "bert_config.json").is_file()
        logits = io["mlm_logits" if bert4keras else "logits"]
        own = {"last_hidden_state": io["last_hidden_state"], "mlm_logits": logits}
        if not bert4keras:
            dialect = "huggingface" if path.name.startswith("hf") else "junnyu"
            yield Original(path.name, path, theirs(io), None, {dialect: own})
            continue
        given = {BERT4KERAS: own}
        for file in sorted(path.glob("dialect_*.npz"), reverse=True):
            held = np.load(file)
            given[f"bert4keras-{file.stem.removeprefix('dialect_')}"] = {
                name: held[f"float64_{name}"] for name in own if f"float64_{name}" in held
            }
        inputs = {name: io[name].astype(np.int64) for name in ("token_ids", "segment_ids")}
        yield Original(path.name, path, inputs, "bert4keras", given)


def theirs(io: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of Hugging Face and JunnYu in our words."""
    return {
        "token_ids": io["input_ids"].astype(np.int64),
        "segment_ids": io["token_type_ids"].astype(np.int64),
        "mask": io["attention_mask"] == 1,
    }


def worst(
    original: Original, dialect: str, expected: Mapping[str, np.ndarray], backend: str = "numpy", dtype: str = "float64"
) -> float:
    """The error of one run."""
    got = running.run(
        original.path, original.inputs, dialect=dialect, backend=backend, dtype=dtype,
        mask_from_ids=original.mask_from_ids,
    )  # fmt: skip
    return error(got, expected)


def nearest(original: Original, dialect: str, expected: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The dialect with other constants that comes nearest, and its error."""
    found = source.find(original.path)
    # A configuration that tells its epsilon takes no dialect.
    stated = None if "layer_norm_eps" in found.config else dialect
    made, weights = convert.load(found, convert.plan(found, dialect=stated), "float64")
    exact, inputs = {name: tensor.numpy() for name, tensor in weights.items()}, dict(original.inputs)
    if original.mask_from_ids is not None:
        inputs["mask"] = _encoder.mask_from_ids_bert4keras(inputs["token_ids"])
    far = {}
    known = dialects.of(made.config.model)
    for name, constants in known.items():
        if constants != known[dialect]:
            model = Model(dialects.replaced(made.config, name), made.heads, made.visible)
            far[name] = error(specification.forward(exact, **inputs, model=model), expected)
    return min(far.items(), key=lambda entry: entry[1])


def error(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference of an output as a share of the largest magnitude that the original gave."""
    return max(float(np.abs(got[name] - array).max() / np.abs(array).max()) for name, array in expected.items())


if __name__ == "__main__":
    main()
