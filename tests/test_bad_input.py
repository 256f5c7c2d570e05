"""Wrong calls, each with the message it must give."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import gradients

from stablegrad_optax import (
    prediction_grad_std,
    scale_factors,
    stablegrad,
    value_and_grad_with_prediction_std,
)

GRADS = gradients()
STATE = stablegrad().init(GRADS)
HIDDEN = {"hidden": GRADS["hidden"]}
NUMBER = "must be a finite number at least 0; got "


def update(grads=GRADS, state=STATE, **kwargs):
    extra_args = (
        {"prediction_grad_std": kwargs.pop("sigma")} if "sigma" in kwargs else {}
    )
    return stablegrad(**kwargs).update(grads, state, **extra_args)


def init(**kwargs):
    return stablegrad(**kwargs).init(GRADS)


def kernels(dtype):
    return {"a": {"kernel": np.ones((2, 2), dtype)}}


def per_example_of_a_scalar():
    f = value_and_grad_with_prediction_std(
        lambda w, x: w * x, lambda y: y**2, per_example=True
    )
    return f(2.0, 3.0)


def scale_factors_in_jit():
    return jax.jit(lambda state: scale_factors(state, GRADS))(STATE)


CALLS = {
    # At construction: the name, the value, the allowed range.
    "reference below 0": (lambda: stablegrad(-1.0), f"reference_std {NUMBER}-1.0"),
    "reference NaN": (lambda: stablegrad(np.nan), f"reference_std {NUMBER}nan"),
    "reference infinite": (lambda: stablegrad(np.inf), f"reference_std {NUMBER}inf"),
    "reference text": (lambda: stablegrad("1"), f"reference_std {NUMBER}'1'"),
    "reference bool": (lambda: stablegrad(True), f"reference_std {NUMBER}True"),
    "reference complex": (lambda: stablegrad(1j), f"reference_std {NUMBER}1j"),
    "reference schedule": (
        lambda: stablegrad(optax.constant_schedule(1.0)),
        f"reference_std {NUMBER}<function",
    ),
    "eps below 0": (lambda: stablegrad(eps=-1e-8), f"eps {NUMBER}-1e-08"),
    "eps NaN": (lambda: stablegrad(eps=np.nan), f"eps {NUMBER}nan"),
    "eps None": (lambda: stablegrad(eps=None), f"eps {NUMBER}None"),
    "scale_biases None": (
        lambda: stablegrad(scale_biases=None),
        "scale_biases must be True or False; got None",
    ),
    "scale_biases 1": (
        lambda: stablegrad(scale_biases=1),
        "scale_biases must be True or False; got 1",
    ),
    "growth 1": (
        lambda: stablegrad(max_reference_growth=1.0),
        "max_reference_growth must be a finite number above 1; got 1.0",
    ),
    "growth below 1": (
        lambda: stablegrad(max_reference_growth=0.5),
        "max_reference_growth must be a finite number above 1; got 0.5",
    ),
    "growth infinite": (
        lambda: stablegrad(max_reference_growth=np.inf),
        "max_reference_growth must be a finite number above 1; got inf",
    ),
    "growth text": (
        lambda: stablegrad(max_reference_growth="2"),
        "max_reference_growth must be a finite number above 1; got '2'",
    ),
    # Masks.
    "mask of numbers": (
        lambda: init(mask=jax.tree.map(lambda _: 1, GRADS)),
        "mask must hold bools; got 1 for leaf 'hidden/bias'",
    ),
    "mask of arrays": (
        lambda: init(mask=jax.tree.map(lambda g: g > 0, GRADS)),
        "mask must hold bools; got Array",
    ),
    "mask of another tree": (
        lambda: init(mask={"hidden": True}),
        "mask must be a pytree prefix of the gradient tree, or a callable",
    ),
    "mask deeper than the tree": (
        lambda: init(mask={"hidden": True, "stack": True, "norm": {"scale": [True]}}),
        "mask must be a pytree prefix of the gradient tree, or a callable",
    ),
    "mask callable for another tree": (
        lambda: init(mask=lambda tree: [True]),
        "mask must be a pytree prefix of the gradient tree, or a callable",
    ),
    "weights of numbers": (
        lambda: init(weights=jax.tree.map(lambda _: 1, GRADS)),
        "weights must hold bools; got 1 for leaf 'hidden/bias'",
    ),
    "weights of another tree": (
        lambda: init(weights={"hidden": True}),
        "weights must be a pytree prefix of the gradient tree, or a callable",
    ),
    "weights selects integers": (
        lambda: stablegrad(weights=True).init(kernels(np.int32)),
        "weights selects leaf 'a/kernel' of dtype int32; only floating leaves",
    ),
    # Stacked layers.
    "num_stacked_axes below 0": (
        lambda: init(num_stacked_axes=-1),
        "num_stacked_axes of leaf 'hidden/bias' must be an int from 0 to its number of "
        "axes, 1; got -1",
    ),
    "num_stacked_axes beyond the axes": (
        lambda: init(num_stacked_axes=2),
        "num_stacked_axes of leaf 'hidden/bias' must be an int from 0 to its number of "
        "axes, 1; got 2",
    ),
    "num_stacked_axes float": (
        lambda: init(num_stacked_axes=1.0),
        "num_stacked_axes of leaf 'hidden/bias' must be an int from 0 to its number of "
        "axes, 1; got 1.0",
    ),
    "num_stacked_axes bool": (
        lambda: init(num_stacked_axes=True),
        "num_stacked_axes of leaf 'hidden/bias' must be an int",
    ),
    "num_stacked_axes of another tree": (
        lambda: init(num_stacked_axes={"hidden": 1}),
        "num_stacked_axes must be a pytree prefix of the gradient tree, or a callable",
    ),
    "num_stacked_axes callable for another tree": (
        lambda: init(num_stacked_axes=lambda tree: (0, 1)),
        "num_stacked_axes must be a pytree prefix of the gradient tree, or a callable",
    ),
    # In update.
    "no reference": (
        lambda: update(reference_std=None),
        "stablegrad has no reference: pass prediction_grad_std to update",
    ),
    "reference with axes": (
        lambda: update(sigma=jnp.ones(2)),
        "prediction_grad_std must be a real scalar; got dtype float32, shape (2,)",
    ),
    "reference tree": (
        lambda: update(sigma={"hidden": 1.0}),
        "prediction_grad_std must be a real scalar; got {'hidden': 1.0}",
    ),
    "reference a string": (
        lambda: update(sigma="0.5"),
        "prediction_grad_std must be a real scalar; got '0.5'",
    ),
    "reference complex array": (
        lambda: update(sigma=jnp.array(1j)),
        "prediction_grad_std must be a real scalar; got dtype complex64",
    ),
    "reference boolean array": (
        lambda: update(sigma=jnp.array(True)),
        "prediction_grad_std must be a real scalar; got dtype bool",
    ),
    "prediction_grad_std True": (
        lambda: update(sigma=True),
        f"prediction_grad_std {NUMBER}True",
    ),
    "prediction_grad_std below 0": (
        lambda: update(sigma=-1.0),
        f"prediction_grad_std {NUMBER}-1.0",
    ),
    "prediction_grad_std NaN": (
        lambda: update(sigma=np.nan),
        f"prediction_grad_std {NUMBER}nan",
    ),
    "integer gradients": (
        lambda: update(kernels(np.int32), stablegrad().init(kernels("f"))),
        "Gradients must be floating point; leaf 'a/kernel' is int32",
    ),
    "boolean gradients": (
        lambda: update(kernels(bool), stablegrad().init(kernels("f"))),
        "Gradients must be floating point; leaf 'a/kernel' is bool",
    ),
    "integer biases": (
        lambda: update({"b": np.ones(2, np.int32)}, stablegrad().init({"b": 1.0})),
        "Exclude it with optax.masked or optax.partition",
    ),
    "a leaf more than in init": (
        lambda: update(GRADS | kernels("f")),
        "5 slices to scale instead of 4, from 'a/kernel' on. Please call init",
    ),
    "a layer less than in init": (
        lambda: update({"hidden": GRADS["hidden"]}),
        "2 slices to scale instead of 4. Please call init on a tree of the same",
    ),
    "a state of renamed layers": (
        lambda: update({"layer": GRADS["hidden"]}, stablegrad().init(HIDDEN)),
        "the state belongs to other leaves from 'layer/bias' on. Please call init",
    ),
    "a mask that fits init alone": (
        lambda: update(kernels("f"), mask=jax.tree.map(lambda g: True, GRADS)),
        "mask must be a pytree prefix of the gradient tree, or a callable",
    ),
    # prediction_grad_std and its companion.
    "no prediction": (
        lambda: prediction_grad_std({}),
        "prediction_grad must hold at least one floating entry",
    ),
    "empty prediction": (
        lambda: prediction_grad_std(jnp.zeros((0, 3))),
        "prediction_grad must hold at least one floating entry",
    ),
    "integer prediction": (
        lambda: prediction_grad_std(jnp.arange(3)),
        "prediction_grad must be floating; got int32",
    ),
    "boolean prediction": (
        lambda: prediction_grad_std(jnp.array([True, False])),
        "prediction_grad must be floating; got bool",
    ),
    "no examples": (
        lambda: prediction_grad_std(jnp.ones(3), num_examples=0),
        "num_examples must be a finite number above 0; got 0",
    ),
    "a string of examples": (
        lambda: prediction_grad_std(jnp.ones(3), num_examples="8"),
        "num_examples must be a finite number above 0; got '8'",
    ),
    "per_example of a scalar": (
        per_example_of_a_scalar,
        "predictions must have a leading axis of examples for per_example=True",
    ),
    # scale_factors.
    "no state of ours": (
        lambda: scale_factors(optax.adam(1e-3).init(GRADS), GRADS),
        "opt_state holds no state of stablegrad, gradient_stabilizer, gradient_auto",
    ),
    "params of another model": (
        lambda: scale_factors(STATE, kernels("f")),
        "opt_state was initialized for other leaves than those of params; params has "
        "a/kernel",
    ),
    "inside jit": (scale_factors_in_jit, "need values: call them outside jit"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_says_what_is_wrong(call):
    function, message = CALLS[call]
    with pytest.raises(ValueError, match=re.escape(message)):
        function()


def test_tracers_pass_every_check():
    """Only Python numbers are validated: the value of a tracer is not known."""

    @jax.jit
    def step(reference, eps, growth):
        tx = stablegrad(reference, eps=eps, max_reference_growth=growth)
        return tx.update(GRADS, tx.init(GRADS))

    step(1.0, 1e-30, 2.0)
