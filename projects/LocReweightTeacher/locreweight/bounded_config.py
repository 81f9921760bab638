"""Config files whose content could be too much for the memory, or for ever."""

from __future__ import annotations

import io

import yaml
from detectron2.config import CfgNode

# Of a config file, each alias counted as what it stands for; Detectron2 has about 300 keys.
_MOST_VALUES = 10_000


class BoundedConfig(CfgNode):
    """Reads config files, bases included, as long as aliases do not let their content explode."""

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with super()._open_cfg(filename) as file:
            text = file.read()
        pending, count = [yaml.safe_load(text)], 0
        while pending:
            node = pending.pop()
            pending += node.values() if isinstance(node, dict) else []
            pending += node if isinstance(node, list) else []
            count += 1
            if count > _MOST_VALUES:
                raise yaml.YAMLError(f"{filename} has more than {_MOST_VALUES} values")
        return io.StringIO(text)
