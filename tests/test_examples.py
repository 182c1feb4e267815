"""What users copy runs: adapters are judged, property tests pass, and the failing one shows its counter-example."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from conformance import report, runner
from refimpl import model as specification
from refimpl.models import gau_alpha
from refimpl.models._heads import TiedLM
from tests.golden import checkpoints, originals

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "vocab_size": 120, "segments": 2, "hidden_size": 32, "layers": 1, "expanded_size": 64, "key_size": 16,
}  # fmt: skip
MODULES = {"refimpl": "refimpl.cli", "torchrun": "torch.distributed.run"}
README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def pytest_of(name):
    """Run one example in a process of its own, as a user does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(EXAMPLES),
        "--import-mode=prepend",
    ]
    return subprocess.run([*command, str(EXAMPLES / name)], capture_output=True, text=True, cwd=EXAMPLES)


def test_the_adapter_of_the_readme_passes_and_is_short():
    assert len((EXAMPLES / "my_rope.py").read_text().splitlines()) <= 15
    run = runner.check(f"python:{EXAMPLES / 'my_rope.py'}")
    assert run.ok, [runner.message(v) for v in run.failures]


def test_the_wrong_adapter_fails_and_its_bug_is_named():
    run = runner.check(f"python:{EXAMPLES / 'wrong_rope.py'}")
    assert not run.ok
    assert any("clipped at 2047" in bug for v in run.failures for bug in v.equals)
    assert "rope.rotate_interleaved" in report.markdown(run)


def test_property_tests_of_a_user_pass():
    done = pytest_of("test_my_rope.py")
    assert done.returncode == 0, done.stdout


def test_a_failing_law_shows_the_shrunk_case():
    done = pytest_of("failing_rope.py")
    assert done.returncode == 1
    for part in ("test_impulse_response(", "LawFailed", "law impulse_response"):
        assert part in done.stdout


def section(title):
    """The Python blocks and the commands of a section of the README, in order."""
    return commands(README.partition(f"\n## {title}\n")[2].partition("\n## ")[0])


def commands(text):
    """What the blocks of a text run, in order."""
    made = []
    for language, block in re.findall(r"```(python)?\n(.*?)```", text, flags=re.DOTALL):
        if language:
            made.append([sys.executable, "-c", block])
        else:
            lines = [line.partition("#")[0].split() for line in block.splitlines()]
            made += [[sys.executable, "-m", MODULES[line[0]], *line[1:]] for line in lines]
    return made


def test_a_model_as_the_readme_trains_exports_and_serves_it(tmp_path):
    for command in section("A model: train, export, serve"):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip("[]\n ").split("]\n [")
    # The first row holds a 7, the second does not.
    assert float(first.split()[1]) > float(first.split()[0])
    assert float(second.split()[1]) < float(second.split()[0])


def test_the_operators_as_the_readme_calls_them(tmp_path):
    given = section("The operators in PyTorch and in ONNX") + section("In Python")
    assert len(given) == 3
    for command in given:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "rms_norm.onnx").is_file() and (tmp_path / "out" / "gau_unit.onnx").is_file()


def test_original_checkpoints_as_the_readme_converts_and_trains_them(tmp_path):
    characters = [chr(0x4E00 + i) for i in range(115)]
    vocabulary = "".join(f"{token}\n" for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters))
    source = tmp_path / "chinese_roformer-v2-char_L-12_H-768_A-12"
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 192, "vocab_size": 120}
    checkpoints.tensorflow(
        source, originals.copy("b4k_roformer_v2").weights, sizes | {"num_hidden_layers": 1, "hidden_act": "relu"}, 1
    )
    for folder in (source, tmp_path):
        (folder / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    token_ids = np.array([[2, 7, 9, 3], [2, 8, 3, 0]])
    np.savez(tmp_path / "ids.npz", token_ids=token_ids, segment_ids=0 * token_ids)
    np.savez(tmp_path / "corpus.npz", token_ids=np.random.default_rng(0).integers(5, 120, (40, 16)))
    texts = ["".join(characters[i : i + 9]) for i in range(60)]
    (tmp_path / "corpus.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    rows = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    (tmp_path / "reviews.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")
    small = gau_alpha.dialect("bert4keras-0.11.5", **SMALL)
    specification.write(specification.Model(small, (TiedLM(),), "bidirectional"), tmp_path / "model.json")

    given = section("Original checkpoints") + section("Training")
    assert len(given) == 8
    for command in given:
        into = command.index(">") if ">" in command else len(command)
        done = subprocess.run(command[:into], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        # The published size would train for hours: it is read, and the small one stays in its place.
        if command[into + 1 :] == ["model.json"]:
            assert specification.from_dict(json.loads(done.stdout)).config.layers == 24
    with np.load(tmp_path / "states.npz") as made:
        assert made["last_hidden_state"].shape == (2, 4, 48)
    for trained in ("reviews", "mlm", "further"):
        assert (tmp_path / "out" / trained / "model" / "model.safetensors").is_file()


def test_a_text_grows_as_the_document_shows():
    (command,) = commands((EXAMPLES.parent / "docs" / "streaming.md").read_text(encoding="utf-8"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "11\n"), done.stderr
