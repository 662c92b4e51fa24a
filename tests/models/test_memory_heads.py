"""The external memory against the equations in NumPy, attention against its sequence at once, and both learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat

import metagen_jax as mg
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.models.memory_heads import attention, memory
from metagen_jax.models.networks import Network

SIZE, WAY = 4, 3
BODY = Network(lambda key: {"hidden_0": {"kernel": jnp.eye(SIZE)}}, lambda params, x: x @ params["hidden_0"]["kernel"])
HEADS = {"memory": lambda: memory(4, 5, recent=0.3, scale=2.0), "attention": lambda: attention(2, 5)}


def _numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def _random(tree, seed=0):
    """Return random parameters like these: nothing is zero, the identity or one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype), tree)


def _learned(head):
    return _random(jax.eval_shape(lambda key: head.init(key, SIZE, WAY), jax.random.key(0)))


def _classify(head):
    """Return (learned, features, targets, queries) -> logits, compiled; rows without a target are unlabelled."""

    @jax.jit
    def logits(learned, features, targets, queries):
        unlabelled = 1.0 * (targets.sum(1) == 0)
        return head.score(head.read(learned, features, targets, unlabelled), queries)

    return logits


def _softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def _cosine(a, b):
    return a @ b / np.sqrt((a @ a + 1e-8) * (b @ b + 1e-8))


def test_the_memory_follows_the_equations_of_least_recently_used_access(x64):
    """Three examples in two slots: the third overwrites the one that was used less."""
    head = memory(2, 2, decay=0.9, recent=0.3, scale=1.5)
    learned = _learned(head) | {"gate": np.log(0.3 / 0.7), "log_scale": np.log(1.5)}
    features, targets = _numbers(3, SIZE), np.eye(3)
    stored, usage, last, chosen = np.zeros((2, 5)), np.zeros(2), np.zeros(2), []
    for feature, target in zip(features, targets, strict=True):
        key = feature @ np.asarray(learned["key"])
        least = int(np.argmin(usage))
        chosen.append(least)
        weight = 0.3 * last + 0.7 * np.eye(2)[least]
        stored[least] = 0.0
        stored += np.outer(weight, np.concatenate([key, target]))
        last = _softmax(np.array([1.5 * _cosine(key, row[:2]) for row in stored]))
        usage = 0.9 * usage + last + weight
    task = jax.jit(head.read)(learned, features, targets, jnp.zeros(3))
    assert chosen[:2] == [0, 1]
    np.testing.assert_allclose(task["memory"], stored, rtol=1e-12)

    query = _numbers(SIZE, seed=1)
    key = query @ np.asarray(learned["key"])
    seen = _softmax(np.array([1.5 * _cosine(key, row[:2]) for row in stored])) @ stored
    expected = np.concatenate([key, seen]) @ np.asarray(learned["kernel"]) + np.asarray(learned["bias"])
    np.testing.assert_allclose(jax.jit(head.score)(task, query[None])[0], expected, rtol=1e-12)


def test_a_memory_that_is_too_small_overwrites_what_was_neither_written_nor_read_lately():
    """The third example is the first once more, which is read again; its own slot, read by half, is the least used."""
    head = memory(3, SIZE, decay=0.9, recent=1e-6, scale=100.0)
    learned = jax.jit(lambda key: head.init(key, SIZE, 4))(jax.random.key(0)) | {"key": np.eye(SIZE)}
    rows = np.eye(SIZE)[[0, 1, 0, 2]].astype("f4")
    task = jax.jit(head.read)(learned, rows, np.eye(4, dtype="f4"), jnp.zeros(4))
    np.testing.assert_allclose(task["memory"][:, SIZE:], np.eye(4)[[0, 1, 3]], atol=1e-4)


