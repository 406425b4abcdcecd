"""The data of a run: tokenizer, examples, and the teacher cache if it has one."""

from __future__ import annotations

import jax

from lm import distill, inference, parallel, pipeline, runs, tokenizer

LABELS = {"order": "order of data", "vocabulary": "model"}  # keys of the identity, for messages


def prepare_data(
    run: runs.Run,
) -> tuple[tokenizer.Tokenizer, pipeline.Examples, pipeline.Examples]:
    """(tokens, training examples, held-out examples); host 0 writes missing files, others wait."""

    def prepare():
        tokens = runs.make_tokenizer(run)
        return tokens, *runs.make_examples(run, tokens)

    data = None if jax.process_index() else prepare()
    parallel.barrier("tokenizer and examples")
    return data or prepare()


def cache_identity(
    run: runs.Run, tokens: tokenizer.Tokenizer, examples: pipeline.Examples, k: int, dtype: str
) -> dict:
    """All that decides the contents of a cache of this run's teacher, as JSON values.

    Reads the checksums of the teacher's checkpoint, no parameters.
    """
    workdir, which = runs.teacher_source(run)
    with inference.open_checkpoints(runs.read_run(workdir), read_only=True) as saved:
        update, parameters = saved.fingerprint(which)
    return {
        "teacher": {"update": update, "parameters": parameters, "dtype": run.teacher.dtype},
        "tokenizer": tokens.fingerprint,
        "order": pipeline.data_order_spec(examples, run.seed),
        "k": k,
        "dtype": dtype,
        "vocabulary": run.model.vocab_size,
        "temperature": distill.shared_temperature(run.teacher.terms),
    }


def find_teacher_cache(
    run: runs.Run, tokens: tokenizer.Tokenizer, examples: pipeline.Examples
) -> pipeline.TeacherCache:
    """Open teacher.cache. examples: of the run's training split.

    Raises ValueError if it is of another teacher, tokenizer, order of data or temperature, or has
    fewer updates than the run.
    """
    cache = pipeline.open_teacher_cache(run.teacher.cache)
    k, dtype = cache.identity["k"], cache.identity["dtype"]
    changes = runs.differences(cache_identity(run, tokens, examples, k, dtype), cache.identity)
    if changes:
        key = changes[0].split()[0].split(".")[0]
        raise ValueError(
            f"teacher.cache={run.teacher.cache} was written for another {LABELS.get(key, key)}: "
            f"{', '.join(changes)}; write one for this config with `python -m lm teacher-cache`, "
            f"or leave teacher.cache empty."
        )
    total = runs.total_updates(run, len(examples))
    if cache.num_updates < total:
        raise ValueError(
            f"teacher.cache={run.teacher.cache} has {cache.num_updates} updates, and the run "
            f"{total}; extend it: python -m lm teacher-cache, as before, with --updates={total}."
        )
    return cache
