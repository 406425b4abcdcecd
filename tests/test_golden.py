"""Goldens: every resolved config, every preset's parameter table, layouts, README's map.

They are our own output: a diff shows what a change reaches. After an intended change run
`make golden` and commit the diff.
"""

from __future__ import annotations

import importlib
import json
import pathlib

import pytest

from configs import base, models
from lm import runs, show
from tests import layers

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "models")
)


def resolved(name: str) -> str:
    """The config as JSON, with its default preset."""
    config = importlib.import_module(f"configs.{name}").get_config()
    return json.dumps(config.copy_and_resolve_references().to_dict(), indent=2) + "\n"


def table(preset: str) -> str:
    """The parameter table of a preset, from shapes alone."""
    config = models.apply(base.get_config(), preset)
    return show.parameters(runs.make_run(config.to_dict(), "nowhere")) + "\n"


LAYOUTS = {  # name: (preset, keys of parallel)
    "sharding_pmap": ("t5_1_1_small", {}),
    "sharding_fsdp": ("t5_1_1_large", {"strategy": "mesh", "fsdp": 8}),
    "sharding_mesh": ("umt5_xl", {"strategy": "mesh", "data": 2, "fsdp": 4, "tensor": 4}),
}


def sharding(name: str) -> str:
    """The parameters on one device, for a preset under a layout."""
    preset, keys = LAYOUTS[name]
    config = models.apply(base.get_config(), preset)
    config.parallel.update(keys)
    return show.sharding(runs.make_run(config.to_dict(), "nowhere")) + "\n"


GOLDENS = {  # kind: (names, suffix, name -> text)
    "configs": (NAMES, ".json", resolved),
    "parameters": (sorted(models.PRESETS), ".txt", table),
    "shardings": (sorted(LAYOUTS), ".txt", sharding),
}


@pytest.mark.parametrize("kind", GOLDENS)
def test_the_files_are_as_agreed(kind):
    names, suffix, make = GOLDENS[kind]
    changed = [name for name in names if (GOLDEN / f"{name}{suffix}").read_text() != make(name)]
    assert not changed, f"changed; if that is intended, run `make golden`: {changed}"


def test_readmes_map_is_that_of_the_layers():
    assert layers.readme_map() in layers.README.read_text(), "run `make golden`"


def test_every_stage_config_takes_every_preset_and_passes_the_checks():
    faults = []
    for name in sorted(set(NAMES) - {"base", "demo", "pipeline", "t5_tables"}):
        get_config = importlib.import_module(f"configs.{name}").get_config
        for preset in sorted(models.PRESETS):
            config = get_config(preset).to_dict()
            if config["stage"] == "distill":
                with pytest.raises(ValueError, match="teacher.workdir"):
                    runs.make_run(config, "nowhere")
                config |= {"stage": "finetune"}
            try:
                run = runs.make_run(config, "nowhere")
            except ValueError as error:
                faults.append(f"{name}:{preset}: {error}")
                continue
            if run.model.vocab_size < config["tokenizer"]["vocab_size"] + 100:
                faults.append(f"{name}:{preset} has no rows for the sentinels")
    assert not faults, "\n".join(faults)


def test_fine_tuning_has_dropout_and_pre_training_has_none():
    dropout = lambda name: json.loads(resolved(name))["model"]["dropout_rate"]
    assert dropout("finetune") == dropout("distill") == 0.1
    assert dropout("pretrain") == dropout("pretrain_wikipedia") == 0.0


if __name__ == "__main__":
    for names, suffix, make in GOLDENS.values():
        for name in names:
            (GOLDEN / f"{name}{suffix}").write_text(make(name))
    layers.write_readme_map()
