"""transformers 4.57 and 5 in and out: logits, greedy ids and beam ids are ours.

The reference is experiments/parity.py, a script that either version runs in its own process.
"""

from __future__ import annotations

import pytest

from experiments import parity
from lm import transformer

VERSIONS = [pytest.param("4.57", marks=pytest.mark.slow), "5"]
FAMILIES = {"t5_1_0", "t5_1_1", "umt5", "t5gemma"}  # one model of each; the others are slow


def representatives(names) -> list:
    slow = lambda name: [] if name in FAMILIES else pytest.mark.slow
    return [pytest.param(name, marks=slow(name)) for name in names]


@pytest.fixture(scope="module", params=VERSIONS)
def references(request, tmp_path_factory):
    """A directory with our exports, and models and results of a version of transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if request.param == "4.57" and not parity.OLD.is_dir():
        pytest.skip("transformers 4.57 is not here")
    root = tmp_path_factory.mktemp("references")
    parity.ask(request.param, root)
    return request.param, root


def agree(root, version, name, model, params):
    actual = parity.agreement(version, root, name, model, params)
    assert actual.spread > 1  # not all alike
    assert actual.logits < 1e-4 and actual.greedy and actual.beam, actual


@pytest.mark.parametrize("name", representatives(parity.MAKE))
def test_an_imported_model_computes_the_logits_and_ids_of_transformers(references, name):
    version, root = references
    agree(root, version, name, *parity.read_theirs(root, name))


@pytest.mark.parametrize("name", representatives(parity.EXPORTS))
def test_an_exported_model_computes_our_logits_and_ids_in_transformers(references, name):
    version, root = references
    config = transformer.ModelConfig.from_flat(parity.EXPORTS[name])
    params = parity.random_params(config)
    agree(root, version, f"{name}_ours", transformer.Transformer(config), params)
