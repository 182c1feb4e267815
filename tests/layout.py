"""The rules of the house as functions over a root folder; each returns the breaches, one sentence per breach.

They are functions, and not tests, so that test_layout.py can also show each of them a folder that breaks it.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Who may import whom; what is not named here imports freely (tests, benchmarks, examples).
MAY_IMPORT = {
    "refimpl": set(),
    "torchimpl": {"refimpl"},
    "export": {"torchimpl", "refimpl"},
    "runtime": {"refimpl"},
    "conformance": {"refimpl"},
    "demo": {"refimpl", "torchimpl", "export", "runtime", "conformance"},
}
# Here the judge reaches what it judges, so these files may import any folder, but only inside a function.
ADAPTERS = Path("conformance/adapters")

# Other people's packages, by folder. The specification lists all that it may use, the others what they may not.
SPECIFICATION_USES = {"numpy", "scipy", "jaxtyping"}
SPECIFICATION_ALSO = {"refimpl/cli.py": {"typer", "rich"}, "refimpl/tokenizer.py": {"tokenizers"}}
FRAMEWORKS = {
    "torch", "onnx", "onnxscript", "onnxruntime", "jax", "tensorflow", "transformers", "peft", "sklearn",
    "rotary_embedding_torch", "flash_pytorch",
}  # fmt: skip
NEVER_USES = {"conformance": FRAMEWORKS, "runtime": {"torch", "onnx"}}

# Folders that hold one file per operator family. The first two must, the others from the day they exist.
MIRRORS = ("refimpl", "conformance")
MIRRORS_ONCE_THERE = ("torchimpl", "export")
FAMILY_FOLDERS = ("ops", "models")

# Lines that compute: docstrings, signatures, comments and blank lines are not counted.
LONGEST_OPERATOR_FILE = 220
IMPORT_SECONDS = 0.3

# An absolute path of somebody's machine; an address such as https://host/home/x has a letter before its slash.
MACHINE_PATH = re.compile(r"(?<![\w./:~*}-])/(?:home|root|Users|work|workspace|opt|mnt|srv|media|tmp|var)/[\w.-]+")


def arrows(root: Path) -> list[str]:
    """No folder imports a folder that the data reaches only after it."""
    breaches = []
    for folder, allowed in MAY_IMPORT.items():
        for file in _python_files(root / folder):
            path = file.relative_to(root)
            adapter = path.is_relative_to(ADAPTERS)
            for module, line, in_function in _imports(file, root):
                other = module.partition(".")[0]
                if other not in MAY_IMPORT or other == folder or other in allowed or (adapter and in_function):
                    continue
                if adapter:
                    remedy = "An adapter imports what it adapts inside a function, so that the judge runs without it"
                else:
                    first = "".join(f"{name} and " for name in sorted(allowed))
                    remedy = f"{folder}/ may import {first}nothing else of this project"
                breaches.append(f"{path}:{line} imports {module}. {remedy}.")
    return breaches


def third_parties(root: Path) -> list[str]:
    """The specification stays NumPy and SciPy; the judge and the runtime stay free of what they do without."""
    breaches = []
    for folder in MAY_IMPORT:
        for file in _python_files(root / folder):
            path = file.relative_to(root)
            for module, line, in_function in _imports(file, root):
                package = module.partition(".")[0]
                if package in MAY_IMPORT or package in sys.stdlib_module_names:
                    continue
                if folder == "refimpl":
                    allowed = SPECIFICATION_USES | SPECIFICATION_ALSO.get(path.as_posix(), set())
                    if package not in allowed:
                        breaches.append(
                            f"{path}:{line} imports {module}. This file may use {_listed(allowed)}; what needs more "
                            "belongs into another folder."
                        )
                    elif package == "scipy" and not in_function:
                        breaches.append(
                            f"{path}:{line} imports {module} at the top. Loading SciPy's parts takes a quarter of a "
                            "second: import it inside the function that calls it."
                        )
                elif package in NEVER_USES.get(folder, set()):
                    if path.is_relative_to(ADAPTERS):
                        if not in_function:
                            breaches.append(
                                f"{path}:{line} imports {module} at the top. An adapter imports what it adapts inside "
                                "a function, so that the judge runs without it."
                            )
                    else:
                        where = f" Only {ADAPTERS.as_posix()}/ may." if folder == "conformance" else ""
                        breaches.append(f"{path}:{line} imports {module}, and {folder}/ must run without it.{where}")
    return breaches


def same_path(root: Path) -> list[str]:
    """An operator family has the same path in every folder, and a test beside it: the directory is the registry."""
    breaches = []
    for part in FAMILY_FOLDERS:
        folders = [*MIRRORS, *(name for name in MIRRORS_ONCE_THERE if (root / name / part).is_dir())]
        families = {name: _families(root / name / part) for name in folders}
        tests = root / "tests" / "refimpl" / part
        tested = {name.removeprefix("test_") for name in _families(tests) if name.startswith("test_")}
        for family in sorted(set().union(*families.values(), tested)):
            places = {f"{name}/{part}/{family}.py": family in families[name] for name in folders}
            places[f"tests/refimpl/{part}/test_{family}.py"] = family in tested
            present = next(place for place, there in places.items() if there)
            breaches += [
                f"{place} is missing: {present} exists, and `{family}` must stand under the same name in every folder."
                for place, there in places.items()
                if not there
            ]
    return breaches


def file_lengths(root: Path) -> list[str]:
    """An operator file can be read in one sitting."""
    breaches = []
    for file in _python_files(root / "refimpl" / "ops"):
        lines = len(_code_lines(file.read_text(encoding="utf-8")))
        if lines > LONGEST_OPERATOR_FILE:
            breaches.append(
                f"{file.relative_to(root)} has {lines} lines of code. An operator file has at most "
                f"{LONGEST_OPERATOR_FILE}: shorten it, or move a family of its own into a file of its own."
            )
    return breaches


def _code_lines(source: str) -> set[int]:
    """Numbers of the lines that compute: docstrings and signatures (one argument and its shape a line) specify."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            lines.difference_update(range(node.lineno, node.body[0].lineno))
    return lines


