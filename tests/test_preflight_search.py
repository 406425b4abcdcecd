"""Advice and search: what is proposed divides and fits, is ranked by time, and is found quickly."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import pytest

from lm import cli, parallel, runs, train
from lm.preflight import compiler, layouts, program, search, slices

ROW = 300_000  # bytes that a row takes in the made-up compiler's programs
BIG = {"model.d_model": 512, "data.input_length": 16}  # much state, few activations
SAVED = {"none": 1.0, "dots": 0.5, "full": 0.2}  # of them by remat


class FakeCompiler:
    """Memory as one would expect: rows of a micro-batch, and the state cut by fsdp and tensor.

    refuses: layouts (fsdp, tensor) that it says are a mistake, as a real one may.
    """

    def __init__(self, state: int, refuses=()):
        self.state, self.refuses, self.asked = state, refuses, []

    def needed(self, config: dict, chips: int) -> int:
        words = config["parallel"]
        data = chips // (words["fsdp"] * words["tensor"])
        rows = config["data"]["batch_size"] / (data * words["fsdp"] * words["num_microbatches"])
        whole = 1 if words["strategy"] == "pmap" else words["fsdp"] * words["tensor"]
        kept = ROW * rows * SAVED[config["model"]["remat"]] / words["tensor"]
        return int(self.state / whole + kept)

    def __call__(self, config, target, workdir, *, label=""):
        self.asked.append((config, target.name))
        words, memory = config["parallel"], target.chip.memory
        if (words["fsdp"], words["tensor"]) in self.refuses:
            raise ValueError("the hosts do not get whole rows; change parallel.tensor.")
        needed = self.needed(config, target.chips)
        again = 4 / 3 if config["model"]["remat"] == "full" else 1
        figures = dict(executed_flops=int(1e12 * again), model_flops=int(1e12), seconds=1.5)
        figures |= dict(memory_bytes=10**7 * words["num_microbatches"])
        sent = 10**6 * words["fsdp"] * words["num_microbatches"] * (target.chips > 1)
        figures |= dict(collectives={"all-gather": sent})
        figures |= dict(target=target.name, chips=target.chips, hosts=target.hosts)
        figures |= dict(
            chip=target.chip, sizes={"gradients": 0}, fits=needed <= memory, needed=needed
        )
        figures |= dict(error="" if needed <= memory else "it takes more.")
        return compiler.Compiled(**figures)


@pytest.fixture
def chip_of(monkeypatch):
    """(bytes) -> slice_named, where the chips v5e have so little memory."""

    def make(memory: int):
        small = dataclasses.replace(slices.CHIPS["v5e"], memory=memory)
        monkeypatch.setitem(slices.CHIPS, "v5e", small)
        return slices.slice_named

    return make


@pytest.fixture
def made(tiny_config, tmp_path):
    """(**changes) -> the tiny run of 32 rows, scanned."""
    return lambda **changes: runs.make_run(
        tiny_config(**{"data.batch_size": 32} | changes), tmp_path / "none"
    )


def whole_bytes(run) -> int:
    """State and gradients of a run, uncut."""
    state = program.state(run)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(state) + size(state.params)


def words_of(layout) -> tuple:
    return (layout.strategy, layout.fsdp, layout.tensor, layout.num_microbatches, layout.remat)


# Layouts. ----------------------------------------------------------------------------------------


def test_a_layout_is_allowed_exactly_where_training_accepts_it(made):
    run, target = made(**{"data.batch_size": 16}), slices.slice_named("v5e-8")
    state, sizes = program.state(run), (1, 2, 3, 4, 8)
    shapes = layouts.Shapes(run, state, target)
    accepted = set()
    for fsdp, tensor, micro in itertools.product(sizes, sizes, (1, 2, 4, 8, 16)):
        strategy = "pmap" if fsdp * tensor == 1 else "mesh"
        layout = layouts.Layout(strategy, -1, fsdp, tensor, micro)
        try:
            laid = train.make_strategy(layouts.laid_out(run, layout), jax.devices())
            laid.abstract_state(state)
        except ValueError:
            continue
        accepted.add(layout)
    allowed = list(shapes.allowed())
    assert {layout for layout in allowed if layout.remat == "none"} == accepted
    assert len(allowed) == 3 * len(accepted) == len(set(allowed))
    assert all((shapes.refusal(layout) is None) for layout in allowed)


def test_the_least_is_what_training_places_and_its_gradients(made):
    run, target = made(**{"optimizer.name": "adafactor"}), slices.slice_named("v5e-8")
    shapes = layouts.Shapes(run, program.state(run), target)
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for fsdp, tensor in ((8, 1), (2, 4), (1, 2)):
        layout = layouts.Layout("mesh", -1, fsdp, tensor)
        strategy = train.make_strategy(layouts.laid_out(run, layout), jax.devices())
        state = strategy.abstract_state(program.state(run))
        placed = sum(map(size, jax.tree.leaves((state, state.params))))
        assert shapes.least(layout) == placed
    assert shapes.least(layouts.Layout()) == whole_bytes(run)


def test_a_tensor_axis_stays_within_a_host(made):
    run, target = made(), slices.slice_named("v5e-16")  # four hosts of four
    shapes = layouts.Shapes(run, program.state(run), target)
    assert {layout.tensor for layout in shapes.allowed()} == {1, 2, 4}
    assert "host" in shapes.refusal(layouts.Layout("mesh", -1, 1, 16))


def test_the_fixed_order_of_sums_is_kept_so_no_mesh_is_proposed(made):
    run = made(**{"parallel.reduction": "fixed"})
    shapes = layouts.Shapes(run, program.state(run), slices.slice_named("v5e-8"))
    assert {layout.strategy for layout in shapes.allowed()} == {"pmap"}


def test_flags_make_of_the_config_what_was_compiled(tmp_path):
    given = ["--config=configs/pretrain.py:tiny", f"--workdir={tmp_path}"]
    config = cli.parse_flags("show", ("config", "workdir"), given).config.to_dict()
    layout = layouts.Layout("mesh", -1, 4, 2, 2, "full")
    flags = layouts.flags(config, layout)
    again = cli.parse_flags("show", ("config", "workdir"), given + flags).config.to_dict()
    assert again == layouts.changed(config, layout) != config
    assert layouts.layout_of(again) == layout and not layouts.flags(again, layout)


def test_smaller_steps_come_first(made):
    run, target = made(), slices.slice_named("v5e-8")
    kinds = search.ladders(run, layouts.Layout(), target)
    assert [len(kind) for kind in kinds] == [5, 2, 3]  # 2..32 rows, dots and full, 2 4 8
    both = search.changes(layouts.Layout(), kinds[:2])
    assert [(one.num_microbatches, one.remat) for one in both[:3]] == [
        *[(2, "dots"), (2, "full"), (4, "dots")]
    ]
    assert search.changes(layouts.Layout(), ()) == [layouts.Layout()]


# Advice. -----------------------------------------------------------------------------------------


def advised(run, target, **more):
    """(the advice, the made-up compiler) of a run that does not fit."""
    fake = FakeCompiler(whole_bytes(run), **more)
    first = fake(run.config, target, "")
    fake.asked.clear()
    assert not first.fits
    return search.advice(run, target, first, compile=fake), fake


def test_each_kind_of_change_is_advised_by_its_smallest_step_that_fits(made, chip_of):
    run = made()
    target = chip_of(int(whole_bytes(run) + 1.3 * ROW))("v5e-8")  # 4 rows a chip do not fit
    advice, fake = advised(run, target)
    assert advice.here and advice.compiled == len(fake.asked) <= search.ADVICE_TRIES
    found = [words_of(trial.layout) for trial in advice.trials]
    assert ("pmap", 1, 1, 4, "none") in found and ("pmap", 1, 1, 2, "none") not in found
    assert ("pmap", 1, 1, 1, "full") in found and ("pmap", 1, 1, 1, "dots") not in found
    for trial in advice.trials:
        config = layouts.changed(run.config, trial.layout)
        assert trial.fits and trial.proven and trial.slice == "v5e-8"
        assert trial.peak == fake.needed(config, 8) <= target.chip.memory
        assert trial.flags == tuple(layouts.flags(run.config, trial.layout))


def test_the_number_of_rows_decides_no_more_than_it_must(made, chip_of):
    run = made(**{"data.batch_size": 256})
    for rows in (2, 8):  # of 32 a chip; as many fit
        target = chip_of(int(whole_bytes(run) + (rows + 0.5) * ROW))("v5e-8")
        advice, _ = advised(run, target)
        assert advice.trials[0].layout == layouts.Layout(num_microbatches=32 // rows)
        assert advice.trials[0].flags == (f"--config.parallel.num_microbatches={32 // rows}",)


def test_two_changes_are_advised_only_where_one_is_not_enough(made, chip_of):
    run = made(**{"data.batch_size": 8})  # a row a chip: micro-batches divide no more
    target = chip_of(whole_bytes(run) // 2 + ROW // 4)("v5e-8")
    advice, _ = advised(run, target)
    assert advice.here and advice.trials
    for trial in advice.trials:
        assert trial.layout.strategy == "mesh" and trial.layout.remat != "none"


def test_what_cannot_fit_by_its_shapes_is_never_compiled(made, chip_of):
    run = made(**BIG)
    target = chip_of(whole_bytes(run) // 3)("v5e-1")
    advice, fake = advised(run, target)
    assert not advice.here
    assert {name for _, name in fake.asked} == {"v5e-4"}
    (trial,) = advice.trials
    assert (trial.slice, trial.layout.strategy, trial.layout.fsdp) == ("v5e-4", "mesh", 4)
    assert trial.fits and trial.proven


def test_without_compiling_the_answer_is_said_to_be_a_guess(made, chip_of):
    run = made(**BIG)
    target = chip_of(whole_bytes(run) // 3)("v5e-1")
    advice = search.advice(run, target, tries=0, compile=None)
    (trial,) = advice.trials
    assert not trial.proven and not advice.here and advice.compiled == 0
    assert trial.slice == "v5e-4" and trial.peak <= target.chip.memory


def test_many_layers_are_scanned_in_what_is_compiled_and_in_its_flags(made, chip_of):
    for depth, flag in ((6, ["--config.model.layers=scanned"]), (2, [])):
        changes = {"model.layers": "unrolled", "model.num_encoder_layers": depth}
        run = made(**BIG | changes | {"model.num_decoder_layers": depth})
        target, fake = chip_of(whole_bytes(run) // 3)("v5e-1"), FakeCompiler(whole_bytes(run))
        (trial,) = search.advice(run, target, compile=fake).trials
        ranked = search.search(run, slices.slice_named("v5e-4"), tries=2, compile=fake)
        for one in (trial, *ranked):
            assert one.proven and [word for word in one.flags if "layers" in word] == flag
        words = "scanned" if flag else "unrolled"
        assert {config["model"]["layers"] for config, _ in fake.asked} == {words}


def test_where_programs_do_not_fit_a_larger_slice_is_still_proven(made, chip_of):
    run = made(**BIG | {"data.batch_size": 64})
    target = chip_of(int(whole_bytes(run) / 3.5))("v5e-4")
    fake = FakeCompiler(whole_bytes(run) * 1.25)  # more than the shapes tell
    advice = search.advice(run, target, tries=2, compile=fake)
    asked = [name for _, name in fake.asked]
    assert not advice.here and advice.trials[0].proven and advice.trials[0].slice == "v5e-8"
    assert asked.count("v5e-4") == 2 and 0 < asked.count("v5e-8") <= 2


def test_what_the_compiler_could_not_compile_teaches_nothing_of_memory(made):
    run, own = made(), layouts.Layout()
    fake = FakeCompiler(whole_bytes(run))
    trials = search.Trials(run, slices.slice_named("v5e-1"), fake, 4)
    found, before = fake(run.config, trials.target, ""), trials.guess(own)
    sizes = {"params": found.needed}
    trials.learn(own, dataclasses.replace(found, fits=False, error="a crash", sizes=sizes))
    assert trials.guess(own) == before
    trials.learn(own, found)
    assert trials.guess(own) == pytest.approx(found.needed, abs=2)


def test_advice_compiles_no_more_than_its_bound(made, chip_of):
    run = made()
    target = chip_of(int(whole_bytes(run) * 1.01 + ROW // 8))("v5e-8")
    for tries in (1, 3):
        fake = FakeCompiler(whole_bytes(run))
        advice = search.advice(run, target, compile=fake, tries=tries)
        assert advice.compiled == len(fake.asked) <= 2 * tries


def test_the_smallest_slice_is_the_first_that_any_change_fits(made, chip_of):
    run = made(**BIG | {"data.batch_size": 64})
    named = chip_of(whole_bytes(run) // 5)
    fake = FakeCompiler(whole_bytes(run))
    found = search.smallest(run, slices.sizes("v5e"), compile=fake)
    assert found.slice == "v5e-8" and found.fits and found.layout.fsdp == 8
    assert named("v5e-8").chips == 8
    nowhere = chip_of(1000) and search.smallest(run, slices.sizes("v5e"), compile=fake)
    assert nowhere is None


# Search. -----------------------------------------------------------------------------------------


def test_layouts_are_ranked_by_time_among_those_that_fit(made, chip_of):
    run = made()
    target = chip_of(int(whole_bytes(run) / 2 + 2.1 * ROW))("v5e-8")
    fake = FakeCompiler(whole_bytes(run), refuses={(2, 4)})
    trials = search.search(run, target, tries=9, compile=fake)
    assert len(trials) == len(fake.asked) <= 9
    fitting = [trial for trial in trials if trial.fits]
    assert trials[: len(fitting)] == fitting and len(fitting) > 2
    assert [one.step_s for one in fitting] == sorted(one.step_s for one in fitting)
    assert all(0 < trial.mfu < 1 + 1e-9 for trial in fitting)  # rounded
    shapes = layouts.Shapes(run, program.state(run), target)
    for trial in trials:
        assert shapes.refusal(trial.layout) is None
        config = layouts.changed(run.config, trial.layout)
        needed = fake.needed(config, 8)
        assert trial.fits == (needed <= target.chip.memory and not trial.error)
    assert len({trial.layout for trial in trials}) == len(trials)


def test_the_runs_own_layout_is_among_them(made):
    run = made(**{"parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.num_microbatches": 4})
    fake = FakeCompiler(1000)
    trials = search.search(run, slices.slice_named("v5e-8"), tries=2, compile=fake)
    assert () in [trial.flags for trial in trials]
    for odd in ({"parallel.strategy": "mesh"}, {"parallel.num_microbatches": 3}):  # rarely proposed
        run = made(**{"data.batch_size": 24} | odd)
        trials = search.search(run, slices.slice_named("v5e-8"), tries=1, compile=fake)
        assert [trial.flags for trial in trials] == [()]


def test_what_a_program_settles_is_not_compiled_again(made, chip_of):
    run = made()
    target = chip_of(int(whole_bytes(run) + 1.3 * ROW))("v5e-1")  # 1 row of 32
    fake = FakeCompiler(whole_bytes(run))
    trials = search.search(run, target, tries=18, compile=fake)
    saves = lambda c: (c["parallel"]["num_microbatches"], layouts.REMATS.index(c["model"]["remat"]))
    fits = lambda config: fake.needed(config, 1) <= target.chip.memory
    below = lambda a, b: all(x <= y for x, y in zip(saves(a), saves(b), strict=True))
    for (a, _), (b, _) in itertools.combinations(fake.asked, 2):  # b after a
        assert not (below(a, b) if fits(a) else below(b, a)), "known from the one before"
    assert trials[0].fits and 3 < len(trials) < 18


def test_a_layout_that_the_compiler_refuses_is_said_to_be_refused(made):
    run, target = made(), slices.slice_named("v5e-4")
    fake = FakeCompiler(1000, refuses={(4, 1), (2, 2), (2, 1), (1, 2), (1, 4)})
    trials = search.search(run, target, tries=6, compile=fake)
    assert trials[0].fits and trials[0].layout.strategy == "pmap"
    assert all("whole rows" in trial.error for trial in trials if not trial.fits)
    text = search.table(trials, target)
    assert "pmap 4x1x1" in text.splitlines()[1] and text.count("refused: the hosts") == 1


def test_the_table_says_which_fit_and_which_are_too_large(made, chip_of):
    run = made()
    target = chip_of(int(whole_bytes(run) + 4.3 * ROW))("v5e-4")
    trials = search.search(run, target, tries=8, compile=FakeCompiler(whole_bytes(run)))
    cells = [line.split() for line in search.table(trials, target).splitlines()[1:]]
    assert [cell[-1] for cell in cells] == ["yes" if one.fits else "no" for one in trials]
    assert {cell[-1] for cell in cells} == {"yes", "no"}


def test_where_every_layout_is_a_mistake_the_mistake_is_raised(made):
    fake = FakeCompiler(1000, refuses={(1, 1)})
    with pytest.raises(ValueError, match="whole rows"):
        search.search(made(), slices.slice_named("v5e-1"), compile=fake)


def test_a_run_without_any_layout_is_told_so_in_a_sentence(made, chip_of):
    with pytest.raises(ValueError, match=r"v5e-8 has no layout .* larger slice"):
        search.search(made(), chip_of(1000)("v5e-8"), compile=None)


def test_parallel_words_that_a_layout_sets_are_those_of_the_config(made):
    names = {field.name for field in dataclasses.fields(parallel.ParallelConfig)}
    of = {section: key for section, key in layouts.KEYS.values() if section == "parallel"}
    assert set(of.values()) <= names
    laid = layouts.laid_out(made(), layouts.Layout("mesh", -1, 2, 2, 4, "dots"))
    config = parallel.ParallelConfig(**laid.config["parallel"])
    assert laid.parallel == config and laid.model.remat == laid.config["model"]["remat"]
