"""Settings of jax for all tests, and shared fixtures: a tiny TFDS directory, tokenizer, config.

XLA compiles without its optimizations, in half the time. Laws of bits, memory and FLOPs need them:
mark such a test or module with `pytest.mark.exact`. `JAX_DISABLE_MOST_OPTIMIZATIONS=false pytest`
optimizes everything. The variables are set before any test imports jax.
"""

from __future__ import annotations

import copy
import functools
import os
import pathlib
import signal
import sys

import pytest

from tests import tiny_data

ROOT = pathlib.Path(__file__).parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "32"  # fewer and XLA's collectives deadlock on two cores
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
NO_OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
UNOPTIMIZED = os.environ.setdefault(NO_OPTIMIZATIONS, "true")

DOCUMENTS = {"train": 60, "validation": 12}
PIECES, SENTINELS = 400, 10


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Set XLA's optimizations for a test, here and in its subprocesses, before its fixtures run."""
    mode = "false" if item.get_closest_marker("exact") else UNOPTIMIZED
    if mode == os.environ[NO_OPTIMIZATIONS]:
        return
    os.environ[NO_OPTIMIZATIONS] = mode
    if jax := sys.modules.get("jax"):
        jax.config.update(NO_OPTIMIZATIONS.lower(), mode not in ("false", "0"))
        jax.clear_caches()  # the key of jit's cache does not hold the mode


@pytest.fixture(scope="module", autouse=True)
def clear_caches():
    """Drop a module's programs after it: thousands of programs take gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def assumed_peak_flops():
    """Let training assume 1e12 FLOP/s instead of measuring the machine at the start of each run."""
    if "lm.train" not in sys.modules:
        yield
        return
    from jax import Device

    from lm import logs

    measure = logs.peak_flops
    peak_flops = lambda devices: 1e12 if isinstance(devices[0], Device) else measure(devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "peak_flops", peak_flops)
        yield


@pytest.fixture(scope="session")
def tiny_tfds(tmp_path_factory):
    """A TFDS directory with a hand-made wikipedia/20230601.en and pydocs, train and validation."""
    root = tmp_path_factory.mktemp("tiny_tfds")
    rows = {split: tiny_data.made_up_documents(n, n) for split, n in DOCUMENTS.items()}
    tiny_data.write_tfds(root, "wikipedia/20230601.en", rows)
    pairs = {
        split: [
            {
                "module": row["title"].split()[1],
                "name": row["title"],
                "body": row["text"],
                "summary": " ".join(row["text"].split()[: 3 + i % 17]),
                "text": row["text"],
            }
            for i, row in enumerate(documents)
        ]
        for split, documents in rows.items()
    }
    tiny_data.write_tfds(root, "pydocs", pairs)
    return root


@pytest.fixture(scope="session")
def tiny_tokens(tiny_tfds, tmp_path_factory):
    """A tokenizer.Tokenizer of PIECES pieces and SENTINELS sentinels, of the training texts."""
    from lm import tokenizer

    rows = tiny_data.made_up_documents(DOCUMENTS["train"], DOCUMENTS["train"])
    texts = [row["text"] for row in rows]
    directory = tmp_path_factory.mktemp("tiny_tokens")
    return tokenizer.train(texts, directory, vocab_size=PIECES, num_extra_ids=SENTINELS)


@pytest.fixture(scope="session")
def tiny_config(tiny_tfds, tiny_tokens):
    """(**{"data.batch_size": 4, ..}) -> the config of a tiny run, as a nested dict."""
    from configs import base

    config = base.get_config()
    config.steps = 6
    config.model.update(vocab_size=512, d_model=16, d_ff=32, num_heads=4, num_kv_heads=4)
    config.model.update(head_dim=4, num_encoder_layers=2, num_decoder_layers=2, scan_layers=True)
    config.tokenizer.update(dir=str(tiny_tokens.directory), vocab_size=PIECES)
    config.tokenizer.num_extra_ids = SENTINELS
    config.data.update(task="wikipedia", tfds_dir=str(tiny_tfds), input_length=32)
    config.data.update(target_length=16, batch_size=8)
    config.optimizer.update(
        name="adamw", learning_rate=1e-2, schedule="constant", warmup={"steps": 2}
    )
    config.update(log_every_steps=1, eval_every_steps=3)
    config.checkpoint.every_steps = 3
    config.evaluate.update(max_examples=20, max_decoded_examples=4)

    def make(**changes) -> dict:
        copied = copy.deepcopy(config)
        for key, value in changes.items():
            *sections, leaf = key.split(".")
            section = functools.reduce(lambda section, name: section[name], sections, copied)
            section[leaf] = value
        return copied.to_dict()

    return make


@pytest.fixture(scope="session")
def store():
    """A stand-in for Google Cloud Storage with the bucket lm-test."""
    from tests import gcs

    server = gcs.Store("lm-test")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def bucket(store, tmp_path_factory):
    """gs://lm-test/<an empty folder>; local copies of it lie in a temporary home directory."""
    pytest.importorskip("gcsfs")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("STORAGE_EMULATOR_HOST", store.address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.address)
        yield f"gs://lm-test/{home.name}"


@pytest.fixture
def interruptible():
    """Let Ctrl-C reach the test: a worker of pytest-xdist ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
