"""Optimise weights on spheres: composable Optax transformations, selected by parameter path.

What holds everywhere:

* `channel_axes` names the axes that index groups, the weights that share one sphere: `-1`,
  `(0, -1)`, `()` for the whole array, `blocks(-1, 4)` for blocks of an axis, `None` for no sphere;
  or a callable `(path, leaf)` to one of these, such as `by_path`'s.
* Sums run in float32 at least, of squares: norms should lie between 1e-19 and 1e19 there. What is
  not finite comes out in its group, and in no other.
* Sums run over the array that a function is given. Under `jax.jit` a sharded array is whole; inside
  `jax.shard_map` it is a device's part, so shard there only axes that index groups.
* `optax.flatten` in front of a link makes one vector of all leaves, and hides the groups.
"""

from importlib.metadata import version as _version

from spherical_optax._ground.geometry import (
    Transport,
    angle,
    exp_map,
    parallel_transport,
    project_to_tangent,
    retract,
)
from spherical_optax._ground.groups import Blocks, blocks, group_inner, group_norm
from spherical_optax._ground.selection import (
    ByPath,
    ChannelAxes,
    by_path,
    path_labels,
    path_mask,
)
from spherical_optax._links.adam_g import adam_g, scale_by_adam_g
from spherical_optax._links.adam_s import adam_s, scale_by_adam_s
from spherical_optax._links.adam_srt import adam_srt, scale_by_adam_srt
from spherical_optax._links.adamp import adamp, project_where_invariant, sgdp
from spherical_optax._links.constraints import (
    centralize_per_group,
    follow_great_circle,
    normalize_per_group,
    project_to_tangent_space,
)
from spherical_optax._links.hyperball import HyperballState, adam_h, hyperball
from spherical_optax._links.momentum import (
    sgd_mrt,
    trace_rt,
)
from spherical_optax._links.muon_h import muon_h, orthogonalize_per_group
from spherical_optax._links.radii import (
    ReprojectToSphereState,
    project_to_sphere,
    radial_brake,
    reproject_to_sphere,
    scale_by_radius,
)
from spherical_optax._links.rotational import (
    RotationalState,
    equilibrium_angle,
    equilibrium_angle_of_lion,
    equilibrium_angle_of_sgd,
    equilibrium_angle_of_sgd_mrt,
    rotational,
)
from spherical_optax._looking.describe import describe
from spherical_optax._looking.invariance import (
    Evidence,
    InvariantGroups,
    check_selection,
    find_invariant_groups,
)
from spherical_optax._looking.measures import (
    angle_per_step,
    deformation,
    effective_learning_rate,
    radial_fraction,
    radius,
)
from spherical_optax._looking.with_geometry import (
    WithGeometryState,
    geometry,
    with_geometry,
)

__version__ = _version("spherical-optax")

__all__ = [
    "Blocks",
    "ByPath",
    "ChannelAxes",
    "Evidence",
    "HyperballState",
    "InvariantGroups",
    "ReprojectToSphereState",
    "RotationalState",
    "Transport",
    "WithGeometryState",
    "adam_g",
    "adam_h",
    "adam_s",
    "adam_srt",
    "adamp",
    "angle",
    "angle_per_step",
    "blocks",
    "by_path",
    "centralize_per_group",
    "check_selection",
    "deformation",
    "describe",
    "effective_learning_rate",
    "equilibrium_angle",
    "equilibrium_angle_of_lion",
    "equilibrium_angle_of_sgd",
    "equilibrium_angle_of_sgd_mrt",
    "exp_map",
    "find_invariant_groups",
    "follow_great_circle",
    "geometry",
    "group_inner",
    "group_norm",
    "hyperball",
    "muon_h",
    "normalize_per_group",
    "orthogonalize_per_group",
    "parallel_transport",
    "path_labels",
    "path_mask",
    "project_to_sphere",
    "project_to_tangent",
    "project_to_tangent_space",
    "project_where_invariant",
    "radial_brake",
    "radial_fraction",
    "radius",
    "reproject_to_sphere",
    "retract",
    "rotational",
    "scale_by_adam_g",
    "scale_by_adam_s",
    "scale_by_adam_srt",
    "scale_by_radius",
    "sgd_mrt",
    "sgdp",
    "trace_rt",
    "with_geometry",
]
