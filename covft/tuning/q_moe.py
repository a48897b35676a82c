"""Experts in the connector of a multimodal LLM, weighed by the text.

Shapes: B images, N tokens of an image, T tokens of all images of a packed batch, D embed_dim, H inner width,
O width of the language model, C text_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, fx, nn

from covft.conditioning import Conditioning
from covft.errors import UnsupportedViTError
from covft.nn.moe import ContextualMoE
from covft.surgery.overrides import Override
from covft.tuning.change import Change
from covft.tuning.method import Method, Tower
from covft.tuning.texts import ReadsText, conditioning_of, text_width
from covft.utils.arguments import check_kinds, check_sizes

CONNECTOR = "covft_connector"
"""Name in the ViT of the experts that stand in for the connector's FFNs."""


@check_kinds
@dataclass(frozen=True, kw_only=True)
class QMoE(Method):
    r"""Mix experts in the connector of a multimodal LLM, weighed by the text; the tower stays frozen.

    $y = \sum_e g_e(t)\, (W_{2,e}\, \sigma(W_{1,e} x + b_{1,e}) + b_{2,e})$ in the place of each FFN of the connector,
    with $g(t) = \mathrm{softmax}(W\, \mathrm{LN}(r(t)) + b)$ and $r(t) = t + W_{down}\, \mathrm{GELU}(W_{up}\, t)$, one
    decision for all tokens of an image. All experts start as copies of the FFN, so the output is the connector's. The
    idea of Q-MoE (Wang et al., "Q-MoE: Connector for MLLMs with Text-Driven Routing", ACM MM 2024): experts in the FFNs
    of the connector, and a router that reads the task's text. Differs from it in that the connector stays the model's
    own, where Q-MoE trains a query transformer; in that all experts are mixed, where Q-MoE searches the best path of
    experts and then trains along it; and in the router, which is covft's.

    For multimodal LLMs alone: a ViT has no connector. With $m$ FFNs of widths $D, H, O$ in the connector it trains
    $m (E (D H + H + H O + O) + 4 C^2 + 5 C + E (C + 1))$ parameters.

    Attributes:
        experts: Number of experts E.
    """

    experts: int = 4
    name: ClassVar[str] = "q_moe"
    needs_text: ClassVar[bool] = True
    part: ClassVar[str] = "projector"

    def __post_init__(self) -> None:
        check_sizes(experts=self.experts)

    def plan(self, tower: Tower) -> Change:
        """Plan a mixture for each FFN of the connector: a linear layer, an activation, and another linear layer.

        Raises:
            ConfigError: If there is no text.
            UnsupportedViTError: If this is a ViT alone, or the connector has no such FFN.
        """
        if not tower.connector:
            raise UnsupportedViTError(
                f"{self.name!r} puts experts into the connector of a multimodal LLM, and here is none.",
                expected="a multimodal LLM of transformers",
                got=f"{type(tower.vit).__name__} alone",
                fix=f"covft.tune(mllm, {self.name!r}, text_encoder=..., tokenizer=...)",
            )
        text_dim = text_width(tower, self.name)
        found = ffns_of(tower.connector)
        if not found:
            raise UnsupportedViTError(
                f"The connector of this model has no FFN that {self.name!r} could copy.",
                expected="a linear layer, an activation and a linear layer, called one after another",
                got="; ".join(f"{path}: {type(module).__name__}" for path, module in tower.connector.items()),
                fix='covft.tune(mllm, "covft"), whose experts are in the tower',
            )
        conditioning = conditioning_of(tower)
        mixtures, overrides = nn.ModuleList(), []
        for ffn in found:
            mixture = ConnectorExperts(conditioning, ffn, text_dim, self.experts)
            mixtures.append(mixture)
            overrides += [Mixed(ffn.first, mixture), Passed(ffn.activation), Passed(ffn.last)]
        return Change(added={CONNECTOR: mixtures}, overrides=tuple(overrides), conditioning=conditioning)


class ConnectorFFN(NamedTuple):
    """The three modules of an FFN, wherever they are in the connector."""

    first: nn.Linear
    activation: nn.Module
    last: nn.Linear


class ConnectorExperts(ReadsText):
    """Mixes copies of an FFN of the connector, by the text of each image.

    Args:
        conditioning: Carries the text.
        ffn: The FFN to copy.
        text_dim: Width C of the text features.
        experts: Number of experts E.
    """

    def __init__(self, conditioning: Conditioning, ffn: ConnectorFFN, text_dim: int, experts: int) -> None:
        super().__init__(conditioning)
        copied = nn.Sequential(*ffn)
        copied.training = ffn.first.training
        self.moe = ContextualMoE(
            copied, embed_dim=ffn.first.in_features, text_dim=text_dim, num_experts=experts, context="text"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix the experts, for tokens `(B, N, D)`, or packed ones `(T, D)` or `(1, T, D)`.

        Raises:
            MissingContextError: If there is no text.
            ShapeError: If the text is for another number of images.
            ReentrantCheckpointError: If gradients would be lost silently.
        """
        scope = self.scope()
        segments = self.conditioning.segments_after(scope, x)
        if segments is None:
            scope.check_rows(len(x))
        text_BC = scope.text_for(len(x) if segments is None else len(segments))
        return self.moe(x, text_BC, segments=segments)


class Mixed(Override):
    """Overrides the first layer of an FFN: returns what the experts compute, and thus the last layer's output.

    Args:
        layer: The layer.
        mixture: The experts.
    """

    def __init__(self, layer: nn.Module, mixture: ConnectorExperts) -> None:
        super().__init__(layer, "forward")
        self.mixture = mixture

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Mix the experts."""
        return self.mixture(*self._own(args), **kwargs)


class Passed(Override):
    """Overrides what comes after the first layer in an FFN, which the experts have computed.

    Args:
        module: The activation, or the last layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return self._own(args)[0]


def ffns_of(connector: Mapping[str, nn.Module]) -> list[ConnectorFFN]:
    """Return the FFNs of a connector: those whose layers are seen to be called one after another, and nowhere else.

    Args:
        connector: Modules by path.
    """
    found: list[ConnectorFFN] = []
    for module in connector.values():
        for holder in module.modules():
            if sum(type(child) is nn.Linear for child in holder.children()) > 1:
                found += _called_in_a_row(holder)
    return found


class _Calls(fx.Tracer):
    """Follows the calls of a module's children, and not what these do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _called_in_a_row(holder: nn.Module) -> Iterator[ConnectorFFN]:
    """Yield the FFNs among the children of a module, by the graph of its forward."""
    try:
        graph = _Calls().trace(holder)
    except Exception:  # of a foreign forward, such as one that looks at values
        return
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        row = [node]
        while len(row) < 3 and len(row[-1].users) == 1:
            row.append(next(iter(row[-1].users)))
        if len(row) < 3 or taken & set(row) or any(each.op != "call_module" for each in row):
            continue
        ffn = ConnectorFFN(*(holder.get_submodule(str(each.target)) for each in row))  # type: ignore[arg-type]
        calls = [each.target for each in graph.nodes if each.op == "call_module"]
        if _is_ffn(ffn) and all(calls.count(each.target) == 1 for each in row):
            taken.update(row)
            yield ffn


def _is_ffn(ffn: ConnectorFFN) -> bool:
    linears = all(type(layer) is nn.Linear and layer.weight.is_floating_point() for layer in (ffn.first, ffn.last))
    return linears and not isinstance(ffn.activation, nn.Identity) and not list(ffn.activation.parameters())
