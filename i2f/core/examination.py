"""The caller's own module at one input: its output, its gradient, and how it must be run to give that gradient."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from i2f._torch import modules
from i2f._torch.operations import Needs, Switch, Unsupported, carried_out, ordinary
from i2f._torch.watch import Watch
from i2f.core import checks, targets
from i2f.core.flat import joined
from i2f.core.gradient import GradientMap

PASSES = 5  # further passes that must agree: few draws may be equal by chance


class Examination:
    """One forward and one plain backward pass of the caller's own module at x.

    Finds how the network must be run (`GradientMap.way`) and the form in which the loss takes the labels, and records
    both in the map. The module is left as it was.

    Args:
        gmap: with a unit of 1. x: (n, ...). what: how messages name x.

    Attributes:
        output: what the module returns. loss: L(x, θ). gradient: ∇_θ L(x, θ), (d_θ,).

    Raises: ValueError about `what` where it does not fit the model; for a loss that does not take the output or y; for
    whatever is not finite; for a forward that is random or changes its parameters.
    """

    def __init__(self, gmap: GradientMap, x: Tensor, what: str):
        self.gmap, self.x, given = gmap, x, gmap.given
        of_loss = gmap.loss.parameters() if isinstance(gmap.loss, nn.Module) else ()
        watch = Watch([*given.parameters(), *of_loss])
        versions = {name: p._version for name, p in given.named_parameters()}
        drawn = _random_state(x.device)
        with _as_given(given) as changed:
            with watch, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
                self.output = _forward(given, x.clone().requires_grad_(), what)
                self._keeps_parameters(versions)
                value, gmap.y = targets.evaluate(gmap.loss, self.output, gmap.y)
            self.gradient = self._by_theta(given, value)
        self.loss = float(value.detach())
        if not torch.isfinite(self.gradient.sum()) and not torch.isfinite(self.gradient).all():  # the sum is quick
            raise ValueError(self._not_finite(value))
        if not torch.equal(drawn, _random_state(x.device)):
            if watch.drew:
                raise ValueError(checks.DRAWS)
            self._repeats()
        gmap.way.stateful |= bool(changed)
        watch.needs.escaping |= modules.exported_stops(given)
        gmap.way.needs = watch.needs

    def confirms(self, found: Tensor) -> bool:
        """Whether the gradient `found` at x is the module's own; where it is not, `GradientMap.way` is changed so that
        it becomes so.

        Raises: ValueError where a second pass of the module gives another gradient: it is random, or keeps a state.
        """
        gmap, apart = self.gmap, self._apart(found)
        if apart <= 1:
            if apart > 0 and gmap.way.needs == Needs():
                checks.repeatable(self.gradient, self._again())  # warns of kernels that are not deterministic
            if modules.has_own_code(gmap.model) or not targets.is_pytorchs(gmap.loss):
                self._keeps_no_state()
            return True
        self._repeats()
        for bound, module in (("copy", gmap.model), ("given", gmap.given)):
            gmap.way.bound, gmap.model = bound, module
            if self._apart(gmap(self.x)) <= 1:
                return False
        cause = "a forward that keeps a state, changes its own parameters, or writes into a tensor under no_grad?"
        raise ValueError(
            f"model: its gradient cannot be computed apart from the module: {cause} "
            "Give one whose output depends on x and θ alone"
        )

    def _keeps_parameters(self, versions: dict[str, int]) -> None:
        """A ValueError where the forward wrote to a parameter, which then gets its value back."""
        written = {name: p for name, p in self.gmap.given.named_parameters() if p._version != versions[name]}
        kept = dict(self.gmap.model.named_parameters())
        changed = [name for name, p in written.items() if not torch.equal(p, kept[name])]
        if changed:
            with torch.no_grad():
                for name in changed:
                    written[name].copy_(kept[name])
            why = "so that there is no θ to derive at: apply the change once, before"
            raise ValueError(f"model: its forward changes a parameter in place ({', '.join(changed)}), {why}")

    def _repeats(self) -> None:
        """Further passes have the same gradient; a ValueError for a network that is random or keeps a state."""
        for _ in range(PASSES):
            checks.repeatable(self.gradient, self._again())

    def _keeps_no_state(self) -> None:
        """A further pass has the loss of the first; a ValueError for a network that counts its passes, or the like."""
        with torch.enable_grad():  # which a forward may need
            again = float(self.gmap.value(self.gmap.leaves(), self.x).detach())
        apart = abs(again - self.loss) / (abs(self.loss) or 1.0)
        if apart > (1e-3 if self.x.dtype == torch.float32 else 1e-8):
            cure = "give one whose output depends on x and θ alone"
            raise ValueError(f"model keeps a state: two passes over the same x differ by {apart:.1g} of L; {cure}")

    def _again(self) -> Tensor:
        """The gradient of a further pass of the module."""
        given = self.gmap.given
        with _as_given(given):
            output = given(self.x.clone().requires_grad_().clone())
            return self._by_theta(given, self.gmap.loss(output, self.gmap.y))

    def _by_theta(self, module: nn.Module, value: Tensor) -> Tensor:
        """∇_θ of a loss of the module, flat."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not value.requires_grad:
            raise ValueError(checks.CONSTANT)
        try:
            parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise checks.not_differentiable(module, error, "first") from error
        if all(part is None for part in parts):
            raise ValueError(checks.NO_J)
        return joined([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)])

    def _apart(self, found: Tensor) -> float:
        """The largest distance of a parameter's two gradients, in units of what rounding may do; NaN counts as far."""
        own, split = self.gradient, self.gmap.split
        if torch.equal(own, found):
            return 0.0
        relative, floor = (1e-3, 1e-5) if own.dtype == torch.float32 else (1e-8, 1e-11)
        whole, worst = floor * float(own.double().norm()), 0.0
        for a, b in zip(split(own), split(found), strict=True):
            distance = float((a.double() - b.double()).norm())
            allowed = relative * float(a.double().norm()) + whole
            far = distance / allowed if allowed else (0.0 if distance == 0 else math.inf)
            worst = math.inf if math.isnan(far) else max(worst, far)
        return worst

    def _not_finite(self, value: Tensor) -> str:
        """The first tensor on the way to the gradient that is NaN or infinite, in words."""
        model = self.gmap.model
        named = [(f"model: {name}", t) for name, t in [*model.named_parameters(), *model.named_buffers()]]
        outputs = [t for t in tree_flatten(self.output)[0] if torch.is_tensor(t)]
        named += [("the model's output at this x", t) for t in outputs] + [("the loss at this x", value)]
        for name, tensor in named:
            bad = int((~torch.isfinite(tensor.detach())).sum())
            if bad:
                return f"{name} has {bad} NaN or infinite entries of {tensor.numel()}; it must be finite"
        return "the gradient has NaN or infinite entries at this x, where model and loss are finite"


