"""Counting what a compiled program costs; and what the methods cost on a TPU.

The programs of the first part are small enough to know their bytes; the second part
compiles for a TPU v5e, which needs libtpu but no TPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks.lib import runs
from benchmarks.overhead import __main__ as command
from benchmarks.overhead import compilers, costs, hlo, programs, trees
from benchmarks.overhead.optimizers import (
    BASELINE,
    CHAINS,
    CLIP,
    METHODS_OF_THE_PACKAGE,
)

ROWS = 1024  # whole tiles of a TPU
ARRAY = jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)
SIZE = 4 * ROWS**2
ROW = 4 * ROWS


def looped(x):
    return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) * 2, x)


def branched(x, index):
    return jax.lax.cond(index > 0, lambda: x * 2, lambda: jnp.tanh(x) + 1)


def put(x, row):
    return jax.lax.dynamic_update_slice(x, row, (8, 0))


# What is compiled, its arguments, and the bytes that it must move, always and in
# branches.
PROGRAMS = {
    "double": (lambda x: x * 2, [ARRAY], 2 * SIZE, 0),
    "chain": (lambda x: jnp.sin(x * 2) + 1, [ARRAY], 2 * SIZE, 0),
    "sum": (jnp.sum, [ARRAY], SIZE, 0),
    "two arrays": (lambda x, y: x + y, [ARRAY, ARRAY], 3 * SIZE, 0),
    "part": (lambda x: x[:8] * 2, [ARRAY], 16 * ROW, 0),
    "branches": (branched, [ARRAY, INDEX], 0, 4 * SIZE),
    "loop": (looped, [ARRAY], (2 + 7 * 2) * SIZE, 0),  # begins with a copy
    "bfloat16": (
        lambda x: x * 2,
        [jax.ShapeDtypeStruct(ARRAY.shape, jnp.bfloat16)],
        SIZE,
        0,
    ),
}
SLACK = 1e-2 * SIZE  # for scalars, and for sums in two steps


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "bfloat16"])
def test_bytes_are_those_that_a_program_must_move(name):
    function, arguments, always, branches = PROGRAMS[name]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = costs.count(text)
    assert found.always.num_bytes == pytest.approx(always, abs=SLACK)
    assert found.branches.num_bytes == pytest.approx(branches, abs=SLACK)
    assert found.always.conditionals == (branches > 0)


def test_an_update_in_place_costs_its_part_and_a_copy_the_whole():
    row = jax.ShapeDtypeStruct((1, ROWS), jnp.float32)
    donated, copied = (
        jax.jit(put, donate_argnums=donate).lower(ARRAY, row).compile().as_text()
        for donate in ((0,), ())
    )
    few = 16  # where the part begins
    assert costs.count(donated).always.num_bytes == pytest.approx(2 * ROW, abs=few)
    whole = 2 * SIZE + 2 * ROW
    assert costs.count(copied).always.num_bytes == pytest.approx(whole, abs=few)


def test_a_loop_of_unknown_length_is_refused():
    def halve(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    text = jax.jit(halve).lower(ARRAY).compile().as_text()
    with pytest.raises(ValueError, match=r"how often while\S* loops"):
        costs.count(text)


@pytest.mark.parametrize(
    ("shape", "arrays"),
    [
        ("f32[]{:T(128)}", [(4, False)]),
        ("bf16[10000,10000]{1,0:T(8,128)(2,1)}", [(2 * 10_000 * 10_112, False)]),
        ("f32[32,1]{0,1:T(1,128)S(1)}", [(4 * 128, True)]),
        ("f32[3,3,64,64]{2,3,1,0:T(8,128)}", [(4 * 9 * 64 * 128, False)]),
        ("(pred[], s4[6]{0}, /*index=2*/u32[]{:S(2)})", [(1, 0), (3, 0), (4, 1)]),
        ("token[]", []),
    ],
)
def test_sizes_are_padded_to_tiles_and_know_their_memory(shape, arrays):
    assert hlo.arrays(shape) == arrays


FETCHED = """\
HloModule jit_step, is_scheduled=true

%twice (x: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%x.1, %x.1)
}

