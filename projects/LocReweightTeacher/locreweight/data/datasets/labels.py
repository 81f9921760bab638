"""Class names of annotations that give each object its name instead of a number."""

from __future__ import annotations

from collections.abc import Sequence


class ClassNames:
    """Numbers of class names: given ones, or those that the annotations use.

    Names that are not given beforehand are numbered as they come. :meth:`with_indices` sorts them
    once all annotations are read.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """
        Args:
            names: ``DATASETS.CLASS_NAMES``. If it is empty, all names are accepted.
        """
        self._are_given = bool(names)
        # Repeated names are reported when the classes of the data sets are compared.
        self._index = {name: i for i, name in enumerate(dict.fromkeys(names))}

    @property
    def names(self) -> list[str]:
        """The class names, in the order of the model's classes."""
        return list(self._index) if self._are_given else sorted(self._index)

    def index(self, name: str) -> int:
        """Number of a class.

        Raises:
            ValueError: if the name is not one of those given.
        """
        if self._are_given and name not in self._index:
            raise ValueError(
                f"class {name!r} is not in {list(self._index)}; set DATASETS.CLASS_NAMES to the "
                "class names of the annotations and MODEL.ROI_HEADS.NUM_CLASSES to their number"
            )
        return self._index.setdefault(name, len(self._index))

    def with_indices(self, records: list[dict]) -> list[dict]:
        """Renumber the annotations of records, in place, in the order of :attr:`names`."""
        final = {name: i for i, name in enumerate(self.names)}
        renumbered = [final[name] for name in self._index]
        for record in records:
            for annotation in record["annotations"]:
                annotation["category_id"] = renumbered[annotation["category_id"]]
        return records