def test_at_the_start_permuting_the_classes_permutes_the_logits_of_the_memory():
    head = memory(4, 5)
    learned, classify = jax.jit(lambda key: head.init(key, SIZE, WAY))(jax.random.key(0)), _classify(head)
    features, targets, order = _numbers(4, SIZE).astype("f4"), np.eye(WAY, dtype="f4")[[0, 1, 2, 1]], [2, 0, 1]
    query = _numbers(6, SIZE, seed=1).astype("f4")
    logits = np.asarray(classify(learned, features, targets, query))
    permuted = classify(learned, features, targets[:, order], query)
    assert np.abs(logits - logits[:, order]).max() > 0.1
    np.testing.assert_allclose(permuted, logits[:, order], rtol=1e-5, atol=1e-5)


def test_attention_to_the_kept_support_equals_attention_over_the_whole_sequence(x64):
    width, layers = 5, 2
    head = attention(layers, width)
    learned = _learned(head)
    features, targets, queries = _numbers(6, SIZE), np.eye(WAY)[[0, 1, 2, 0, 1, 2]], _numbers(2, SIZE, seed=1)
    together, blocks = _classify(head)(learned, features, targets, queries), learned["layers"]
    for row, query in enumerate(queries):
        x = np.concatenate([np.vstack([features, query]), np.vstack([targets, np.zeros(WAY)])], axis=1)
        for index in range(layers):
            block = blocks[f"layer_{index}"]
            x = np.hstack([x, np.tanh(x @ block["filter"]) / (1 + np.exp(-x @ block["gate"]))])
            seen = []
            for place in range(len(x)):
                alike = (x[: place + 1] @ block["key"]) @ (x[place] @ block["query"]) / np.sqrt(width)
                seen.append(_softmax(alike) @ (x[: place + 1] @ block["value"]))
            x = np.hstack([x, np.array(seen)])
        expected = x[-1] @ np.asarray(learned["kernel"]) + np.asarray(learned["bias"])
        np.testing.assert_allclose(together[row], expected, rtol=1e-10)


def _padded(leaf, value):
    """Put two rows of `value` between the others and one behind them."""
    extra = np.full((1, *leaf.shape[1:]), value, leaf.dtype)
    return np.concatenate([leaf[:1], extra, leaf[1:3], extra, leaf[3:], extra])


@pytest.mark.parametrize("name", HEADS)
def test_rows_without_a_target_and_other_queries_change_nothing(name):
    head = HEADS[name]()
    learned, classify = _learned(head), _classify(head)
    features, targets = _numbers(4, SIZE).astype("f4"), np.eye(WAY, dtype="f4")[[0, 1, 2, 1]]
    queries = _numbers(3, SIZE, seed=1).astype("f4")
    logits = np.asarray(classify(learned, features, targets, queries))
    padded = _padded(features, 7.0), _padded(targets, 0.0)
    np.testing.assert_allclose(classify(learned, *padded, queries), logits, rtol=1e-5, atol=1e-6)
    others = np.stack([queries[1], queries[1] + 1, queries[0]])
    np.testing.assert_allclose(classify(learned, features, targets, others)[0], logits[1], rtol=1e-5, atol=1e-6)
    changed = features + 3.0 * np.eye(4, dtype="f4")[:, [2]]
    assert np.abs(classify(learned, changed, targets, queries) - logits).max() > 1e-3
    assert np.abs(classify(learned, features, targets[::-1], queries) - logits).max() > 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_a_support_without_any_example_gives_finite_logits_and_gradients(name):
    head = HEADS[name]()

    def total(learned, features):
        return head.score(head.read(learned, features, jnp.zeros((2, WAY)), jnp.ones(2)), features).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(_learned(head), _numbers(2, SIZE).astype("f4"))
    assert np.isfinite(value)
    assert np.isfinite(flat(gradients)).all()


def _task(key, shot=1, query=2, noise=0.2):
    centre_key, support_key, query_key, order_key = jax.random.split(key, 4)
    centres = jax.random.normal(centre_key, (WAY, SIZE))

    def examples(key, num):
        x = centres[:, None] + noise * jax.random.normal(key, (WAY, num, SIZE))
        return mg.Examples(x.reshape(-1, SIZE), jnp.repeat(jnp.arange(WAY), num), jnp.ones(WAY * num))

    places = jax.random.permutation(order_key, WAY * shot)
    support = jax.tree.map(lambda leaf: leaf[places], examples(support_key, shot))
    return mg.Task(support, examples(query_key, query))


