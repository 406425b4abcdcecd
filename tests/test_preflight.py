"""Preflight compiles the step that train runs, and reports its memory, time and cost."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from flax import traverse_util

from lm import cli, pipeline, runs, train
from lm.preflight import advice, compiler, program, report, slices

PMAP, MESH = {}, {"parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2}
LAYOUTS = {
    "pmap": PMAP,
    "pmap fixed": {"parallel.deterministic_reduction": True, "parallel.num_microbatches": 1},
    "mesh": MESH,
    "mesh micro-batches": MESH | {"parallel.num_microbatches": 2, "optimizer.ema_decay": 0.9},
}
STUDENT = {"stage": "distill", "model.num_encoder_layers": 1, "model.num_decoder_layers": 1}


def has_compiler() -> bool:
    """Whether the TPU compiler is installed, as make tpu-compiler does it."""
    try:
        return compiler.library().is_file()
    except ValueError:
        return False


tpu = pytest.mark.skipif(not has_compiler(), reason="no TPU compiler; make tpu-compiler")


@pytest.fixture
def run_flags(tiny_config, tmp_path):
    """Returns flags(**changes): the flags of a tiny run, whose workdir does not exist."""

    def flags(**changes) -> list[str]:
        sections = traverse_util.flatten_dict(tiny_config(**changes), sep=".")
        values = {key: value for key, value in sections.items() if value not in (None, ())}
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        return ["--config=configs/base.py", *flags, f"--workdir={tmp_path / 'run'}"]

    return flags


def preflight(*flags: str) -> int:
    return cli.main(["preflight", *flags])


def without_text_bytes(lowered, vocab_size: int) -> str:
    """StableHLO without the constant that requires a tokenizer: the text bytes of each token."""
    constant = rf"dense<[^>]*> : tensor<{vocab_size}xi32>"
    text, count = re.subn(constant, "dense<..>", lowered.as_text())
    assert count
    return text


def lower_in_train(run: runs.Run, init_teacher=None):
    """Lowers the program of train with its own state and first batch."""
    strategy = train.make_strategy(run)
    tokens = runs.make_tokenizer(run)
    setup = train.make_setup(run, strategy, tokens, *runs.make_examples(run, tokens))
    batch = next(iter(pipeline.train_batches(setup.examples, run.seed)))
    state, teacher = strategy.init(setup.init_state, None), None
    if init_teacher is not None:
        teacher = strategy.place_state(strategy.fetch(strategy.init(init_teacher)))
    return setup.train_step.lower(state, strategy.place_batch(batch), teacher)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_program_is_that_of_train_to_the_letter(layout, tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**LAYOUTS[layout]), tmp_path / "run")
    actual = without_text_bytes(program.prepare(run, jax.devices()).lower(), 512)
    assert actual == without_text_bytes(lower_in_train(run), 512)
    assert ("all_reduce" in actual or "collective_permute" in actual) == ("pmap" in layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pmap", "mesh"])
def test_the_program_of_a_student_includes_its_teacher(layout, tiny_config, tmp_path):
    teacher_run = runs.make_run(tiny_config(), tmp_path / "teacher")
    runs.claim(teacher_run, runs.make_tokenizer(teacher_run))
    changes = STUDENT | {"teacher.workdir": str(teacher_run.workdir), "tokenizer.dir": ""}
    run = runs.make_run(tiny_config(**changes, **LAYOUTS[layout]), tmp_path / "run")
    prepared = program.prepare(run, jax.devices())
    init_teacher = lambda: program.make_update(teacher_run).init_state().params
    actual = without_text_bytes(prepared.lower(), 512)
    assert actual == without_text_bytes(lower_in_train(run, init_teacher), 512)
    pretraining = runs.make_run(tiny_config(**LAYOUTS[layout]), tmp_path / "pretraining")
    teacher_sizes = program.prepare(pretraining, jax.devices()).sizes
    assert prepared.sizes["teacher"] == teacher_sizes["params"] > prepared.sizes["params"]


def device_bytes(device, tree) -> int:
    """Bytes of an array tree on one device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize("layout", ["pmap", "mesh micro-batches"])
