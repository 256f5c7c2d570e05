"""Tests what compiled steps consist of, never how long they take; and the command."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.lib import runs
from benchmarks.lib import timing as lib_timing
from benchmarks.overhead import __main__ as command
from benchmarks.overhead import page, programs, timing, trees
from benchmarks.overhead.measurements import Measurements
from benchmarks.overhead.optimizers import (
    AGAIN,
    BASELINE,
    CHAINS,
    METHODS_OF_THE_PACKAGE,
    TIMED,
    Chain,
)
from benchmarks.tasks.images.models import ResNet

# Large leaves, as matrices and as convolutions: their sums are kernels of their own
# kind on a CPU (YNNPACK).
SHAPES = {
    "conv": {"kernel": (3, 3, 128, 192), "bias": (192,)},
    "dense": {"kernel": (512, 384), "bias": (384,)},
    "odd": {"kernel": (331, 257)},
}


def large(dtype):
    return trees.abstract(SHAPES, jnp.dtype(dtype))


def gradient_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.recent_xla
@pytest.mark.parametrize("name", METHODS_OF_THE_PACKAGE)
def test_float32_needs_no_memory_of_the_gradients_size(name):
    """Another pass included, and what leaves of one shape could share."""
    twice = {f"{layer}_{i}": SHAPES[layer] for layer in SHAPES for i in range(2)}
    tree = trees.abstract(twice, jnp.dtype("float32"))
    needed, base = (
        programs.temporary_bytes(programs.compile_step(chain, tree))
        for chain in (CHAINS[name], CHAINS[BASELINE])
    )
    assert needed - base < gradient_bytes(tree) / 100


@pytest.mark.recent_xla
@pytest.mark.parametrize("name", METHODS_OF_THE_PACKAGE[:2])
def test_bfloat16_needs_what_any_scaling_needs(name):
    """XLA on CPUs writes every bfloat16 leaf that two loops read, scale(0.5)'s too."""
    tree = large("bfloat16")
    halved = Chain(lambda: optax.scale(0.5))
    needed, base = (
        programs.temporary_bytes(programs.compile_step(chain, tree))
        for chain in (CHAINS[name], halved)
    )
    assert needed - base < gradient_bytes(tree) / 100


@pytest.mark.recent_xla
@pytest.mark.parametrize("name", METHODS_OF_THE_PACKAGE[:2])
def test_nothing_of_the_gradients_size_is_written_but_adams_results(name):
    """Two moments and the parameters, in the entry and in every branch."""
    tree = large("float32")

    def written(chain):
        text = programs.compile_step(chain, tree).as_text()
        free = r"parameter|get-tuple-element|tuple|bitcast|constant"
        outside = [c for c in text.split("\n\n") if "fused_computation" not in c[:40]]
        found = re.findall(
            rf" = f32\[512,384\]\S* (?!{free})[\w-]+\(", "".join(outside)
        )
        return len(found)

    assert written(CHAINS[name]) == written(CHAINS[BASELINE]) == 3


@pytest.mark.recent_xla
@pytest.mark.parametrize(
    "name",
    [
        METHODS_OF_THE_PACKAGE[0],
        *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS_OF_THE_PACKAGE[1:]),
    ],
)
def test_a_large_leaf_adds_its_sums_and_a_small_one_no_kernel(name):
    """All arithmetic between is on vectors; small leaves are summed together."""
    sums = {"GradientStabilizer + AdamW": 1}.get(name, 2)
    adamw = programs.kernels_per_leaf(CHAINS[BASELINE], 32, first=12, second=24).always
    large = programs.kernels_per_leaf(CHAINS[name], 128, first=12, second=24)
    small = programs.kernels_per_leaf(CHAINS[name], 32, first=12, second=24)
    assert large.always <= adamw + sums + 0.5  # joining the sums is 1 for 32 of them
    # Where its entry begins in both branches; its sums, of scaled, centred entries.
    assert large.branches <= 2 + 2 * sums + 1
    assert small.always == adamw
    assert small.branches <= 2


@pytest.mark.parametrize("name", METHODS_OF_THE_PACKAGE[:2])
@pytest.mark.parametrize("width", [32, 128])  # summed together, each by itself
def test_one_all_reduce_whatever_the_number_of_leaves(name, width):
    counts = [programs.all_reduces(CHAINS[name], leaves, width) for leaves in (3, 12)]
    assert [count.always for count in counts] == [1, 1]
    assert counts[0].branches == counts[1].branches <= 2