@ordinary()
def check(gmap: GradientMap, x: Tensor, what: str) -> Any:
    """The model's output at `x`, once all that `Examination` looks at is in order; for an attack. Without labels, the
    output is examined alone.

    Raises: as `Examination`.
    """
    x = x.clone()  # an ordinary tensor, also under inference mode
    if gmap.y is None:
        with _as_given(gmap.given):
            output = _forward(gmap.given, x, what)
        if _numbers(output):
            probe = copy.copy(gmap)
            probe.y, probe.loss = torch.zeros(()), _any_function
            check(probe, x, what)
            gmap.model = probe.model
        return output
    examined = Examination(gmap, x, what)
    try:
        examined.confirms(gmap(x))
    except RuntimeError as error:
        raise checks.not_differentiable(gmap.model, error, "first") from error
    return examined.output


@contextmanager
def _as_given(module: nn.Module) -> Iterator[list[bool]]:
    """The module runs as it does for its owner, and is left as it was (`modules.preserved`)."""
    own = carried_out(Needs(), Switch())
    with modules.preserved(module) as changed, modules.uncompiled(), torch.enable_grad(), own:
        yield changed


def _forward(module: nn.Module, x: Tensor, what: str) -> Any:
    try:
        return module(x.clone())  # no leaf: a forward may change it in place
    except torch.OutOfMemoryError:
        raise
    except Unsupported as error:
        raise ValueError(str(error)) from error
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(f"{what} does not fit the model: {type(error).__name__}: {error}") from error
    except Exception as error:  # it may raise anything
        raise ValueError(f"model fails at {what}: {type(error).__name__}: {error}") from error


def _random_state(device: torch.device) -> Tensor:
    """Of PyTorch's global generator, which a random forward advances."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _numbers(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output; none of an object that only the user's loss can read."""
    return [t for t in tree_flatten(output)[0] if torch.is_tensor(t) and t.is_floating_point()]


def _any_function(output: Any, y: Any) -> Tensor:
    """A scalar that depends on every entry of an output, for a network without labels."""
    parts = _numbers(output)
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in parts]
    return torch.stack([(t * w).sum() for t, w in zip(parts, weights, strict=True)]).sum()
