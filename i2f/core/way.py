"""How a network must be run so that its gradient is the caller's own."""

from dataclasses import dataclass, field

from i2f._torch.operations import Needs, Switch


@dataclass
class Way:
    """How a network must be run so that the computed gradient equals the module's own; found by `examination`, shared
    by copies of the map.

    needs: what its operations need. stateful: a forward changes Python attributes, which are put back. bound: where
    parameters cannot be swapped (a second name in a list, a patched forward), "copy" uses those of the copied module,
    and "given" those of the caller's. switch: of the values that are held where the network stops its gradient.
    """

    needs: Needs = field(default_factory=Needs)
    stateful: bool = False
    bound: str = ""
    switch: Switch = field(default_factory=Switch)
