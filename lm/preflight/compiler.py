"""The TPU compiler in a process of its own: what it says of a run's program, as plain numbers.

A child process, because what is compiled for is chosen before jax is imported, because the compiler
talks much to the terminal, and because it may crash. python -m lm.preflight.compiler is the child:
JSON on stdin, JSON on stdout, all talk on stderr.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from lm import exits
from lm.preflight import roofline, slices

LIBRARY = "libtpu.so"
NOWHERE = "workdir-of-preflight"  # a workdir that no run has claimed
TIMEOUT = 3600.0  # seconds
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "Used 20.1G of 15.75G hbm", "the total memory required for HLO temporaries (335.31G) exceeds"
NEEDED = re.compile(r"(?:Used |required [^(]*\()([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of one update on some chips. Bytes are those of one chip.

    chip: may be a dict. fits: None where only a compiler could tell. needed: at the same time, as
    far as is known. sizes: of state, batch and gradients by kind. workspace: what the program takes
    beside its arguments, gradients and activations among it; code: its instructions. model_flops
    and executed_flops: of an update over all chips, the latter with what is computed twice.
    memory_bytes: to and from memory, alone_bytes of it with no matrix product at the same time.
    collectives: sent to other chips by kind. unknown_loops: of a length that is not known, whose
    body counts once. seconds: that compiling took. error: why it does not fit, a sentence.
    """

    target: str
    chip: slices.Chip
    chips: int
    hosts: int
    sizes: dict[str, int]
    model_flops: int
    fits: bool | None = None
    needed: int = 0
    workspace: int = 0
    code: int = 0
    executed_flops: int = 0
    memory_bytes: int = 0
    alone_bytes: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    seconds: float = 0.0
    error: str = ""

    def __post_init__(self):
        if isinstance(self.chip, dict):
            object.__setattr__(self, "chip", slices.Chip(**self.chip))

    @property
    def network_bytes(self) -> int:
        """Bytes that a chip sends to others, of all kinds."""
        return sum(self.collectives.values())

    @property
    def prediction(self) -> roofline.Prediction:
        """The seconds of an update, from what each chip does in it."""
        return roofline.predict(
            self.chip,
            flops=self.executed_flops / self.chips,
            memory_bytes=self.memory_bytes,
            network=self.network_bytes,
            alone=self.alone_bytes,
        )

    @property
    def activations(self) -> int:
        """Bytes of the workspace that are not gradients: activations, and the compiler's own."""
        return max(0, self.workspace - self.sizes["gradients"])


def library() -> pathlib.Path:
    """The TPU compiler: $TPU_LIBRARY_PATH, <environment>/libtpu, or the package libtpu.

    Raises ValueError, with the command that installs it, where there is none.
    """
    places = [pathlib.Path(sys.prefix) / "libtpu/libtpu" / LIBRARY]
    if named := os.environ.get("TPU_LIBRARY_PATH"):
        places = [pathlib.Path(named)]
    elif found := importlib.util.find_spec("libtpu"):
        places += [pathlib.Path(place) / LIBRARY for place in found.submodule_search_locations]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"the TPU compiler is not at {places[0]}; install it with `make tpu-compiler`, or "
        f"`pip install --no-deps --target {sys.prefix}/libtpu '{requirement()}'`."
    )


def requirement() -> str:
    """The libtpu that the installed jax names in its extra tpu, as libtpu==0.0.42.*."""
    lines = importlib.metadata.requires("jax") or []
    return next(line.partition(";")[0].strip() for line in lines if line.startswith("libtpu"))


def compile_for(
    config: dict,
    target: slices.Slice | None,
    workdir: str = NOWHERE,
    *,
    timeout: float = TIMEOUT,
    label: str = "",
) -> Compiled:
    """Compile the update of a config for a slice, or with None for the devices of this machine.

    config: nested, all keys. timeout in seconds. label: what stderr says meanwhile; empty: nothing.
    GPUs by name are not compiled for: what is known from shapes is all.
    Raises ValueError for a config that is wrong, and where no compiler is there or it says nothing.
    What the compiler refuses is no mistake: Compiled.error says it.
    """
    asked = {"config": config, "workdir": str(workdir), "target": target and target.name}
    command = [sys.executable, "-m", "lm.preflight.compiler"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = os.environ | _environment(target)
    with tempfile.TemporaryFile("w+", errors="replace") as talk:
        with subprocess.Popen(command, stderr=talk, **pipes) as child:
            try:
                said = _wait(child, json.dumps(asked), timeout, label)
            finally:
                child.kill()  # after Ctrl-C; one that has ended feels nothing
                child.wait()
        talk.seek(0)
        words = talk.read()
    answers = [json.loads(line) for line in said.splitlines()]
    if answers and "mistake" in answers[-1]:
        raise ValueError(answers[-1]["mistake"])
    if child.returncode == 0:
        return Compiled(**answers[-1])
    ended = f"took more than {timeout:.0f} s and was stopped"
    if child.returncode != -signal.SIGKILL:
        last = " ".join((words.strip().splitlines() or ["nothing"])[-1].split())[:300]
        ended = f"ended with code {child.returncode}; its last words: {last}"
    sentence = f"the compiler for {target.name if target else 'this machine'} {ended}."
    if not answers:
        raise ValueError(sentence)
    return Compiled(**answers[0] | {"fits": False, "error": sentence})


def _environment(target: slices.Slice | None) -> dict[str, str]:
    # What is set before jax is imported.
    if target is None:
        return {}
    words = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}  # it holds none of these
    if target.chip.name in slices.GPUS:
        return words | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={target.chips}"}
    return words | {
        "TPU_LIBRARY_PATH": str(library()),
        "TPU_SKIP_MDS_QUERY": "1",  # this is no TPU VM: ask no metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held, so several may compile
    }


