"""Laws of the program that fingerprints this code's numbers."""

from __future__ import annotations

import json

import pytest

from experiments import fingerprints


@pytest.mark.slow
def test_two_runs_print_the_same_digests_and_a_changed_one_is_named(tmp_path, capsys):
    out, steps = f"--out={tmp_path / 'run'}", "--steps=4"
    assert fingerprints.main([out, steps]) == 0
    digests = json.loads(capsys.readouterr().out)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(digests | {"losses/mesh": "another"}))
    assert fingerprints.main([out, steps, f"--against={changed}"]) == 1
    assert "1 of" in capsys.readouterr().err.splitlines()[-1]
