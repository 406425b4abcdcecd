"""Goldens: every resolved config and every preset's parameter table, so a diff shows its reach.

They are our own output on purpose. After a change that is meant: make golden, and commit the diff.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pathlib

import pytest

from configs import base, models
from lm import runs, show

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
    """What a device holds of a preset under a layout."""
    preset, keys = LAYOUTS[name]
    config = models.apply(base.get_config(), preset)
    config.parallel.update(keys)
    return show.sharding(runs.make_run(config.to_dict(), "nowhere")) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_config_is_what_we_last_agreed(name):
    golden = (GOLDEN / f"{name}.json").read_text()
    assert resolved(name) == golden, f"{name} changed; if that is meant, run `make golden`"


@pytest.mark.parametrize("preset", sorted(models.PRESETS))
def test_parameters_are_what_we_last_agreed(preset):
    golden = (GOLDEN / f"{preset}.txt").read_text()
    assert table(preset) == golden, f"{preset} changed; if that is meant, run `make golden`"


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_lie_where_we_last_agreed(name):
    golden = (GOLDEN / f"{name}.txt").read_text()
    assert sharding(name) == golden, f"{name} changed; if that is meant, run `make golden`"


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("demo", "pipeline", "t5_tables")]
)
@pytest.mark.parametrize("preset", sorted(models.PRESETS))
def test_every_stage_config_takes_every_preset_and_passes_the_checks(name, preset):
    make = importlib.import_module(f"configs.{name}").get_config
    if not inspect.signature(make).parameters:
        pytest.skip("base is the preset-free ground of the others")
    config = make(preset).to_dict()
    if config["stage"] == "distill":
        with pytest.raises(ValueError, match="teacher.workdir"):
            runs.make_run(config, "nowhere")
        config |= {"stage": "finetune"}
    made = runs.make_run(config, "nowhere")
    assert made.model.vocab_size >= config["tokenizer"]["vocab_size"] + 100


def test_fine_tuning_has_dropout_and_pre_training_has_none():
    dropout = lambda name: json.loads(resolved(name))["model"]["dropout_rate"]
    assert dropout("finetune") == dropout("distill") == 0.1
    assert dropout("pretrain") == dropout("pretrain_wikipedia") == 0.0


if __name__ == "__main__":
    for name in NAMES:
        (GOLDEN / f"{name}.json").write_text(resolved(name))
    for preset in models.PRESETS:
        (GOLDEN / f"{preset}.txt").write_text(table(preset))
    for name in LAYOUTS:
        (GOLDEN / f"{name}.txt").write_text(sharding(name))
