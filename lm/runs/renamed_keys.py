"""Config keys of older versions, and their names now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

RENAMED_KEYS = {
    "every": "log_every_steps, eval_every_steps and checkpoint.every_steps",
    "keep": "checkpoint.max_to_keep",
    "keep_every": "checkpoint.keep_period",
    "keep_best": "checkpoint.best_metric",
    "early_stop": "early_stopping_patience",
    "model.arrangement": "model.architecture",
    "model.shared": "model.shared_params",
    "model.position": "model.position.kind",
    "model.relative_buckets": "model.position.relative_attention_num_buckets",
    "model.relative_limit": "model.position.relative_attention_max_distance",
    "model.rotary_base": "model.position.rotary_base",
    "model.norm": "model.norm.kind",
    "model.norm_placement": "model.norm.placement",
    "model.query_key_norm": "model.attention.query_key_norm",
    "model.attention": "model.attention.implementation",
    "model.attention_scale": "model.attention.scale",
    "model.attention_cap": "model.attention.logits_soft_cap",
    "model.logits_cap": "model.final_logits_soft_cap",
    "model.windows": "model.attention.pattern",
    "model.window": "model.attention.window_size",
    "model.head": "model.lm_head",
    "model.start_id": "model.decoder_start_token_id",
    "model.layers": "model.scan_layers",
    "model.remat": "model.remat_policy",
    "tokenizer.pieces": "tokenizer.vocab_size",
    "tokenizer.num_sentinels": "tokenizer.num_extra_ids",
    "tokenizer.documents": "tokenizer.max_documents",
    "data.tasks": "data.custom_tasks",
    "data.dir": "data.tfds_dir",
    "data.shards": "data.shards_dir",
    "data.train": "data.train_split",
    "data.heldout": "data.heldout_split",
    "data.limit": "data.max_examples_per_task",
    "data.temperature": "data.mixing_temperature",
    "data.workers": "data.num_workers",
    "objective.mean_span": "objective.mean_noise_span_length",
    "loss.smoothing": "loss.label_smoothing",
    "lora.match": "lora.target_pattern",
    "optimizer.peak": "optimizer.learning_rate",
    "optimizer.warmup_duration": "optimizer.warmup",
    "optimizer.cooldown_duration": "optimizer.cooldown",
    "optimizer.final": "optimizer.final_learning_rate_fraction",
    "optimizer.clip_norm": "optimizer.grad_clip_norm",
    "optimizer.decays": "optimizer.weight_decay_multipliers",
    "optimizer.rates": "optimizer.learning_rate_multipliers",
    "optimizer.average": "optimizer.ema_decay",
    "parallel.micro_batches": "parallel.num_microbatches",
    "parallel.reduction": "parallel.deterministic_reduction",
    "parallel.shards": "parallel.reduction_shards",
    "teacher.init": "teacher.student_init",
    "teacher.loss.relations.of": "teacher.loss.relations.vectors",
    "guard.patience": "guard.max_bad_steps",
    "guard.rollbacks": "guard.max_rollbacks",
    "guard.spike": "guard.spike_threshold",
    "guard.hang": "guard.hang_timeout_seconds",
    "evaluate.examples": "evaluate.max_examples",
    "evaluate.decode": "evaluate.max_decoded_examples",
    "evaluate.decoding": "decoding",
}
# Names of old leaves that are sections now: a mapping there is not an old value.
SECTIONS_NOW = {"model.position", "model.norm", "model.attention"}


def dotted_items(config: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of every section and leaf."""
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")


def check_renamed(config: Mapping) -> None:
    """Raise ValueError, with the new name, for the first key of an older version."""
    for key, value in dotted_items(config):
        is_section = key in SECTIONS_NOW and isinstance(value, Mapping)
        if key in RENAMED_KEYS and not is_section:
            raise ValueError(
                f"the config has the old key {key}, which is now {RENAMED_KEYS[key]}; rename it, "
                f"or continue the run with the version of this package that started it."
            )
