"""Properties that Optax's own test suites check, for every method of this package."""

import functools
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    CASES,
    METHODS,
    assert_trees_close,
    assert_trees_equal,
    each_case,
    each_method,
    each_scaling_case,
    each_scaling_method,
    each_transformation,
    each_with_one,
    gradients,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import stablegrad_optax


def avals(tree):
    """Shapes, dtypes, weak types and shardings: what a compiled program depends on."""
    return jax.tree.map(jax.typeof, tree)


@each_method
def test_unexpected_extra_args_are_swallowed(case):
    grads = gradients()
    step = jax.jit(functools.partial(case.tx.update, value_fn=None, **case.extra_args))
    updates, state = step(grads, case.tx.init(grads), grads, loss=1.0)
    expected, expected_state = case.update(grads, case.tx.init(grads))
    assert_trees_close(updates, expected)
    assert_trees_close(state, expected_state)


@each_method
def test_the_second_call_does_not_recompile(case):
    traces = []

    @jax.jit
    def step(grads, state):
        traces.append(1)
        return case.tx.update(grads, state, **case.extra_args)

    state = case.tx.init(gradients())
    for seed in (0, 1, 2):
        _, state = step(gradients(seed), state)
    assert len(traces) == 1


@each_method
def test_eager_updates_do_not_compile_after_the_second(case):
    """A conditional on a closure would compile anew and keep its program each time."""
    compilations = []

    def count(event, seconds, **kwargs):
        compilations.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x + 1)(1.0)
        assert compilations  # the listener works
        state = case.tx.init(gradients())
        for seed in range(5):
            if seed == 2:
                compilations.clear()
            _, state = case.tx.update(gradients(seed), state, **case.extra_args)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compilations


@each_case
def test_state_keeps_structure_shapes_and_dtypes(case):
    """And each field is a buffer of its own, from init on."""
    grads = gradients()
    state = case.tx.init(grads)
    update = functools.partial(case.tx.update, **case.extra_args)
    _, new_state = jax.eval_shape(update, grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, jax.eval_shape(case.tx.init, grads)
    )
    fields = jax.tree.leaves(state)
    for old, new in zip(fields, jax.tree.leaves(new_state), strict=True):
        assert old.weak_type == new.weak_type
    assert len({field.unsafe_buffer_pointer() for field in fields}) == len(fields)


@each_scaling_case
def test_state_is_one_vector_per_statistic(case):
    """A params-shaped tree of scalars breaks sharding metadata."""
    few, many = gradients(), {str(i): gradients() for i in range(3)}
    assert jax.tree.structure(case.tx.init(few)) == jax.tree.structure(
        case.tx.init(many)
    )


@each_method
def test_state_can_be_donated(case):
    grads = gradients()
    state = case.tx.init(grads)
    step = jax.jit(case.tx.update, donate_argnums=1)
    expected = case.update(grads, case.update(grads, case.tx.init(grads))[1])
    _, state = step(grads, state, **case.extra_args)
    assert_trees_equal(step(grads, state, **case.extra_args), expected)


@each_case
def test_no_array_is_made_before_init(case):
    def pointers():
        return {id(array) for array in jax.live_arrays()}

    before = pointers()
    tx = case.make()
    assert pointers() <= before
    del tx


@each_scaling_method
def test_map_params_leaves_the_statistics_alone(case):
    tx = optax.chain(case.tx, optax.adam(1e-3))
    grads = gradients()
    state = tx.init(grads)
    specs = jax.tree.map(lambda _: "spec", grads)
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs)
    assert mapped[1][0].mu == specs
    assert_trees_equal(mapped[0], state[0])
    # As in optax's own recipe for partition specs of an optimizer's state.
    replicated = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    assert jax.tree.leaves(replicated[0]) == []


def rosenbrock(params):
    x = params["x"]
    return 100 * (x[0, 1] - x[0, 0] ** 2) ** 2 + (1 - x[0, 0]) ** 2


def parabola(params):
    return jnp.sum((params["x"] - jnp.array([[1.0, -1.0, 1.0]])) ** 2)


def matrix(params):
    target = jnp.array([[1.0, 2.0], [3.0, -4.0]])
    product = params["x"] @ jnp.array([[2.0, 1.0], [1.0, 3.0]])
    return jnp.sum((product + params["bias"] - target) ** 2)


