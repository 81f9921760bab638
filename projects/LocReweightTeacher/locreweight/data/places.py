"""Where data lies: variables in the names of data sets."""

from __future__ import annotations

import os
import re

DETECTRON2_DATASETS = "DETECTRON2_DATASETS"


def expand(path: str) -> str:
    """A path with ``$VARIABLES`` and ``~`` filled in.

    ``$DETECTRON2_DATASETS``, where Detectron2 looks for the data sets that it has registered, is
    ``datasets`` if it is not set, as there. Other variables that are not set stay as they are, and
    an error that names the path will show them.
    """
    default = os.environ.get(DETECTRON2_DATASETS, "datasets")
    path = re.sub(
        rf"\$(?:{DETECTRON2_DATASETS}\b|{{{DETECTRON2_DATASETS}}})", lambda _: default, path
    )
    return os.path.expanduser(os.path.expandvars(path))
