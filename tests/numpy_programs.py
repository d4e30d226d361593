"""Programs that JAX traces, and NumPy runs: no compilation, which takes JAX far longer than a run.

`traced` is as `jax.jit`, of which it takes the first half. So thousands of programs of shapes that
were never seen can be run in the time of a hundred compilations. `test_properties.py` holds what
NumPy makes of a program against what XLA and JAX's single operations make of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

UFUNCS = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "atan2": np.arctan2,
    "cos": np.cos,
    "div": np.divide,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "rem": np.fmod,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}
REDUCTIONS = {
    "reduce_and": np.logical_and,
    "reduce_max": np.maximum,
    "reduce_min": np.minimum,
    "reduce_or": np.logical_or,
    "reduce_sum": np.add,
}


def traced(fn: Callable) -> Callable:
    """`fn`, of trees of arrays, run by NumPy. Each tree of types is traced once."""
    programs: dict[Any, Any] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        leaves = [np.asarray(leaf) for leaf in leaves]
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in programs:
            programs[key] = jax.make_jaxpr(fn, return_shape=True)(*args)
        program, shapes = programs[key]
        with np.errstate(all="ignore"):
            outputs = interpret(program.jaxpr, program.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return call


def interpret(jaxpr: Any, consts: list[Any], args: list[Any]) -> list[np.ndarray]:
    values = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def read(atom: Any) -> np.ndarray:
        literal = isinstance(atom, jax.extend.core.Literal)
        return np.asarray(atom.val, atom.aval.dtype) if literal else values[atom]

    for equation in jaxpr.eqns:
        outputs = evaluate(equation, [read(atom) for atom in equation.invars])
        for variable, output in zip(equation.outvars, outputs, strict=True):
            output = np.asarray(output, variable.aval.dtype)
            assert output.shape == variable.aval.shape, equation
            values[variable] = output
    return [read(atom) for atom in jaxpr.outvars]


def evaluate(equation: Any, args: list[np.ndarray]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in UFUNCS:
        return [UFUNCS[name](*args)]
    if name in REDUCTIONS:
        (x,) = args
        if name == "reduce_sum":
            return [np.sum(x, params["axes"], x.dtype)]
        return [REDUCTIONS[name].reduce(x, params["axes"])]
    match name:
        case "broadcast_in_dim":
            shape = np.ones(len(params["shape"]), int)
            shape[list(params["broadcast_dimensions"])] = args[0].shape
            return [np.broadcast_to(args[0].reshape(shape), params["shape"])]
        case "cond":
            which, *operands = args
            branches = params["branches"]
            branch = branches[min(max(int(which), 0), len(branches) - 1)]
            return interpret(branch.jaxpr, branch.consts, operands)
        case "concatenate":
            return [np.concatenate(args, params["dimension"])]
        case "convert_element_type":
            return [args[0].astype(params["new_dtype"])]
        case "dot_general":
            return [dot_general(*args, *params["dimension_numbers"])]
        case "integer_pow":
            return [args[0] ** args[0].dtype.type(params["y"])]
        case "jit" | "pjit" | "closed_call" | "custom_jvp_call" | "custom_vjp_call":
            inner = params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"]
            return interpret(inner.jaxpr, inner.consts, args)
        case "optimization_barrier" | "stop_gradient" | "copy":
            return args
        case "reshape":
            return [args[0].reshape(params["new_sizes"])]
        case "rsqrt":
            return [1 / np.sqrt(args[0])]
        case "scan":
            return scan(equation, args)
        case "select_n":
            which, *cases = args
            return [np.where(which, cases[1], cases[0])]
        case "slice":
            starts, stops = params["start_indices"], params["limit_indices"]
            strides = params["strides"] or [1] * len(starts)
            return [args[0][tuple(map(slice, starts, stops, strides))]]
        case "squeeze":
            return [np.squeeze(args[0], params["dimensions"])]
        case "stack":
            return [np.stack(args, params["axis"])]
        case "transpose":
            return [np.transpose(args[0], params["permutation"])]
    outputs = equation.primitive.bind(*args, **params)  # by JAX: what is rare
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def dot_general(x: np.ndarray, y: np.ndarray, summed: Any, batch: Any) -> np.ndarray:
    x_names, y_names = list(range(x.ndim)), list(range(x.ndim, x.ndim + y.ndim))
    for x_axes, y_axes in (summed, batch):
        for i, j in zip(x_axes, y_axes, strict=True):
            y_names[j] = x_names[i]
    shared = [x_names[i] for i in batch[0]]
    gone = {*shared, *(x_names[i] for i in summed[0])}
    kept = [name for name in (*x_names, *y_names) if name not in gone]
    return np.einsum(x, x_names, y, y_names, [*shared, *kept])


def scan(equation: Any, args: list[np.ndarray]) -> list[Any]:
    params, inner = equation.params, equation.params["jaxpr"]
    # What is not carried has an axis more outside; JAX's own counts changed their names.
    carried = sum(
        outer.aval.ndim == here.ndim
        for outer, here in zip(equation.outvars, inner.out_avals, strict=True)
    )
    scanned = sum(arg.ndim != here.ndim for arg, here in zip(args, inner.in_avals, strict=True))
    last = len(args) - scanned
    first = last - carried
    consts, carry, xs = args[:first], args[first:last], args[last:]
    steps = range(params["length"])
    seen = []
    for i in reversed(steps) if params["reverse"] else steps:
        outputs = interpret(inner.jaxpr, inner.consts, [*consts, *carry, *(x[i] for x in xs)])
        carry = outputs[:carried]
        seen.append(outputs[carried:])
    stacked = [np.stack(ys[::-1] if params["reverse"] else ys) for ys in zip(*seen, strict=True)]
    return [*carry, *stacked]
