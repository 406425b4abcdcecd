"""Which numbers does this code produce? A refactoring must print the same digests.

python -m experiments.fingerprints --out=runs/fingerprints
python -m experiments.fingerprints --out=runs/fingerprints --against=before.json

Runs the commands on synthetic text: a corpus is built, four runs train (pre-training, pre-training
on a mesh of 8 devices with micro-batches, fine-tuning, distillation from a cached teacher), a run
answers 50 inputs by greedy and beam search, and is exported. Prints JSON: sha256 digests of the
corpus, of every logged loss, of the answers and of the exported files. Exit code 1 where they
differ from --against. Bits depend on processor and versions: compare on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {
    "model.vocab_size": 512,
    "model.d_model": 16,
    "model.d_ff": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 4,
    "model.num_encoder_layers": 2,
    "model.num_decoder_layers": 2,
}
LENGTHS = {"data.input_length": 48, "data.target_length": 24, "data.batch_size": 8}
MESH = {"parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2}
MESH |= {"parallel.num_microbatches": 2, "model.scan_layers": True, "data.batch_size": 16}
TASK = """from configs import finetune


def get_config(preset: str = "tiny"):
    config = finetune.get_config(preset)
    task = dict(source="{folder}/{{split}}.tsv", inputs="say: {{en}}", targets="{{de}}")
    config.data.custom_tasks = dict(en_de=task)
    config.data.task = "en_de"
    return config
"""


def write_texts(folder: pathlib.Path) -> None:
    """Writes documents, pairs and inputs of synthetic words; the same at every call."""
    spelling, rng = random.Random(0), random.Random(1)
    words = ["".join(spelling.choices("aeiouklmnrst", k=2 + i // 20)) for i in range(120)]
    weights = [1 / (1 + i) for i in range(len(words))]
    text = lambda: " ".join(rng.choices(words, weights, k=rng.randint(30, 90))).capitalize() + "."
    documents = [json.dumps({"text": text()}) for _ in range(300)]
    inputs = [text() for _ in range(200)]
    pairs = [f"{line}\t{' '.join(line.split()[: 3 + i % 9])}" for i, line in enumerate(inputs)]
    folder.mkdir(parents=True)
    for name, lines in (
        ("documents.jsonl", documents),
        ("train.tsv", ["en\tde", *pairs[:150]]),
        ("validation.tsv", ["en\tde", *pairs[150:]]),
        ("inputs.txt", inputs[:50]),
    ):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))


def run_command(*arguments: object, devices: int = 1) -> None:
    """Runs `python -m lm` on `devices` CPU devices. Raises SystemExit with its error output."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "32"}
    environment = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lm", *map(str, arguments)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{process.stderr}")


def config_flags(steps: int, *sections: dict) -> list[str]:
    """Flags for dotted keys, with intervals that suit the number of updates."""
    keys = {"steps": steps, "log_every_steps": 1, "optimizer.warmup.steps": 2}
    keys |= {"eval_every_steps": steps // 2, "checkpoint.every_steps": steps // 2}
    keys |= {"evaluate.max_examples": 20, "evaluate.max_decoded_examples": 16}
    for section in sections:
        keys |= section
    return [f"--config.{key}={value}" for key, value in keys.items()]


def digests_of(folder: pathlib.Path, label: str, suffixes: tuple[str, ...] = ()) -> dict[str, str]:
    """The sha256 of every file below a folder, except files with one of the suffixes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in suffixes]
    return {
        f"{label}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def losses_of(workdir: pathlib.Path) -> dict[str, str]:
    """A digest of every loss and gradient norm that a run logged."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("split", "step", "loss", "nats", "gradient_norm")
    numbers = json.dumps([[row.get(name) for name in names] for row in rows])
    return {f"losses/{workdir.name}": hashlib.sha256(numbers.encode()).hexdigest()}


def fingerprints(out: pathlib.Path, steps: int) -> dict[str, str]:
    """Runs everything in the empty folder `out`, `steps` updates per run; returns the digests."""
    write_texts(out / "texts")
    corpus, task = out / "corpus", out / "task.py"
    task.write_text(TASK.format(folder=out / "texts"))
    flags = ("--vocab_size=400", "--heldout_fraction=0.1", "--workers=1", "--shards=2")
    run_command("corpus", f"--source={out}/texts/documents.jsonl", f"--out={corpus}", *flags)
    digests = digests_of(corpus, "corpus", (".json", ".jsonl"))

    def train(name: str, config: object, *sections: dict, devices: int = 1) -> None:
        flags = config_flags(steps, *sections)
        workdir = out / name
        run_command("train", f"--config={config}", *flags, f"--workdir={workdir}", devices=devices)
        digests.update(losses_of(workdir))

    text = SIZES | LENGTHS | {"data.task": corpus}
    train("pretrain", "configs/pretrain.py:tiny", text)
    train("mesh", "configs/pretrain.py:tiny", text, MESH, devices=8)
    train("finetune", f"{task}:{out}/pretrain", LENGTHS, {"data.input_length": 64})
    distill = f"configs/distill.py:{out}/finetune"
    student = {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1, "data.batch_size": 8}
    cache = out / "cache"
    flags = config_flags(steps, student)
    run_command("teacher-cache", f"--config={distill}", *flags, f"--out={cache}", "--k=8")
    train("distill", distill, student, {"teacher.cache": cache})
    for method in ("greedy", "beam num_beams=4"):
        answers = out / "answers" / f"{method.split()[0]}.jsonl"
        answers.parent.mkdir(exist_ok=True)
        flags = (f"--input={out}/texts/inputs.txt", f"--decoding={method}", f"--out={answers}")
        run_command("predict", f"--workdir={out}/finetune", *flags)
    run_command("export", f"--workdir={out}/finetune", out / "export")
    return digests | digests_of(out / "answers", "answers") | digests_of(out / "export", "export")


def main(arguments: list[str] | None = None) -> int:
    """Prints the digests as JSON, or compares them with a file; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/fingerprints", help="folder; emptied first")
    parser.add_argument("--steps", type=int, default=40, help="updates of each run")
    parser.add_argument("--against", default="", help="JSON of another commit, same machine")
    flags = parser.parse_args(arguments)
    out = pathlib.Path(flags.out).resolve()
    if out.exists() and any(out.iterdir()) and not (out / "texts").is_dir():
        parser.error(f"--out={out} holds something else; name a new folder")
    shutil.rmtree(out, ignore_errors=True)
    digests = fingerprints(out, flags.steps)
    print(json.dumps(digests, indent=1))
    if not flags.against:
        return 0
    reference = json.loads(pathlib.Path(flags.against).read_text())
    changed = sorted(
        name for name in digests.keys() | reference if digests.get(name) != reference.get(name)
    )
    print(f"{len(changed)} of {len(digests)} differ: {', '.join(changed)}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
