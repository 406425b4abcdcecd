"""Laws of Generator: an answer depends on its input only; a bucket of lengths is one program."""

from __future__ import annotations

import numpy as np
import pytest

from lm import decoding, inference, parallel, pipeline, runs, steps, tasks
from tests import untrained

TEXTS = [f"{'kilo lima ' * (i % 7)}{word} {i}" for i, word in enumerate("abcde" * 3)]
DECODINGS = (
    "greedy",
    "beam num_beams=3 num_return_sequences=2",
    "sample temperature=2.0 top_p=0.9 num_return_sequences=2",
)
ONE_DEVICE = parallel.ParallelConfig(data=1)


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
    """The input shapes of each trace of decode_step, in order."""
    shapes, step = [], steps.decode_step

    def record(params, examples, *rest, **options):
        shapes.append(examples.inputs.shape)
        return step(params, examples, *rest, **options)

    monkeypatch.setattr(steps, "decode_step", record)
    return shapes


def make_generator(run, tokens, params, decoding_text="greedy", config=ONE_DEVICE, **options):
    strategy = parallel.make_strategy(config)
    placed = strategy.place_state(params)
    return inference.Generator(
        run, strategy, placed, tokens, decoding.parse(decoding_text), **options
    )


def assert_same(actual, expected):
    assert [answer.texts for answer in actual] == [answer.texts for answer in expected]
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x.scores, y.scores, rtol=1e-4)


@pytest.mark.parametrize("decoding_text", DECODINGS)
def test_an_answer_does_not_depend_on_other_inputs_or_the_bucket(
    decoding_text, run, params, tiny_tokens, monkeypatch
):
    answer = make_generator(run, tiny_tokens, params, decoding_text, rows=4)
    together = answer(TEXTS)
    assert len({text for a in together for text in a.texts}) > len(TEXTS) / 2
    assert {len(a.texts) for a in together} == {1 if decoding_text == "greedy" else 2}
    numbers = (0, 6, 9)
    alone = [answer(TEXTS[number : number + 1], first=number)[0] for number in numbers]
    assert_same(alone, [together[number] for number in numbers])
    monkeypatch.setattr(pipeline.batches, "MIN_BUCKET", 64)
    assert_same(answer(TEXTS[:4]), together[:4])


@pytest.mark.parametrize("decoding_text", DECODINGS[1:])
@pytest.mark.parametrize("strategy", ["pmap", "mesh"])
def test_answers_do_not_depend_on_the_devices(decoding_text, strategy, run, params, tiny_tokens):
    texts = ["kilo", "lima mike", "november", "a", "b"]
    config = parallel.ParallelConfig(strategy=strategy, data=2)
    several = make_generator(run, tiny_tokens, params, decoding_text, config, rows=4)(texts)
    assert_same(several, make_generator(run, tiny_tokens, params, decoding_text, rows=3)(texts))


def test_each_bucket_of_lengths_is_compiled_once(run, params, tiny_tokens, traced):
    answer = make_generator(run, tiny_tokens, params, rows=2)
    answer(TEXTS)
    buckets = {pipeline.bucket_length(len(tiny_tokens.encode(text)) + 1, 64) for text in TEXTS}
    assert sorted(columns for _, columns in traced) == sorted(buckets) == [16, 32, 64]
    answer(TEXTS[::-1])
    answer(TEXTS[:1])
    answer.with_params(other_params(answer, run))(TEXTS[:3])
    assert len(traced) == 3


def other_params(answer, run):
    return parallel.make_strategy(ONE_DEVICE).place_state(untrained.params(run, seed=1))


def test_with_params_gives_the_answers_of_the_other_parameters(run, params, tiny_tokens):
    answer = make_generator(run, tiny_tokens, params)
    actual = answer.with_params(other_params(answer, run))(TEXTS[:4])
    assert_same(actual, make_generator(run, tiny_tokens, untrained.params(run, seed=1))(TEXTS[:4]))
    assert actual != answer(TEXTS[:4])


def test_samples_depend_on_the_seed_and_the_number_of_the_input_only(run, params, tiny_tokens):
    answers = {
        (seed, first): make_generator(run, tiny_tokens, params, DECODINGS[2], seed=seed)(
            [TEXTS[1]] * 2, first=first
        )
        for seed in (0, 1)
        for first in (0, 1)
    }
    assert answers[0, 0][1] == answers[0, 1][0], "the same number"
    samples = [tuple(answer.texts) for pair in answers.values() for answer in pair]
    assert len(set(samples)) == 6, "other numbers and seeds give other samples"
    assert all(len(set(texts)) == 2 for texts in samples), "the samples of an input differ"


def test_a_long_input_is_marked_and_truncated_as_its_task_says(run, params, tiny_tokens):
    answer = make_generator(run, tiny_tokens, params)
    turns = [f"{word} kilo lima mike" for word in ("alfa", "bravo", "charlie", "delta", "echo")]
    task = tasks.Task("x", "respond: {turns}", "{turns}", turns="turns")
    dialogue = task.format_dialogue(turns * 9)
    ids, is_cut = tasks.truncate_input(task, dialogue, 64, tiny_tokens)
    latest = tiny_tokens.decode(ids)
    assert is_cut and latest.startswith("respond: ") and latest.endswith(turns[-1])
    (by_task,), (plain,), (short,) = answer([dialogue], task), answer([dialogue]), answer([latest])
    assert by_task.texts == short.texts != plain.texts
    assert (by_task.is_truncated, plain.is_truncated, short.is_truncated) == (True, True, False)


def test_beat_is_called_after_each_batch(run, params, tiny_tokens):
    beats = []
    make_generator(run, tiny_tokens, params, rows=4)(TEXTS, beat=lambda: beats.append(1))
    assert len(beats) == -(-len(TEXTS) // 4)
    assert make_generator(run, tiny_tokens, params)([]) == []
