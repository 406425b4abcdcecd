"""Compile a run's training step for chips that this machine lacks, in a child process.

The platform must be chosen before jax is imported, and the TPU compiler writes to the terminal and
may crash: so a child process compiles (python -m lm.preflight.compiler: a JSON request on stdin,
JSON results on stdout, all other output on stderr), and the parent imports no jax.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from lm import exits
from lm.preflight import slices

NO_WORKDIR = "workdir-of-preflight"  # a workdir that no run has claimed
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "Used 20.1G of 15.75G hbm", "the total memory required for HLO temporaries (335.31G) exceeds"
REQUIRED = re.compile(r"(?:Used |required [^(]*\()([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One update of a run, compiled for some chips. Bytes are per chip.

    fits: None if only a compiler could tell and none was used. peak: bytes in use at the same time,
    a lower bound unless compiled. sizes: bytes of state, batch and gradients by kind. workspace:
    temporary buffers (activations and gradients). code: instructions. model_flops, executed_flops:
    of an update over all chips, without and with recomputation. collectives: bytes sent to other
    chips by kind. unknown_loops: loops of unknown trip count, whose bodies count once. seconds: of
    compilation. error: why it does not fit.
    """

    target: str
    chip: slices.Chip
    chips: int
    hosts: int
    sizes: dict[str, int]
    model_flops: int
    fits: bool | None = None
    peak: int = 0
    workspace: int = 0
    code: int = 0
    executed_flops: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def has_program(self) -> bool:
        """Whether the compiler produced a program."""
        return self.workspace + self.code > 0


def library() -> pathlib.Path:
    """Finds the TPU compiler: $TPU_LIBRARY_PATH, <environment>/libtpu, or the package libtpu.

    Raises: ValueError if it is not installed, with the command that installs it.
    """
    folders = [pathlib.Path(sys.prefix) / "libtpu/libtpu"]
    if spec := importlib.util.find_spec("libtpu"):
        folders += map(pathlib.Path, spec.submodule_search_locations)
    paths = [folder / "libtpu.so" for folder in folders]
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        paths = [pathlib.Path(path)]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(
        f"the TPU compiler is not at {paths[0]}; install it with `make tpu-compiler`, or "
        f"`pip install --no-deps --target {sys.prefix}/libtpu '{requirement()}'`."
    )


def requirement() -> str:
    """Returns the libtpu version that the installed jax requires, as libtpu==0.0.42.*."""
    lines = importlib.metadata.requires("jax") or []
    return next(line.partition(";")[0].strip() for line in lines if line.startswith("libtpu"))


def compile_for(
    config: dict[str, Any],
    target: slices.Slice | None,
    workdir: str = NO_WORKDIR,
    *,
    timeout: float = 3600.0,
    label: str = "",
) -> Compiled:
    """Compiles the update of a config for a slice, or with None for this machine's devices.

    Args:
      config: nested, with all keys.
      target: GPUs get a result from shapes only, without compilation.
      timeout: seconds.
      label: progress message on stderr; empty: none.

    Raises:
      ValueError: the config is wrong, the compiler is not installed, or the child failed before
        its first result. A program that the compiler rejects is a result with fits=False and an
        error.
    """
    request = {"config": config, "workdir": str(workdir), "target": target and target.name}
    command = [sys.executable, "-m", "lm.preflight.compiler"]
    options = {"env": os.environ | _environment(target), "text": True, "errors": "replace"}
    options |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    if label:
        print(f"{label} ..", file=sys.stderr)
    with subprocess.Popen(command, **options) as child:
        try:
            output, log = child.communicate(json.dumps(request), timeout)
            last = " ".join((log.strip().splitlines() or ["nothing"])[-1].split())[:300]
            failure = f"ended with code {child.returncode}; its last line: {last}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            failure = f"took more than {timeout:.0f} s and was stopped"
        finally:
            child.kill()  # after Ctrl-C; no effect on a child that has ended
            child.wait()
    results = [json.loads(line) for line in output.splitlines()]
    if results and "mistake" in results[-1]:
        raise ValueError(results[-1]["mistake"])
    if child.returncode:
        error = f"the compiler for {target.name if target else 'this machine'} {failure}."
        if not results:
            raise ValueError(error)
        results = [results[0] | {"fits": False, "error": error}]
    return Compiled(**results[-1] | {"chip": slices.Chip(**results[-1]["chip"])})


def _environment(target: slices.Slice | None) -> dict[str, str]:
    """Variables that must be set before jax is imported."""
    if target is None:
        return {}
    # The compilation cache is off: it stores no programs for absent devices.
    variables = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    if target.chip.name in slices.GPUS:
        return variables | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={target.chips}"}
    return variables | {
        "TPU_LIBRARY_PATH": str(library()),
        "TPU_SKIP_MDS_QUERY": "1",  # not a TPU VM: query no metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held, so several may compile
    }