ENTRY %main (x.2: f32[16,128]) -> f32[16,128] {
  %x.2 = f32[16,128]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[16,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, \
s32[]{:S(2)}) slice-start(%x.2), slice={[0:8], [0:128]}
  %copy-start = (f32[16,128]{1,0:T(8,128)S(1)}, f32[16,128]{1,0:T(8,128)}, \
u32[]{:S(2)}) copy-start(%x.2)
  %slice-done = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %copy-done = f32[16,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = f32[8,128]{1,0:T(8,128)S(1)} fusion(%slice-done), kind=kLoop, calls=%twice
  ROOT %both = f32[16,128]{1,0:T(8,128)S(1)} custom-call(%fusion, %slice-done), \
custom_call_target="ConcatBitcast"
}
"""


def test_what_is_fetched_ahead_counts_once_and_what_is_on_the_chip_never():
    always = costs.count(FETCHED).always
    assert always.num_bytes == 4 * 128 * (8 + 16)
    assert always.kernels == 1


@pytest.fixture
def compiler_here(monkeypatch):
    """Compiles for CPUs of this computer; one small tree and two optimizers."""
    cpus = np.array(jax.devices()[:4]).reshape(2, 2)
    here = compilers.Compiler(
        SingleDeviceSharding(jax.devices()[0]), Mesh(cpus, ("rows", "columns")), "none"
    )
    monkeypatch.setattr(compilers, "missing", lambda target: None)
    monkeypatch.setattr(compilers, "load", lambda target: here)
    layer = {"dense": {"kernel": (4, 6), "bias": (6,)}}
    monkeypatch.setitem(trees.TREES, "e", ("small", lambda: layer))
    monkeypatch.setattr(command, "COMPILED", (BASELINE, CLIP))


def test_the_command_compiles_keeps_and_resumes(compiler_here, tmp_path, capsys):
    args = ["--compiled", "tpu", "--quick", "--output", str(tmp_path)]
    assert command.main(args) == 0
    printed = capsys.readouterr().out
    assert re.search(r"clip \+ AdamW: .* MB, \d+ kernels", printed)
    records = runs.read(tmp_path / "overhead.jsonl")
    adamw, clip = records
    assert clip["target"] == "tpu"
    assert clip["all_reduces"] > adamw["all_reduces"] == 0
    assert clip["bytes"] > adamw["bytes"] > 7 * adamw["gradient_bytes"]
    table = (tmp_path / "overhead.md").read_text()
    ratio = clip["bytes"] / adamw["bytes"]
    assert f"| clip + AdamW | {ratio:.3f} |" in table
    assert (tmp_path / "overhead_compiled.png").read_bytes().startswith(b"\x89PNG")

    assert command.main(args) == 0
    assert runs.read(tmp_path / "overhead.jsonl") == records


def test_what_could_not_be_compiled_is_shown_and_tried_again(
    compiler_here, tmp_path, monkeypatch, capsys
):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large\nmore")

    args = ["--compiled", "gpu", "--quick", "--output", str(tmp_path)]
    with monkeypatch.context() as broken:
        broken.setattr(programs, "lower", refuse)
        assert command.main(args) == 0
    assert "failed: RESOURCE_EXHAUSTED: too large" in capsys.readouterr().out
    table = tmp_path / "overhead.md"
    assert "| clip + AdamW | failed |" in table.read_text()
    message = "Failed: gpu e float32 AdamW: RESOURCE_EXHAUSTED: too large"
    assert message in table.read_text()
    assert command.main(args) == 0
    assert "failed" not in table.read_text()


@pytest.mark.parametrize(("target", "extra"), [("tpu", "tpu"), ("gpu", "cuda12")])
def test_a_compiler_that_is_not_installed_costs_one_line(
    target, extra, monkeypatch, capsys
):
    absent = compilers.TARGETS[target]._replace(packages=("no-such-compiler",))
    monkeypatch.setitem(compilers.TARGETS, target, absent)
    with pytest.raises(SystemExit) as stop:
        command.main(["--compiled", target])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs no-such-compiler: pip install 'jax[{extra}]'" in line


needs_libtpu = pytest.mark.skipif(
    compilers.missing("tpu") is not None, reason=str(compilers.missing("tpu"))
)


def on_a_tpu(test):
    """Marks what `make test-tpu` runs: seconds for each program, fully optimized."""
    return pytest.mark.slow(pytest.mark.optimized(needs_libtpu(test)))


MEASURED = (
    *METHODS_OF_THE_PACKAGE,
    "clip by history + AdamW",
    "skip spikes + AdamW",
)
BYTES = 1.16  # over adamw's; one more read of the gradient is 8/7 = 1.143


@pytest.fixture(scope="module")
def tpu():
    return compilers.load("tpu")


@on_a_tpu
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("loop", "branches")])
def test_a_tpus_bytes_are_those_that_a_program_must_move(tpu, name):
    function, arguments, always, _ = PROGRAMS[name]
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=tpu.device) for x in arguments
    ]
    program = jax.jit(function).lower(*arguments).compile()
    found = costs.count(program.as_text())
    assert found.always.num_bytes == pytest.approx(always, abs=SLACK)
    assert found.branches == costs.Cost()


@on_a_tpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MEASURED)
def test_on_a_tpu_a_method_reads_a_large_leaf_once_more_and_never_branches(
    tpu, name, dtype
):
    _, shapes = trees.TREES["d"]
    tree = trees.abstract(shapes(), jnp.dtype(dtype))
    own, base = (
        costs.count(
            programs.lower(CHAINS[chain], tree, lambda leaf: tpu.device)
            .compile()
            .as_text()
        )
        for chain in (name, BASELINE)
    )
    assert own.always.num_bytes <= BYTES * base.always.num_bytes
    assert own.always.conditionals == 0
    assert own.branches == costs.Cost()


@on_a_tpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MEASURED)
def test_on_2_by_2_tpus_a_method_needs_one_all_reduce(tpu, name, dtype):
    """Whatever the number of sharded leaves, large and small, biases among them."""
    shapes = trees.decoder(blocks=2, width=256) | trees.equal(20)
    tree = trees.abstract(shapes, jnp.dtype(dtype))
    lowered = programs.lower(CHAINS[name], tree, programs.sharded_over(tpu.mesh))
    always, branches = costs.count(lowered.compile().as_text())
    assert (always.all_reduces, branches.all_reduces) == (1, 0)
    assert always.other_collectives == branches.other_collectives == 0