PROBLEMS = {
    "parabola": (parabola, {"x": np.array([[-1.0, 10.0, 1.0]])}),
    "rosenbrock": (rosenbrock, {"x": np.array([[-1.2, 1.0]])}),
    "matrix": (matrix, {"x": np.zeros((2, 2)), "bias": np.zeros(2)}),
}


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        pytest.param(
            case,
            problem,
            id=f"{case.name}-{problem}",
            # A variant of a method's arguments solves one problem.
            marks=() if case in METHODS or i == 0 else pytest.mark.slow,
        )
        for case in CASES
        for i, problem in enumerate(case.converges)
    ],
)
def test_reaches_the_optimum_in_30000_steps(case, problem):
    loss_fn, params = PROBLEMS[problem]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    rate = optax.exponential_decay(1e-2, 30_000, 1e-5)
    tx = optax.chain(case.tx, optax.sgd(rate))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, **case.extra_args)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=30_000)[0][0]

    # The step's length is at most the rate, which ends at 1e-7.
    assert loss_fn(run(params)) < 1e-6


@each_case
def test_inject_hyperparams_equals_plain(case):
    injected = optax.inject_hyperparams(case.factory, static_args=case.static_args)
    tx = injected(**case.kwargs)
    state, plain = tx.init(gradients()), case.tx.init(gradients())
    step = jax.jit(functools.partial(tx.update, **case.extra_args))
    for seed in (0, 1, 2):
        updates, state = step(gradients(seed), state)
        expected, plain = case.update(gradients(seed), plain)
        # The hyperparameters are float32: 1 - 0.999 is right to 1.7e-5. Entries of a
        # rotated matrix are sums, which may be near zero.
        close = {"rtol": 2e-5, "atol": 1e-5 if case.has_moments else 1e-12}
        assert_trees_close(updates, expected, **close)
    assert_trees_close(state.inner_state, plain, **close)


@each_method
def test_hyperparams_follow_a_schedule(case):
    """Numeric arguments are used in arithmetic only: they can be traced."""
    floors = {name: optax.constant_schedule(1e-20) for name in case.numerical_floors}
    if not floors:
        pytest.skip("no numeric argument")
    injected = optax.inject_hyperparams(case.factory, static_args=case.static_args)
    grads = gradients()
    tx, plain = injected(**case.kwargs, **floors), case.tx
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), **case.extra_args)
    expected, _ = case.update(grads, plain.init(grads))
    assert_trees_close(updates, expected, rtol=2e-5)


DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]


@each_with_one(CASES, "dtype", DTYPES)
def test_dtype_is_preserved(case, dtype):
    """Updates have the gradients' dtype; statistics of 16 bits are kept in float32."""
    with jax.enable_x64(jnp.dtype(dtype).itemsize * 8 in (64, 128)):
        grads = jax.eval_shape(lambda: gradients(dtype=dtype))
        state = jax.eval_shape(case.tx.init, grads)
        update = functools.partial(case.tx.update, **case.extra_args)
        updates, new_state = jax.eval_shape(update, grads, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        fields = jax.tree.leaves(state)
        floats = [x for x in fields if jnp.issubdtype(x.dtype, jnp.floating)]
        statistics = jnp.promote_types(jnp.finfo(dtype).dtype, jnp.float32)
        assert {x.dtype for x in floats} == {statistics}


@each_method
def test_mixed_precision_trees(case):
    """Statistics have the widest dtype of the tree, each leaf keeps its own."""
    with jax.enable_x64(True):
        wide = gradients(dtype=jnp.float64)
        dtypes = {"hidden": jnp.float64, "norm": jnp.bfloat16, "stack": jnp.float32}
        mixed = {name: optax.tree.cast(wide[name], dtypes[name]) for name in wide}
        updates, state = case.update(mixed, case.tx.init(mixed))
        chex.assert_trees_all_equal_dtypes(updates, mixed)
        fields = jax.tree.leaves(state)
        floats = [x for x in fields if jnp.issubdtype(x.dtype, jnp.floating)]
        if not case.has_moments:  # a moment has the precision of its own leaf
            assert {x.dtype for x in floats} <= {jnp.dtype("float64")}
        alone, _ = case.update(wide, case.tx.init(wide))
        for name, dtype in dtypes.items():
            # bfloat16 has 8 bits, which a global statistic hands on to all leaves.
            expected = optax.tree.cast(alone[name], dtype)
            assert_trees_close(updates[name], expected, rtol=1e-2)


@each_case
def test_strict_dtype_and_rank_promotion(case):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.float32, jnp.bfloat16):
            shapes = jax.eval_shape(lambda dtype=dtype: gradients(dtype=dtype))
            state = jax.eval_shape(case.tx.init, shapes)
            jax.eval_shape(case.make().update, shapes, state, **case.extra_args)