# The child. --------------------------------------------------------------------------------------


def _results(request: dict) -> Iterator[Compiled]:
    """Yields the result from shapes; then, if that fits, the result of the compiler."""
    from lm import runs, train
    from lm.preflight import program

    run = runs.make_run(request["config"], request["workdir"])
    target = request["target"] and slices.parse_target(request["target"])
    devices, chip = _devices(target)
    update = program.prepare(run, devices)
    from_shapes = Compiled(
        target=target.name if target else f"local ({len(devices)} x {chip.device_kind})",
        chip=chip,
        chips=len(devices),
        hosts=target.hosts if target else len({device.process_index for device in devices}),
        sizes=update.sizes,
        model_flops=train.step_flops(run),
        peak=sum(update.sizes.values()),
    )
    if from_shapes.peak > chip.memory:
        error = f"state, gradients and batch alone need {_over(from_shapes.peak, chip)}."
        from_shapes = dataclasses.replace(from_shapes, fits=False, error=error)
    yield from_shapes
    if from_shapes.fits is None and chip.name not in slices.GPUS:
        yield _compile(from_shapes, update)


def _devices(target: slices.Slice | None) -> tuple[list, slices.Chip]:
    """jax devices of the target, and the properties of one of them."""
    import jax
    from jax.experimental import topologies

    if target is None:
        return jax.devices(), _local_chip(jax.devices())
    if target.chip.name in slices.GPUS:
        return jax.devices(), target.chip
    options = target.compiler_options
    return list(topologies.get_topology_desc(platform="tpu", **options).devices), target.chip


def _local_chip(devices: list) -> slices.Chip:
    """The properties of a device of this machine; a CPU device has a share of the memory."""
    from lm import logs

    first = devices[0]
    kinds = [*slices.CHIPS.values(), *slices.GPUS.values()]
    matches = [chip for chip in kinds if chip.device_kind in first.device_kind]
    chip = matches[-1] if matches else slices.Chip("local", first.device_kind, 0.0, 0)
    memory = (first.memory_stats() or {}).get("bytes_limit", chip.memory)
    if first.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    flops = logs.peak_flops(devices) / len(devices)
    return dataclasses.replace(
        chip, name="local", device_kind=first.device_kind, flops=flops, memory=memory
    )


def _compile(from_shapes: Compiled, update) -> Compiled:
    """Adds the compiler's result to the result from shapes. update: program.Prepared."""
    import jax

    from lm.preflight import flops, hlo

    chip = from_shapes.chip
    platform = "cpu" if chip.device_kind == "cpu" else "tpu" if "TPU" in chip.device_kind else "gpu"
    executed = flops.executed_flops(update.jaxpr(), platform)
    counted = dataclasses.replace(from_shapes, executed_flops=executed)
    lowered, start = update.lower(), time.monotonic()
    try:
        compiled = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return _rejected(counted, str(error), time.monotonic() - start)
    usage, traffic = compiled.memory_analysis(), hlo.collective_traffic(compiled.as_text())
    buffers = usage.argument_size_in_bytes + usage.output_size_in_bytes
    peak = buffers - usage.alias_size_in_bytes
    peak += usage.temp_size_in_bytes + usage.generated_code_size_in_bytes
    return dataclasses.replace(
        counted,
        fits=peak <= chip.memory,
        peak=peak,
        workspace=usage.temp_size_in_bytes,
        code=usage.generated_code_size_in_bytes,
        collectives=traffic.sent,
        unknown_loops=traffic.unknown_loops,
        seconds=time.monotonic() - start,
        error="" if peak <= chip.memory else f"it needs {_over(peak, chip)}",
    )


def _rejected(counted: Compiled, message: str, seconds: float) -> Compiled:
    """Returns the result of a rejected program, with the bytes that the message names."""
    sizes = [int(float(number) * UNITS[unit]) for number, unit in REQUIRED.findall(message)]
    peak, error = counted.peak, f"the compiler rejects it: {' '.join(message.split())[:300]}"
    if "RESOURCE_EXHAUSTED" in message and sizes:
        peak = max(peak, *sizes)
        error = f"it needs {_over(peak, counted.chip)}"
    return dataclasses.replace(counted, fits=False, peak=peak, error=error, seconds=seconds)


def _over(size: int, chip: slices.Chip) -> str:
    return f"{size / slices.GIB:.2f} GiB, and a chip has {chip.memory / slices.GIB:.2f} GiB"


def main() -> None:
    """Runs the child: prints each result as a line of JSON, or {"mistake": sentence}."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libtpu and XLA write to stdout too
    try:
        for result in _results(json.load(sys.stdin)):
            print(json.dumps(dataclasses.asdict(result)), file=out, flush=True)
    except (ValueError, OSError) as error:
        print(json.dumps({"mistake": exits.one_line(error, None)}), file=out, flush=True)


if __name__ == "__main__":
    main()
