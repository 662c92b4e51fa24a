"""Functions seen as what they multiply some of their arguments with.

A dense layer meets its kernel in one way: a matrix product, y = x W, or y = d W^T in the backward pass of another
layer. `trace` turns a function, whoever wrote it (a plain `x @ w`, a flax module), into a program, and `run` evaluates
the program with products that the caller makes. A kernel that is met in any other way (added to something, reshaped for
a convolution, looped over) is asked for as an array.

Only what jax offers to interpreters of its programs is used (`jax.extend.core`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from metagen_jax.sharding import differing_like
from metagen_jax.types import Array, Params

CALLS = ("jit", "pjit")
"""Primitives whose body is entered when a kernel is passed to it."""


class Use(NamedTuple):
    """One product of a program with one of its kernels."""

    kernel: int  # which argument
    transposed: bool  # d W^T rather than x W
    rows: int  # of the other operand, as a matrix
    varies: bool  # the other operand depends on an argument that varies
    stopped: bool  # no gradient reaches the kernel through this use
    precision: Any  # of the product, as jax.lax.dot_general has it


Dot = Callable[[Array, Array], Array]
"""(x [R, A], w [A, B]) -> [R, B], in the precision that the program asks for."""
Product = Callable[[Use, Array, Dot], Array]
"""(use, x [R, in], dot) -> x W [R, out]; x [R, out] -> [R, in] where the use is transposed."""


class Program(NamedTuple):
    """A traced function of flat arguments."""

    jaxpr: Any
    consts: Sequence[Any]
    structure: Any  # of the result


def trace(function: Callable[..., Any], *arguments: Any) -> Program:
    """Return the function as a program of the leaves of its arguments."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return Program(closed.jaxpr, closed.consts, jax.tree.structure(shapes))


def run(
    program: Program,
    leaves: Sequence[Any],
    kernels: Sequence[int],
    product: Product,
    dense: Callable[[int], Array],
    varying: Sequence[int] = (),
) -> Any:
    """Evaluate a program some of whose arguments are kernels.

    Args:
        program: of `trace`.
        leaves: its arguments; those that are kernels are not looked at.
        kernels: indices of the arguments that are kernels, matrices [in, out].
        product: makes every product with a kernel.
        dense: kernel -> the array, for any other use of it.
        varying: indices of the arguments that vary, from which `Use.varies` follows.

    Returns:
        What the function returns.
    """
    given = [_Kernel(index) if index in kernels else leaf for index, leaf in enumerate(leaves)]
    frame = _Frame(program.jaxpr, product, dense)
    outputs, _ = frame.run(program.consts, given, [index in varying for index in range(len(leaves))])
    return jax.tree.unflatten(program.structure, outputs)


def uses_of(
    program: Program, leaves: Sequence[Any], candidates: Sequence[int], varying: Sequence[int] = ()
) -> tuple[list[Use], set[int]]:
    """Return the products of a program with candidates for kernels, and the candidates that it asks for as arrays."""
    found: list[Use] = []
    asked: set[int] = set()

    def evaluate(leaves: Sequence[Any]) -> Any:
        def product(use: Use, x: Array, dot: Dot) -> Array:
            found.append(use)
            kernel = leaves[use.kernel]
            return dot(x, kernel.T if use.transposed else kernel)

        def dense(index: int) -> Array:
            asked.add(index)
            return leaves[index]

        return run(program, leaves, candidates, product, dense, varying)

    jax.eval_shape(evaluate, leaves)
    return found, asked


def is_matrix(leaf: Any) -> bool:
    """Whether an array could be the kernel of a dense layer."""
    return jnp.ndim(leaf) == 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def taps(uses: Sequence[Use], kernel: Array) -> list[Array]:
    """Return zeros to add to a kernel's products, one for each use, whose gradients are those of the products."""
    shapes = [(use.rows, kernel.shape[0 if use.transposed else 1]) for use in uses]
    return [differing_like(jnp.zeros(shape, kernel.dtype), kernel) for shape in shapes]


def owners(params: Params) -> list[str]:
    """Return the player of every leaf, in the order of `jax.tree.leaves`."""
    return [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]


class _Kernel(NamedTuple):
    """Stands in a program where a kernel would be."""

    argument: int
    transposed: bool = False
    dtype: Any = None  # that it was cast to
    stopped: bool = False


