"""Semi-supervised object detection via dynamic reweighting of localization error.

:mod:`~locreweight.losses`, :mod:`~locreweight.ema` and :mod:`~locreweight.geometry` implement the
paper's equations and need only PyTorch. The other modules use Detectron2. Importing this package
needs only the standard library.
"""

import logging
import warnings

# What Detectron2 and fvcore do with PyTorch gives these warnings. Users cannot change it.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