def machine_paths(root: Path) -> list[str]:
    """No file that the project keeps names a folder of one machine."""
    breaches = []
    for file in _kept_files(root):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, start=1):
            if match := MACHINE_PATH.search(line):
                breaches.append(
                    f"{file.relative_to(root)}:{number} names {match[0]}, a folder that other machines do not have. "
                    "Use a path relative to the repository, or tmp_path in a test."
                )
    return breaches


def import_weight(root: Path, module: str = "refimpl") -> list[str]:
    """Importing the specification, every operator file included, loads NumPy, SciPy, jaxtyping and no more."""
    files = _python_files(root / module / "ops")
    operators = [f"{module}.ops.{file.stem}" for file in files if not file.stem.startswith("_")]
    carriers = sorted(SPECIFICATION_USES)
    loaded = set(_fresh(root, f"import {', '.join([module, *operators])}; {_SHOW_MODULES}").split())
    carried = set(_fresh(root, f"import {', '.join(carriers)}; {_SHOW_MODULES}").split())
    surplus = sorted(loaded - carried - set(sys.stdlib_module_names) - {module})
    return [
        f"`import {module}` with its operators loads {name}, which a user of the specification may not have. Import it "
        "inside the function that needs it, or in another folder."
        for name in surplus
    ]


def judge_weight(root: Path) -> list[str]:
    """Importing the judge loads none of what it judges; an adapter is imported when it is asked for."""
    files = [file.relative_to(root).with_suffix("") for file in _python_files(root / "conformance")]
    modules = [".".join(file.parts) for file in files if file.parent != ADAPTERS and file.name not in _NOT_MODULES]
    loaded = set(_fresh(root, f"import {', '.join(['conformance.adapters', *modules])}; {_SHOW_MODULES}").split())
    return [
        f"Importing conformance/ without its adapters loads {name}. Import it in {ADAPTERS.as_posix()}/, inside a "
        "function."
        for name in sorted(loaded & FRAMEWORKS)
    ]


def runtime_weight(root: Path) -> list[str]:
    """Importing the runtime, every file of it, loads neither torch nor onnx: a server needs none of the two."""
    files = [file.relative_to(root).with_suffix("") for file in _python_files(root / "runtime")]
    modules = ["sys", *(".".join(file.parts) for file in files if file.name not in _NOT_MODULES)]
    loaded = set(_fresh(root, f"import {', '.join(modules)}; {_SHOW_MODULES}").split())
    return [
        f"Importing runtime/ loads {name}, which a server does not have. Leave it to torchimpl/ and export/."
        for name in sorted(loaded & NEVER_USES["runtime"])
    ]


def import_time(root: Path, module: str = "refimpl", *, limit: float = IMPORT_SECONDS, tries: int = 8) -> list[str]:
    """Importing the specification is quick. The best of several fresh processes counts: a busy machine is no breach."""
    timed = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    best = float("inf")
    for _ in range(tries):
        best = min(best, float(_fresh(root, timed)))
        if best < limit:
            return []
    return [
        f"`import {module}` takes {best:.2f} s at best; the limit is {limit} s. See what takes the time with: "
        f"python -X importtime -c 'import {module}'"
    ]


# A package is imported with its modules; __main__ would run.
_NOT_MODULES = {"__init__", "__main__"}
_SHOW_MODULES = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"


def _fresh(root: Path, code: str) -> str:
    """What `code` prints in a Python process of its own, started in `root`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{code}\n{done.stderr}")
    return done.stdout


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _families(folder: Path) -> set[str]:
    """The names of the files in `folder` that stand for an operator family; _private files do not."""
    return {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}


def _imports(file: Path, root: Path) -> Iterator[tuple[str, int, bool]]:
    """Every module that `file` imports: its full name, the line, and whether it happens inside a function."""
    package = file.relative_to(root).parent.parts

    def walk(node: ast.AST, in_function: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*parents, *([node.module] if node.module else [])]), node.lineno, in_function
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _IMPORT_CALLS and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith("."):
                yield name.value, node.lineno, in_function
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(ast.parse(file.read_text(encoding="utf-8"), str(file)), False)


_IMPORT_CALLS = {"__import__", "import_module", "importlib.import_module"}


def _kept_files(root: Path) -> list[Path]:
    """What git tracks or would track; without git, everything outside hidden and generated folders."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True).stdout.decode().split("\0")
        files = [root / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        left_out = {"out", "build", "dist", "__pycache__"}
        files = [
            file
            for file in root.rglob("*")
            if not any(part.startswith(".") or part in left_out for part in file.relative_to(root).parts)
        ]
    return sorted(file for file in files if file.is_file())


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