@each_method
def test_multi_steps_gives_exact_zeros_in_between(case):
    multi = optax.MultiSteps(case.tx, every_k_schedule=2).gradient_transformation()
    step = jax.jit(functools.partial(multi.update, **case.extra_args))
    grads = [gradients(seed) for seed in (0, 1)]
    state = multi.init(grads[0])
    skipped, state = step(grads[0], state)
    assert_trees_equal(skipped, optax.tree.zeros_like(grads[0]))
    updates, state = step(grads[1], state)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    assert_trees_close(updates, case.update(mean, case.tx.init(mean))[0], rtol=1e-5)


@each_case
def test_cond_between_updated_and_old(case):
    grads = gradients()

    def step(take, grads, state):
        def update():
            return case.tx.update(grads, state, **case.extra_args)

        return jax.lax.cond(take, update, lambda: (grads, state))

    state = case.tx.init(grads)
    out = jax.eval_shape(step, True, grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, (grads, state))


@each_case
def test_init_on_shapes_alone(case):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), gradients())
    assert_trees_equal(case.tx.init(shapes), case.tx.init(gradients()))


@each_with_one(METHODS, "compiled", [False, True], ids=["eager", "jit"])
def test_explicit_mesh_types_are_kept(case, compiled):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    kernel = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    specs = {
        "hidden": {
            "kernel": PartitionSpec("a", "b"),
            "bias": PartitionSpec("b"),
        },
        "other": {"kernel": PartitionSpec(None, "a")},
        "whole": {"kernel": PartitionSpec(None, None)},
    }
    host = {
        "hidden": {"kernel": kernel, "bias": kernel[0]},
        "other": {"kernel": 2 * kernel},
        "whole": {"kernel": 3 * kernel},
    }
    expected = case.first_update(host)
    with jax.set_mesh(mesh):
        grads = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), host, specs
        )
        init = jax.jit(case.tx.init) if compiled else case.tx.init
        update = case.update if compiled else case.make().update
        state = init(grads)
        extra_args = {} if compiled else case.extra_args
        updates, new_state = update(grads, state, **extra_args)
        assert avals(updates) == avals(grads)
        assert avals(new_state) == avals(state)
    # Sums over shards round in another order than sums over the whole.
    assert_trees_close(jax.device_get(updates), expected, rtol=1e-5)


@each_with_one(
    CASES,
    "empty",
    [
        [],
        (),
        {},
        None,
        [None, ()],
        {"a": optax.MaskedNode(), "b": {}},
        {"a": {"kernel": None}},
    ],
)
def test_empty_trees(case, empty):
    state = case.tx.init(empty)
    updates, new_state = case.tx.update(empty, state, empty, **case.extra_args)
    assert updates == empty
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)


@each_method
def test_none_and_masked_nodes_beside_arrays(case):
    """As Equinox and optax.masked hand gradients over."""
    whole = gradients()
    grads = {
        "hidden": whole["hidden"] | {"static": None},
        "stack": whole["stack"],
        "masked": {"kernel": optax.MaskedNode()},
    }
    updates, _ = case.update(grads, case.tx.init(grads))
    assert updates["masked"] == grads["masked"]
    assert updates["hidden"].pop("static") is None
    alone = {name: whole[name] for name in ("hidden", "stack")}
    expected, _ = case.update(alone, case.tx.init(alone))
    assert_trees_equal({name: updates[name] for name in expected}, expected)


OLD_ARGUMENTS = (
    "stablegrad",
    "gradient_stabilizer",
    "gradient_autoscaled_normalization",
    "clip_by_history",
    "gradient_report",
)

MASK = {
    "hidden": {"bias": True, "kernel": False},
    "norm": {"scale": False},
    "stack": {"bias": True, "kernel": True},
}


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK | {"norm": False}, lambda tree: MASK, False],
    ids=["tree", "prefix", "callable", "nothing"],
)
@each_transformation
def test_mask_means_what_it_means_in_optax(case, mask):
    """Two updates equal those of `optax.masked`, and False is exact to the last bit."""
    grads = gradients()
    tx = case.make(mask=mask)
    whole = jax.tree.map(lambda _: False, grads) if mask is False else mask
    expected_tx = optax.masked(case.tx, whole)
    state, expected_state = tx.init(grads), expected_tx.init(grads)
    for seed in range(2):
        grads = gradients(seed)
        updates, state = tx.update(grads, state, grads, **case.extra_args)
        expected, expected_state = expected_tx.update(
            grads, expected_state, grads, **case.extra_args
        )
        assert_trees_close(updates, expected)
    for name in ("norm", "hidden"):
        kept = {"norm": "scale", "hidden": "kernel"}[name]
        assert_trees_equal(updates[name][kept], grads[name][kept])


