"""Advice: each change is allowed, compiled and fits, and no smaller step of its kind fits."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from lm import cli, runs
from lm.preflight import advice, compiler, program, slices

ROW = 300_000  # bytes of a row's activations in the fake compiler's programs
REMAT_SHARE = {"none": 1.0, "dots": 0.5, "full": 0.2}  # share of them by remat policy
BIG = {"model.d_model": 512, "data.input_length": 16}  # much state, few activations


class FakeCompiler:
    """Memory of a micro-batch's rows, and of the state divided by fsdp and tensor.

    invalid_fsdp: values of fsdp for which it raises ValueError, as the real compiler may.
    """

    def __init__(self, state: int, invalid_fsdp=()):
        self.state, self.invalid_fsdp, self.compiled = state, invalid_fsdp, []

    def needed(self, config: dict, chips: int) -> int:
        layout = config["parallel"]
        rows = config["data"]["batch_size"] / (
            chips / layout["tensor"] * layout["num_microbatches"]
        )
        shards = 1 if layout["strategy"] == "pmap" else layout["fsdp"] * layout["tensor"]
        rows *= ROW * REMAT_SHARE[config["model"]["remat_policy"]] / layout["tensor"]
        return int(self.state / shards + rows)

    def __call__(self, config, target, workdir, *, label=""):
        if config["parallel"]["fsdp"] in self.invalid_fsdp:
            raise ValueError("the hosts do not get whole rows; change parallel.tensor.")
        self.compiled.append((config, target.name))
        needed = self.needed(config, target.chips)
        return compiler.Compiled(
            target=target.name,
            chip=target.chip,
            chips=target.chips,
            hosts=target.hosts,
            sizes={"gradients": 0},
            model_flops=10**12,
            executed_flops=10**12,
            fits=needed <= target.chip.memory,
            peak=needed,
            seconds=1.5,
        )


@pytest.fixture
def slice_with(monkeypatch):
    """Returns make(memory, name): the v5e slice of the name, whose chips have that memory."""

    def make(memory: float, name: str) -> slices.Slice:
        small = dataclasses.replace(slices.CHIPS["v5e"], memory=int(memory))
        monkeypatch.setitem(slices.CHIPS, "v5e", small)
        return slices.parse_slice(name)

    return make


@pytest.fixture
def make_run(tiny_config, tmp_path):
    """Returns make(**changes): a tiny run of 32 rows."""
    return lambda **changes: runs.make_run(
        tiny_config(**{"data.batch_size": 32} | changes), tmp_path / "none"
    )


def state_bytes(run) -> int:
    """Bytes of the state and gradients of a run, not sharded."""
    state = program.make_update(run).state_shapes
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(state) + size(state.params)


def advise(run, target, **options):
    """Returns the trials and the fake compiler for a run that does not fit."""
    fake = FakeCompiler(state_bytes(run))
    assert fake.needed(run.config_dict, target.chips) > target.chip.memory
    return advice.advise(run, target, compile=fake, **options), fake


def test_advice_has_the_smallest_step_that_fits_of_each_kind(make_run, slice_with):
    run = make_run()
    target = slice_with(state_bytes(run) + 1.3 * ROW, "v5e-8")  # 4 rows a chip do not fit
    trials, fake = advise(run, target)
    changes = [trial.changes for trial in trials]
    assert {"parallel.num_microbatches": 4} in changes and {"model.remat_policy": "full"} in changes
    for trial in trials:
        config = advice.changed(run.config_dict, trial.changes)
        assert (trial.slice, trial.compiled.fits) == (target, True)
        assert trial.compiled.peak == fake.needed(config, 8) <= target.chip.memory
    assert len({str(call) for call in fake.compiled}) == len(fake.compiled)


def test_num_microbatches_is_the_smallest_that_fits(make_run, slice_with):
    run = make_run(**{"data.batch_size": 256})
    for rows in (2, 8):  # so many of a chip's 32 rows fit
        target = slice_with(state_bytes(run) + (rows + 0.5) * ROW, "v5e-8")
        trials, _ = advise(run, target)
        assert trials[0].flags == [f"--config.parallel.num_microbatches={32 // rows}"]


def test_two_changes_are_advised_if_no_single_change_fits(make_run, slice_with):
    run = make_run(**{"data.batch_size": 8})  # one row per chip: no smaller micro-batch
    trials, _ = advise(run, slice_with(state_bytes(run) / 2 + ROW / 4, "v5e-8"))
    assert trials
    for trial in trials:
        assert set(trial.changes) == {"model.remat_policy", "parallel.strategy", "parallel.fsdp"}


def test_if_nothing_fits_the_smallest_larger_slice_is_advised(make_run, slice_with):
    run = make_run(**BIG | {"data.batch_size": 16})
    (trial,), fake = advise(run, slice_with(state_bytes(run) / 3, "v5e-1"))
    assert trial.slice.name == "v5e-4" and trial.compiled.fits
    assert trial.changes == {"parallel.strategy": "mesh", "parallel.fsdp": 4}
    assert {name for _, name in fake.compiled} == {"v5e-1", "v5e-4"}


def test_advice_is_empty_if_nothing_fits(make_run, slice_with):
    trials, _ = advise(make_run(), slice_with(1000, "v5e-256"))
    assert trials == []


def test_deep_models_are_compiled_with_scan_layers_which_is_in_the_flags(make_run, slice_with):
    for depth, flags in ((6, ["--config.model.scan_layers=True"]), (2, [])):
        depths = {"model.num_encoder_layers": depth, "model.num_decoder_layers": depth}
        run = make_run(**BIG | depths | {"model.scan_layers": False})
        (trial,), fake = advise(run, slice_with(state_bytes(run) / 3, "v5e-1"))
        assert [flag for flag in trial.flags if "layers" in flag] == flags
        is_scanned = {config["model"]["scan_layers"] for config, _ in fake.compiled}
        assert is_scanned == {bool(flags)}


def test_the_flags_of_a_trial_produce_its_config(tmp_path, make_run, slice_with):
    arguments = ["--config=configs/pretrain.py:tiny", f"--workdir={tmp_path}"]
    config = cli.parse_flags("show", ("config", "workdir"), arguments).config.to_dict()
    changes = {"parallel.strategy": "mesh", "parallel.fsdp": 4, "model.remat_policy": "full"}
    changes |= {"model.scan_layers": True, "parallel.num_microbatches": 2}
    flags = advice.Trial(slices.parse_slice("v5e-4"), changes, None).flags
    actual = cli.parse_flags("show", ("config", "workdir"), arguments + flags).config.to_dict()
    assert actual == advice.changed(config, changes) != config


def test_at_most_max_programs_are_compiled_for_the_slice_and_for_larger_ones(make_run, slice_with):
    run = make_run()
    target = slice_with(state_bytes(run) * 1.01 + ROW / 8, "v5e-8")
    for limit in (0, 1, 3):
        _, fake = advise(run, target, max_programs=limit)
        assert len(fake.compiled) <= 2 * limit


def test_an_invalid_layout_is_skipped(make_run, slice_with):
    run = make_run(**BIG | {"data.batch_size": 8})
    fake = FakeCompiler(state_bytes(run), invalid_fsdp=(8,))
    target = slice_with(state_bytes(run) / 2 + 1.5 * ROW, "v5e-8")
    trials = advice.advise(run, target, compile=fake)
    assert [trial.changes["parallel.fsdp"] for trial in trials] == [2]


def test_ladders_have_only_steps_that_training_accepts(make_run):
    target = slices.parse_slice("v5e-8")
    assert [len(kind) for kind in advice.ladders(make_run(), target)] == [2, 2, 3]
    deterministic = make_run(**{"parallel.deterministic_reduction": True})  # requires pmap
    kinds = advice.ladders(deterministic, target)
    assert not any("parallel.fsdp" in step for kind in kinds for step in kind)
    sharded = make_run(**{"parallel.strategy": "mesh", "parallel.tensor": 4})
    widths = [step["parallel.fsdp"] for step in advice.ladders(sharded, target)[-1]]
    assert widths == [2]


def test_smallest_returns_the_first_slice_that_any_change_fits(make_run, slice_with):
    run = make_run(**BIG | {"data.batch_size": 64})
    fake = FakeCompiler(state_bytes(run))
    target = slice_with(state_bytes(run) / 5, "v5e-8")
    candidates = slices.sizes("v5e")
    trial = advice.smallest(run, candidates, max_programs=30, compile=fake)
    assert trial.slice == target and trial.compiled.fits
    assert trial.changes["parallel.fsdp"] == 8
    slice_with(1000, "v5e-8")
    assert advice.smallest(run, slices.sizes("v5e"), max_programs=99, compile=fake) is None
