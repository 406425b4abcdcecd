"""Laws of a run: an impossible config is an error before any work, one sentence with the fix."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lm import objectives, parallel, runs, sources, tokenizer, train

IMPOSSIBLE = [
    # Sizes that do not fit together.
    (
        {"model.num_heads": 6, "model.num_kv_heads": 4},
        "model.num_heads=6 is not a multiple of model.num_kv_heads=4; use a divisor",
    ),
    (
        {"model.vocab_size": 409},
        r"model.vocab_size=409 is smaller than the tokenizer's 400 pieces \+ 10 sentinels; use 512",
    ),
    (
        {"data.input_length": 512, "objective.noise_density": 0.5},
        "input_length=512 .* needs 128 sentinels, .*tokenizer.num_extra_ids=10; train",
    ),
    # Names that are in no table.
    ({"stage": "pretrian"}, "stage='pretrian' is unknown; choose one of .* did you mean 'pretrain"),
    ({"data.task": "wiki"}, "data.task='wiki' is unknown; choose one of"),
    ({"objective.name": "spam_corruption"}, "choose one of .*span_corruption, token_masking"),
    ({"objective.placement": "t6"}, "objective.placement='t6' is unknown; choose one of t5"),
    ({"optimizer.name": "adam"}, "optimizer.name='adam' is unknown; .* did you mean 'adamw'"),
    ({"optimizer.schedule": "cos"}, "optimizer.schedule='cos' is unknown; choose one of constant"),
    ({"model.lm_head": "tide"}, "model.lm_head='tide' is unknown; .* did you mean 'tied'"),
    ({"model.activation": "gegelu"}, "model.activation='gegelu' is unknown; choose one of"),
    ({"model.dtype": "float16"}, "model.dtype='float16' is unknown; choose one of bfloat16"),
    (
        {"parallel.strategy": "pjit"},
        "parallel.strategy='pjit' is unknown; choose one of mesh",
    ),
    # Numbers out of bounds, and NaN.
    ({"steps": 0}, "steps=0 and duration=.* set no length; set one"),
    ({"steps": 5, "duration.epochs": 2.0}, "steps=5 and duration={'epochs': 2.0} are both set"),
    ({"steps": 0, "duration.epochs": -2.0}, "duration.epochs=-2.0 is not a length"),
    ({"steps": -1}, "steps=-1 is too small; use 0 or more"),
    ({"checkpoint.keep_period": -1}, "checkpoint.keep_period=-1 is too small; use 0 or more"),
    (
        {"checkpoint.best_metric": "nat"},
        "checkpoint.best_metric='nat' is unknown; .* did you mean 'nats'",
    ),
    (
        {"checkpoint.best_metric": "nats", "checkpoint.every_steps": 4},
        "make checkpoint.every_steps=4 a multiple of eval_every_steps=3",
    ),
    ({"guard.max_bad_steps": 0}, "guard.max_bad_steps=0 is too small; use 1 or more"),
    ({"guard.max_rollbacks": -1}, "guard.max_rollbacks=-1 is too small; use 0 or more"),
    (
        {"guard.hang_timeout_seconds": -1.0},
        "guard.hang_timeout_seconds=-1.0 is too small; use 0 or more",
    ),
    (
        {"tokenizer.character_coverage": 2.0},
        "character_coverage=2.0 is out of bounds; use 0.98 to 1",
    ),
    ({"seed": -1}, "seed=-1 is too small; use 0 or more"),
    ({"seed": 1 << 32}, "seed=4294967296 has more than 32 bits; use one below 4294967296"),
    ({"checkpoint.max_to_keep": 1}, "checkpoint.max_to_keep=1 is too small; use 2 or more"),
    ({"log_every_steps": 0}, "log_every_steps=0 is too small; use 1 or more"),
    ({"eval_every_steps": 0}, "eval_every_steps=0 is too small; use 1 or more"),
    ({"checkpoint.every_steps": -5}, "checkpoint.every_steps=-5 is too small; use 1 or more"),
    ({"evaluate.max_examples": -1}, "evaluate.max_examples=-1 is too small; use 0 or more"),
    ({"tokenizer.max_documents": 0}, "tokenizer.max_documents=0 is too small; use 1 or more"),
    ({"model.d_model": 0}, "model.d_model=0 is too small; use 1 or more"),
    ({"model.dropout_rate": 1.0}, "model.dropout_rate=1.0 is not a probability; use 0 to below 1"),
    ({"model.dropout_rate": float("nan")}, "model.dropout_rate=nan is not a probability"),
    (
        {"model.position.relative_attention_num_buckets": 6},
        "model.position.relative_attention_num_buckets=6 .* use a multiple of 4",
    ),
    (
        {"model.position.relative_attention_max_distance": 16},
        "model.position.relative_attention_max_distance=16 do not make bins",
    ),
    ({"data.batch_size": 0}, "data.batch_size=0 is too small; use 1 or more"),
    ({"objective.noise_density": 1.0}, "objective.noise_density=1.0 is not between 0 and 1"),
    (
        {"objective.mean_noise_span_length": 0.5},
        "objective.mean_noise_span_length=0.5 is not a finite number of at least 1",
    ),
    (
        {"optimizer.learning_rate": float("nan")},
        "optimizer.learning_rate=nan is out of bounds; use 0 to 1000",
    ),
    (
        {"optimizer.learning_rate": -1.0},
        "optimizer.learning_rate=-1.0 is out of bounds; use 0 to 1000",
    ),
    ({"optimizer.warmup.steps": -1}, "optimizer.warmup.steps=-1 is not a length"),
    ({"loss.label_smoothing": 1.0}, "loss.label_smoothing=1.0 is out of bounds; use 0 to 0.999"),
    ({"parallel.num_microbatches": 0}, "parallel.num_microbatches=0 is too small; use 1"),
    ({"parallel.data": 0}, "parallel.data=0 is no size; use 1 or more, or -1 for all"),
    # Keys that contradict each other.
    ({"parallel.fsdp": 2}, "parallel.fsdp=2 .* pmap replicates; use parallel.strategy='mesh'"),
    (
        {"stage": "distill"},
        "stage='distill' needs a teacher; set teacher.workdir to its run",
    ),
    (
        {"teacher.workdir": "/r"},
        "teacher.workdir='/r' has no effect in stage='pretrain'; use stage=",
    ),
    (
        {"stage": "distill", "teacher.workdir": "/r", "init_from": "/p"},
        "init_from='/p' and teacher.student_init both initialize the student; leave "
        "init_from empty",
    ),
    (
        {"tokenizer.dir": "/nowhere"},
        "there is no tokenizer in /nowhere; make it with `python",
    ),
    ({"tokenizer.dir": "", "init_from": "/nowhere"}, "/nowhere holds no run .*; train one there"),
]


@pytest.mark.parametrize(("changes", "sentence"), IMPOSSIBLE, ids=lambda x: str(x)[:60])
def test_an_impossible_value_is_an_error_before_any_file_or_device(
    changes, sentence, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(parallel, "make_strategy", None)
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=sentence):
        runs.make_run(tiny_config(**changes), workdir)
    assert not workdir.exists()


def test_every_number_of_a_config_has_a_bound(tiny_config, tmp_path):
    """No number accepts a negative value or NaN, except -1 for parallel.data."""
    accepted = []

    def check(section: dict, prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                check(value, f"{prefix}{key}.")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                wrong = -2 if isinstance(value, int) else float("nan")
                try:
                    runs.make_run(tiny_config(**{prefix + key: wrong}), tmp_path)
                except ValueError as error:
                    assert str(wrong) in str(error)
                else:
                    accepted.append(prefix + key)

    check(tiny_config(), "")
    assert not accepted


@pytest.mark.parametrize(
    ("changes", "count", "shards"),
    [
        ({"data.batch_size": 12}, 8, 8),
        ({"data.batch_size": 8, "parallel.num_microbatches": 3}, 4, 4),
        ({"data.batch_size": 8, "parallel.num_microbatches": 2}, 8, 8),
        ({"data.batch_size": 6, "parallel.strategy": "mesh", "parallel.fsdp": 4}, 4, 4),
    ],
)
def test_an_indivisible_batch_is_an_error_before_the_workdir_exists(
    changes, count, shards, tiny_config, tmp_path
):
    run = runs.make_run(tiny_config(**changes), tmp_path / "run")
    product = shards * changes.get("parallel.num_microbatches", 1)
    sentence = f"data.batch_size={changes['data.batch_size']} does not divide over {shards} shards"
    with pytest.raises(ValueError, match=f"{sentence} .* use a multiple of {product}"):
        train.train(run, devices=jax.devices()[:count])
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_may_be_exactly_as_large_as_the_tokenizer(tiny_config, tmp_path):
    runs.make_run(tiny_config(**{"model.vocab_size": 410}), tmp_path)


def test_an_input_may_use_every_sentinel(tiny_config, tmp_path):
    # The longest text whose spans use all 10 sentinels, and one more token.
    spans = lambda length: objectives.lengths(objectives.ObjectiveConfig(), length).sentinels
    longest = max(length for length in range(100, 400) if spans(length) == 10)
    runs.make_run(tiny_config(**{"data.input_length": longest}), tmp_path)
    with pytest.raises(ValueError, match="needs 11 sentinels"):
        runs.make_run(tiny_config(**{"data.input_length": longest + 1}), tmp_path)
    # Pairs need no sentinels.
    pairs = {"data.task": "docstring_summary", "data.input_length": longest + 1}
    runs.make_run(tiny_config(**pairs), tmp_path)


def test_an_untrained_tokenizer_is_checked_by_its_config(tiny_config, tmp_path):
    new = {"tokenizer.dir": "", "tokenizer.vocab_size": 505, "tokenizer.num_extra_ids": 8}
    with pytest.raises(ValueError, match=r"the tokenizer's 505 pieces \+ 8 sentinels; use 640"):
        runs.make_run(tiny_config(**new), tmp_path)
    runs.make_run(tiny_config(**new | {"tokenizer.num_extra_ids": 7}), tmp_path)


def test_a_workdir_accepts_its_config_and_names_the_keys_that_differ(tiny_config, tmp_path):
    workdir = tmp_path / "run"
    run = runs.make_run(tiny_config(), workdir)
    runs.check_workdir(run)
    runs.claim(run, runs.make_tokenizer(run))
    runs.check_workdir(run)
    assert runs.read_run(workdir) == run
    before = (workdir / "config.json").read_bytes()
    changed = runs.make_run(tiny_config(**{"optimizer.learning_rate": 0.5, "steps": 7}), workdir)
    with pytest.raises(ValueError) as error:
        runs.check_workdir(changed)
    sentence = str(error.value)
    assert "optimizer.learning_rate (here 0.5, there 0.01)" in sentence
    assert "steps (here 7, there 6)" in sentence
    assert "another --workdir" in sentence
    assert sentence.count("(here ") == 2
    assert (workdir / "config.json").read_bytes() == before


NUMBERS = {  # changed values of twelve fields that affect a run's numbers
    "seed": 5,
    "steps": 7,
    "data.batch_size": 16,
    "data.input_length": 40,
    "stage": "finetune",
    "optimizer.learning_rate": 0.5,
    "optimizer.name": "lion",
    "loss.z_loss": 0.5,
    "guard.spike_threshold": 3.0,
    "objective.mean_noise_span_length": 4.0,
    "model.dropout_rate": 0.1,
    "data.train_split": "train[:50%]",
}
FREE = {  # changed values of fields that do not
    "parallel.data": 2,
    "parallel.num_microbatches": 2,
    "log_every_steps": 5,
    "checkpoint.max_to_keep": 3,
    "checkpoint.keep_period": 9,
    "evaluate.max_examples": 4,
    "guard.hang_timeout_seconds": 60.0,
    "model.dtype": "bfloat16",
    "data.num_workers": 1,
    "model.remat_policy": "full",
    "model.attention.implementation": "einsum",
    "model.scan_layers": False,
    "data.max_bad_records": 2,
}


@pytest.fixture
def claimed(tiny_config, tmp_path):
    run = runs.make_run(tiny_config(), tmp_path / "run")
    runs.claim(run, runs.make_tokenizer(run))
    return run.workdir


@pytest.mark.parametrize("key", NUMBERS)
def test_a_key_that_affects_numbers_changes_midway_only_if_allowed(key, claimed, tiny_config):
    changed = runs.make_run(tiny_config(**{key: NUMBERS[key]}), claimed)
    others = tuple(name for name in NUMBERS if name != key)
    for allow in ((), others):
        with pytest.raises(ValueError, match=rf"{key} \(here .*--allow_change={key}\."):
            runs.check_workdir(changed, allow)
    runs.check_workdir(changed, (key,))
    runs.check_workdir(changed, (key.partition(".")[0],))


def test_operational_keys_may_change(claimed, tiny_config):
    runs.check_workdir(runs.make_run(tiny_config(**FREE), claimed))
    fixed = runs.without_operational(tiny_config(**FREE))
    assert (
        fixed
        == runs.without_operational(tiny_config())
        != runs.without_operational(tiny_config(seed=1))
    )


def test_allow_change_must_name_a_key(claimed, tiny_config):
    run = runs.make_run(tiny_config(), claimed)
    with pytest.raises(
        ValueError, match="optimizer.learning_rat is no key .*mean 'optimizer.learning_rate'"
    ):
        runs.check_workdir(run, ("optimizer.learning_rat",))


def test_a_duration_is_counted_in_batches_of_the_run(tiny_config, tmp_path):
    total = lambda unit, number, examples: runs.total_updates(
        runs.make_run(tiny_config(**{"steps": 0, f"duration.{unit}": number}), tmp_path), examples
    )
    assert total("epochs", 3.0, 80) == 30 and total("epochs", 0.5, 80) == 5
    run = runs.make_run(tiny_config(), tmp_path)
    assert total("tokens", 10.0 * 8 * sum(run.lengths), 1) == 10
    assert runs.total_updates(run, 80) == 6


def test_differences_names_exactly_the_keys_that_differ():
    current = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}, "same": {"x": [1, 2]}}
    stored = {"a": 1, "b": {"c": 2, "d": 4}, "g": 5, "same": {"x": [1, 2]}}
    lines = runs.differences(current, stored)
    assert [line.split()[0] for line in lines] == ["b.d", "e", "g"]
    assert runs.differences(current, json.loads(json.dumps(current))) == []
    assert len(runs.differences(stored, current)) == len(lines)


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run \(no config.json\); train one there first"):
        runs.read_run(tmp_path)


def test_the_tokenizer_is_that_of_the_config_of_init_from_or_of_the_workdir(tiny_config, tmp_path):
    named = tiny_config()["tokenizer"]["dir"]
    first = runs.make_run(tiny_config(), tmp_path / "first")
    assert runs.tokenizer_dir(first) == pathlib.Path(named)
    runs.claim(first, runs.make_tokenizer(first))
    child = {"tokenizer.dir": "", "init_from": str(tmp_path / "first")}
    second = runs.make_run(tiny_config(**child), tmp_path / "second")
    assert runs.tokenizer_dir(second) == first.workdir / "tokenizer"
    alone = runs.make_run(tiny_config(**{"tokenizer.dir": ""}), tmp_path / "alone")
    assert runs.tokenizer_dir(alone) == tmp_path / "alone" / "tokenizer"


def test_a_claimed_workdir_does_not_need_its_source(tiny_config, tmp_path):
    first = runs.make_run(tiny_config(), tmp_path / "first")
    tokens = runs.make_tokenizer(first)
    runs.claim(first, tokens)
    child = {"tokenizer.dir": "", "init_from": str(first.workdir)}
    second = runs.make_run(tiny_config(**child), tmp_path / "second")
    runs.claim(second, runs.make_tokenizer(second))
    first.workdir.rename(tmp_path / "moved")
    alone = runs.make_tokenizer(runs.read_run(second.workdir))
    assert alone.fingerprint == tokens.fingerprint
    # A lost tokenizer is not trained again.
    shutil.rmtree(second.workdir / "tokenizer")
    with pytest.raises(ValueError, match="there is no tokenizer in"):
        runs.make_tokenizer(runs.read_run(second.workdir))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json is no config"),
        ("{}", "the config has no key"),
    ],
)
def test_a_damaged_config_is_named(text, sentence, tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        runs.read_run(tmp_path)


@pytest.mark.parametrize("section", ["", *runs.SECTIONS])
def test_an_unknown_or_missing_key_is_named(section, tiny_config, tmp_path):
    config = tiny_config()
    keys = config[section] if section else config
    keys["extra"] = 1
    where = f"{section}.extra" if section else "extra"
    with pytest.raises(ValueError, match=f"has an unknown key {where}.* configs/base.py"):
        runs.make_run(config, tmp_path)
    del keys["extra"]
    missing = sorted(key for key in keys if not isinstance(keys[key], dict))[0]
    del keys[missing]
    with pytest.raises(ValueError, match=f"has no key .*{missing}"):
        runs.make_run(config, tmp_path)


def test_an_old_key_is_refused_with_its_new_name(tiny_config, tmp_path):
    for old, new in runs.RENAMED_KEYS.items():
        config, (*sections, leaf) = tiny_config(), old.split(".")
        functools.reduce(lambda parent, key: parent.setdefault(key, {}), sections, config)[leaf] = 1
        (tmp_path / "config.json").write_text(json.dumps(config))
        for read in (lambda c: runs.make_run(c, tmp_path / "x"), lambda _: runs.read_run(tmp_path)):
            with pytest.raises(ValueError, match=f"has the old key {old}, which is now {new}"):
                read(config)


def test_an_incompatible_source_is_an_error_before_any_work(tiny_config, tmp_path):
    first = runs.make_run(tiny_config(), tmp_path / "first")
    runs.claim(first, runs.make_tokenizer(first))
    source = {"init_from": str(first.workdir)}
    for field, value in {
        "d_ff": 64,
        "position.relative_attention_max_distance": 20,
        "num_decoder_layers": 1,
    }.items():
        with pytest.raises(ValueError, match=f"model.{field}={value} differs from init_from="):
            runs.make_run(tiny_config(**source, **{f"model.{field}": value}), tmp_path / "second")
    student = {"stage": "distill", "teacher.workdir": str(first.workdir)}
    for change, sentence in (
        ({"model.num_encoder_layers": 3}, "num_encoder_layers=3 is more than the teacher's 2"),
        (
            {"model.vocab_size": 640, "teacher.student_init": "random"},
            "640 differs from the teacher's 512",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            runs.make_run(tiny_config(**student, **change), tmp_path / "third")
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_the_tokenizer_is_trained_once_on_the_training_split(tiny_config, tmp_path, monkeypatch):
    run = runs.make_run(
        tiny_config(**{"tokenizer.dir": "", "tokenizer.max_documents": 50}), tmp_path
    )
    texts_read = []
    fit = tokenizer.train

    def spy(texts, *arguments, **options):
        texts_read.extend(texts)
        return fit(texts_read, *arguments, **options)

    monkeypatch.setattr(tokenizer, "train", spy)
    trained = runs.make_tokenizer(run)
    records = sources.tfds_records("wikipedia/20230601.en", "train", run.data.tfds_dir)
    assert texts_read == [records[i]["text"] for i in range(50)]
    assert (trained.vocab_size, trained.num_extra_ids) == (400, 10)
    monkeypatch.setattr(tokenizer, "train", None)
    assert runs.make_tokenizer(run).fingerprint == trained.fingerprint
    # A tokenizer of another config is not used.
    changes = {"tokenizer.dir": "", "tokenizer.num_extra_ids": 9}
    with pytest.raises(ValueError, match="num_extra_ids=9 differs from the 10 of the tokenizer in"):
        runs.make_run(tiny_config(**changes), tmp_path)
    changes = {"tokenizer.dir": "", "tokenizer.character_coverage": 0.99}
    with pytest.raises(ValueError, match="character_coverage=0.99 differs from the 0.9995 of the"):
        runs.make_run(tiny_config(**changes), tmp_path)


def test_training_and_held_out_splits_are_disjoint(tiny_config, tmp_path):
    run = runs.make_run(tiny_config(), tmp_path)
    assert runs.splits(run) == ({"wikipedia": "train"}, {"wikipedia": "validation"})
    for change, sentence in (
        (
            {"data.heldout_split": "validatoin"},
            "'validatoin' is unknown; .* did you mean 'validation'",
        ),
        (
            {"data.heldout_split": "train[:10%]"},
            "'train' and data.heldout_split='train.*' .* share examples",
        ),
        ({"data.train_split": "train+validation"}, "share examples; use disjoint slices"),
        ({"data.heldout_split": "all"}, "share examples"),
        ({"data.heldout_split": ""}, "is unknown"),
    ):
        with pytest.raises(ValueError, match=sentence):
            runs.splits(runs.make_run(tiny_config(**change), tmp_path))
        train_texts, heldout = (
            {records[i]["text"] for i in range(len(records))}
            for records in (
                sources.tfds_records("wikipedia/20230601.en", split, run.data.tfds_dir)
                for split in ("train", "validation")
            )
        )
        assert heldout and train_texts.isdisjoint(heldout)


BYTES = {"tokenizer.kind": "bytes", "tokenizer.vocab_size": 259, "tokenizer.dir": ""}
BYTES |= {"tokenizer.num_extra_ids": 100, "model.vocab_size": 384}


def test_a_byte_tokenizer_needs_no_training(tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**BYTES), tmp_path)
    tokens = runs.make_tokenizer(run)
    assert (tokens.vocab_size, tokens.size, tokens.sentinel(0), tokens.sentinel(99)) == (
        259,
        359,
        259,
        358,
    )
    train, _ = runs.make_examples(run, tokens)
    row = train.batch(np.array([0]), np.array([0]), seed=0)
    inputs, targets = row.inputs[0], row.targets[0]
    text = objectives.uncorrupt(run.objective, inputs, targets, tokens.vocabulary)
    np.testing.assert_array_equal(text, train.splits[0].text(0))
    assert tokens.decode(text).isascii() and np.isin(inputs, tokens.sentinels).sum() > 1


def test_a_byte_tokenizer_has_259_pieces(tiny_config, tmp_path):
    with pytest.raises(
        ValueError, match="tokenizer.vocab_size=300 .* tokenizer.kind='bytes'; use 259"
    ):
        runs.make_run(tiny_config(**BYTES | {"tokenizer.vocab_size": 300}), tmp_path)