@pytest.mark.parametrize("name", OLD_ARGUMENTS)
def test_an_old_argument_names_the_new_one(name):
    with pytest.raises(
        TypeError, match="'stacked_axes'; its name is 'num_stacked_axes'"
    ):
        getattr(stablegrad_optax, name)(stacked_axes=1)


@each_transformation
def test_a_state_of_other_layers_is_refused(case):
    """Renamed layers outside jit; another number of layers everywhere."""
    layer = gradients()["hidden"]
    update = functools.partial(case.tx.update, **case.extra_args)
    state = case.tx.init({"old": layer, "same": layer})
    with pytest.raises(ValueError, match="other leaves from 'new/"):
        update({"new": layer, "same": layer}, state)
    for each in (update, jax.jit(update)):
        with pytest.raises(ValueError, match="slices to scale instead of"):
            each({"old": layer}, state)


@each_method
def test_nested_masks(case):
    grads = gradients()
    mask = {"hidden": True, "norm": False, "stack": {"bias": True, "kernel": True}}
    inner = {"hidden": True, "norm": True, "stack": False}

    def nested(tree):
        # The inner mask is for the tree that the outer one has masked.
        return {name: inner[name] for name in tree}

    tx = optax.masked(optax.masked(case.tx, nested), mask)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), **case.extra_args)
    assert_trees_equal(updates["norm"], grads["norm"])
    assert_trees_equal(updates["stack"], grads["stack"])
    alone = {"hidden": grads["hidden"]}
    assert_trees_close(updates["hidden"], case.first_update(alone)["hidden"])


def wrappers(case):
    """Each wrapper around the method: its transformation."""
    labels = {"hidden": "method", "norm": "method", "stack": "method"}
    return {
        "chain": optax.chain(case.tx, optax.identity()),
        "named_chain": optax.named_chain(("method", case.tx), ("end", optax.scale(1))),
        "partition": optax.partition({"method": case.tx}, labels),
        "masked": optax.masked(case.tx, True),
        "apply_if_finite": optax.apply_if_finite(case.tx, 3),
        "conditionally_mask": optax.conditionally_mask(case.tx, lambda step: step >= 0),
        "snapshot": optax.chain(optax.snapshot("norm", optax.tree.norm), case.tx),
    }


@each_with_one(METHODS, "wrapper", list(wrappers(CASES[0])))
def test_inside_a_wrapper_equals_alone(case, wrapper):
    tx = optax.with_extra_args_support(wrappers(case)[wrapper])
    grads = gradients()
    # Not compiled: a program for each wrapper and case would take minutes.
    updates, _ = tx.update(grads, tx.init(grads), grads, **case.extra_args)
    assert_trees_close(updates, case.first_update(grads))


@each_method
def test_apply_if_finite_keeps_the_statistics_of_a_bad_step(case):
    tx = optax.apply_if_finite(case.tx, 3)
    grads = gradients()
    step = jax.jit(functools.partial(tx.update, **case.extra_args))
    _, state = step(grads, tx.init(grads))
    updates, skipped = step(jax.tree.map(lambda x: x * jnp.nan, grads), state)
    assert_trees_equal(updates, optax.tree.zeros_like(grads))
    assert_trees_equal(skipped.inner_state, state.inner_state)


@each_method
def test_conditionally_mask_keeps_the_state_of_a_skipped_step(case):
    tx = optax.conditionally_mask(case.tx, lambda step: step < 1)
    grads = gradients()
    step = jax.jit(functools.partial(tx.update, **case.extra_args))
    _, state = step(grads, tx.init(grads))
    updates, skipped = step(gradients(1), state)
    assert_trees_equal(updates, optax.tree.zeros_like(grads))
    assert_trees_equal(skipped.inner_state, state.inner_state)


def public():
    return [getattr(stablegrad_optax, name) for name in stablegrad_optax.__all__]


@pytest.mark.parametrize("symbol", public(), ids=lambda symbol: symbol.__name__)
def test_every_public_function_shows_an_example(symbol):
    """The examples themselves run as doctests (see pyproject.toml)."""
    if isinstance(symbol, type):
        assert symbol.__doc__
    else:
        assert ">>> " in symbol.__doc__
        assert "Args:" in symbol.__doc__
        assert "Returns:" in symbol.__doc__


def test_no_private_import_of_optax_and_no_front_end_in_the_package():
    root = Path(stablegrad_optax.__file__).parent
    for path in root.glob("*.py"):
        imports = re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.M)
        for module in imports:
            assert not module.startswith("optax._"), path
            assert module.split(".")[0] not in ("flax", "equinox", "matplotlib", "rich")
