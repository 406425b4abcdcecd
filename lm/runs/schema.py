"""Run: a checked config as frozen dataclasses, and its workdir."""

from __future__ import annotations

import dataclasses
import pathlib
import typing

from lm import (
    checkpoints,
    decoding,
    distill,
    lookup,
    objectives,
    optimizers,
    parallel,
    pipeline,
    steps,
    storage,
    tokenizer,
    transformer,
)
from lm.transformer import lora

STAGES = {"pretrain": "masked language modelling", "finetune": "a task", "distill": "a teacher"}


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When bad updates cause a rollback, and when a hung process exits; see configs/base.py."""

    max_bad_steps: int = 5
    max_rollbacks: int = 3
    spike_threshold: float = 6.0
    hang_timeout_seconds: float = 1800.0

    def __post_init__(self):
        bounds = {"max_bad_steps": (1, None), "max_rollbacks": (0, None)}
        bounds |= {"spike_threshold": (0, None), "hang_timeout_seconds": (0, None)}
        lookup.check_bounds(self, "guard", bounds)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How many held-out examples to measure, and how many of them to decode; 0: all."""

    max_examples: int = 2048
    max_decoded_examples: int = 512

    def __post_init__(self):
        bounds = {"max_examples": (0, None), "max_decoded_examples": (0, None)}
        lookup.check_bounds(self, "evaluate", bounds)


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config and its workdir; keys and units as in configs/base.py.

    config_dict: the config as the plain values of config.json. name: the title of reports, by
    default the stage.
    """

    config_dict: dict = dataclasses.field(repr=False)
    workdir: pathlib.Path
    name: str
    stage: str
    seed: int
    steps: int
    duration: optimizers.DurationConfig
    init_from: str
    log_every_steps: int
    eval_every_steps: int
    early_stopping_patience: int
    model: transformer.ModelConfig
    tokenizer: tokenizer.TokenizerConfig
    data: pipeline.DataConfig
    objective: objectives.ObjectiveConfig
    loss: steps.LossConfig
    lora: transformer.LoraConfig
    optimizer: optimizers.OptimizerConfig
    parallel: parallel.ParallelConfig
    teacher: distill.TeacherConfig
    checkpoint: checkpoints.CheckpointConfig
    guard: GuardConfig
    evaluate: EvaluateConfig
    decoding: decoding.DecodingConfig

    def __post_init__(self):
        lookup.lookup(STAGES, self.stage, "stage")
        bounds = {"steps": (0, None), "seed": (0, None), "early_stopping_patience": (0, None)}
        bounds |= {"log_every_steps": (1, None), "eval_every_steps": (1, None)}
        lookup.check_bounds(self, "", bounds)
        if self.seed >= 1 << 32:
            raise ValueError(f"seed={self.seed} has more than 32 bits; use one below {1 << 32}.")
        if bool(self.steps) == bool(self.duration.units):
            problem = "are both set" if self.steps else "set no length"
            raise ValueError(
                f"steps={self.steps} and duration={self.duration} {problem}; set one of them."
            )

    @property
    def shapes(self) -> dict:
        """The shapes of the trained parameters: the model's and those of LoRA."""
        return lora.shapes(self.lora, transformer.param_shapes(self.model))

    @property
    def trained(self) -> optimizers.OptimizerConfig:
        """The section optimizer, in which parameters frozen by LoRA or distillation are marked."""
        frozen = ""
        if self.stage == "distill":
            frozen = distill.frozen(self.teacher.student_init, self.model)
        frozen = lora.OTHERS if self.lora.rank else frozen
        rules = self.optimizer.learning_rate_multipliers
        rules = ((frozen, None), *rules) if frozen else rules
        return dataclasses.replace(self.optimizer, learning_rate_multipliers=rules)

    @property
    def lengths(self) -> tuple[int, int]:
        """Columns of a batch's inputs and targets, in tokens."""
        return self.data.lengths(self.objective)

    @property
    def shards_dir(self) -> pathlib.Path:
        """The directory of token shards."""
        if self.data.shards_dir:
            return storage.as_path(self.data.shards_dir).expanduser()
        return self.workdir / "shards"


FIELDS = typing.get_type_hints(Run)
SECTIONS = {name: kind for name, kind in FIELDS.items() if dataclasses.is_dataclass(kind)}
KEYS = {name: kind for name, kind in FIELDS.items() if name not in ("config_dict", "workdir")}


def run_length(run: Run, num_examples: int) -> optimizers.RunLength:
    """Return the updates per epoch of `num_examples` examples, and the tokens per update."""
    size = run.data.batch_size
    return optimizers.RunLength(num_examples / size, size * sum(run.lengths))


def total_updates(run: Run, num_examples: int) -> int:
    """Return the number of updates of the whole run, given by `steps` or `duration`."""
    try:
        return run.steps or run.duration.num_updates(run_length(run, num_examples))
    except ValueError as error:
        raise ValueError(f"duration.{error}") from None