def _wait(child: subprocess.Popen, text: str, timeout: float, label: str) -> str:
    """All that the child says on stdout; it is killed after the timeout."""
    start, given = time.monotonic(), text
    shown = bool(label) and sys.stderr.isatty()
    if label and not shown:
        print(f"{label} ..", file=sys.stderr)
    while True:
        try:
            said = child.communicate(given, timeout=1.0)[0]
            break
        except subprocess.TimeoutExpired:
            past, given = time.monotonic() - start, None
            if shown:
                print(f"\r{label}: {past:.0f} s", end="", file=sys.stderr, flush=True)
            if past > timeout:
                child.kill()
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return said


# The child. --------------------------------------------------------------------------------------


def answers(asked: dict) -> Iterator[Compiled]:
    """What shapes tell, and then, where that fits, what the compiler says. asked: see compile_for.

    Raises ValueError and OSError for what a user can cause.
    """
    from lm import runs, train
    from lm.preflight import program

    run = runs.make_run(asked["config"], asked["workdir"])
    target = asked["target"] and slices.target_named(asked["target"])
    devices, chip = _devices(target)
    prepared = program.prepared(run, devices)
    least = sum(prepared.sizes.values())
    known = Compiled(
        target=target.name if target else f"local ({len(devices)} x {chip.device_kind})",
        chip=chip,
        chips=len(devices),
        hosts=target.hosts if target else len({one.process_index for one in devices}),
        sizes=prepared.sizes,
        model_flops=train.step_flops(run),
        needed=least,
    )
    if least > chip.memory:
        words = f"{least / slices.GIB:.2f} GiB, and a chip has {chip.memory / slices.GIB:.2f} GiB"
        error = f"state, gradients and batch alone take {words}."
        known = dataclasses.replace(known, fits=False, error=error)
    yield known
    if known.fits is None and chip.name not in slices.GPUS:
        yield _compiled(known, prepared.lowered())


def _devices(target: slices.Slice | None) -> tuple[list, slices.Chip]:
    # jax devices of the target, and what one of them can do.
    import jax
    from jax.experimental import topologies

    if target is None:
        return jax.devices(), _here(jax.devices())
    if target.chip.name in slices.GPUS:
        return jax.devices(), target.chip
    options = target.compiler_options
    return list(topologies.get_topology_desc(platform="tpu", **options).devices), target.chip


def _here(devices: list) -> slices.Chip:
    # A device of this machine, as far as it tells: of a CPU its share of the memory.
    from lm import logs

    first = devices[0]
    kinds = [*slices.CHIPS.values(), *slices.GPUS.values()]
    alike = [chip for chip in kinds if chip.device_kind in first.device_kind]
    chip = alike[-1] if alike else slices.Chip("local", first.device_kind, 0.0, 0)
    stats = first.memory_stats() or {}
    memory = stats.get("bytes_limit", chip.memory)
    if first.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    flops = logs.peak_flops(devices) / len(devices)
    return dataclasses.replace(
        chip, name="local", device_kind=first.device_kind, flops=flops, memory=memory
    )


def _compiled(known: Compiled, program) -> Compiled:
    # What the compiler adds to what shapes tell. program: program.Program.
    import jax

    from lm.preflight import flops, hlo

    start, chip = time.monotonic(), known.chip
    platform = "cpu" if chip.device_kind == "cpu" else "tpu" if "TPU" in chip.device_kind else "gpu"
    executed = flops.executed_flops(program.jaxpr, platform)
    known = dataclasses.replace(known, executed_flops=executed)
    try:
        made = program.lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return _refused(known, str(error), time.monotonic() - start)
    used, moved = made.memory_analysis(), hlo.traffic(made.as_text())
    kept = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    needed = kept + used.temp_size_in_bytes + used.generated_code_size_in_bytes
    return dataclasses.replace(
        known,
        fits=needed <= chip.memory,
        needed=needed,
        workspace=used.temp_size_in_bytes,
        code=used.generated_code_size_in_bytes,
        memory_bytes=moved.memory_bytes,
        alone_bytes=moved.alone_bytes,
        collectives=moved.collectives,
        unknown_loops=moved.unknown_loops,
        seconds=time.monotonic() - start,
        error="" if needed <= chip.memory else _excess(needed, chip),
    )


def _refused(known: Compiled, said: str, seconds: float) -> Compiled:
    """What does not fit, with the bytes that the compiler names, or what it does not compile."""
    found = [int(float(number) * UNITS[unit]) for number, unit in NEEDED.findall(said)]
    needed, error = known.needed, f"the compiler refuses it: {' '.join(said.split())[:300]}"
    if "RESOURCE_EXHAUSTED" in said and found:
        needed = max(needed, *found)
        error = _excess(needed, known.chip)
    return dataclasses.replace(known, fits=False, needed=needed, error=error, seconds=seconds)


def _excess(needed: int, chip: slices.Chip) -> str:
    return (
        f"it takes {needed / slices.GIB:.2f} GiB, and a chip has {chip.memory / slices.GIB:.2f} GiB"
    )


def main() -> None:
    """The child: a line of JSON for each of answers, or {"mistake": a sentence}."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libtpu and XLA write there as well
    try:
        for answer in answers(json.load(sys.stdin)):
            print(json.dumps(dataclasses.asdict(answer)), file=out, flush=True)
    except (ValueError, OSError) as error:
        print(json.dumps({"mistake": exits.one_line(error, None)}), file=out, flush=True)


if __name__ == "__main__":
    main()
