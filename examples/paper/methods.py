"""The methods that are compared, each adapting the same layers and training the head.

To add one, write a function from model, adapted part and rank to the model, and name it in `METHODS`: see
docs/paper.md, "Add your method".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import methods as words
from benchmarks.methods import QUERY_AND_VALUE, NotAvailable
from torch import nn

from .models import AdaptedPart, freeze_all_but
from .side_tuning import SideTuned

_ATTENTION = re.compile(r"attn|attention|token_mixer")
_LORA_ALPHA = 8  # the paper's, as are the ranks
_FUSED = "qkv"  # which gets three factors of rank 8


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Attributes:
        label: The name in tables.
        build: The function from model, adapted part and rank (or None) to the model that is trained. It may change the
            given model. It raises `NotAvailable` if the method does not support the model.
        scale: The learning rate at which the search begins, relative to that of the recipe.
        ranks: The ranks to try, the default first.
        exact_steps: The number of steps at the start of a run with exact backpropagation.
        same_as: The method whose gradients this one computes at another cost. Tables then show that method's scores
            where this one has none of its own.
    """

    label: str
    build: Callable[[nn.Module, AdaptedPart, int | None], nn.Module]
    scale: float = 1.0
    ranks: tuple[int, ...] = ()
    exact_steps: int = 0
    same_as: str | None = None


