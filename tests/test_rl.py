"""PPO: its advantages and loss in literal NumPy, rollouts, minibatches, scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lib.optimizers import Optimizer
from benchmarks.lib.train import Rule, Training, moments
from benchmarks.tasks.control import ppo
from benchmarks.tasks.control.environments import ENVIRONMENTS
from benchmarks.tasks.control.task import Ppo
from stablegrad_optax import prediction_grad_std

# An episode of random actions takes some 22 steps: several end in a rollout.
TASK = Ppo(ENVIRONMENTS["CartPole-v1"], copies=3, horizon=40, minibatches=4, epochs=2)
NUM_EXAMPLES, UPDATES = 120, 8

gradient = jax.jit(Ppo.gradient, static_argnums=0)
score = jax.jit(Ppo.score, static_argnums=0)


@pytest.fixture(scope="module")
def trained():
    """Weights, the key, and what a run carries after each update of two rollouts."""
    key = jax.random.key(0)
    params, state = TASK.init(key)
    states = []
    for step in range(2 * UPDATES):
        state = gradient(TASK, params, state, key, step).state
        states.append(state)
    return params, key, states


@pytest.fixture(scope="module")
def rollout():
    """Rewards, values, ends and last values of five copies, f64."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 30, 5))
    return rewards, values, rng.random((30, 5)) < 0.2, rng.normal(size=5)


def test_advantages_are_discounted_sums_of_errors_up_to_the_end(rollout):
    rewards, values, ended, last = rollout
    horizon, copies = rewards.shape
    after = np.concatenate([values[1:], last[None]])
    expected = np.zeros((horizon, copies))
    for copy in range(copies):
        for first in range(horizon):
            factor = 1.0
            for t in range(first, horizon):
                error = rewards[t, copy] - values[t, copy]
                if not ended[t, copy]:
                    error += 0.99 * after[t, copy]
                expected[first, copy] += factor * error
                factor *= 0.99 * 0.95
                if ended[t, copy]:
                    break
    single = (a.astype(np.float32) for a in (rewards, values))
    found = ppo.advantages(*single, ended, last.astype(np.float32))
    # Sums of thirty terms in single precision.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def examples():
    """Outputs and a batch, f64, some ratios and values beyond their ranges."""
    rng = np.random.default_rng(1)
    num, actions = 50, 3
    logits, values = rng.normal(size=(num, actions)), 3 * rng.normal(size=num)
    batch = ppo.Experience(
        rng.normal(size=(num, 4)),
        rng.integers(actions, size=num),
        np.log(rng.uniform(0.1, 0.9, num)),
        values + rng.normal(scale=0.3, size=num),
        2 + 5 * rng.normal(size=num),
        3 * rng.normal(size=num),
    )
    return (logits, values), batch


def test_the_loss_is_the_clipped_objective_of_the_paper(examples):
    (logits, values), batch = examples
    policy = value = entropy = 0.0
    mean, std = batch.advantages.mean(), batch.advantages.std()
    for i, action in enumerate(batch.actions):
        probs = np.exp(logits[i]) / np.exp(logits[i]).sum()
        ratio = probs[action] / np.exp(batch.log_probs[i])
        score = (batch.advantages[i] - mean) / std
        policy += min(ratio * score, min(max(ratio, 0.8), 1.2) * score) / 50
        change = min(max(values[i] - batch.values[i], -0.2), 0.2)
        errors = values[i] - batch.targets[i], batch.values[i] + change
        errors = errors[0], errors[1] - batch.targets[i]
        value += max(e**2 for e in errors) / 2 / 50
        entropy -= (probs * np.log(probs)).sum() / 50
    expected = -policy + 0.5 * value - 0.01 * entropy
    single = jax.tree.map(
        lambda a: a if a.dtype.kind == "i" else a.astype(np.float32), examples
    )
    assert float(ppo.loss(*single)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", [0, 6])
def test_the_gradient_is_that_of_the_loss_at_its_minibatch(trained, update):
    params, key, states = trained
    step = UPDATES + update
    found = gradient(TASK, params, states[step - 1], key, step)
    minibatch = slice(30 * (update % 4), 30 * (update % 4 + 1))
    batch = jax.tree.map(lambda leaf: leaf[minibatch], states[step].experience)

    def loss(params, probe):
        logits, values = TASK.model.apply({"params": params}, batch.observations)
        return ppo.loss((logits + probe[0], values + probe[1]), batch)

    probe = jnp.zeros((30, 2)), jnp.zeros(30)
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, probe)
    value, (grads, output_grads) = both
    assert float(found.loss) == pytest.approx(float(value), rel=1e-5)
    # Two programs for one derivative: they differ by rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        found.grads,
        grads,
    )
    std = 30 * prediction_grad_std(output_grads)
    assert float(found.probes["prediction"]) == pytest.approx(float(std), rel=1e-4)


