"""Laws of hostile checkpoints: at worst an error; no code is run, no other file is written."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

from lm.checkpoints import metadata
from tests.states import bits, make_state, restore, save

ROOT = pathlib.Path(__file__).parents[1]
TERA = 2**40  # elements of 4 bytes each: 4 TB
DEEP = "[" * 100_000 + "]" * 100_000


def change(path: pathlib.Path, edit) -> None:
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def change_facts(step: pathlib.Path, **facts) -> None:
    """Change facts and seal them again: a seal is no signature."""
    path = step / "facts" / "metadata"
    sealed = metadata.seal(metadata.unseal(json.loads(path.read_text())) | facts)
    path.write_text(json.dumps(sealed))


def leaves_of(step: pathlib.Path) -> dict:
    return json.loads((step / "facts" / "metadata").read_text())["leaves"]


def traverse_in_facts(step):
    leaves = leaves_of(step)
    leaves["params"]["../../../../evil"] = leaves["params"].pop("tower.head")
    change_facts(step, leaves=leaves)


def traverse_in_metadata(step):
    path = step / "params" / "_METADATA"
    path.write_text(path.read_text().replace("tower.head", "../../../../evil"))


def great_shape_in_facts(step):
    leaves = leaves_of(step)
    leaves["params"]["tower.head"]["shape"] = [TERA]
    change_facts(step, leaves=leaves)


def great_shape_in_metadata(step):
    for path in (step / "params" / "_METADATA", step / "params/array_metadatas/process_0"):
        path.write_text(path.read_text().replace("[130, 140]", f"[{TERA}, 140]"))


def great_shape_in_array(step):
    import tensorstore

    base = f"file://{step / 'params'}/"
    store = {"driver": "ocdbt", "base": base, "path": "tower.head/"}
    metadata = {"shape": [TERA, 140], "chunks": [TERA, 140], "dtype": "<f4"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    tensorstore.open(spec, create=True, delete_existing=True).result()


def name_handlers(step):
    def rename(content):
        content["item_handlers"] = dict.fromkeys(content["item_handlers"], "os.system")

    change(step / "_CHECKPOINT_METADATA", rename)


def name_types(step):
    def rename(content):
        for leaf in content["tree_metadata"].values():
            leaf["value_metadata"]["value_type"] = "os.system"

    change(step / "params" / "_METADATA", rename)


def skip_arrays(step):
    def skip(content):
        for leaf in content["tree_metadata"].values():
            leaf["value_metadata"]["skip_deserialize"] = True

    change(step / "params" / "_METADATA", skip)


def link_out(step):
    outside = step.parents[1] / "outside"
    shutil.move(step, outside)
    (outside / "facts" / "metadata").write_text("{}")
    step.symlink_to(outside)


def link_device(step):
    (step / "facts" / "metadata").unlink()
    (step / "facts" / "metadata").symlink_to("/dev/zero")


def make_pipe(step):
    (step / "facts" / "metadata").unlink()
    os.mkfifo(step / "facts" / "metadata")


def make_great(step):
    with (step / "facts" / "metadata").open("r+b") as file:
        file.truncate(2**42)


def nest_facts(step):
    (step / "facts" / "metadata").write_text(DEEP)


def nest_metadata(step):
    (step / "params" / "_METADATA").write_text(DEEP)


HOSTILE = {  # a change of the newer of two steps: the step that is restored, or the error
    traverse_in_facts: "../../../../evil is float32 [130, 140]",
    traverse_in_metadata: 1,
    great_shape_in_facts: "tower.head is float32 [1099511627776]",
    great_shape_in_metadata: 2,
    great_shape_in_array: 1,
    name_handlers: 2,
    name_types: 2,
    skip_arrays: 1,
    link_out: 1,
    link_device: 1,
    make_pipe: 1,
    make_great: 1,
    nest_facts: 1,
    nest_metadata: 1,
}


def work(root: str) -> None:
    """Restore every hostile folder with little memory; print the outcomes as JSON."""
    folders, outcomes = pathlib.Path(root), {}
    assert int(restore(folders / "control" / "checkpoints")[0].step) == 2
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31,) * 2)
    for folder in sorted(folders.iterdir()):
        try:
            actual, _ = restore(folder / "checkpoints")
            outcomes[folder.name] = int(actual.step)
            assert bits(actual) == bits(make_state(outcomes[folder.name])), folder.name
        except (ValueError, OSError) as error:
            outcomes[folder.name] = str(error)
    print(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{hostile change: outcome}, from one process."""
    root = tmp_path_factory.mktemp("hostile")
    save(root / "control" / "checkpoints", make_state(1), make_state(2))
    for make in HOSTILE:
        shutil.copytree(root / "control", root / make.__name__)
        make(root / make.__name__ / "checkpoints" / "2")
    before = sorted(path for path in root.parent.rglob("*") if "checkpoints" not in path.parts)
    code = "import sys; from tests import test_hostile_checkpoints as t; t.work(sys.argv[1])"
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    after = sorted(path for path in root.parent.rglob("*") if "checkpoints" not in path.parts)
    assert after == before
    assert (root / "link_out" / "outside" / "facts" / "metadata").read_text() == "{}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_checkpoint_is_an_error_or_harmless(make, outcomes):
    expected = HOSTILE[make]
    if isinstance(expected, int):
        assert outcomes[make.__name__] == expected
    else:
        assert expected in outcomes[make.__name__]