@pytest.mark.parametrize("name", HEADS)
def test_the_meta_gradient_equals_finite_differences(x64, name):
    built = mg.classifier(BODY, SIZE, WAY, HEADS[name]())
    learner = mg.amortised(built.model, built.embed)
    meta = _random(jax.eval_shape(learner.init, jax.random.key(0)), seed=3)
    task = _task(jax.random.key(1), shot=2)
    gradient, _ = jax.jit(learner.field)(meta, jax.random.key(2), task)
    along = _random(meta, seed=4)

    @jax.jit
    def loss(meta):
        adapted, _ = learner.adapt(meta, jax.random.key(2), task.support)
        return built.model.game(adapted, jax.random.key(2), task.query)[0]["head"]

    for player in ("body", "head"):
        only = {name: jax.tree.map(lambda d, on=name == player: d * on, tree) for name, tree in along.items()}
        slope = flat(gradient) @ flat(only)
        assert abs(slope) > 1e-4
        np.testing.assert_allclose(slope, finite_difference(loss, meta, only), rtol=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("memory", 120), ("attention", 200)])
def test_meta_training_finds_how_to_classify_from_one_example(name, steps):
    """Random class centres, new ones in every task: what is learned is to look up, not the classes."""
    built = mg.classifier(
        BODY, SIZE, WAY, {"memory": lambda: memory(4, 8), "attention": lambda: attention(1, 16)}[name]()
    )
    learner = mg.amortised(built.model, built.embed)
    meta = jax.jit(learner.init)(jax.random.key(0))
    if name == "memory":  # which would know how from the start
        meta["head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(1), meta["head"]["kernel"].shape)
    total, rule = sum_over_tasks(learner.field), optax.adam(2e-2)
    tasks = jax.jit(jax.vmap(_task))(jax.random.split(jax.random.key(2), 16 * steps))
    tasks = jax.tree.map(lambda leaf: leaf.reshape(steps, 16, *leaf.shape[1:]), tasks)
    keys = jax.random.split(jax.random.key(3), 16)

    @jax.jit
    def train(meta):
        def step(carry, tasks):
            meta, state = carry
            direction, metrics = total(meta, jax.random.clone(keys), tasks, jnp.full(16, 1 / 16))
            updates, state = rule.update(direction, state, meta)
            return (optax.apply_updates(meta, updates), state), metrics["accuracy"].mean()

        return jax.lax.scan(step, (meta, rule.init(meta)), tasks)[1]

    accuracy = np.asarray(train(meta))
    assert accuracy[:3].mean() < 0.55
    assert accuracy[-20:].mean() > 0.85


def test_attention_begins_by_seeing_what_is_alike():
    """At the start a query sees most of the example with its own feature, in every layer's kernels."""
    head = attention(1, 64, scale=8.0)
    learned = jax.jit(lambda key: head.init(key, SIZE, WAY))(jax.random.key(0))
    features = 4 * np.eye(SIZE, dtype="f4")[:3]
    x = np.concatenate([features, np.zeros((3, WAY), "f4")], axis=1)
    block = jax.tree.map(np.asarray, learned["layers"]["layer_0"])
    x = np.concatenate([x, np.tanh(x @ block["filter"]) / (1 + np.exp(-x @ block["gate"]))], axis=1)
    alike = (x @ block["query"]) @ (x @ block["key"]).T
    np.testing.assert_array_equal(alike.argmax(1), [0, 1, 2])
    np.testing.assert_array_equal(block["query"], 8.0 * block["key"])


@pytest.mark.parametrize("head", [memory(4, 5), attention()])
def test_a_head_that_was_not_read_says_so(head):
    with pytest.raises(ValueError, match="read off a support set before it can score"):
        head.score(_learned(head), jnp.zeros((1, SIZE)))


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="slots=0"):
        memory(0, 3)
    with pytest.raises(ValueError, match=r"recent=1\.0"):
        memory(3, 3, recent=1.0)
    with pytest.raises(ValueError, match="layers=0"):
        attention(0)
