"""Site names, and where a family finds a site in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from dllm_sparsity.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from jaxtyping import Int

PRIMITIVE_SITES = ("input", "gate", "up", "intermediate")
ALL = ("input", "intermediate")
"""What the site `all` stands for: the inputs of every linear of the FFN."""


Act = Callable[..., Tensor]
"""Takes a site's tensor, and as `routed` what its rows are where experts share them out; gives what goes on."""


@dataclass(frozen=True)
class Routed:
    """What the rows of an expert layer are: one row for each token and expert that met.

    Args:
        token: Place of each row's token among the tokens of the forward pass.
        expert: Expert of each row, or of all of them.
        tokens: Tokens of the forward pass.
    """

    token: Int[Tensor, "rows"]
    expert: Int[Tensor, "rows"] | int
    tokens: int


@dataclass(frozen=True)
class SitePoint:
    """A tensor that flows into or out of a module, or inside one.

    Args:
        module: The module to hook.
        side: Whether its first input or its output is the site; `inside` where only `attach` knows.
        width: Entries of a row.
        start: First column of the site where the tensor holds more than the site.
        weight: Weight of the linear that consumes the site, `[out, width]`, where there is one.
        attach: Lets an act work on the site and returns what detaches it; None where a hook on the module does.
    """

    module: nn.Module
    side: Literal["input", "output", "inside"]
    width: int
    start: int = 0
    weight: Tensor | None = None
    attach: Callable[[Act], Callable[[], None]] | None = None


@dataclass(frozen=True)
class GatedForm:
    """A module that computes down(activation(gate(x)) * up(x)) of children that can be called one by one.

    Args:
        module: The module.
        gate: Its gate projection.
        up: Its up projection.
        activation: The gate's activation.
        down: Its down projection.
        norm: The normalisation whose output is the module's input and nothing else's, where the family knows one.
    """

    module: nn.Module
    gate: nn.Module
    up: nn.Module
    activation: nn.Module
    down: nn.Module
    norm: nn.Module | None = None


@dataclass(frozen=True)
class FFN:
    """One feed-forward layer as a family found it.

    Args:
        layer: Index of the layer in the model.
        name: Path of the module in the model.
        points: The sites it has.
        missing: Why it lacks the other sites.
        form: Its parts, where kernels may take over from its forward pass.
        d_model: Width of `input`.
        d_ffn: Width of `intermediate`.
        gated: Whether it has a gate.
        device_of: A parameter that tells where the layer lives.
        experts: Number of experts; 0 where every token passes one and the same FFN.
    """

    layer: int
    name: str
    points: dict[str, SitePoint]
    d_model: int
    d_ffn: int
    gated: bool
    device_of: Tensor
    missing: dict[str, str] = field(default_factory=dict)
    form: GatedForm | None = None
    experts: int = 0


def expand(sites: str | Sequence[str]) -> tuple[str, ...]:
    """Return the primitive sites that a user's choice stands for, in the order in which they fire.

    Args:
        sites: One name or several.

    Raises:
        UserError: A name is unknown, or none is given.
    """
    asked = [sites] if isinstance(sites, str) else list(sites)
    for name in asked:
        if name not in (*PRIMITIVE_SITES, "all"):
            raise UserError(
                f"unknown site {name!r}{did_you_mean(name, [*PRIMITIVE_SITES, 'all'])}",
                f"sites are: {', '.join(PRIMITIVE_SITES)}, all",
            )
    wanted = {primitive for name in asked for primitive in (ALL if name == "all" else (name,))}
    if not wanted:
        raise UserError("no site given", f"sites are: {', '.join(PRIMITIVE_SITES)}, all")
    return tuple(site for site in PRIMITIVE_SITES if site in wanted)


def choose(ffns: list[FFN], sites: tuple[str, ...], layers: Iterable[int] | None) -> list[FFN]:
    """Return the FFNs of the layers asked for, all of which have the sites.

    Args:
        ffns: Of a model.
        sites: Primitive sites.
        layers: All when None.

    Raises:
        UserError: A layer or site does not exist.
    """
    if layers is not None:
        wanted = set(layers)
        unknown = sorted(wanted - {ffn.layer for ffn in ffns})
        if unknown or not wanted:
            raise UserError(f"no such layers: {unknown}", f"the model has layers 0 to {max(f.layer for f in ffns)}")
        ffns = [ffn for ffn in ffns if ffn.layer in wanted]
    for ffn in ffns:
        for site in sites:
            if site not in ffn.points:
                reason = ffn.missing.get(site, "its form has no such site")
                raise UserError(f"{ffn.name} has no site {site}: {reason}", f"it has: {', '.join(ffn.points)}")
    return ffns
