import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import metagen_jax as mg
from metagen_jax.cost import Flops, bytes_at_peak, flops

N, D, H, M = 5, 7, 11, 3  # examples, inputs, hidden units, outputs
X, Y = jnp.zeros((N, D)), jnp.zeros((N, M))
FIRST, SECOND = jnp.zeros((D, H)), jnp.zeros((H, M))
LAYERS = 2 * N * (D * H + H * M)  # products of both layers


def network(x, first, second):
    return jnp.tanh(x @ first) @ second


def loss(weights, x, y):
    return 0.5 * ((network(x, *weights) - y) ** 2).sum()


def test_a_forward_pass_counts_a_multiplication_and_an_addition_for_each_term_and_one_for_each_activation():
    assert flops(network, X, FIRST, SECOND) == Flops(LAYERS, N * H, 0)
    assert flops(lambda x: (x + 1.0).sum(), X) == Flops(0, N * D + (N * D - 1), 0)


def test_a_gradient_in_the_weights_costs_two_forward_passes_more_but_for_the_gradient_of_the_data():
    backward = 2 * N * (H * M + H * M + D * H)  # both sides of the second layer, the weights of the first
    assert flops(jax.grad(loss), (FIRST, SECOND), X, Y).products == LAYERS + backward
    assert flops(jax.jit(jax.grad(loss)), (FIRST, SECOND), X, Y).products == LAYERS + backward
    assert flops(jax.grad(loss, (0, 1)), (FIRST, SECOND), X, Y).products == LAYERS + backward + 2 * N * D * H


def test_the_body_of_a_scan_counts_as_often_as_it_runs_and_nested_scans_multiply():
    square = jnp.zeros((D, D))

    def steps(x, num):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ square), None), x, length=num)[0]

    once = Flops(2 * N * D * D, N * D, 0)
    assert flops(lambda x: steps(x, 6), X) == Flops(6 * once.products, 6 * once.elementwise, 0)
    nested = flops(lambda x: jax.lax.scan(lambda x, _: (steps(x, 6), None), x, length=4)[0], X)
    assert nested == Flops(24 * once.products, 24 * once.elementwise, 0)
    unrolled = flops(lambda x: jnp.tanh(jnp.tanh(x @ square) @ square), X)
    assert flops(lambda x: steps(x, 2), X) == unrolled


def test_what_no_output_depends_on_counts_nothing_in_the_carry_of_a_scan_either():
    square = jnp.zeros((D, D))

    def both(carry, _):
        kept, lost = carry
        return (jnp.tanh(kept), lost @ square), lost.sum()

    (kept, lost), sums = jax.eval_shape(lambda x: jax.lax.scan(both, (x, x), length=3), X)
    chex.assert_shape((kept, lost, sums), ((N, D), (N, D), (3,)))
    assert flops(lambda x: jax.lax.scan(both, (x, x), length=3)[0][0], X) == Flops(0, 3 * N * D, 0)
    assert flops(jax.jit(lambda x: jax.lax.scan(both, (x, x), length=3)[1]), X).products == 3 * 2 * N * D * D


@pytest.mark.parametrize("shared", [True, False])
def test_tasks_that_share_an_operand_and_tasks_that_do_not_count_alike(shared):
    first = FIRST if shared else jnp.zeros((4, D, H))
    mapped = jax.vmap(network, in_axes=(0, None if shared else 0, None))
    assert flops(mapped, jnp.zeros((4, N, D)), first, SECOND) == Flops(4 * LAYERS, 4 * N * H, 0)


def test_cond_counts_its_most_expensive_branch_and_while_its_body_once_and_says_so():
    branches = [lambda x: x, lambda x: jnp.tanh(x), lambda x: (x @ FIRST) @ FIRST.T]
    assert flops(lambda i, x: jax.lax.switch(i, branches, x), 0, X) == Flops(4 * N * D * H, 0, 0)
    count = flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9.0, jnp.tanh, x), X)
    assert count == Flops(0, N * D + N * D - 1, 1)
    in_scan = flops(
        lambda x: jax.lax.scan(
            lambda x, _: (jax.lax.while_loop(lambda x: x[0, 0] < 9.0, jnp.tanh, x), None), x, length=3
        )[0],
        X,
    )
    assert in_scan == Flops(0, 3 * N * D, 1)


def test_recomputation_counts():
    """A layer whose activations are thrown away is evaluated once more, but for its last product."""
    plain = flops(jax.grad(loss), (FIRST, SECOND), X, Y).products
    forgetful = jax.grad(lambda weights: 0.5 * ((jax.checkpoint(network)(X, *weights) - Y) ** 2).sum())
    assert flops(forgetful, (FIRST, SECOND)).products == plain + 2 * N * D * H


def test_bodies_of_custom_derivatives_are_entered():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, ct: (ct @ saved[1].T, saved[0].T @ ct))
    assert flops(product, X, FIRST).products == 2 * N * D * H
    assert flops(jax.grad(lambda w: product(X, w).sum()), FIRST).products == 2 * N * D * H  # x^T ct
    assert flops(jax.nn.relu, X) == Flops(0, N * D, 0)  # a custom_jvp


