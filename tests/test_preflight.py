"""Laws of preflight: it compiles the step that train runs, and reports what that takes."""

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

from lm import cli, pipeline, runs, train
from lm.preflight import advice, compiler, program, report, slices
from tests import test_cli

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
def asked(tiny_config, tmp_path):
    """(**changes) -> the flags of a tiny run, of a workdir that is not there yet."""

    def flags(**changes) -> list[str]:
        flags = test_cli.flat(tiny_config(**changes))
        given = [flag for flag in flags if not flag.endswith("=None")]  # keys left at None
        return ["--config=configs/base.py", *given, f"--workdir={tmp_path / 'run'}"]

    return flags


def preflight(*flags: str) -> int:
    return cli.main(["preflight", *flags])


def without_text_bytes(lowered, vocab: int) -> str:
    """StableHLO without the one constant that only a tokenizer knows: its pieces' bytes."""
    text, found = re.subn(rf"dense<[^>]*> : tensor<{vocab}xi32>", "dense<..>", lowered.as_text())
    assert found
    return text


def trained_program(run: runs.Run, teacher=None):
    """What train lowers, of its own state and first batch."""
    strategy = train.make_strategy(run)
    tokens = runs.make_tokenizer(run)
    setup = train.make_setup(run, strategy, tokens, *runs.make_examples(run, tokens))
    first = next(iter(pipeline.train_batches(setup.examples, run.seed)))
    state = strategy.init(setup.init_state, None)
    if teacher is not None:
        teacher = strategy.place_state(strategy.fetch(strategy.init(teacher)))
    return setup.train_step.lower(state, strategy.place_batch(first), teacher)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_program_is_that_of_train_to_the_letter(layout, tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**LAYOUTS[layout]), tmp_path / "run")
    ours = program.prepare(run, jax.devices()).lower()
    texts = [without_text_bytes(one, 512) for one in (ours, trained_program(run))]
    assert texts[0] == texts[1]
    assert ("all_reduce" in texts[0] or "collective_permute" in texts[0]) == ("pmap" in layout)


@pytest.mark.parametrize("layout", ["pmap", "mesh"])
def test_a_students_program_holds_its_teacher(layout, tiny_config, tmp_path):
    theirs = runs.make_run(tiny_config(), tmp_path / "teacher")
    runs.claim(theirs, runs.make_tokenizer(theirs))
    words = STUDENT | {"teacher.workdir": str(theirs.workdir), "tokenizer.dir": ""}
    run = runs.make_run(tiny_config(**words, **LAYOUTS[layout]), tmp_path / "run")
    prepared = program.prepare(run, jax.devices())
    make = lambda: program.make_update(theirs).init_state().params
    ours = without_text_bytes(prepared.lower(), 512)
    assert ours == without_text_bytes(trained_program(run, make), 512)
    whole = program.prepare(
        runs.make_run(tiny_config(**LAYOUTS[layout]), tmp_path / "other"), jax.devices()
    )
    assert prepared.sizes["teacher"] == whole.sizes["params"] > prepared.sizes["params"]


def held_by(device, tree) -> int:
    """Bytes of a placed tree on one device."""
    leaves = jax.tree.leaves(tree)
    parts = [part for leaf in leaves for part in leaf.addressable_shards if part.device == device]
    return sum(part.data.nbytes for part in parts)


@pytest.mark.parametrize("layout", ["pmap", "mesh micro-batches"])
def test_sizes_are_what_a_device_really_holds(layout, tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**LAYOUTS[layout]), tmp_path / "run")
    prepared = program.prepare(run, jax.devices())
    strategy, made = prepared.strategy, program.make_update(run)
    state = strategy.init(made.init_state, None)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.batch_shapes(run))
    held = lambda tree: held_by(jax.devices()[-1], tree)
    sizes = prepared.sizes
    assert sizes["params"] == sizes["gradients"] == held(state.params) > 0
    assert sizes["optimizer"] == held((state.opt_state, state.step, state.skipped))
    assert sizes["average"] == held(state.average)
    assert sizes["batch"] == held(strategy.place_batch(zeros))
    assert sizes["teacher"] == 0


def test_what_the_data_decide_changes_no_shape(tiny_config, tmp_path):
    epochs = {"steps": 0, "duration.epochs": 3.0, "optimizer.warmup.steps": 0}
    epochs["optimizer.warmup.epochs"] = 0.5
    counted = runs.make_run(tiny_config(), tmp_path)
    endless = runs.make_run(tiny_config(**epochs), tmp_path)
    assert program.total_updates(counted) == 6 and program.total_updates(endless) == 0
    assert program.make_update(counted).state_shapes == program.make_update(endless).state_shapes


