"""House rules: what can be counted about the code is counted here, and every fault is listed."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys

from lm import transformer
from tests.layers import LAYERS, RANK

ROOT = pathlib.Path(__file__).parents[1]
LM = ROOT / "lm"

# What third parties each layer may import. Worker processes of data import the JAX_FREE modules.
JAX_FREE = {
    "exits",
    "batch",
    "extensions",
    "lookup",
    "storage",
    "objectives",
    "metrics",
    "sources",
    "tokenizer",
}
JAX_FREE |= {"sources", "tokenizer", "tasks", "shards", "corpus", "pipeline", "report"}
FILE_PACKAGES = {"grain", "orbax", "tensorflow_datasets", "array_record", "sentencepiece"}
FILE_PACKAGES |= {"apache_beam"}
TOUCHES_FILES = {"storage", "sources", "tokenizer", "parallel", "checkpoints", "logs", "shards"}
TOUCHES_FILES |= {"corpus", "pipeline", "interop"}
FORBIDDEN_PACKAGES = {"pickle", "dill", "joblib", "tensorflow", "torch", "yaml"}

# Lines of lm/, in all and by package or module. Raise a figure only with a reason in the commit.
TOTAL_LINES = 22390
LINES = {
    "__init__": 25,
    "attention": 188,
    "batch": 58,
    "checkpoints": 628,
    "cli": 583,
    "corpus": 1711,
    "cpu_kernels": 140,
    "decoding": 448,
    "distill": 1089,
    "evaluate": 543,
    "exits": 10,
    "extensions": 152,
    "inference": 870,
    "initialization": 59,
    "interop": 1812,
    "layers": 219,
    "logs": 708,
    "lookup": 59,
    "losses": 122,
    "metrics": 267,
    "objectives": 691,
    "optimizers": 639,
    "parallel": 749,
    "pipeline": 833,
    "preflight": 1280,
    "report": 526,
    "runs": 835,
    "shards": 720,
    "show": 93,
    "sources": 1979,
    "steps": 373,
    "storage": 406,
    "tasks": 489,
    "tokenizer": 633,
    "train": 1519,
    "transformer": 934,
}

# Vague file names, and words that are not names: they tell a story or stand for any noun.
VAGUE = r"(get|do|handle)_|.*(manager|helper)"
FIELDS_NAMES = {"get_config", "get_task", "_open_manager"}  # of ml_collections, seqio and orbax
DRAWERS = {"utils", "util", "common", "helpers", "misc", "lib", "core", "base"}
# Words that tell a story or stand for any noun; no definition in lm/ has such a name.
BANNED_WORDS = {"asked", "begun", "beside", "both", "company", "dealt", "drawn", "former"}
BANNED_WORDS |= {"found", "given", "heard", "held", "here", "how", "kept", "known", "left"}
BANNED_WORDS |= {"made", "more", "narrowed", "odd", "of", "one", "other", "ours", "own", "part"}
BANNED_WORDS |= {"place", "room", "ruled", "said", "settled", "taken", "theirs", "this", "told"}
BANNED_WORDS |= {"wanted", "what", "whose"}
# The standard term for each word that a name might use instead.
STANDARD_TERMS = {
    "adapter": "lora",
    "annealing": "cooldown",
    "catalogue": "table",
    "doc": "document",
    "door": "cli",
    "foreign": "transformers, t5x",
    "judge": "score",
    "micro": "num_microbatches",
    "mould": "template",
    "origin": "initialization",
    "questions": "prompts",
    "sight": "attention_context",
    "stranger": "reference",
    "strangers": "references",
    "taught": "teacher",
    "walk": "stepwise",
}
MODULES = sorted(LM.rglob("*.py"))
CODE = MODULES + [p for at in ("configs", "experiments") for p in sorted((ROOT / at).rglob("*.py"))]
EVERYTHING = CODE + sorted((ROOT / "tests").rglob("*.py"))

# What runs somebody else's code, or reads a file that can.
HOSTILE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
HOSTILE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
HOSTILE_CALLS |= {"os.popen", "subprocess.getoutput", "shutil.unpack_archive"}
HOSTILE_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}


def top_name(path: pathlib.Path) -> str:
    """The package or module of lm/ that a file belongs to."""
    name = path.relative_to(LM).parts[0].removesuffix(".py")
    return "cli" if name == "__main__" else name


def at(path: pathlib.Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno if node else 1}"


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(node: ast.AST) -> set[str]:
    """The modules of all import statements below a node: "lm.x" for ours, else the package."""
    modules = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            modules |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and not child.level:
            names = {f"lm.{alias.name}" for alias in child.names}
            modules |= names if child.module == "lm" else {child.module}
    ours = {".".join(name.split(".")[:2]) for name in modules if name.startswith("lm.")}
    return ours | {name.split(".")[0] for name in modules if not name.startswith("lm.")}


def functions(node: ast.AST) -> list:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [child for child in ast.walk(node) if isinstance(child, kinds)]


def defined_names(node: ast.AST):
    """(name, node) of every function, class, argument, variable and attribute that is defined."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name, child
        elif isinstance(child, ast.arg):
            yield child.arg, child
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, child
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield child.attr, child