def test_counting_kernels_sees_branches_and_no_fused_instructions():
    def step(x, i):
        return jax.lax.cond(i > 0, lambda: jnp.sin(x) @ x, lambda: x * 2 + 1)

    abstract = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    found = programs.kernels(jax.jit(step).lower(abstract, index).compile())
    assert found.always <= 3  # the comparison, the conditional
    assert found.branches == 3  # sine, product; one fusion


def test_trees_are_those_that_they_name():
    sizes = {name: trees.size(shapes()) for name, (_, shapes) in trees.TREES.items()}
    assert sizes == {
        "a": (161, 25_557_032),  # torchvision's resnet50
        "b": (148, 124_439_808),  # GPT-2's 124M
        "c": (2000, 2_048_000),
        "d": (1, 100_000_000),
        "e": (65, 32_864),
        "f": (400, 409_600),
        "g": (74, 42_528_768),
    }


@pytest.mark.parametrize(
    ("norm", "size"), [("batch", 269_722), ("none", 269_034)]
)  # He et al.: 0.27 million
def test_resnet20_has_its_number_of_parameters(norm, size):
    image = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(ResNet(norm=norm).init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == size


def test_optimizers_take_turns_and_ratios_are_paired():
    turns = []
    stretches = {
        name: lambda steps, name=name: turns.append(name) for name in ("base", "other")
    }
    times = timing.interleave(stretches, 10, "base")
    rounds = {tuple(turns[i : i + 2]) for i in range(4, 24, 2)}  # four calls warm up
    assert rounds == {("base", "other"), ("other", "base")}
    np.testing.assert_array_equal(times["base"].ratio, 1)
    np.testing.assert_allclose(
        times["other"].ratio, times["other"].seconds / times["base"].seconds
    )


@pytest.fixture
def small(monkeypatch):
    """Two optimizers on one layer."""
    layer = {"dense": {"kernel": (4, 3), "bias": (3,)}}
    monkeypatch.setitem(trees.TREES, "e", ("small", lambda: layer))
    timed = {name: CHAINS[name] for name in (BASELINE, "StableGrad + AdamW")}
    monkeypatch.setattr(command, "TIMED", timed)
    monkeypatch.setattr(lib_timing, "STRETCH", 0.0)


@pytest.mark.slow
def test_the_command_measures_shows_keeps_and_resumes(small, tmp_path, capsys):
    args = ["--quick", "--output", str(tmp_path), "--parts", "updates", "compile"]
    assert command.main(args) == 0
    assert re.search(r"StableGrad \+ AdamW: .* ms", capsys.readouterr().out)
    records = runs.read(tmp_path / "overhead.jsonl")
    assert {record["kind"] for record in records} == {"update", "compile"}
    assert all(record["jax"] == jax.__version__ for record in records)
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "overhead.md").read_text()
    assert re.search(r"\| StableGrad \+ AdamW \|.*\d\.\d{3} \(", table)

    assert command.main(args) == 0
    assert "StableGrad" not in capsys.readouterr().out
    assert runs.read(tmp_path / "overhead.jsonl") == records
    assert (tmp_path / "overhead.md").read_text() == table


def test_an_optimizer_that_joins_later_is_measured_with_the_baseline(small, tmp_path):
    path, both = tmp_path / "overhead.jsonl", [BASELINE, "StableGrad + AdamW"]
    Measurements(path, 2, str).updates("e", "float32", [BASELINE])
    added = Measurements(path, 2, str).updates("e", "float32", both)
    assert [record["optimizer"] for record in added] == ["StableGrad + AdamW"]
    # Lines of fewer rounds than are asked for are measured again.
    again = Measurements(path, 3, str).updates("e", "float32", both)
    assert [record["rounds"] for record in again] == [3, 3]


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for option in ("trees", "dtypes", "rounds", "leaves", "output", "quick"):
        assert f"--{option}" in text


def test_tables_leave_out_what_was_not_measured(tmp_path):
    text = page.markdown({})
    assert "##" not in text
    assert AGAIN in TIMED
    key = ("update", "a", "float32", BASELINE)
    record = {"kind": "update", "ratio": 1.0, "ratio_quartiles": [1, 1]}
    record |= {"added_bytes": 0, "gradient_bytes": 8, "device": "cpu", "jax": "1"}
    record |= {"stablegrad_optax": "1", "date": "2026-01-01"}
    assert "| AdamW | 1.00 |" in page.markdown({key: record})
