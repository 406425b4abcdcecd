"""Laws of answers: each is its input's own, and a bucket of lengths is one program."""

from __future__ import annotations

import numpy as np
import pytest

from lm import decoding, inference, parallel, pipeline, runs, steps, tasks
from tests import untrained

TEXTS = [f"{'kilo lima ' * (i % 7)}{word} {i}" for i, word in enumerate("abcde" * 3)]
HOW = (
    "greedy",
    "beam num_beams=3 num_return_sequences=2",
    "sample temperature=2.0 top_p=0.9 num_return_sequences=2",
)
ONE = parallel.ParallelConfig(data=1)


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    changes = {"data.task": "docstring_summary", "stage": "finetune", "data.input_length": 64}
    changes |= {"data.target_length": 8}
    return runs.make_run(tiny_config(**changes), tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def params(run):
    return untrained.params(run)


@pytest.fixture
def traced(monkeypatch):
    """The shapes of the inputs for which decode_step was traced, in order."""
    shapes, step = [], steps.decode_step

    def counted(params, examples, *rest, **options):
        shapes.append(examples.inputs.shape)
        return step(params, examples, *rest, **options)

    monkeypatch.setattr(steps, "decode_step", counted)
    return shapes


def make(run, tokens, params, how="greedy", config=ONE, **options):
    strategy = parallel.make_strategy(config)
    placed = strategy.place_state(params)
    return inference.Generator(run, strategy, placed, tokens, decoding.parse(how), **options)


def assert_same(ours, theirs):
    assert [answer.texts for answer in ours] == [answer.texts for answer in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_an_answer_is_the_same_alone_and_in_company_in_any_bucket(
    how, run, params, tiny_tokens, monkeypatch
):
    answer = make(run, tiny_tokens, params, how, rows=4)
    together = answer(TEXTS)
    assert len({text for found in together for text in found.texts}) > len(TEXTS) / 2
    assert {len(found.texts) for found in together} == {1 if how == "greedy" else 2}
    some = (0, 6, 9)
    alone = [answer(TEXTS[number : number + 1], first=number)[0] for number in some]
    assert_same(alone, [together[number] for number in some])
    monkeypatch.setattr(pipeline.batches, "LEAST", 64)
    assert_same(answer(TEXTS[:4]), together[:4])


@pytest.mark.parametrize("how", HOW[1:])
@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_answers_do_not_depend_on_the_devices(how, strategy, run, params, tiny_tokens):
    some = ["kilo", "lima mike", "november", "a", "b"]
    config = parallel.ParallelConfig(strategy=strategy, data=2)
    several = make(run, tiny_tokens, params, how, config, rows=4)(some)
    assert_same(several, make(run, tiny_tokens, params, how, rows=3)(some))


def test_a_bucket_of_lengths_is_one_program_compiled_once(run, params, tiny_tokens, traced):
    answer = make(run, tiny_tokens, params, rows=2)
    answer(TEXTS)
    buckets = {pipeline.bucket_length(len(tiny_tokens.encode(text)) + 1, 64) for text in TEXTS}
    assert sorted(columns for _, columns in traced) == sorted(buckets) == [16, 32, 64]
    answer(TEXTS[::-1])
    answer(TEXTS[:1])
    answer.with_params(untrained_of(answer, run))(TEXTS[:3])
    assert len(traced) == 3


def untrained_of(answer, run):
    return parallel.make_strategy(ONE).place_state(untrained.params(run, seed=1))


def test_answers_of_other_parameters_are_those_that_they_give(run, params, tiny_tokens):
    answer = make(run, tiny_tokens, params)
    other = answer.with_params(untrained_of(answer, run))(TEXTS[:4])
    assert_same(other, make(run, tiny_tokens, untrained.params(run, seed=1))(TEXTS[:4]))
    assert other != answer(TEXTS[:4])


def test_what_is_sampled_follows_from_the_seed_and_the_number_of_the_input(
    run, params, tiny_tokens
):
    said = {
        (seed, first): make(run, tiny_tokens, params, HOW[2], seed=seed)(
            [TEXTS[1]] * 2, first=first
        )
        for seed in (0, 1)
        for first in (0, 1)
    }
    assert said[0, 0][1] == said[0, 1][0], "the same number"
    drawn = [tuple(found.texts) for answers in said.values() for found in answers]
    assert len(set(drawn)) == 6, "another number or another seed, another draw"
    assert all(len(set(texts)) == 2 for texts in drawn), "n_best draws are different ones"


def test_an_input_too_long_is_told_and_answered_as_its_task_cuts_it(run, params, tiny_tokens):
    answer = make(run, tiny_tokens, params)
    turns = [f"{word} kilo lima mike" for word in ("alfa", "bravo", "charlie", "delta", "echo")]
    task = tasks.Task("x", "respond: {turns}", "{turns}", turns="turns")
    whole = task.format_dialogue(turns * 9)
    ids, cut = tasks.truncate_input(task, whole, 64, tiny_tokens)
    latest = tiny_tokens.decode(ids)
    assert cut and latest.startswith("respond: ") and latest.endswith(turns[-1])
    (by_task,), (plain,), (short,) = answer([whole], task), answer([whole]), answer([latest])
    assert by_task.texts == short.texts != plain.texts
    assert (by_task.is_truncated, plain.is_truncated, short.is_truncated) == (True, True, False)


def test_each_batch_is_a_sign_of_life(run, params, tiny_tokens):
    signs = []
    make(run, tiny_tokens, params, rows=4)(TEXTS, beat=lambda: signs.append(1))
    assert len(signs) == -(-len(TEXTS) // 4)
    assert make(run, tiny_tokens, params)([]) == []