def public_definitions(module: ast.Module):
    """(name, node) of the functions, classes and constants at the top of a module."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)]
        else:
            continue
        yield from ((name, node) for name in names if not name.startswith("_"))


def used_names(module: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # getattr and monkeypatch name what they want
    return names


def unused_public_names() -> list[str]:
    """Public functions of lm/ that no other file uses; a package's re-export is no use."""
    users = collections.defaultdict(set)
    for path in EVERYTHING:
        if path.name != "__init__.py" or path.parent.parent != LM:
            for name in used_names(tree(path)):
                users[name].add(path)
        else:
            body = [n for n in tree(path).body if not isinstance(n, ast.ImportFrom)]
            for name in used_names(ast.Module(body, [])):
                users[name].add(path)
    return [
        f"{at(path, node)} {name}"
        for path in MODULES
        for name, node in public_definitions(tree(path))
        if isinstance(node, ast.FunctionDef) and not users[name] - {path}
    ]


# Layers. --------------------------------------------------------------------------------------


def test_imports_only_point_down():
    faults = []
    for path in MODULES:
        if path == LM / "__init__.py":
            continue
        name = top_name(path)
        if name not in RANK:
            faults.append(f"{at(path)} lm/{name} is in no layer; add it to tests/layers.py")
            continue
        for other in sorted(m.removeprefix("lm.") for m in imported(tree(path)) if "lm." in m):
            if other != name and RANK.get(other, 99) >= RANK[name]:
                faults.append(f"{at(path)} lm/{name} imports lm/{other}; move the shared part down")
    assert not faults, "\n".join(faults)


def test_the_layers_are_those_of_the_packages():
    assert set(RANK) == {top_name(path) for path in MODULES} - {"__init__"}
    assert len(RANK) == sum(len(" ".join(groups).split()) for _, groups, _ in LAYERS) <= 35


def test_third_parties_are_imported_in_their_layer_only():
    faults = []
    for path in MODULES:
        name, modules = top_name(path), imported(tree(path))
        forbidden = modules & FORBIDDEN_PACKAGES
        if name in JAX_FREE:
            forbidden |= modules & {"jax", "flax", "optax"}
        if name not in TOUCHES_FILES:
            forbidden |= modules & FILE_PACKAGES
        if name != "cli":
            forbidden |= modules & {"absl", "ml_collections"}  # ConfigDict is the cli's
        faults += [f"{at(path)} imports {module}" for module in sorted(forbidden)]
    assert not faults, "\n".join(faults)


def test_worker_processes_import_no_jax():
    code = "import sys; from lm import corpus, pipeline; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_package_is_described_module_by_module():
    faults = []
    for path in LM.rglob("__init__.py"):
        text = ast.get_docstring(tree(path)) or ""
        modules = {p.stem for p in path.parent.glob("*.py")} - {"__init__", "__main__"}
        modules |= {p.parent.name for p in path.parent.glob("*/__init__.py")}
        missing = sorted(name for name in modules if not re.search(rf"\b{name}\b", text))
        faults += [f"{at(path)} does not name {name}" for name in missing]
        if any(name == "__all__" for name, _ in defined_names(tree(path))):
            faults.append(f"{at(path)} has __all__")
    assert not faults, "\n".join(faults)


