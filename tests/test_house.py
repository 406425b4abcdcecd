"""The house: floors, imports, sizes, names, docstrings; what can be counted is counted here."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import pathlib
import re

import pytest

from lm import transformer

ROOT = pathlib.Path(__file__).parents[1]
LM = ROOT / "lm"

LAYERS = (  # lowest first: a module imports only from layers before its own
    {"exits"},
    {"batch", "lookup", "storage"},
    {"attention", "losses", "decoding", "optimizers", "objectives", "metrics"},
    {"layers"},
    {"transformer"},
    {"steps", "initialization"},
    {"distill"},
    {"sources"},
    {"tokenizer", "parallel", "checkpoints", "logs"},
    {"tasks"},
    {"shards"},
    {"pipeline"},
    {"runs"},
    {"inference"},
    {"evaluate"},
    {"train", "interop"},
    {"corpus", "show", "report"},
    {"preflight"},
    {"cli"},
)
JAX_FREE = {"exits", "batch", "lookup", "storage", "objectives", "metrics", "sources", "tokenizer"}
JAX_FREE |= {"tasks", "shards", "corpus", "pipeline", "report"}  # worker processes import these
OUTSIDE = {"grain", "orbax", "tensorflow_datasets", "array_record", "sentencepiece", "apache_beam"}
TOUCHES_FILES = {"storage", "sources", "tokenizer", "parallel", "checkpoints", "logs", "shards"}
TOUCHES_FILES |= {"corpus", "pipeline", "interop"}
DRAWERS = {"utils", "util", "common", "helpers", "misc", "lib", "core", "base"}
BANNED = {"pickle", "dill", "joblib", "tensorflow", "torch", "yaml"}

MODULES = sorted(LM.rglob("*.py"))
CODE = MODULES + [p for at in ("configs", "experiments") for p in sorted((ROOT / at).rglob("*.py"))]
EVERYTHING = CODE + sorted((ROOT / "tests").rglob("*.py"))

# What runs another's code, or reads a file that can.
HOSTILE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HOSTILE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
HOSTILE_CALLS |= {"os.popen", "subprocess.getoutput", "shutil.unpack_archive"}
HOSTILE_WORDS = {"shell", "allow_pickle", "trust_remote_code"}


def noun(path: pathlib.Path) -> str:
    """The noun of the field that a file is about: its package's, where it is in one."""
    inside = path.relative_to(LM).parts[0].removesuffix(".py")
    return "cli" if inside == "__main__" else inside  # what python -m opens


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.AST) -> set[str]:
    """The modules of any import statement below a node: "lm.x" for ours, else the package."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found |= {alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and not part.level:
            if part.module == "lm":
                found |= {f"lm.{alias.name}" for alias in part.names}
            elif part.module.startswith("lm."):
                found.add(".".join(part.module.split(".")[:2]))
            else:
                found.add(part.module.split(".")[0])
    return found


def functions(path: pathlib.Path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_only_point_down(path):
    if path.name == "__init__.py" and path.parent == LM:
        return
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    here = noun(path)
    assert here in layer, f"{path} stands on no floor; add it to LAYERS and to the design"
    for other in (name.removeprefix("lm.") for name in imported(tree(path)) if "lm." in name):
        assert layer[other] < layer[here] or other == here, (
            f"lm/{here} (floor {layer[here]}) imports lm/{other} (floor {layer[other]}); "
            f"move the shared part down."
        )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_third_parties_come_in_where_the_law_says(path):
    here, module = noun(path), tree(path)
    everything = imported(module)
    if here in JAX_FREE:
        assert not everything & {"jax", "flax", "optax"}, f"{path}: worker processes import this"
    if here not in TOUCHES_FILES:
        assert not everything & OUTSIDE, f"{path}: files and networks are floor 4's"
    if here != "cli":
        assert not everything & {"absl", "ml_collections"}, f"{path}: ConfigDict stays at the door"
    assert not everything & BANNED, f"{path} imports {everything & BANNED}"


def test_worker_processes_import_no_jax():
    import subprocess
    import sys

    code = "import sys; from lm import corpus, pipeline; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", CODE, ids=str)
def test_files_and_functions_fit_on_a_screen(path):
    lines = path.read_text().count("\n")
    assert lines <= 400, f"{path}: {lines} lines; make it a package of the same name"
    for node in functions(path):
        length = node.end_lineno - node.lineno + 1
        list_of_keys = path == ROOT / "configs" / "base.py"
        assert length <= 60 or list_of_keys, f"{path}:{node.lineno} {node.name}: {length} lines"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = len([argument for argument in arguments if argument.arg != "self"])
        assert count <= 8, f"{path}:{node.lineno} {node.name} takes {count} arguments"


@pytest.mark.parametrize("path", CODE, ids=str)
def test_names_say_what_they_are_about(path):
    assert path.stem not in DRAWERS or path == ROOT / "configs" / "base.py", f"{path}: a drawer"
    for node in functions(path):
        bad = re.match(r"(get|do|handle)_|.*(manager|helper)", node.name)
        config = path.parent.name == "configs" and node.name == "get_config"
        assert not bad or config, f"{path}:{node.lineno} {node.name} says nothing"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), f"{path} has a TODO"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_public_names_are_documented(path):
    module = tree(path)
    assert ast.get_docstring(module), f"{path} has no docstring"
    public = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    inner = {id(n) for f in functions(path) for n in ast.walk(f) if n is not f}
    for node in public:
        if id(node) not in inner and node.name != "setup":  # flax's own
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


@pytest.mark.parametrize("path", CODE, ids=str)
def test_no_error_is_swallowed_and_no_user_meets_an_assert(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "").endswith("Exception")
            falling_back = path.parent.name == "checkpoints"
            assert not broad or falling_back, f"{path}:{node.lineno} catches everything"
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts; raise ValueError"


def hostile(module: ast.AST) -> list[str]:
    """What a module does that could run code of whoever wrote a file it reads, with its line."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [f"{node.lineno} imports {name}" for name in imported(node) & HOSTILE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        if called in HOSTILE_CALLS:
            found.append(f"{node.lineno} calls {called}")
        if called.endswith(".extractall") and ast.unparse(words.get("filter", node)) != "'data'":
            found.append(f"{node.lineno} calls extractall without filter='data'")
        for word in HOSTILE_WORDS & words.keys():
            if getattr(words[word], "value", True):
                found.append(f"{node.lineno} says {word}={ast.unparse(words[word])}")
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_nothing_that_is_read_can_run_code(path):
    found = hostile(tree(path))
    if path not in CODE:  # tests send themselves what worker processes are sent
        found = [what for what in found if not what.endswith("pickle")]
    assert not found, path


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from joblib import load", 1),
        ("import numpy as np; np.load(path)", 0),
        ("np.load(path, allow_pickle=False)", 0),
        ("np.load(path, allow_pickle=True)", 1),
        ("torch.load(path, weights_only=True)", 1),
        ("yaml.load(text, Loader)", 1),
        ("eval(text); exec(text)", 2),
        ("model.eval()", 0),
        ("subprocess.run(line, shell=True)", 1),
        ("subprocess.run(line, shell=given)", 1),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", 1),
        ("tar.extractall(folder)", 1),
        ("tar.extractall(folder, filter='data')", 0),
        ("tar.extractall(folder, filter='fully_trusted')", 1),
        ("os.system(line)", 1),
    ],
)
def test_the_scan_finds_each_of_them_and_nothing_else(source, count):
    assert len(hostile(ast.parse(source))) == count


