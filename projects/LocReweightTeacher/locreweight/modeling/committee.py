"""Several detectors that are trained together."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from .meta_arch import SemiSupervisedRCNN


class Committee(nn.Module):
    """Detectors behind one forward pass, as ``DistributedDataParallel`` requires.

    Members may share modules. Each name of a shared parameter is in the state dict.
    """

    def __init__(self, members: Sequence[SemiSupervisedRCNN]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: list[tuple]) -> list:
        """Run each member on its own arguments; see :meth:`.SemiSupervisedRCNN.forward`."""
        first, *others = zip(self.members, inputs, strict=True)
        outputs = [first[0](*first[1])]
        # Detectron2 logs scalars in the forward pass. Those of further members would replace the
        # first one's.
        with EventStorage(get_event_storage().iter):
            outputs += [member(*arguments) for member, arguments in others]
        return outputs


def members_of(model: nn.Module) -> list[SemiSupervisedRCNN]:
    """Return the members of a committee, or a detector by itself."""
    members: list = list(model.members) if isinstance(model, Committee) else [model]
    return members
