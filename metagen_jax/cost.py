"""What a function costs before it is run: floating-point operations read off its jaxpr, memory off its compiled form.

The cost analysis of a compiled program counts the body of a loop once, whatever its length, so operations are counted
here in the jaxpr, where the length of a `scan` is known. Dead code is left out, as XLA does; what XLA simplifies beyond
that (terms that are equal, products by zero) is counted all the same.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

ARITHMETIC = frozenset(
    """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh cumlogsumexp cummax cummin cumprod
    cumsum digamma div erf erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul neg pow
    rem round rsqrt sign sin sinh sqrt square sub tan tanh
    """.split()  # noqa: SIM905
)
"""Primitives that count one for each float of their output; comparisons, selections, copies and conversions do not."""
REDUCTIONS = frozenset(f"reduce_{name}" for name in ("sum", "prod", "max", "min"))
WINDOWS = frozenset(f"reduce_window_{name}" for name in ("sum", "max", "min"))
SCATTERS = frozenset(f"scatter{mark}{name}" for name in ("add", "sub", "mul", "min", "max") for mark in ("-", "_"))


class Flops(NamedTuple):
    """Floating-point operations; plain integers, since a run has more of them than 32 bits hold."""

    products: int  # of matrix products and convolutions, a multiplication and an addition for each term
    elementwise: int  # one for each output element of everything else that is arithmetic
    loops_of_unknown_length: int  # `while` loops met, each counted as if it ran once

    @property
    def total(self) -> int:
        """All operations."""
        return self.products + self.elementwise


class Memory(NamedTuple):
    """Bytes that a compiled program needs on its device."""

    temporary: int  # at the peak, beside what follows
    arguments: int
    outputs: int
    aliased: int  # of the outputs, those that lie where donated arguments lay
    code: int  # 0 where the backend does not say

    @property
    def total(self) -> int:
        """Everything that has to fit at once."""
        return self.temporary + self.arguments + self.outputs - self.aliased + self.code


NOTHING = Flops(0, 0, 0)

Live = tuple[bool, ...]  # which of a list of variables something depends on that is wanted
Known = dict[tuple[int, Live], tuple[Flops, Live]]  # bodies that were counted before, by identity


def flops(function: Callable[..., Any], *arguments: Any) -> Flops:
    """Count the floating-point operations of `function(*arguments)` without running it.

    Products count 2 for each term that is there: a convolution's padding and the zeros of its dilation are none. A
    reduction of n elements counts n - 1. A `scan` counts its body as often as it runs, `cond` its most expensive
    branch, `while` its body and condition once; a `shard_map` counts its body on every device. The bodies of jit,
    remat and custom derivatives are entered. What no output depends on counts nothing, nor do integers, sorting, FFTs,
    decompositions and random bits; the body of a kernel written by hand counts once.

    Args:
        function: any function of arrays, jitted or not.
        *arguments: arrays, or `jax.ShapeDtypeStruct`s in their place.

    Example:
        >>> flops(lambda x, w: jnp.tanh(x @ w), jnp.zeros((5, 3)), jnp.zeros((3, 4)))
        Flops(products=120, elementwise=20, loops_of_unknown_length=0)
    """
    return flops_of(jax.make_jaxpr(function)(*arguments))


def flops_of(jaxpr: ClosedJaxpr) -> Flops:
    """Count the operations of a jaxpr, as `flops` does."""
    count, _ = _of_body(jaxpr, (True,) * len(jaxpr.jaxpr.outvars), {})
    return count


def bytes_at_peak(compiled: jax.stages.Compiled) -> Memory:
    """Return the memory that a compiled program needs.

    `temporary` is the size of the buffers that XLA laid out (`temp_size_in_bytes`), not `peak_memory_in_bytes`, which
    the CPU backend does not fill in alike.

    Args:
        compiled: of `jax.jit(function).lower(*arguments).compile()`.

    Raises:
        ValueError: the backend says nothing about memory.
    """
    stats: Any = compiled.memory_analysis()
    if stats is None:
        raise ValueError(f"the backend {jax.default_backend()} does not say how much memory a program needs")
    return Memory(
        stats.temp_size_in_bytes,
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def _of_body(body: Jaxpr | ClosedJaxpr, live: Live, known: Known) -> tuple[Flops, Live]:
    """Count what the live outputs of a body depend on, and return which of its inputs they depend on."""
    jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    if (id(jaxpr), live) not in known:
        wanted = {id(var) for var, alive in zip(jaxpr.outvars, live, strict=True) if alive}
        counts = []
        for equation in reversed(jaxpr.eqns):
            alive = tuple(id(var) in wanted for var in equation.outvars)
            if any(alive) or equation.effects:
                count, needed = _of_equation(equation, alive, known)
                counts.append(count)
                wanted |= {id(var) for var, need in zip(equation.invars, needed, strict=True) if need}
        known[id(jaxpr), live] = _sum(counts), tuple(id(var) in wanted for var in jaxpr.invars)
    return known[id(jaxpr), live]


def _of_equation(equation: JaxprEqn, live: Live, known: Known) -> tuple[Flops, Live]:
    name, params = equation.primitive.name, equation.params
    everything = (True,) * len(equation.invars)
    if name == "scan":
        return _of_scan(params, live, known)
    if name == "while":
        condition, _ = _of_body(params["cond_jaxpr"], (True,), known)
        body, _ = _of_body(params["body_jaxpr"], (True,) * len(live), known)
        inside = _sum([condition, body])
        return inside._replace(loops_of_unknown_length=inside.loops_of_unknown_length + 1), everything
    if name == "cond":
        branches = [_of_body(branch, live, known) for branch in params["branches"]]
        needed = tuple(any(each) for each in zip(*(needed for _, needed in branches), strict=True))
        return max((count for count, _ in branches), key=lambda count: count.total), (True, *needed)
    bodies = list(_bodies(params))
    if name in REDUCTIONS | WINDOWS | SCATTERS or not bodies:
        return _of_primitive(equation), everything
    number = 1
    if name == "shard_map":
        sizes = dict(params["mesh"].shape)
        manual = params.get("newly_manual_axes", params.get("manual_axes", sizes))  # the name depends on the version
        number = math.prod(sizes[axis] for axis in manual)
    if len(bodies) == 1 and len(_outputs(bodies[0])) == len(live):
        count, needed = _of_body(bodies[0], live, known)
        return _times(count, number), needed if len(needed) == len(everything) else everything
    return _sum([_of_body(body, (True,) * len(_outputs(body)), known)[0] for body in bodies]), everything


def _of_scan(params: dict[str, Any], live: Live, known: Known) -> tuple[Flops, Live]:
    num_consts, num_carry = _scan_sizes(params)
    carry, stacked = live[:num_carry], live[num_carry:]
    while True:  # what one turn needs of the carry, the turn before has to compute
        count, needed = _of_body(params["jaxpr"], (*carry, *stacked), known)
        more = tuple(map(any, zip(carry, needed[num_consts : num_consts + num_carry], strict=True)))
        if more == carry:
            return _times(count, params["length"]), needed[:num_consts] + carry + needed[num_consts + num_carry :]
        carry = more


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many of the inputs of a scan are constants, and how many are carried."""
    if "ft_in" not in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(consts), len(carry)


