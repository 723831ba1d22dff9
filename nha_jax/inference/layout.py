"""Where the arrays of a generation live when the model is cut over a mesh.

Nothing here knows a rule for it: what the parameters say is followed. If they are cut over their
key/value heads, so are the caches; if they are cut over the vocabulary, so are logits and counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nha_jax.inference.state import GenerationState, empty_state
from nha_jax.layers.checks import Window
from nha_jax.models.language_model import LanguageModel
from nha_jax.ops.cache import HEAD_AXES


class Layout(NamedTuple):
    """Shardings, hashable, so that they can be a static argument.

    Attributes:
      state: of each array of a state.
      replicated: of what the host looks at.
    """

    state: Any
    replicated: NamedSharding

    @classmethod
    def of(cls, model: LanguageModel, state: GenerationState) -> "Layout | None":
        """That of a state of this model; None: the model is on one device.

        Args:
          model: with its parameters.
          state: or its shapes.
        """
        mesh, axes = None, {}
        for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            sharding = parameter.get_value().sharding
            if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
                mesh = sharding.mesh
                names = parameter.get_metadata("logical_axes")
                cut = zip(names, sharding.spec, strict=False)  # a spec may be shorter
                axes.update({name: axis for name, axis in cut if axis is not None})
        if mesh is None:
            return None
        types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

        def place(path: Any, leaf: Any) -> NamedSharding:
            name = path[-1].name
            spec: list[Any] = [None] * leaf.ndim
            if leaf.size == 0:
                pass  # slots of a layer that has none
            elif name in HEAD_AXES:
                spec[1 + HEAD_AXES[name]] = axes.get("kv_heads")  # behind the axis of layers
            elif name in ("logits", "counts"):
                spec[1] = axes.get("vocab")
            # As compiled programs write it; written otherwise, the same cut is another program: the
            # last Nones are missing where the compiler chose the cut, not where types say it.
            cut_by = {types[axis] for axes in spec for axis in _names(axes)}
            automatic = AxisType.Explicit not in types.values() or AxisType.Auto in cut_by
            while automatic and spec and spec[-1] is None:
                spec.pop()
            return NamedSharding(mesh, PartitionSpec(*spec))

        shardings = jax.tree_util.tree_map_with_path(place, state)
        return cls(shardings, NamedSharding(mesh, PartitionSpec()))

    @property
    def is_explicit(self) -> bool:
        """Whether the mesh has axes of which operations have to say how they cut their results."""
        return AxisType.Explicit in self.replicated.mesh.axis_types

    def automatic(self, function: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
        """A function to be traced under axes of type Auto, whatever those of the mesh are.

        Args:
          function: its operations leave to the compiler how their results are cut.
          shardings: of what it returns.
        """
        if not self.is_explicit:
            return function
        mesh = self.replicated.mesh
        types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

        def explicit_part(sharding: NamedSharding) -> NamedSharding:
            spec = []
            for axes in sharding.spec:
                explicit = tuple(n for n in _names(axes) if types[n] == AxisType.Explicit)
                spec.append(explicit or None)
            return NamedSharding(mesh, PartitionSpec(*spec))

        out = jax.tree.map(explicit_part, shardings)
        return jax.sharding.auto_axes(function, out_sharding=out)

    def constrain(self, values: Any, shardings: Any) -> Any:
        """Values cut in this way, in a function that `automatic` made."""
        if self.is_explicit:
            # The mesh is then the one around, with axes of the other type.
            shardings = jax.tree.map(lambda sharding: sharding.spec, shardings)
        return lax.with_sharding_constraint(values, shardings)


def _names(axes: Any) -> tuple[str, ...]:
    """The names in one entry of a spec."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def first_state(
    model: LanguageModel,
    batch: int,
    *,
    max_length: int | None,
    windows: tuple[Window, ...] | None = None,
    seed: int = 0,
) -> GenerationState:
    """`empty_state` with its arguments, each device making its own shards only."""

    def make() -> GenerationState:
        return empty_state(model, batch, max_length=max_length, windows=windows, seed=seed)

    layout = Layout.of(model, jax.eval_shape(make))
    return make() if layout is None else jax.jit(make, out_shardings=layout.state)()