def test_test_modules_import_no_test_module():
    faults = []
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(tree(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            faults += [f"{at(path, node)} {name}" for name in names if ".test_" in name]
    assert not faults, "\n".join(faults)


# Sizes. ---------------------------------------------------------------------------------------


def test_files_and_functions_fit_on_a_screen():
    faults = []
    for path in CODE:
        if (lines := path.read_text().count("\n")) > 400:
            faults.append(f"{at(path)} has {lines} lines; make it a package")
        for node in functions(tree(path)):
            length = node.end_lineno - node.lineno + 1
            if length > 60 and path != ROOT / "configs" / "base.py":  # a list of keys
                faults.append(f"{at(path, node)} {node.name} has {length} lines")
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if (count := sum(argument.arg != "self" for argument in arguments)) > 8:
                faults.append(f"{at(path, node)} {node.name} takes {count} arguments")
    assert not faults, "\n".join(faults)


def test_the_library_fits_its_budget_of_lines():
    lines = collections.Counter()
    for path in MODULES:
        lines[top_name(path)] += path.read_text().count("\n")
    faults = [f"lm has {lines.total()} lines of {TOTAL_LINES}"] * (lines.total() > TOTAL_LINES)
    for name, count in sorted(lines.items()):
        if count > LINES.get(name, 0):
            faults.append(f"lm/{name} has {count} lines of {LINES.get(name, 0)}")
    assert not faults, "\n".join(faults)
    tests = sum(path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= 0.8 * lines.total(), f"{tests} lines of tests for {lines.total()} of code"


def test_configs_are_differences():
    text = (ROOT / "configs/base.py").read_text()
    keys = re.findall(r"^    ([\w.]+)\.\w+ = (?!.*ConfigDict)", text, re.M)
    rest = [section for section in keys if not section.startswith(("model", "encoder"))]
    assert 30 < len(rest) <= 120, f"configs/base.py has {len(rest)} keys beside the model's"
    fields = dataclasses.fields(transformer.ModelConfig)
    assert len(fields) <= 32, f"ModelConfig has {len(fields)} fields"
    faults = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "base", "models"):
            continue
        (node,) = [node for node in functions(tree(path)) if node.name == "get_config"]
        if (length := node.end_lineno - node.lineno + 1) > 20:
            faults.append(f"{at(path, node)} has {length} lines of differences")
    assert not faults, "\n".join(faults)


# Names and prose. -----------------------------------------------------------------------------


def test_names_say_what_they_are_about():
    faults = []
    for path in CODE:
        if path.stem in DRAWERS and path != ROOT / "configs" / "base.py":
            faults.append(f"{at(path)} is a drawer")
        for node in functions(tree(path)):
            if node.name not in FIELDS_NAMES and re.match(VAGUE, node.name):
                faults.append(f"{at(path, node)} {node.name} is vague")
        if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()):
            faults.append(f"{at(path)} has a TODO")
    assert not faults, "\n".join(faults)


def test_no_name_is_a_banned_word():
    faults = []
    for path in MODULES:
        for name, node in defined_names(tree(path)):
            if name.strip("_") in BANNED_WORDS:
                faults.append(f"{at(path, node)} {name}: name the contents")
    assert not faults, "\n".join(faults)


def test_names_use_the_standard_terms():
    faults = []
    for path in MODULES:
        for name, node in defined_names(tree(path)):
            for word in sorted(set(name.lower().split("_")) & STANDARD_TERMS.keys()):
                faults.append(f"{at(path, node)} {name}: use {STANDARD_TERMS[word]}")
    assert not faults, "\n".join(faults)


def test_public_names_are_documented():
    faults = []
    for path in MODULES:
        module = tree(path)
        if not ast.get_docstring(module):
            faults.append(f"{at(path)} has no docstring")
        inner = {id(n) for f in functions(module) for n in ast.walk(f) if n is not f}
        for node in ast.walk(module):
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if not public or id(node) in inner or node.name == "setup":  # setup is flax's
                continue
            if not ast.get_docstring(node):
                faults.append(f"{at(path, node)} {node.name} has no docstring")
    assert not faults, "\n".join(faults)


def test_public_parameters_are_annotated():
    faults = []
    for path in MODULES:
        for name, node in public_definitions(tree(path)):
            for function in [node] if isinstance(node, ast.FunctionDef) else []:
                arguments = function.args
                arguments = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
                bare = [argument.arg for argument in arguments if argument.annotation is None]
                faults += [f"{at(path, node)} {name}({argument})" for argument in bare]
    assert not faults, "\n".join(faults)


def test_public_names_are_used():
    faults = unused_public_names()
    assert not faults, "\n".join(faults)


def test_no_error_is_swallowed_and_no_user_meets_an_assert():
    faults = []
    for path in CODE:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Assert):
                faults.append(f"{at(path, node)} asserts; raise ValueError")
            if not isinstance(node, ast.ExceptHandler) or path.parent.name == "checkpoints":
                continue  # checkpoints fall back from any error to the checkpoint before
            if node.type is None or getattr(node.type, "id", "").endswith("Exception"):
                faults.append(f"{at(path, node)} catches everything")
    assert not faults, "\n".join(faults)


