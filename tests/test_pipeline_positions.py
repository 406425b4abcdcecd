"""A position is a step: resuming is exact at 251 steps of every pipeline on 1 to 8 hosts."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
import pytest

from lm import objectives, pipeline, shards

SIZE, GAP, POSITIONS, HOSTS, AHEAD = 400, np.array([9]), 251, (1, 2, 4, 8), 4
VOCABULARY = objectives.Vocabulary(np.arange(390, 400), 1, np.arange(3, 300), np.zeros(400, bool))
PIPELINES = {  # tasks, packing
    "text": (("pydocs",), "none"),
    "pairs": (("docstring_summary",), "none"),
    "packed": (("docstring_summary",), "first_fit"),
    "mixture": (("pydocs", "docstring_summary"), "first_fit"),
}


def make_split(task: str, directory: pathlib.Path, data: pipeline.DataConfig) -> pipeline.TaskSplit:
    """A split of random ids, read several times in POSITIONS batches."""
    rng, path = np.random.default_rng(0), directory / task
    path.mkdir()
    ids = [rng.integers(3, SIZE - 10, rng.integers(4, 14)) for _ in range(450)]
    if task == "pydocs":
        file = shards.write_text(path / "file", ids, GAP, SIZE)
    else:
        file = shards.write_pairs(path / "file", [(tokens, tokens[:4]) for tokens in ids], SIZE)
    manifest = shards.write_manifest(path, {}, {"file": file}, {})
    return pipeline.TaskSplit(
        task, str(path), manifest, data, objectives.ObjectiveConfig(), VOCABULARY
    )


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_position_is_exact_at_every_step_on_any_number_of_hosts(kind, tmp_path, monkeypatch):
    import grain

    plain = grain.ReadOptions(num_threads=0)  # 16 batches ahead at each step would be slow
    monkeypatch.setattr(grain, "ReadOptions", lambda **_: plain)
    tasks, packing = PIPELINES[kind]
    shape = dict(input_length=24, target_length=16, batch_size=8)
    data = pipeline.DataConfig(
        mixture=tuple((task, None) for task in tasks), packing=packing, **shape
    )
    examples = pipeline.Examples(tuple(make_split(task, tmp_path, data) for task in tasks))

    def following(count: int, **where) -> list[np.ndarray]:
        batches = pipeline.train_batches(examples, 5, **where)
        return [np.concatenate(rows[:4], axis=1) for rows in itertools.islice(batches, count)]

    unbroken = following(POSITIONS + AHEAD)
    assert len(examples) < POSITIONS * 8 / 3  # several epochs
    for step in range(POSITIONS):
        hosts = HOSTS[step % 4]
        host = step // 4 % hosts
        position = json.loads(json.dumps({"next_index": step}))
        resumed = following(AHEAD, start=position["next_index"], host=host, hosts=hosts)
        for rows, whole in zip(resumed, unbroken[step:][:AHEAD], strict=True):
            np.testing.assert_array_equal(rows, whole[host::hosts])
