"""Bad input to the library: a call, the error that it raises, and words of its message."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np  # noqa: F401  (of the calls)
import optax

import spherical_optax as so

X = jnp.ones((3, 2))
PARAMS = {"conv": jnp.ones((4, 6)), "head": jnp.ones((3, 2))}
AXES = so.by_path({"conv": -1})
NAN, INF = float("nan"), float("inf")


def use(tx: optax.GradientTransformation, params: Any = PARAMS, grads: Any = None) -> Any:
    """One step."""
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
    return tx.update(grads, tx.init(params), params)


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.sum(params["conv"]) + jnp.sum(batch)


norm = partial(so.group_norm, X)
find = partial(so.find_invariant_groups, loss, PARAMS)
watch = partial(so.with_geometry, optax.sgd(0.1), channel_axes=AXES)
hyperball = partial(so.hyperball, optax.identity(), channel_axes=AXES)


def masked(mask: Any) -> dict[str, Any]:
    return {"weight_decay": 0.1, "weight_decay_mask": mask, "channel_axes": AXES}


NAMES = {name: value for name, value in globals().items() if not name.startswith("_")}

# By what is wrong; the words are a part of the message, behind the name of the error.
AXES_OF_ARRAYS = {
    "norm(channel_axes=4)": "ValueError: channel_axes=4 is out of range for shape (3, 2)",
    "norm(channel_axes=-3)": "ValueError: use axes in [-2, 1]",
    "norm(channel_axes=(0, -2))": "ValueError: channel_axes=(0, -2) names an axis of (3, 2) twice",
    "norm(channel_axes=(0, -3))": "ValueError: channel_axes=(0, -3) is out of range",
    "norm(channel_axes='conv')": "TypeError: channel_axes='conv' is not an int",
    "norm(channel_axes=1.5)": "TypeError: channel_axes=1.5 is not an int",
    "norm(channel_axes={'conv': -1})": "TypeError: such as so.by_path({'conv': -1})",
    "norm(channel_axes=True)": "TypeError: lambda path, leaf: -1 if condition else None",
    "norm(channel_axes=(0, np.True_))": "TypeError: is no axis",
    "norm(channel_axes=jnp.asarray(-1))": "TypeError: pass static_args='channel_axes'",
    "norm(channel_axes=so.blocks(-1, 3))": "ValueError: 3 blocks do not divide axis -1 of shape",
    "norm(channel_axes=so.blocks(5, 1))": "ValueError: channel_axes=so.blocks(5, 1) is out of ran",
    "norm(channel_axes=so.blocks(1, 2, channel_axes=-1))": "ValueError: twice",
    "so.blocks(-1, 0)": "ValueError: blocks: count=0 is below 1",
    "so.blocks(-1, -2)": "ValueError: blocks: count=-2 is below 1",
    "so.blocks(-1, 2.0)": "TypeError: so.blocks(-1, 2.0) is not an int",
    "so.blocks('a', 2)": "TypeError: so.blocks('a', 2) is not an int",
    "so.blocks(-1, True)": "TypeError: True is no axis",
    "so.group_norm(PARAMS, channel_axes=-1)": "TypeError: dict is no array; for trees there are",
    "so.group_norm('x', channel_axes=-1)": "TypeError: str is no array",
    "so.group_norm(None, channel_axes=-1)": "TypeError: NoneType is no array",
    "so.retract(X, jnp.ones(2), channel_axes=-1)": "ValueError: shapes (3, 2), (2,) and not one",
    "so.group_norm(1j * X, channel_axes=-1)": "TypeError: complex arrays have no spheres here",
    "so.angle(X, PARAMS, channel_axes=-1)": "TypeError: dict is no array",
}
SELECTIONS = {
    "so.by_path(['conv'])": "TypeError: ['conv'] is not a mapping such as {'conv': -1}",
    "so.by_path('conv')": "TypeError: 'conv' is not a mapping",
    "so.by_path({'conv': '-1'})": "TypeError: the rule 'conv': channel_axes='-1' is not an int",
    "so.by_path({'conv': True})": "TypeError: the rule 'conv': channel_axes=True: True is no axis",
    "so.by_path({0: -1})": "TypeError: 0 is not a string such as 'conv'",
    "so.by_path({'conv(': -1})": "ValueError: 'conv(' is not a regular expression",
    "so.path_labels(AXES)({'a': X})": "ValueError: no parameter path matches the rule 'conv'",
    "so.path_mask(-1)({'a': 'text'})": "TypeError: a: 'text' is no array",
    "so.describe('text', -1)": "TypeError: 'text' is no array",
    "so.describe(PARAMS, {'conv': -1})": "TypeError: conv: channel_axes={'conv': -1} is not an int",
    "so.describe(PARAMS, lambda path: -1)": "TypeError: cannot be called as (path, leaf) -> axes",
    "so.describe(PARAMS, lambda path, leaf: 'x')": "TypeError: conv: channel_axes='x' is not",
    "so.describe({'a': jnp.ones((3, 2), int)}, -1)": "TypeError: a: parameters on a sphere are rea",
    "so.adam_s(0.1, channel_axes=-1).init('text')": "TypeError: 'text' is no array",
    "so.adam_s(0.1, channel_axes=AXES).init(None)": "ValueError: no parameter path matches a rule",
    "so.adam_s(0.1, channel_axes=7).init(PARAMS)": "ValueError: conv: channel_axes=7 is out of ran",
    "so.muon_h(0.1, channel_axes=AXES).init(PARAMS)": "ValueError: conv: a group of (4, 6) with ch",
}
HYPERPARAMETERS = {
    "so.adam_s(0.1, b1=1.5, channel_axes=-1)": "ValueError: b1=1.5 is not in [0, 1)",
    "so.adam_s(0.1, b2=NAN, channel_axes=-1)": "ValueError: b2=nan is not in [0, 1)",
    "so.adam_srt(0.1, b1=-0.1, channel_axes=-1)": "ValueError: b1=-0.1 is not in [0, 1)",
    "so.adam_srt(0.1, b1=(0.9, 0.99), channel_axes=-1)": "ValueError: b1=(0.9, 0.99) is not in",
    "so.adam_g(0.1, b2='0.9', channel_axes=-1)": "ValueError: b2='0.9' is not in [0, 1)",
    "so.scale_by_adam_s(b2=1, channel_axes=-1)": "ValueError: b2=1 is not in [0, 1)",
    "so.scale_by_adam_g(b1=1.0, channel_axes=-1)": "ValueError: b1=1.0 is not in [0, 1)",
    "so.scale_by_adam_srt(b2=jnp.ones(2), channel_axes=-1)": "ValueError: is not in [0, 1)",
    "so.adam_h(0.1, b2=2, channel_axes=-1)": "ValueError: b2=2 is not in [0, 1)",
    "so.adamp(0.1, b1=1, channel_axes=-1)": "ValueError: b1=1 is not in [0, 1)",
    "so.muon_h(0.1, beta=1, channel_axes=())": "ValueError: beta=1 is not in [0, 1)",
    "so.muon_h(0.1, adam_b1=-1, channel_axes=())": "ValueError: adam_b1=-1 is not in [0, 1)",
    "so.sgd_mrt(0.1, momentum=1.0, channel_axes=-1)": "ValueError: momentum=1.0 is not in [0, 1)",
    "so.sgdp(0.1, momentum=1.0, channel_axes=-1)": "ValueError: momentum=1.0 is not in [0, 1)",
    "so.trace_rt(NAN, channel_axes=-1)": "ValueError: decay=nan is not in [0, 1)",
    "so.trace_rt(0.9, dampening=2, channel_axes=-1)": "ValueError: dampening=2 is not in [0, 1]",
    "so.sgdp(0.1, dampening=-1, channel_axes=-1)": "ValueError: dampening=-1 is not in [0, 1]",
    "so.radial_brake(NAN, channel_axes=-1)": "ValueError: outward=nan is not in [0, 1]",
    "so.radial_brake('x', channel_axes=-1)": "ValueError: outward='x' is not in [0, 1]",
    "so.radial_brake(0.5, X, channel_axes=-1)": "ValueError: inward=Array(",
    "so.adam_s(0.1, eps=-1, channel_axes=-1)": "ValueError: eps=-1 is not a finite number from 0",
    "so.adam_srt(0.1, eps=INF, channel_axes=-1)": "ValueError: eps=inf is not a finite number",
    "so.muon_h(0.1, adam_eps=None, channel_axes=())": "ValueError: adam_eps=None is not a finite",
    "so.adamp(0.1, eps='x', channel_axes=-1)": "ValueError: eps='x' is not a finite number from 0",
    "so.adamp(0.1, delta=-1, channel_axes=-1)": "ValueError: delta=-1 is not a finite number from",
    "so.adamp(0.1, wd_ratio=NAN, channel_axes=-1)": "ValueError: wd_ratio=nan is not a finite",
    "so.adamp(0.1, weight_decay=-1, channel_axes=-1)": "ValueError: weight_decay=-1 is not a",
    "so.sgdp(0.1, weight_decay=abs, channel_axes=-1)": "ValueError: weight_decay=<built-in functio",
    "so.adam_s(0.1, weight_decay=-1, channel_axes=-1)": "ValueError: weight_decay=-1 is not a fini",
    "so.adam_srt(0.1, weight_decay=NAN, channel_axes=-1)": "ValueError: from 0, and no schedule",
    "so.adam_g(0.1, weight_decay='x', channel_axes=-1)": "ValueError: weight_decay='x' is not a",
    "so.sgd_mrt(0.1, weight_decay=INF, channel_axes=-1)": "ValueError: weight_decay=inf is not a",
    "so.adam_h(0.1, adam_weight_decay=-1, channel_axes=-1)": "ValueError: adam_weight_decay=-1 is",
    "so.adam_s('0.1', channel_axes=-1)": "ValueError: learning_rate='0.1' is not a finite number",
    "so.adam_srt(NAN, channel_axes=-1)": "ValueError: learning_rate=nan is not a finite number",
    "so.adam_g(INF, channel_axes=-1)": "ValueError: learning_rate=inf is not a finite number, and",
    "so.sgd_mrt(None, channel_axes=-1)": "ValueError: learning_rate=None is not a finite number",
    "so.adam_s(jnp.ones(3), channel_axes=-1)": "ValueError: learning_rate=Array(",
    "so.adam_h(1.5, channel_axes=-1)": "ValueError: learning_rate=1.5 is not in [0, 1), and no sc",
    "so.muon_h(-0.1, channel_axes=())": "ValueError: learning_rate=-0.1 is not in [0, 1)",
    "hyperball(4.0, retraction='exp')": "ValueError: learning_rate=4.0 is not in [0, 3.14159)",
    "so.adam_h(0.1, adam_learning_rate='x', channel_axes=-1)": "ValueError: adam_learning_rate='x'",
    "so.rotational(optax.identity(), NAN, channel_axes=-1)": "ValueError: angle=nan is not a",
    "so.rotational(optax.identity(), 0.1, update_norm_decay=1, channel_axes=-1)": "ValueError: upd",
    "so.rotational(optax.identity(), 0.1, eps=-1, channel_axes=-1)": "ValueError: eps=-1 is not",
    "so.muon_h(0.1, ns_steps=0, channel_axes=())": "ValueError: ns_steps=0 is not an integer from",
    "so.muon_h(0.1, ns_steps=2.5, channel_axes=())": "ValueError: ns_steps=2.5 is not an integer",
    "so.adam_s(0.1, mu_dtype='int32', channel_axes=-1)": "TypeError: mu_dtype='int32' is no floati",
    "so.adam_h(0.1, mu_dtype='float99', channel_axes=-1)": "TypeError: 'float99'",
    "so.sgd_mrt(0.1, accumulator_dtype=int, channel_axes=-1)": "TypeError: accumulator_dtype=<cla",
    "so.scale_by_adam_srt(channel_axes=-1, transport='rt')": "ValueError: transport='rt' is not on",
    "hyperball(0.1, retraction='cayley')": "ValueError: retraction='cayley' is not one of 'normal",
    "hyperball(0.1, zero='pull')": "ValueError: zero='pull' is not one of 'error', 'skip', 'fill'",
    "hyperball(0.1, radius=0.0)": "ValueError: radius=0.0 is not a positive finite number",
    "hyperball(0.1, radius='2')": "ValueError: radius='2' is not one number",
    "hyperball(0.1, radius=jnp.ones((1, 3)))": "ValueError: is not one number",
    "hyperball(0.1, radius=lambda path, leaf: -1.0).init(PARAMS)": "ValueError: conv: radius=-1.0 ",
    "hyperball(0.1, radius=lambda path, leaf: X).init(PARAMS)": "ValueError: conv: radius has the",
    "so.reproject_to_sphere(0, channel_axes=-1)": "ValueError: radius=0 is not a positive finite",
    "so.reproject_to_sphere(NAN, channel_axes=-1)": "ValueError: radius=nan is not a positive",
    "so.reproject_to_sphere(np.float32(-1), channel_axes=-1)": "ValueError: is not a positive fini",
    "so.reproject_to_sphere(jnp.float32(INF), channel_axes=-1)": "ValueError: is not a positive",
    "so.reproject_to_sphere(np.ones(1), channel_axes=-1)": "ValueError: is not one number",
    "so.project_to_sphere(PARAMS, None, channel_axes=AXES)": "ValueError: radius=None is not one",
    "so.hyperball(optax.adam, 0.1, channel_axes=-1)": "TypeError: is no gradient transformation",
    "jax.jit(lambda n: so.orthogonalize_per_group(ns_steps=n, channel_axes=()))(2)": (
        "ValueError: ns_steps is traced, and has to be known: pass static_args='ns_steps'"
    ),
    "so.equilibrium_angle(-0.1, 0.1)": "ValueError: learning_rate=-0.1 is not a finite number from",
    "so.equilibrium_angle(0.1, np.asarray([0.1, NAN]))": "ValueError: weight_decay=nan is not a fi",
    "so.equilibrium_angle(optax.constant_schedule(0.1), 0.1)": "ValueError: learning_rate=<functio",
    "so.equilibrium_angle(0.1, 0.1, b1=1)": "ValueError: b1=1 is not in [0, 1)",
    "so.equilibrium_angle_of_sgd(0.1, 0.1, momentum='x')": "ValueError: momentum='x' is not in [0,",
    "so.equilibrium_angle_of_sgd_mrt(0.1, 0.1, dampening=2.0)": "ValueError: dampening=2.0 is not",
    "so.equilibrium_angle_of_lion(0.1, 0.1, b2=jnp.array(-0.5))": "ValueError: b2=-0.5 is not in [",
    "so.rotational(0.1, 0.1, channel_axes=-1)": "TypeError: direction=0.1 is no gradient transform",
    "so.project_where_invariant(None, channel_axes=-1)": "TypeError: direction=None is no gradient",
}
USES = {
    "so.adam_srt(0.1)": "TypeError: channel_axes",
    "so.adam_srt(channel_axes=-1)": "TypeError: learning_rate",
    "use(so.adam_s(0.1, **masked({'conv': True})))": "ValueError: head: in the updates but not at ",
    "use(so.sgd_mrt(0.1, **masked({'conv': True})))": "ValueError: head: in the updates but not at",
    "use(so.adam_g(0.1, **masked({'conv': True})))": "ValueError: head: in the updates but not at",
    "use(so.adam_srt(0.1, **masked(lambda params: params | {'x': X})))": "ValueError: x: in the ma",
    "use(so.adam_srt(0.1, channel_axes=AXES), grads={'conv': X})": "ValueError: head: in the optim",
    "use(so.adam_srt(0.1, channel_axes=AXES), grads=PARAMS | {'head': X.T})": (
        "ValueError: head: (2, 3) in the updates but (3, 2) in the optimizer's state"
    ),
    "so.angle_per_step(PARAMS, {'conv': X}, channel_axes=AXES)": "ValueError: head: in the parame",
    "so.radius(PARAMS, channel_axes='conv')": "TypeError: conv: channel_axes='conv' is not an int",
    "watch(every=0)": "ValueError: every=0 is not an integer from 1",
    "watch(every=1.5)": "ValueError: every=1.5 is not an integer from 1",
    "watch(every='2')": "ValueError: every='2' is not an integer from 1",
    "watch(keep='x').init(PARAMS)": "TypeError: conv: keep='x' is no axis, and no callable",
    "watch(keep=0).init(PARAMS)": "ValueError: conv: keep=0 does not index groups",
    "so.with_geometry(optax.adam, channel_axes=-1)": "TypeError: is no gradient transformation",
    "so.geometry(None)": "ValueError: the state holds 0 states of with_geometry and not one",
    "find()": "ValueError: no batch: pass at least one after the parameters",
    "find(X, tolerance=0)": "ValueError: tolerance=0 is not in (0, 1)",
    "find(X, tolerance='x')": "ValueError: tolerance='x' is not in (0, 1)",
    "find(X, tolerance=NAN)": "ValueError: tolerance=nan is not in (0, 1)",
    "find(X, candidates=-1)": "TypeError: candidates=-1 is not a sequence such as",
    "find(X, candidates=[7])": "ValueError: candidates: 7 makes groups of no parameter",
}
ROWS = AXES_OF_ARRAYS | SELECTIONS | HYPERPARAMETERS | USES
