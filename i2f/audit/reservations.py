"""What is not known about a sample's numbers, in words."""

import math
from collections.abc import Iterator

import torch

from i2f.audit.sample import FIRST_ORDER, Sample, psnr
from i2f.audit.shared import Shared
from i2f.core import spectrum


def reservations(sample: Sample, shared: Shared, most: float, mask_rank: int | None = None) -> list[str]:
    """Every reservation that holds, the gravest first.

    Args: most: the largest RMSE that isotropic noise can leave. mask_rank: the rank of J on the coordinates that
    pruning kept.
    """
    return [
        *_first_order(sample, shared, mask_rank),
        *_knowledge(sample, shared),
        *_needed(sample, shared, most),
        *_network(sample, shared),
    ]


def _first_order(sample: Sample, shared: Shared, mask_rank: int | None) -> Iterator[str]:
    rows = shared.J.shape[0]
    if sample.predicted > FIRST_ORDER and shared.question.defense.name != "designed":
        yield (
            f"the predicted RMSE of {sample.predicted:.2g} is above {FIRST_ORDER:.2g}, where the first order is no "
            "longer reliable: the true error may be smaller or larger"
        )
    if sample.rank is not None and sample.rank < rows:
        yield (
            f"J Jᵀ has rank {sample.rank} of {rows}: to first order the gradient does not show the other directions "
            "of the input, but a prior or a second gradient may"
        )
    if sample.bound > sample.judged:
        yield (
            f"the lower bound I_lb = {sample.bound:.2g} is above the judged error of {sample.judged:.2g}: it holds for "
            "attackers without range and prior, and the judged one knows them"
        )
    if mask_rank is not None:
        sees = "recovers everything" if mask_rank == rows else f"sees {mask_rank} of {rows} directions"
        yield f"an attacker who reads the mask off the zeros {sees}; that the pruned entries are small is not used"


def _knowledge(sample: Sample, shared: Shared) -> Iterator[str]:
    if shared.question.defense.name == "quantize":
        yield (
            "rounding is not random: an attacker who searches among the inputs whose gradient rounds to this one may "
            "find more"
        )
    if sample.label is not True:
        yield "the attackers are given the label, which was not read off this gradient: a real one may have to guess it"


def _needed(sample: Sample, shared: Shared, most: float) -> Iterator[str]:
    target, tau = shared.question.target_psnr, shared.question.tau
    if sample.needed is not None and math.isinf(sample.needed):
        yield (
            f"no isotropic noise reaches {target:g} dB: an attacker who ignores the gradient is left with {most:.3g} "
            f"({psnr(most):.3g} dB), where the prior has standard deviation τ = {tau:g} ({psnr(tau):.3g} dB)"
        )
    elif sample.needed and math.sqrt(shared.question.target_mse) > FIRST_ORDER:
        yield (
            f"the noise needed for {target:g} dB is too large for the first order to be reliable: it may leave a "
            "smaller error"
        )


def _network(sample: Sample, shared: Shared) -> Iterator[str]:
    J, weights = shared.J, shared.question.weights
    if shared.kinked:
        attack = (
            "" if shared.attack else "; attack=True also runs the recursive attack, which such networks do not stall"
        )
        yield f"the network has kinks (ReLU, max pooling, …): J is valid between them only{attack}"
    if J.dtype != torch.float64:
        level = f"{spectrum.zero_level(J):.1g}"
        rounding = f": λ below {level} of the largest may be rounding error, and is set to that level"
        yield f"computed in {_name(J.dtype)}{'' if sample.rank is None else rounding}"
    if weights not in (torch.float32, torch.float64):
        yield (
            f"the model's {_name(weights)} weights were audited in {_name(J.dtype)}: the rounding of a gradient "
            "computed in lower precision is not counted as protection"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
