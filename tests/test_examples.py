"""The examples of the docs run, in a short form."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from stablegrad_optax import default_optimizers

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_compares_its_optimizers(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    name = "StableGrad + Muon"
    optimizers = {name: default_optimizers()[name]}
    if hasattr(module, "kernels_as_matrices"):
        optimizers = {name: default_optimizers(module.kernels_as_matrices)[name]}
    result = module.run(
        optimizers=optimizers,
        learning_rates=(1e-3,),
        steps=3,
        num_seeds=2,
        num_tuning_seeds=1,
        parallel=2,
    )
    assert result.curves[name].shape == (2, 3)
    assert np.isfinite(result.curves[name]).all()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_it_printed_has_every_optimizer(path):
    lines = path.with_suffix(".txt").read_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    compared = [
        name
        for name in default_optimizers()
        if "SOAP" not in name or path.stem != "compare_cnn"
    ]
    assert all(any(line.startswith(name) for line in lines) for name in compared)