@dataclasses.dataclass
class _Frame:
    """A program, or a part of one, while it runs: what its variables hold, arrays and kernels."""

    jaxpr: Any
    product: Product
    dense: Callable[[int], Array]
    values: dict[Any, Any] = dataclasses.field(default_factory=dict)
    varying: set[Any] = dataclasses.field(default_factory=set)
    waiting: list[Any] = dataclasses.field(default_factory=list)  # equations without kernels, evaluated together

    def run(self, consts: Sequence[Any], given: Sequence[Any], varying: Sequence[bool]) -> tuple[list[Any], list[bool]]:
        jaxpr = self.jaxpr
        self.values.update(zip(jaxpr.constvars, consts, strict=True))
        self.write(jaxpr.invars, given, varying)
        for equation in jaxpr.eqns:
            if any(isinstance(self.values.get(atom), _Kernel) for atom in equation.invars if not _literal(atom)):
                self.flush()
                self.special(equation)
            else:
                self.waiting.append(equation)
                if any(self.varies(atom) for atom in equation.invars):
                    self.varying.update(equation.outvars)
        self.flush()
        outputs = [self.array(self.read(atom)) for atom in jaxpr.outvars]
        return outputs, [self.varies(atom) for atom in jaxpr.outvars]

    def special(self, equation: Any) -> None:
        """Evaluate an equation that has a kernel among its operands."""
        name, params = equation.primitive.name, equation.params
        operands = [self.read(atom) for atom in equation.invars]
        varying = [self.varies(atom) for atom in equation.invars]
        kernel = operands[0]
        if name in CALLS and isinstance(params.get("jaxpr"), jex.ClosedJaxpr):
            body = params["jaxpr"]
            results, varied = _Frame(body.jaxpr, self.product, self.dense).run(body.consts, operands, varying)
            self.write(equation.outvars, results, varied)
        elif name == "dot_general" and _is_matrix_product(params["dimension_numbers"], operands):
            self.write(equation.outvars, [self.multiply(params, operands, varying)], [any(varying)])
        elif name == "transpose" and tuple(params["permutation"]) == (1, 0):
            self.write(equation.outvars, [kernel._replace(transposed=not kernel.transposed)], varying)
        elif name == "convert_element_type" and _rounds_once(kernel, params["new_dtype"]):
            self.write(equation.outvars, [kernel._replace(dtype=params["new_dtype"])], varying)
        elif name == "stop_gradient":
            self.write(equation.outvars, [kernel._replace(stopped=True)], varying)
        else:
            program = _program(self.jaxpr, [equation])
            arrays = [self.array(self.values[variable]) for variable in program.jaxpr.invars]
            results = jex.jaxpr_as_fun(program)(*arrays)
            self.write(program.jaxpr.outvars, results, [any(varying)] * len(results))

    def multiply(self, params: Any, operands: Sequence[Any], varying: Sequence[bool]) -> Array:
        side = 0 if isinstance(operands[0], _Kernel) else 1
        kernel, other = operands[side], operands[1 - side]
        contract, _ = params["dimension_numbers"]
        other = jnp.moveaxis(other, contract[1 - side][0], -1)
        free, size = other.shape[:-1], other.shape[-1]
        options = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}

        def dot(x: Array, w: Array) -> Array:
            x, w = (leaf if kernel.dtype is None else leaf.astype(kernel.dtype) for leaf in (x, w))
            return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), **options)

        transposed = (contract[side][0] == 1) != kernel.transposed
        rows = other.reshape(-1, size)
        use = Use(kernel.argument, transposed, rows.shape[0], varying[1 - side], kernel.stopped, params["precision"])
        made = self.product(use, rows, dot)
        made = made.reshape(*free, made.shape[-1])
        return jnp.moveaxis(made, -1, 0) if side == 0 else made

    def flush(self) -> None:
        """Evaluate the equations that wait."""
        if self.waiting:
            program = _program(self.jaxpr, self.waiting)
            results = jex.jaxpr_as_fun(program)(*[self.values[variable] for variable in program.jaxpr.invars])
            self.values.update(zip(program.jaxpr.outvars, results, strict=True))
            self.waiting = []

    def read(self, atom: Any) -> Any:
        return atom.val if _literal(atom) else self.values[atom]

    def write(self, variables: Sequence[Any], values: Sequence[Any], varying: Sequence[bool]) -> None:
        for variable, value, varies in zip(variables, values, varying, strict=True):
            self.values[variable] = value
            if varies:
                self.varying.add(variable)

    def varies(self, atom: Any) -> bool:
        return not _literal(atom) and atom in self.varying

    def array(self, value: Any) -> Any:
        if not isinstance(value, _Kernel):
            return value
        array = self.dense(value.argument)
        array = array.T if value.transposed else array
        array = array if value.dtype is None else array.astype(value.dtype)
        return jax.lax.stop_gradient(array) if value.stopped else array


def _rounds_once(kernel: _Kernel, dtype: Any) -> bool:
    """Whether a cast is the first one of a kernel, to another float."""
    return isinstance(kernel, _Kernel) and kernel.dtype is None and jnp.issubdtype(dtype, jnp.floating)


def _is_matrix_product(dimensions: Any, operands: Sequence[Any]) -> bool:
    """Whether one operand is a kernel, and each has one contracted dimension and no batch dimension."""
    contract, batch = dimensions
    kernels = [isinstance(operand, _Kernel) for operand in operands]
    return sum(kernels) == 1 and len(contract[0]) == 1 and not batch[0] and not batch[1]


def _program(around: Any, equations: Sequence[Any]) -> Any:
    """Return equations as a program from the variables that they read to those that they make."""
    made = [variable for equation in equations for variable in equation.outvars if not _dropped(variable)]
    known, read = set(made), dict[Any, None]()
    for equation in equations:
        read |= {atom: None for atom in equation.invars if not _literal(atom) and atom not in known}
    effects = frozenset().union(*(equation.effects for equation in equations))
    body = jex.Jaxpr((), list(read), made, list(equations), effects, around.debug_info)
    return jex.ClosedJaxpr(body, ())


def _literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def _dropped(variable: Any) -> bool:
    return isinstance(variable, jex.DropVar)