def test_no_path_of_a_machine_is_written_down():
    paths = [*EVERYTHING, *ROOT.glob("*.md"), ROOT / "Makefile"]
    faults = [at(path) for path in paths if "/" + "work/" in path.read_text()]
    assert not faults, "\n".join(faults)


# Safety. --------------------------------------------------------------------------------------


def hostile(module: ast.AST) -> list[str]:
    """What in a module could run the code of whoever wrote a file that it reads, with its line."""
    faults = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            faults += [f"{node.lineno} imports {name}" for name in imported(node) & HOSTILE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in HOSTILE_CALLS:
            faults.append(f"{node.lineno} calls {called}")
        unfiltered = ast.unparse(arguments.get("filter", node)) != "'data'"
        if called.endswith(".extractall") and unfiltered:
            faults.append(f"{node.lineno} calls extractall without filter='data'")
        for name in HOSTILE_ARGUMENTS & arguments.keys():
            if getattr(arguments[name], "value", True):
                faults.append(f"{node.lineno} passes {name}={ast.unparse(arguments[name])}")
    return faults


def test_no_file_that_is_read_can_run_code():
    faults = []
    for path in EVERYTHING:
        lines = hostile(tree(path))
        if path not in CODE:  # tests pickle what worker processes are sent
            lines = [line for line in lines if not line.endswith("pickle")]
        faults += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not faults, "\n".join(faults)


def test_the_scan_finds_hostile_lines_and_nothing_else():
    sources = {
        "import pickle": 1,
        "from joblib import load": 1,
        "import numpy as np; np.load(path)": 0,
        "np.load(path, allow_pickle=False)": 0,
        "np.load(path, allow_pickle=True)": 1,
        "torch.load(path, weights_only=True)": 1,
        "yaml.load(text, Loader)": 1,
        "eval(text); exec(text)": 2,
        "model.eval()": 0,
        "subprocess.run(line, shell=True)": 1,
        "subprocess.run(line, shell=given)": 1,
        "AutoModel.from_pretrained(name, trust_remote_code=True)": 1,
        "tar.extractall(folder)": 1,
        "tar.extractall(folder, filter='data')": 0,
        "tar.extractall(folder, filter='fully_trusted')": 1,
        "os.system(line)": 1,
    }
    assert {source: len(hostile(ast.parse(source))) for source in sources} == sources


# Requirements. --------------------------------------------------------------------------------


def test_the_requirements_bring_no_tensorflow_and_no_torch():
    name = lambda line: re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open()]
    queue, packages = [name(line) for line in lines if line], set()
    while queue:
        package = queue.pop()
        if package in packages:
            continue
        packages.add(package)
        try:
            needed = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        queue += [name(line) for line in needed if "extra ==" not in line]
    assert len(packages) > 40
    assert not packages & {"tensorflow", "tf-nightly", "torch", "keras"}, packages


def test_requirements_have_both_bounds():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line), line