def head_only(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    freeze_all_but(model, part.heads)
    return model


def full(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    """Exact backpropagation to the weights of the adapted layers. Norms stay frozen, as in the other methods."""
    freeze_all_but(model, [*part.targets, *part.heads])
    return model


def checkpointing(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    return words.checkpointing(full(model, part, rank), part.heads, {})


def lora(model: nn.Module, part: AdaptedPart, rank: int | None, targets: list[str] | None = None) -> nn.Module:
    targets = part.targets if targets is None else targets
    fused = {rf".*{_FUSED}": 24} if any(name.endswith(_FUSED) for name in targets) else {}
    return words.lora(model, part.heads, targets, {"r": rank, "lora_alpha": _LORA_ALPHA, "rank_pattern": fused})


def lora_without_mlps(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    targets = [name for name in part.targets if _ATTENTION.search(name)]
    if not targets:
        raise NotAvailable("the adapted part has no attention")
    return lora(model, part, rank, targets)


def lora_of_queries_and_values(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    own = (*QUERY_AND_VALUE, _FUSED, "q", "v")
    targets = [name for name in part.targets if name.rsplit(".", 1)[-1] in own]
    if not targets:
        raise NotAvailable("the adapted part has no attention")
    return lora(model, part, rank, targets)


def lora_fa(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    return words.lora_fa(model, part.heads, {"target_modules": part.targets, "r": rank, "lora_alpha": _LORA_ALPHA})


def velora(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    return words.velora(model, part.heads, {"target_modules": part.targets, "r": rank, "lora_alpha": _LORA_ALPHA})


def lbp_wht(model: nn.Module, part: AdaptedPart, rank: int | None, **settings: Any) -> nn.Module:
    """LBP-WHT of the adapted layers; `rank` is that of the weight gradient.

    Input gradients are exact unless the settings say otherwise. With the default, "auto", they would be rounded, and
    layers would be left to exact backpropagation, where that is faster: scores would depend on the machine.
    """
    settings.setdefault("grad_input_dtype", "full")
    return words.lbp_wht(model, part.heads, {"target_modules": part.targets, **part.lbp_wht, "r": rank, **settings})


def paper(model: nn.Module, part: AdaptedPart, rank: int | None, n: int) -> nn.Module:
    """The paper's setting LP_L1-n: both gradients at the rank n (n + 1) / 2."""
    r = n * (n + 1) // 2
    return lbp_wht(model, part, r, grad_input_rank=r)


def paper_late_exact(model: nn.Module, part: AdaptedPart, rank: int | None, n: int) -> nn.Module:
    """The paper's setting, but with exact input gradients in the second half of the layers.

    The error of an input gradient passes to all layers before it, so the errors of the last layers matter most.
    """
    r = n * (n + 1) // 2
    late = {re.escape(name): None for name in part.targets[len(part.targets) // 2 :]}
    return lbp_wht(model, part, r, grad_input_rank=r, grad_input_rank_pattern=late)


def paper_by_depth(model: nn.Module, part: AdaptedPart, rank: int | None, *n: int) -> nn.Module:
    """The paper's setting with a rank for each section of the layers, the first section first.

    The sections have equally many layers. A layer near the input receives a gradient that many layers have disturbed
    and whose energy is spread over more coefficients, so that it may need a higher rank than one near the head.
    """
    ranks = [k * (k + 1) // 2 for k in n]
    section = {re.escape(name): ranks[index * len(n) // len(part.targets)] for index, name in enumerate(part.targets)}
    return lbp_wht(
        model, part, ranks[0], rank_pattern=section, grad_input_rank=ranks[0], grad_input_rank_pattern=section
    )


def with_norms(
    model: nn.Module,
    part: AdaptedPart,
    rank: int | None,
    build: Callable[[nn.Module, AdaptedPart, int | None], nn.Module],
) -> nn.Module:
    """Another method, with the affine parameters of the norms in the adapted part trained too."""
    if not part.norms:
        raise NotAvailable("no norm lies in the adapted part")
    parameters = [parameter for name in part.norms for parameter in model.get_submodule(name).parameters()]
    adapted = build(model, part, rank)
    for parameter in parameters:
        parameter.requires_grad = True
    return adapted


def adaptive(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    """LBP-WHT at rank 10 whose input gradients go through a basis found for each image; `rank` is that of the basis."""
    return lbp_wht(model, part, 10, grad_input_basis="adaptive", grad_input_rank=rank)


def lora_with_lbp_wht(model: nn.Module, part: AdaptedPart, rank: int | None, **settings: Any) -> nn.Module:
    return lbp_wht(lora(model, part, 8), part, rank, **settings)


def side_tuning(model: nn.Module, part: AdaptedPart, rank: int | None) -> nn.Module:
    freeze_all_but(model, part.heads)
    return SideTuned(model, part.targets, width=rank or 64)


METHODS = {
    "head": Method("head only", head_only, scale=10),
    "full": Method("exact backpropagation", full),
    "checkpointing": Method("exact backpropagation, checkpointing", checkpointing, same_as="full"),
    "lora": Method("LoRA", lora, scale=10, ranks=(8, 16)),
    "lora-without-mlps": Method("LoRA without MLPs", lora_without_mlps, scale=10, ranks=(8, 16)),
    "lora-qv": Method("LoRA on q, v", lora_of_queries_and_values, scale=10, ranks=(8, 16)),
    "lora-fa": Method("LoRA-FA", lora_fa, scale=10, ranks=(8, 16)),
    "velora": Method("VeLoRA", velora, scale=10, ranks=(8, 16)),
    "side-tuning": Method("side tuning", side_tuning, scale=10, ranks=(64, 128)),
    "lbp-wht": Method("LBP-WHT, exact dx", lbp_wht, ranks=(10, 21)),
    "lbp-wht-adaptive": Method("LBP-WHT, adaptive dx", adaptive, ranks=(24, 16)),
    "lora+lbp-wht": Method("LoRA + LBP-WHT", lora_with_lbp_wht, scale=10, ranks=(10, 21)),
    **{f"lp_l1-{n}": Method(f"LBP-WHT, LP_L1-{n} (paper)", partial(paper, n=n)) for n in (2, 4, 6, 8)},
    # Remedies where the paper's setting loses accuracy
    "lp_l1-4-late-exact": Method("LBP-WHT, LP_L1-4, late layers with exact dx", partial(paper_late_exact, n=4)),
    "lp_l1-4-warm-up": Method("LBP-WHT, LP_L1-4, the first 40 steps exact", partial(paper, n=4), exact_steps=40),
    "lp_l1-6-4-2": Method("LBP-WHT, LP_L1-6, -4, -2 by depth", lambda *given: paper_by_depth(*given, 6, 4, 2)),
    "lp_l1-2+norms": Method("LBP-WHT, LP_L1-2, norms trained", partial(with_norms, build=partial(paper, n=2))),
    "lp_l1-4+norms": Method("LBP-WHT, LP_L1-4, norms trained", partial(with_norms, build=partial(paper, n=4))),
    "full+norms": Method("exact backpropagation, norms trained", partial(with_norms, build=full)),
}


def method_named(name: str) -> Method:
    """The method with a name in `METHODS`.

    Raises:
        SystemExit: there is no such method.
    """
    if name not in METHODS:
        raise SystemExit(f"--methods {name}: choose from {', '.join(METHODS)}")
    return METHODS[name]