def test_sizes_are_the_bytes_of_the_arrays_on_a_device(layout, tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**LAYOUTS[layout]), tmp_path / "run")
    prepared = program.prepare(run, jax.devices())
    strategy = prepared.strategy
    state = strategy.init(program.make_update(run).init_state, None)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.batch_shapes(run))
    size = lambda tree: device_bytes(jax.devices()[-1], tree)
    sizes = prepared.sizes
    assert sizes["params"] == sizes["gradients"] == size(state.params) > 0
    assert sizes["optimizer"] == size((state.opt_state, state.step, state.skipped))
    assert sizes["average"] == size(state.average)
    assert sizes["batch"] == size(strategy.place_batch(zeros))
    assert sizes["teacher"] == 0


def test_a_duration_in_epochs_changes_no_shape(tiny_config, tmp_path):
    epochs = {"steps": 0, "duration.epochs": 3.0, "optimizer.warmup.steps": 0}
    epochs["optimizer.warmup.epochs"] = 0.5
    in_steps = runs.make_run(tiny_config(), tmp_path)
    in_epochs = runs.make_run(tiny_config(**epochs), tmp_path)
    assert program.total_updates(in_steps) == 6 and program.total_updates(in_epochs) == 0
    updates = [program.make_update(run) for run in (in_steps, in_epochs)]
    assert updates[0].state_shapes == updates[1].state_shapes