def test_a_rollout_is_collected_at_its_step_alone_and_shuffled_every_epoch(trained):
    _, _, states = trained
    for step in range(1, 2 * UPDATES):
        before, after = states[step - 1], states[step]
        rows = [np.asarray(s.experience.observations) for s in (before, after)]
        is_new, is_epoch = step % UPDATES == 0, step % 4 == 0
        same_place = np.array_equal(before.observations, after.observations)
        same_rows = np.array_equal(*(np.sort(r, axis=0) for r in rows))
        assert same_place == same_rows == (not is_new)
        assert np.array_equal(*rows) == (not is_epoch)


def test_what_is_learned_from_was_done_by_the_policy(trained):
    params, _, states = trained
    experience = states[UPDATES].experience
    logits, values = TASK.model.apply({"params": params}, experience.observations)
    every = np.asarray(jax.nn.log_softmax(logits))
    chosen = every[np.arange(NUM_EXAMPLES), experience.actions]
    np.testing.assert_allclose(experience.log_probs, chosen, rtol=1e-5)
    np.testing.assert_allclose(experience.values, values, rtol=1e-4, atol=1e-5)
    targets = experience.advantages + experience.values
    np.testing.assert_allclose(experience.targets, targets, rtol=1e-5)
    assert 0.3 < experience.actions.mean() < 0.7


def test_nothing_is_added_from_beyond_an_end_and_the_next_episode_starts(trained):
    """Every reward of CartPole is 1, and only a start is so near to 0."""
    params, key, states = trained
    last = states[UPDATES - 1]
    found = TASK.collect(params, last.environments, last.observations, key)
    observations, advantages, values = (
        np.asarray(leaf).reshape(40, 3, -1)
        for leaf in (
            found.experience.observations,
            found.experience.advantages,
            found.experience.values,
        )
    )
    beyond = (np.abs(observations[:, :, [0, 2]]) > [2.4, 12 * np.pi / 180]).any(-1)
    assert not beyond.any()
    starts = (np.abs(observations) <= 0.05).all(-1)
    jumps = np.abs(np.diff(observations[..., 2], axis=0)) > 0.1  # of the angle
    ends = jumps & starts[1:]
    assert ends.sum() >= 3
    np.testing.assert_allclose(
        advantages[:-1, :, 0][ends], 1 - values[:-1, :, 0][ends], rtol=1e-4
    )


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_alone():
    """The weights are fixed, through a rollout and into the next."""
    keys = jax.random.split(jax.random.key(7), 2)
    starts = [TASK.init(key) for key in keys]
    params, together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    side_by_side = jax.jit(jax.vmap(TASK.gradient, (0, 0, 0, None)))
    alone = [state for _, state in starts]
    for step in range(UPDATES + 1):
        both = side_by_side(params, together, keys, step)
        together = both.state
        for run, key in enumerate(keys):
            one = gradient(TASK, starts[run][0], alone[run], key, step)
            alone[run] = one.state
            jax.tree.map(
                lambda a, b, run=run: np.testing.assert_allclose(
                    a[run], b, rtol=1e-3, atol=1e-4
                ),
                both,
                one,
            )


def test_updates_in_one_program_are_those_of_a_loop():
    rule = Rule(Optimizer.named("clip at 0.5 + Adam"), UPDATES + 3)

    def run(in_one_program):
        training = Training(
            TASK,
            rule,
            (1, UPDATES + 3),
            jax.random.split(jax.random.key(1), 4),
            in_one_program=in_one_program,
        )
        for moment in moments([training] * 2, (1e-3, 1e-2), (0, 1)):
            yield jax.device_get(moment._replace(ms_per_step=0.0))

    for loop, program in zip(run(False), run(True), strict=True):
        jax.tree.map(
            # Two programs round differently, and Adam's first updates are signs.
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            program,
            loop,
        )


@pytest.mark.parametrize(
    "name",
    [
        "CartPole-v1",
        pytest.param("Breakout-MinAtar", marks=pytest.mark.slow),
    ],
)
def test_chance_is_what_uniformly_random_actions_score(name):
    """Zero weights are that policy; within four standard errors of 256 episodes."""
    task = Ppo(ENVIRONMENTS[name], copies=1, horizon=4, minibatches=1)
    params, state = task.init(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    found = score(task, zeros, state, jax.random.split(jax.random.key(1), 256))
    error = {"CartPole-v1": 3.0, "Breakout-MinAtar": 0.18}[name]
    assert float(found["return"]) == pytest.approx(task.environment.chance, abs=error)
    assert float(found["error"]) == pytest.approx(1, abs=0.01)


def test_an_error_is_the_missing_share_of_the_way():
    cartpole = ENVIRONMENTS["CartPole-v1"]
    for mean, error in ((22.3, 1), (9, 1), (500, 0), (501, 0), (261.15, 0.5)):
        assert float(cartpole.error(jnp.array(mean))) == pytest.approx(error, abs=1e-5)
    assert cartpole.failure_return == pytest.approx(261.15)
