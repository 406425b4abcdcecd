"""Law of flipped bits: no crash, and no undetected change of checksummed data."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from experiments import flips, parity
from lm import cli, logs, transformer
from lm.interop import transformers, vocabulary

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 56
WORDS = dict(vocab_size=512, d_model=8, d_ff=12, num_heads=2, num_kv_heads=2, head_dim=4)
WORDS |= dict(num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokens):
    """A checkpoint of transformers, the run imported from it, and rows of a log."""
    folder = tmp_path_factory.mktemp("flips")
    config = transformer.ModelConfig.from_flat(WORDS)
    transformers.write(parity.random_params(config), config, folder / "foreign")
    vocabulary.write(tiny_tokens.directory, folder / "foreign")
    command = ["import", str(folder / "foreign"), f"--workdir={folder / 'run'}"]
    assert cli.main(command) == 0
    logs.write_manifest(folder / "run", {"stage": "finetune", "params": 1})
    rows = [{"step": step, "split": "train", "loss": 5 / step} for step in range(1, 20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "run" / logs.METRICS).write_text(lines)
    return folder


def test_a_flipped_bit_is_an_error_or_harmless(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    command = [sys.executable, "-m", "experiments.flips", str(tmp_path / "copy"), str(COUNT), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop("broken") == []
    assert outcomes.keys() == flips.READERS.keys()
    assert sum(sum(counts.values()) for counts in outcomes.values()) == COUNT
    for name in ("facts", "tokenizer.model"):
        assert outcomes[name] == {"said": COUNT // len(outcomes)}
    assert outcomes["safetensors"].get("changed", 0)  # the control: flips reach the data