def _of_primitive(equation: JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    out: Any = equation.outvars[0].aval if equation.outvars else None
    if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.inexact):
        return NOTHING
    shapes = [getattr(operand.aval, "shape", ()) for operand in equation.invars]
    size = math.prod(out.shape)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return Flops(2 * size * math.prod(shapes[0][axis] for axis in contracted), 0, 0)
    if name == "conv_general_dilated":
        return Flops(2 * _terms_of_convolution(shapes[0], shapes[1], out.shape, params), 0, 0)
    if name in REDUCTIONS:
        return Flops(0, max(math.prod(shapes[0]) - size, 0), 0)
    if name in WINDOWS:
        return Flops(0, size * (math.prod(params["window_dimensions"]) - 1), 0)
    if name in SCATTERS:
        return Flops(0, math.prod(shapes[2]), 0)
    return Flops(0, size, 0) if name in ARITHMETIC else NOTHING


def _terms_of_convolution(
    image: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...], params: dict[str, Any]
) -> int:
    """Return how many products of two entries a convolution adds up, in groups of features or of examples alike."""
    at = params["dimension_numbers"]
    terms = out[at.out_spec[0]] * out[at.out_spec[1]] * kernel[at.rhs_spec[1]]  # kernels have one group's inputs only
    settings = zip(
        params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True
    )
    for axis, (stride, (before, _), spread, dilation) in enumerate(settings, start=2):
        size, window = image[at.lhs_spec[axis]], kernel[at.rhs_spec[axis]]
        places = [
            start * stride + offset * dilation - before
            for start in range(out[at.out_spec[axis]])
            for offset in range(window)
        ]
        terms *= sum(0 <= place <= (size - 1) * spread and place % spread == 0 for place in places)
    return terms


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item


def _outputs(body: Jaxpr | ClosedJaxpr) -> list[Any]:
    return body.jaxpr.outvars if isinstance(body, ClosedJaxpr) else body.outvars


def _sum(counts: list[Flops]) -> Flops:
    return Flops(*map(sum, zip(NOTHING, *counts, strict=True)))


def _times(count: Flops, number: int) -> Flops:
    return Flops(number * count.products, number * count.elementwise, count.loops_of_unknown_length)
