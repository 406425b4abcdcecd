"""A config as a record: its sections and keys, lengths and places."""

from __future__ import annotations

import dataclasses
import pathlib

from lm import distill, objectives, optimizers, parallel, pipeline, steps, storage, transformer
from lm.transformer import lora

SECTIONS = {
    "model": transformer.ModelConfig,
    "data": pipeline.DataConfig,
    "objective": objectives.ObjectiveConfig,
    "loss": steps.LossConfig,
    "lora": transformer.LoraConfig,
    "optimizer": optimizers.OptimizerConfig,
    "parallel": parallel.ParallelConfig,
}
PLAIN_SECTIONS = {
    "tokenizer": (
        *("dir", "kind", "vocab_size", "num_extra_ids"),
        *("normalization", "character_coverage", "max_documents"),
    ),
    "teacher": ("workdir", "student_init", "loss", "dtype", "cache", "on_policy"),
    "checkpoint": ("every_steps", "max_to_keep", "keep_period", "best_metric"),
    "evaluate": ("max_examples", "max_decoded_examples", "decoding"),
    "guard": ("max_bad_steps", "max_rollbacks", "spike_threshold", "hang_timeout_seconds"),
}
PLAIN_KEYS = ("name", "stage", "seed", "steps", "duration", "init_from")
PLAIN_KEYS += ("log_every_steps", "eval_every_steps", "early_stopping_patience")


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config, as plain values in `config` and as frozen dataclasses by section."""

    config: dict
    workdir: pathlib.Path
    model: transformer.ModelConfig
    data: pipeline.DataConfig
    objective: objectives.ObjectiveConfig
    loss: steps.LossConfig
    lora: transformer.LoraConfig
    optimizer: optimizers.OptimizerConfig
    parallel: parallel.ParallelConfig

    @property
    def name(self) -> str:
        """The run's role: config.name, or else its stage."""
        return self.config["name"] or self.config["stage"]

    def place(self, key: str, default: str) -> pathlib.Path:
        """The directory that config key "section.key" names, or workdir/default."""
        section, leaf = key.split(".")
        named = self.config[section][leaf]
        return storage.as_path(named).expanduser() if named else self.workdir / default

    @property
    def shapes(self) -> dict:
        """The parameters that training holds, as shapes: the model's, and those of LoRA."""
        return lora.shapes(self.lora, transformer.param_shapes(self.model))

    @property
    def trained(self) -> optimizers.OptimizerConfig:
        """The optimizer's section; with LoRA it leaves all but the adapters as they are, and a
        shared encoder is the teacher's.
        """
        teacher, stays = self.config["teacher"], ""
        if self.config["stage"] == "distill":
            stays = distill.frozen(teacher["init"], self.model)
        stays = lora.OTHERS if self.lora.rank else stays
        rates = (
            f"{stays}=none {self.optimizer.learning_rate_multipliers}"
            if stays
            else self.optimizer.learning_rate_multipliers
        )
        return dataclasses.replace(self.optimizer, learning_rate_multipliers=rates)

    @property
    def lengths(self) -> tuple[int, int]:
        """Columns of a batch's inputs and targets, in tokens."""
        return self.data.lengths(self.objective)


def pace(run: Run, examples: int) -> optimizers.RunLength:
    """How fast the run reads so many training examples, for durations in epochs and tokens."""
    size = run.data.batch_size
    return optimizers.RunLength(examples / size, size * sum(run.lengths))


def total_updates(run: Run, examples: int) -> int:
    """Updates of the whole run: steps, or as many as its duration of so many examples takes."""
    steps, duration = run.config["steps"], run.config["duration"]
    try:
        return steps or optimizers.num_updates(duration, 0, pace(run, examples))
    except ValueError as error:
        raise ValueError(f"duration={error}") from None
