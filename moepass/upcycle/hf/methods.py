"""Options of the methods that arrange neurons: what goes together, what a host has room for, what needs a calibration.

``check_options``   what no host could do; ``check_shared``: what this host cannot
``wants_arrangement``, ``why_calibration``  what a recipe asks of ``hf.arrange``
Source: ``reference/upcycling.md`` sections 1.0 (d) and 1.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moepass import errors
from moepass.upcycle.hf.hosts import HOSTS, Host
from moepass.upcycle.hf.routers import FROM_DATA

if TYPE_CHECKING:
    from moepass.upcycle.hf.recipe import Recipe

#: Values of options that are words.
WORDS = {"drop_indices": ("shared", "independent"), "cluster_on": ("weights", "activations")}
#: Expert widths that are multiples of it have rows of whole 16 bytes in every dtype, which grouped_mm asks for.
ALIGNED = 8
#: Methods (names of the command line) that give each neuron to one expert: the others have nothing to arrange.
ARRANGED = ("split", "cluster")


def check_options(recipe: Recipe) -> None:
    """Raise ``BadOption`` for words that are none, and for options that mean nothing to the recipe's method."""
    for name, known in WORDS.items():
        value = getattr(recipe, name)
        if value not in known:
            raise errors.BadOption(name=name, value=value, detail=f"choose one of {', '.join(known)}")
    if isinstance(recipe.shared, bool) or not isinstance(recipe.shared, int) or recipe.shared < 0:
        raise errors.BadOption(name="shared", value=recipe.shared, detail="give a number of neurons, such as 1408")
    _only_for(recipe, "drop_indices", ("drop",))
    _only_for(recipe, "cluster_on", ("cluster",))
    _only_for(recipe, "shared", ARRANGED)
    if recipe.router in FROM_DATA:
        _only_for(recipe, "router", ARRANGED)


def _only_for(recipe: Recipe, name: str, methods: tuple[str, ...]) -> None:
    value = getattr(recipe, name)
    if value != type(recipe).__dataclass_fields__[name].default and recipe.method not in methods:
        detail = f"it is for --init {' or '.join(methods)}, not {recipe.method}"
        raise errors.BadOption(name=name, value=value, detail=detail)


def check_shared(N: int, E: int, host: Host, F: int) -> None:
    """Raise ``BadOption`` where N of F neurons cannot be the shared expert of this host, beside E equal routed ones."""
    if host.shared is None:
        able = ", ".join(name for name, h in HOSTS.items() if h.shared is not None)
        detail = f"{host.model_type} has no shared expert; hosts that have one are {able}"
        raise errors.BadOption(name="shared", value=N, detail=detail)
    fitting = _fitting(E, host, F)
    if N in fitting:
        return
    near = sorted(sorted(fitting, key=lambda n: ((F - n) // E % ALIGNED > 0, abs(n - N)))[:4])
    what = f"{host.model_type} with {E} equal routed experts, of a block of {F} neurons,"
    advice = f"can share {' or '.join(map(str, near))}" if near else "can share none; choose another number of experts"
    raise errors.BadOption(name="shared", value=N, detail=f"{what} {advice}")


def _fitting(E: int, host: Host, F: int) -> list[int]:
    rule = "any" if host.shared is None else host.shared.width
    if rule == "any":
        return [N for N in range(1, F) if (F - N) % E == 0]
    most = 2 if rule == "equal" else F
    return [n * F // (E + n) for n in range(1, most) if F % (E + n) == 0]


def wants_arrangement(recipe: Recipe) -> bool:
    """Whether the order of the neurons, or the router, has to be made from weights or activations."""
    return recipe.method == "cluster" or recipe.shared > 0 or recipe.router in FROM_DATA


def why_calibration(recipe: Recipe) -> str | None:
    """The option that cannot do without activations, or None."""
    if recipe.cluster_on == "activations":
        return "cluster_on"
    return "shared" if recipe.shared else None


def uses_calibration(recipe: Recipe) -> bool:
    """Whether a calibration decides any weight."""
    return why_calibration(recipe) is not None or recipe.router in FROM_DATA