def test_a_body_on_several_devices_counts_on_each_of_them():
    mesh = jax.make_mesh((4,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("task"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(split, whole), out_specs=split)
    assert flops(mapped, jnp.zeros((8, D)), FIRST) == flops(lambda x, w: x @ w, jnp.zeros((8, D)), FIRST)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_the_terms_that_are_there_and_not_its_padding(groups):
    """Hand formula: stride 2, window 3, SAME on 7 pixels: 4 places, 3 terms each but for 2 at either border."""
    batch, size, inputs, outputs, window = 2, 7, 4, 6, 3
    image, kernel = jnp.zeros((batch, size, size, inputs)), jnp.zeros((window, window, inputs // groups, outputs))

    def convolve(image, kernel, padding="SAME"):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    there = 3 * 3 + 1 * 2 - 1 + 0  # of the four places 0, 2, 4, 6 from -1 on: 2, 3, 3, 2 terms
    assert there == 2 + 3 + 3 + 2
    want = 2 * batch * outputs * (inputs // groups) * there**2
    assert flops(convolve, image, kernel).products == want
    valid = 2 * batch * outputs * (inputs // groups) * (3 * window) ** 2
    assert flops(lambda *both: convolve(*both, "VALID"), image, kernel).products == valid
    both = jax.grad(lambda image, kernel: convolve(image, kernel).sum(), (0, 1))
    assert flops(both, image, kernel).products == 2 * want  # transposed, dilated: the same terms; forward is dead
    tasks = flops(jax.vmap(convolve), jnp.stack([image] * 3), jnp.stack([kernel] * 3))
    assert tasks.products == 3 * want


def test_a_convolution_as_wide_as_the_image_is_a_matrix_product():
    image, kernel = jnp.zeros((2, 5, 5, 4)), jnp.zeros((5, 5, 4, 6))
    convolve = lambda image, kernel: jax.lax.conv_general_dilated(  # noqa: E731
        image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    flat = flops(jnp.matmul, image.reshape(2, 100), kernel.reshape(100, 6))
    assert flops(convolve, image, kernel) == flat


def linear(params, key, batch):
    del key
    w = params["model"]
    return 0.5 * ((batch.x @ w - batch.label) ** 2).sum(), {}


def test_a_second_order_meta_gradient_of_a_linear_model_takes_six_products_and_first_order_four():
    """Support: x w and x^T r; query: the same two; second order: x times the adjoint of w', and x^T times that."""
    key, product = jax.random.key(0), 2 * N * D * M
    model = mg.Model(lambda key: {"model": jnp.zeros((D, M))}, mg.cooperative(linear), lambda params, key, num: X)
    examples = mg.Examples(X, Y, jnp.ones(N))
    task, start = mg.Task(examples, examples), mg.fixed(optax.sgd(0.1))
    meta = model.init(key)
    for steps in (1, 3):
        second, first = mg.maml(model, start, steps), mg.fomaml(model, start, steps)
        assert flops(second.field, meta, key, task).products == (4 * steps + 2) * product
        assert flops(first.field, meta, key, task).products == (2 * steps + 2) * product
    tasks = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), task)
    total = mg.meta.batch.sum_over_tasks(mg.maml(model, start, 1).field)
    assert flops(total, meta, jax.random.split(key, 8), tasks, jnp.ones(8)).products == 8 * 6 * product


def test_counting_agrees_with_xla_where_there_is_no_loop():
    """XLA counts what is transcendental apart; here both are one sum."""
    weights = (FIRST, SECOND)
    analysis = jax.jit(jax.grad(loss)).lower(weights, X, Y).compile().cost_analysis()
    xla = analysis["flops"] + analysis["transcendentals"]
    assert flops(jax.grad(loss), weights, X, Y).total == pytest.approx(
        xla, rel=0.02 if jax.__version_info__ < (0, 11) else 0.08
    )  # later ones compute some of it twice


def test_operations_are_counted_on_shapes_beyond_32_bits_without_allocating():
    large = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    assert flops(jnp.matmul, large, large).products == 2 * 10**18


def test_integers_and_random_bits_count_nothing():
    assert flops(lambda i: i * 2 + 1, jnp.arange(5)) == Flops(0, 0, 0)
    assert flops(lambda key: jax.random.bits(key, (5,)), jax.random.key(0)) == Flops(0, 0, 0)


def test_memory_of_a_program_is_that_of_its_buffers():
    rows = jnp.zeros((256, 256))
    compiled = jax.jit(lambda x: (jnp.sort(x @ x.T, 0) @ x).sum()).lower(rows).compile()
    memory = bytes_at_peak(compiled)
    assert (memory.arguments, memory.outputs, memory.aliased) == (4 * 256 * 256, 4, 0)
    assert 4 * 256 * 256 <= memory.temporary <= 4 * 4 * 256 * 256
    assert memory.total == memory.temporary + memory.arguments + memory.outputs + memory.code
    donated = bytes_at_peak(jax.jit(jnp.tanh, donate_argnums=0).lower(rows).compile())
    assert donated.aliased == donated.arguments == 4 * 256 * 256
    assert donated.total == donated.temporary + donated.arguments + donated.code


def test_a_backend_that_says_nothing_about_memory_is_refused():
    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(ValueError, match="does not say how much memory"):
        bytes_at_peak(Silent())