WORDS = """
import json, re, sys, jax, numpy as np
from lm import runs
from lm.preflight import program
figure = lambda name: int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
run = runs.make_run(json.loads(sys.argv[1]), sys.argv[2])
prepared = program.prepare(run, jax.devices()[:1])
step = prepared.lower().compile()
said = step.memory_analysis()
state = prepared.strategy.init(program.make_update(run).init_state)
ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), program.batch_shapes(run))
rows = jax.block_until_ready(prepared.strategy.place_batch(ones))
open("/proc/self/clear_refs", "w").write("5")  # from here on VmHWM is the peak of what follows
before = figure("VmRSS")
jax.block_until_ready(step(jax.block_until_ready(state), rows, None))
fresh = said.output_size_in_bytes - said.alias_size_in_bytes
print(json.dumps([said.temp_size_in_bytes + fresh, (figure("VmHWM") - before) * 1024]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is reset by Linux")
def test_the_compilers_estimate_is_the_memory_that_an_update_takes(tiny_config, tmp_path):
    # On a CPU, of one device: workspace and new outputs, against the growth of resident memory.
    sizes = {"model.d_model": 128, "model.d_ff": 512, "model.head_dim": 32, "parallel.data": 1}
    config = tiny_config(
        **sizes, **{"data.batch_size": 256, "model.attention.implementation": "einsum"}
    )
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", WORDS, json.dumps(config), str(tmp_path)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    estimate, measured = json.loads(said.stdout)
    assert estimate > 2**28  # so much that the process's own needs are small beside it
    assert 0.85 < measured / estimate < 1.25, (estimate, measured)


def test_local_devices_have_the_same_report_as_one_json_object(asked, capsys):
    changes = {"parallel.data": 1, "data.batch_size": 8}
    assert preflight(*asked(**changes), "--slice=local", "--json", "--price=2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["advice"] is None
    kinds = dict(found["memory"])
    needed, _ = kinds.pop("needed"), kinds.pop("chip")
    assert sum(kinds.values()) == needed and min(kinds.values()) >= 0
    assert found["flops"]["executed"] >= found["flops"]["model"] > 0
    assert found["step"]["seconds"] > 0 and found["step"]["network_seconds"] is None
    whole = found["run"]
    assert whole["updates"] == 6 and whole["tokens"] == 6 * found["step"]["tokens"]
    assert whole["cost"] == 2 * whole["chip_hours"]
    text = report.text(found)
    assert "fits" in text.splitlines()[0] and "its speed is unknown" in text


def test_of_gpus_that_are_not_here_state_and_batch_are_known(asked, capsys):
    assert preflight(*asked(), "--slice=h100-8") == 0
    said = capsys.readouterr().out
    assert "8 x H100, 1 host" in said and "parameters" in said
    assert re.search(r"activations and workspace +\? +unknown: not compiled", said)
    assert "at least" in said and "MFU" not in said


@tpu
def test_a_tiny_model_fits_one_v5e_chip_and_the_terminal_stays_quiet(asked):
    command = [sys.executable, "-m", "lm", "preflight", *asked(), "--slice=v5e-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "compiling pretrain for v5e-1 ..\n"
    assert done.stdout.startswith("v5e-1: 1 x TPU v5 lite, 1 host; the run fits.")
    for words in ("parameters", "peak", "MFU", "chip-hours", "model FLOPs"):
        assert words in done.stdout
    assert "all-reduce" not in done.stdout


@tpu
@pytest.mark.parametrize("name", ["v5p-16", "v4-16"])
def test_several_hosts_compile_as_one(name, tiny_config):
    # Two hosts of four chips each; sharded, and replicated.
    words = MESH if name == "v5p-16" else PMAP
    target = slices.parse_slice(name)
    compiled = compiler.compile_for(tiny_config(**words, **{"data.batch_size": 16}), target)
    assert compiled.fits and not compiled.error and (compiled.chips, compiled.hosts) == (8, 2)
    assert compiled.sizes["params"] <= compiled.peak < target.chip.memory
    sent = set(compiled.collectives)
    assert "all-reduce" in sent and ("all-gather" in sent) == (name == "v5p-16")
    if name == "v4-16":  # every gradient, once around the ring, and some sums
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
def test_what_is_advised_instead_is_compiled_and_fits(asked, capsys):
    # 1.3 billion parameters in two layers: with AdamW and gradients more than one chip holds.
    wide = {"model.d_model": 4096, "model.d_ff": 81920, "data.input_length": 16}
    shallow = {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1}
    assert preflight(*asked(**wide | shallow), "--slice=v5e-1") == 1
    report, advice = capsys.readouterr().out.split("no change of layout is enough on this slice")
    assert "does not fit" in report and "activations and workspace" in report
    (line,) = advice.splitlines()[1:]
    flags = "--slice=v5e-4 --config.parallel.strategy=mesh --config.parallel.fsdp=4"
    assert line.strip().startswith(flags)
    assert " ms at best" in line


def test_without_the_compiler_the_sentence_has_the_command(asked, monkeypatch, capsys):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    assert preflight(*asked(), "--slice=v5e-1") == 2
    said = capsys.readouterr().err
    assert "is not at /nowhere/libtpu.so" in said and "make tpu-compiler" in said
    assert "libtpu==" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.batch_size": 12}, "data.batch_size=12 does not divide over 8 shards"),
        ({"parallel.data": 9}, "parallel.data=9 is more than the 8 devices"),
        (MESH | {"parallel.tensor": 8, "parallel.fsdp": 1}, "does not divide over tensor=8"),
    ],
)
def test_a_layout_that_the_devices_cannot_have_is_a_mistake(changes, words, asked, capsys):
    assert preflight(*asked(**changes), "--slice=h100-8") == 2
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

# As the compiler of libtpu 0.0.42 words them.
REFUSALS = [
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


@pytest.mark.parametrize(("said", "needed"), REFUSALS)
def test_a_refusal_for_memory_tells_how_much_it_takes(said, needed):
    made = compiler._rejected(FROM_SHAPES, said, 1.0)
    assert made.fits is False and made.peak == needed
    assert f"{needed / 2**30:.2f} GiB, and a chip has 15.75" in made.error


def test_any_other_refusal_is_told_in_its_own_words():
    made = compiler._rejected(FROM_SHAPES, "UNIMPLEMENTED: no such\n thing", 1.0)
    assert made.fits is False and "rejects it: UNIMPLEMENTED: no such thing" in made.error


@pytest.fixture
def child(monkeypatch, tmp_path):
    """(script) -> compile_for runs this shell script in place of the child."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    (tmp_path / "libtpu.so").touch()

    def run_instead(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!/bin/sh\ncat > {tmp_path}/given\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return run_instead


def answer(tmp_path, **changes) -> str:
    """A shell command that says what shapes told."""
    text = json.dumps(dataclasses.asdict(dataclasses.replace(FROM_SHAPES, **changes)))
    (tmp_path / "answer").write_text(text + "\n")
    return f"cat {tmp_path}/answer"


def compile_tiny(tiny_config, **options) -> compiler.Compiled:
    return compiler.compile_for(tiny_config(), slices.parse_slice("v5e-1"), **options)


def test_a_crash_keeps_what_shapes_told(child, tiny_config, tmp_path):
    child(f"{answer(tmp_path)}; echo 'chatter' >&2; echo 'F0101 check failed' >&2; kill -SEGV $$")
    made = compile_tiny(tiny_config)
    assert made.fits is False and made.peak == 211 and made.chip == slices.CHIPS["v5e"]
    assert made.error.startswith("the compiler for v5e-1 ended with code -11")
    assert "F0101 check failed" in made.error and "chatter" not in made.error
    assert json.loads((tmp_path / "given").read_text())["target"] == "v5e-1"


def test_a_child_that_says_nothing_is_a_mistake_with_its_last_words(child, tiny_config):
    child("echo 'ImportError: no jax' >&2; exit 1")
    with pytest.raises(
        ValueError, match="ended with code 1; the last line of its output: ImportError: no jax"
    ):
        compile_tiny(tiny_config)


def test_one_that_takes_too_long_is_stopped(child, tiny_config, tmp_path):
    child(f"{answer(tmp_path)}; exec sleep 60")
    start = time.monotonic()
    made = compile_tiny(tiny_config, timeout=1.0)
    assert "took more than 1 s" in made.error and time.monotonic() - start < 20


def test_ctrl_c_leaves_no_compiler_behind(interruptible, child, tiny_config, tmp_path):
    child(f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def press():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread, start = threading.Thread(target=press), time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        compile_tiny(tiny_config)
    thread.join()
    assert time.monotonic() - start < 30
    assert not pathlib.Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_the_report_states_what_is_unknown(tiny_config, tmp_path):
    epochs = {"steps": 0, "duration.epochs": 3.0, "model.scan_layers": False}
    deep = {"model.num_encoder_layers": 6, "model.num_decoder_layers": 6}
    run = runs.make_run(tiny_config(**epochs, **deep), tmp_path)
    program = dict(fits=True, executed_flops=197_000, code=5, peak=200)
    summary = report.summarize(run, dataclasses.replace(FROM_SHAPES, **program), price=1.0)
    assert summary["run"] is None and "counted in the data" in report.text(summary)
    scanned, bfloat16 = summary["hints"]
    assert "scan_layers" in scanned and "bfloat16" in bfloat16
    # 197,000 FLOPs at 197 TFLOP/s are a nanosecond.
    assert summary["step"]["seconds"] == pytest.approx(1e-9)
    assert summary["step"]["bound"] == "compute"