def test_installing_this_brings_no_tensorflow_and_no_torch():
    name = lambda line: re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open()]
    todo, seen = [name(line) for line in lines if line], set()
    while todo:
        package = todo.pop()
        if package in seen:
            continue
        seen.add(package)
        try:
            needed = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        todo += [name(line) for line in needed if "extra ==" not in line]
    assert len(seen) > 40 and not seen & {"tensorflow", "tf-nightly", "torch", "keras"}, seen


def test_requirements_have_both_bounds():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line), line


def test_configs_are_differences():
    text = (ROOT / "configs/base.py").read_text()
    leaves = re.findall(r"^    (\w+)\.\w+ = (?!.*ConfigDict)", text, re.M)
    others = [section for section in leaves if section not in ("model", "encoder")]
    assert 40 < len(others) <= 80, f"configs/base.py has {len(others)} leaves beside the model's"
    fields = dataclasses.fields(transformer.ModelConfig)
    assert len(fields) <= 32, f"ModelConfig has {len(fields)} fields"
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "base", "models"):
            continue
        (made,) = [node for node in functions(path) if node.name == "get_config"]
        length = made.end_lineno - made.lineno + 1
        assert length <= 20, f"{path}: {length} lines of differences"


def test_the_house_is_small_and_tested():
    assert len({noun(path) for path in MODULES}) <= 31, (
        "another package reopens the question of rooms"
    )
    code = sum(path.read_text().count("\n") for path in MODULES)
    tests = sum(path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= 0.8 * code, f"{tests} lines of tests for {code} of code"


def test_no_path_of_a_machine_is_written_down():
    for path in [*CODE, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.md"), ROOT / "Makefile"]:
        assert "/" + "work/" not in path.read_text(), f"{path} names a machine's path"