SCRIPT = """
import json, re, sys, jax, numpy as np
from lm import runs
from lm.preflight import program
read_kb = lambda name: int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
run = runs.make_run(json.loads(sys.argv[1]), sys.argv[2])
prepared = program.prepare(run, jax.devices()[:1])
step = prepared.lower().compile()
usage = step.memory_analysis()
state = prepared.strategy.init(program.make_update(run).init_state)
ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), program.batch_shapes(run))
rows = jax.block_until_ready(prepared.strategy.place_batch(ones))
open("/proc/self/clear_refs", "w").write("5")  # reset VmHWM, the peak of resident memory
before = read_kb("VmRSS")
jax.block_until_ready(step(jax.block_until_ready(state), rows, None))
outputs = usage.output_size_in_bytes - usage.alias_size_in_bytes
print(json.dumps([usage.temp_size_in_bytes + outputs, (read_kb("VmHWM") - before) * 1024]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is reset by Linux")
def test_the_compilers_estimate_is_the_peak_memory_of_an_update(tiny_config, tmp_path):
    # On one CPU device: workspace and new outputs, against the growth of resident memory.
    sizes = {"model.d_model": 128, "model.d_ff": 512, "model.head_dim": 32, "parallel.data": 1}
    sizes |= {"data.batch_size": 256, "model.attention.implementation": "einsum"}
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", SCRIPT, json.dumps(tiny_config(**sizes)), str(tmp_path)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    estimate, measured = json.loads(child.stdout)
    assert estimate > 2**28  # much more than the memory of the process itself
    assert 0.85 < measured / estimate < 1.25, (estimate, measured)


def test_local_devices_have_the_same_report_as_one_json_object(run_flags, capsys):
    changes = {"parallel.data": 1, "data.batch_size": 8}
    assert preflight(*run_flags(**changes), "--slice=local", "--json", "--price=2") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["fits"] and summary["advice"] is None
    kinds = dict(summary["memory"])
    needed, _ = kinds.pop("needed"), kinds.pop("chip")
    assert sum(kinds.values()) == needed and min(kinds.values()) >= 0
    assert summary["flops"]["executed"] >= summary["flops"]["model"] > 0
    assert summary["step"]["seconds"] > 0 and summary["step"]["network_seconds"] is None
    run = summary["run"]
    assert run["updates"] == 6 and run["tokens"] == 6 * summary["step"]["tokens"]
    assert run["cost"] == 2 * run["chip_hours"]
    text = report.text(summary)
    assert "fits" in text.splitlines()[0] and "its speed is unknown" in text


def test_absent_gpus_have_a_report_of_state_and_batch(run_flags, capsys):
    assert preflight(*run_flags(), "--slice=h100-8") == 0
    text = capsys.readouterr().out
    assert "8 x H100, 1 host" in text and "parameters" in text
    assert re.search(r"activations and workspace +\? +unknown: not compiled", text)
    assert "at least" in text and "MFU" not in text


@tpu
def test_a_tiny_model_fits_one_v5e_chip_and_the_terminal_stays_quiet(run_flags):
    command = [sys.executable, "-m", "lm", "preflight", *run_flags(), "--slice=v5e-1"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0
    assert child.stderr == "compiling pretrain for v5e-1 ..\n"
    assert child.stdout.startswith("v5e-1: 1 x TPU v5 lite, 1 host; the run fits.")
    for words in ("parameters", "peak", "MFU", "chip-hours", "model FLOPs"):
        assert words in child.stdout
    assert "all-reduce" not in child.stdout


@tpu
@pytest.mark.parametrize("name", ["v5p-16", "v4-16"])
def test_several_hosts_compile_as_one(name, tiny_config):
    # Two hosts of four chips each; sharded, and replicated.
    changes = MESH if name == "v5p-16" else PMAP
    target = slices.parse_slice(name)
    compiled = compiler.compile_for(tiny_config(**changes, **{"data.batch_size": 16}), target)
    assert compiled.fits and not compiled.error and (compiled.chips, compiled.hosts) == (8, 2)
    assert compiled.sizes["params"] <= compiled.peak < target.chip.memory
    kinds = set(compiled.collectives)
    assert "all-reduce" in kinds and ("all-gather" in kinds) == (name == "v5p-16")
    if name == "v4-16":  # every gradient once around the ring, and a few metrics
        ring = 2 * 7 / 8 * compiled.sizes["gradients"]
        assert ring <= compiled.collectives["all-reduce"] <= 1.05 * ring + 4096


@tpu
def test_eleven_billion_parameters_on_one_chip_are_rejected(monkeypatch, capsys):
    monkeypatch.setattr(advice, "advise", functools.partial(advice.advise, max_programs=0))
    config = "--config=configs/pretrain_wikipedia.py:t5_1_1_xxl"
    assert preflight(config, "--slice=v5e-1", "--json") == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["fits"] is False and "15.75 GiB" in summary["error"] and summary["step"] is None
    assert summary["memory"]["params"] == 4 * 11_135_332_352  # as T5 1.1 XXL is published
    assert summary["advice"] == []
    assert any("scan_layers" in hint for hint in summary["hints"])


@tpu
def test_the_advice_for_a_run_that_does_not_fit_fits(run_flags, capsys):
    # 1.3 billion parameters in two layers: with AdamW and gradients more than one chip holds.
    wide = {"model.d_model": 4096, "model.d_ff": 81920, "data.input_length": 16}
    shallow = {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1}
    assert preflight(*run_flags(**wide | shallow), "--slice=v5e-1") == 1
    report, advice = capsys.readouterr().out.split("no change of layout fits on this slice")
    assert "does not fit" in report and "activations and workspace" in report
    (line,) = advice.splitlines()[1:]
    flags = "--slice=v5e-4 --config.parallel.strategy=mesh --config.parallel.fsdp=4"
    assert line.strip().startswith(flags)
    assert " ms at best" in line


def test_a_missing_compiler_is_an_error_with_the_install_command(run_flags, monkeypatch, capsys):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    assert preflight(*run_flags(), "--slice=v5e-1") == 2
    error = capsys.readouterr().err
    assert "is not at /nowhere/libtpu.so" in error and "make tpu-compiler" in error
    assert "libtpu==" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.batch_size": 12}, "data.batch_size=12 does not divide over 8 shards"),
        ({"parallel.data": 9}, "parallel.data=9 is more than the 8 devices"),
        (MESH | {"parallel.tensor": 8, "parallel.fsdp": 1}, "does not divide over tensor=8"),
    ],
)
def test_a_layout_that_does_not_suit_the_devices_is_a_user_error(changes, words, run_flags, capsys):
    assert preflight(*run_flags(**changes), "--slice=h100-8") == 2
    assert words in capsys.readouterr().err


FROM_SHAPES = compiler.Compiled(
    target="v5e-1",
    chip=slices.CHIPS["v5e"],
    chips=1,
    hosts=1,
    sizes={"params": 100, "optimizer": 10, "batch": 1, "gradients": 100},
    model_flops=7,
    peak=211,
)

# Messages of the compiler of libtpu 0.0.42, and the bytes that they name.
REJECTIONS = [
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (335.31G) exceeds available HBM (15.75G).",
        int(335.31 * 2**30),
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        int(20.5 * 2**30),
    ),
]


@pytest.mark.parametrize(("message", "needed"), REJECTIONS)
def test_a_rejection_for_memory_reports_the_required_bytes(message, needed):
    compiled = compiler._rejected(FROM_SHAPES, message, 1.0)
    assert compiled.fits is False and compiled.peak == needed
    assert f"{needed / 2**30:.2f} GiB, and a chip has 15.75" in compiled.error


def test_any_other_rejection_quotes_the_message():
    compiled = compiler._rejected(FROM_SHAPES, "UNIMPLEMENTED: no such\n thing", 1.0)
    assert compiled.fits is False and "rejects it: UNIMPLEMENTED: no such thing" in compiled.error


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Returns replace(script): compile_for runs the shell script instead of the child."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    (tmp_path / "libtpu.so").touch()

    def replace(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!/bin/sh\ncat > {tmp_path}/request\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


def print_result(tmp_path) -> str:
    """Returns a shell command that prints FROM_SHAPES."""
    (tmp_path / "result").write_text(json.dumps(dataclasses.asdict(FROM_SHAPES)) + "\n")
    return f"cat {tmp_path}/result"


def compile_tiny(tiny_config, **options) -> compiler.Compiled:
    return compiler.compile_for(tiny_config(), slices.parse_slice("v5e-1"), **options)


def test_a_crash_keeps_the_result_from_shapes(child, tiny_config, tmp_path):
    child(f"{print_result(tmp_path)}; echo 'chatter' >&2; echo 'F0101 check' >&2; kill -SEGV $$")
    compiled = compile_tiny(tiny_config)
    assert compiled.fits is False and compiled.peak == 211 and compiled.chip == slices.CHIPS["v5e"]
    assert compiled.error.startswith("the compiler for v5e-1 ended with code -11")
    assert "F0101 check" in compiled.error and "chatter" not in compiled.error
    assert json.loads((tmp_path / "request").read_text())["target"] == "v5e-1"


def test_a_child_without_a_result_raises_with_its_last_line(child, tiny_config):
    child("echo 'ImportError: no jax' >&2; exit 1")
    with pytest.raises(ValueError, match="ended with code 1; its last line: ImportError: no jax"):
        compile_tiny(tiny_config)


def test_a_child_that_exceeds_the_timeout_is_stopped(child, tiny_config, tmp_path):
    child(f"{print_result(tmp_path)}; exec sleep 60")
    start = time.monotonic()
    compiled = compile_tiny(tiny_config, timeout=1.0)
    assert "took more than 1 s" in compiled.error and time.monotonic() - start < 20


def test_ctrl_c_stops_the_child(interruptible, child, tiny_config, tmp_path):
    child(f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread, start = threading.Thread(target=interrupt), time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        compile_tiny(tiny_config)
    thread.join()
    assert time.monotonic() - start < 30
    assert not pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_the_report_of_a_run_in_epochs_has_a_step_and_hints(tiny_config, tmp_path):
    epochs = {"steps": 0, "duration.epochs": 3.0, "model.scan_layers": False}
    deep = {"model.num_encoder_layers": 6, "model.num_decoder_layers": 6}
    run = runs.make_run(tiny_config(**epochs, **deep), tmp_path)
    fields = dict(fits=True, executed_flops=197_000, code=5, peak=200)
    summary = report.summarize(run, dataclasses.replace(FROM_SHAPES, **fields), price=1.0)
    assert summary["run"] is None and "its length is in epochs" in report.text(summary)
    scanned, bfloat16 = summary["hints"]
    assert "scan_layers" in scanned and "bfloat16" in bfloat16
    # 197,000 FLOPs at 197 TFLOP/s are a nanosecond.
    assert summary["step"]["seconds"] == pytest.approx(1e-9)
    assert summary["step"]["bound"] == "compute"
