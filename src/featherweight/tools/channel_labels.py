"""Labels: what may be removed of an axis, index by index, as sets of atoms.

An atom is something that is removed as a whole, wherever it is; an index goes when any of its atoms goes,
and an index without atoms stays. Atoms are united when an operator needs the same indices of two axes
(disjoint sets), refined into several when an axis is taken apart (``e -> {outer, inner}``), and fixed when
something has them in a size that cannot change. A label is the number of a set; an axis is an array of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

Axis = NDArray[np.int64]  # index -> label
_TRIES = 4  # how often an axis is refined until it is a product


class Labels:
    """All atoms and labels of a model.

    Attributes:
        why: What is told of atoms that are fixed from here on.
    """

    def __init__(self) -> None:
        self.why = "it has a fixed size"
        self._parent: list[int] = []
        self._family: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._fixed: dict[int, str] = {}
        self._sets: list[tuple[int, ...]] = [()]
        self._numbers: dict[tuple[int, ...], int] = {(): 0}
        self._families: list[int] = []
        self._factors: set[int] = set()  # families of rows and columns
        self._stands: dict[int, int] = {}  # label -> label of today; emptied by every change

    # ---- making labels

    def fresh(self, size: int) -> Axis:
        """One new atom per index; they are of one family."""
        start, family = len(self._parent), len(self._families)
        self._families.append(family)
        atoms = range(start, start + size)
        self._parent.extend(atoms)
        self._family.extend([family] * size)
        first = len(self._sets)
        self._sets.extend((atom,) for atom in atoms)
        self._numbers.update(zip(self._sets[first:], count(first)))
        return np.arange(first, first + size, dtype=np.int64)

    def kept(self, why: str) -> Axis:
        """One index that stays, and why."""
        made = self.fresh(1)
        self.fix(made, why)
        return made

    def label(self, atoms: Iterable[int]) -> int:
        """The number of a set of atoms."""
        found = tuple(dict.fromkeys(atoms))
        number = self._numbers.get(found)
        if number is None:
            number = self._numbers[found] = len(self._sets)
            self._sets.append(found)
        return number

    def join(self, outer: Axis, inner: Axis) -> Axis:
        """Two neighbouring axes as one: an index has the atoms of both."""
        if not inner.any():
            return outer.repeat(len(inner))
        if not outer.any():
            return np.tile(inner, len(outer))
        pairs = np.stack([outer.repeat(len(inner)), np.tile(inner, len(outer))], 1)
        unique, places = np.unique(pairs, axis=0, return_inverse=True)
        joined = [self.label(self.atoms(one) + self.atoms(other)) for one, other in unique.tolist()]
        return np.array(joined, np.int64)[places.reshape(-1)]

    def split(self, axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis]:
        """One axis as two: an index has the atoms of its row and those of its column.

        Atoms that are in no whole row or column are refined into one of each. Where rows are made of
        different things (a concatenation), or of what is a product already, all rows lose the same instead.
        """
        for _ in range(_TRIES):
            grid = self.today(axis).reshape(outer, inner)
            if (grid == grid[:, :1]).all():
                return grid[:, 0].copy(), np.zeros(inner, np.int64)
            if (grid == grid[:1]).all():
                return np.zeros(outer, np.int64), grid[0].copy()
            rows, columns, scattered = self._lines(grid)
            if not scattered:
                return self._axis(rows), self._axis(columns)
            if self._alike(grid, scattered):
                self._refine(grid, scattered)
            else:
                for row in grid[1:]:
                    self.tie(grid[0], row)
        self.fix(axis)
        return np.zeros(outer, np.int64), np.zeros(inner, np.int64)

    def _axis(self, sets: Sequence[Iterable[int]]) -> Axis:
        return np.array([self.label(one) for one in sets], np.int64)

    def _lines(self, grid: Axis) -> tuple[list[list[int]], list[list[int]], set[int]]:
        """Atoms of each whole row, of each whole column, and those that are scattered."""
        rows: list[list[int]] = [[] for _ in range(grid.shape[0])]
        columns: list[list[int]] = [[] for _ in range(grid.shape[1])]
        ids = np.unique(grid).tolist()
        having: dict[int, list[int]] = {}
        for one in ids:
            for atom in self._sets[one]:
                having.setdefault(atom, []).append(one)
        if len(ids) == grid.size and all(len(labels) == 1 for labels in having.values()):
            return rows, columns, set(having)
        scattered = set()
        for atom, labels in having.items():
            mask = np.isin(grid, labels)
            whole, through = np.asarray(mask.all(1)), np.asarray(mask.all(0))
            if np.array_equal(mask, whole[:, None] | through[None]):
                for index in np.flatnonzero(whole):
                    rows[index].append(atom)
                for index in np.flatnonzero(through):
                    columns[index].append(atom)
            else:
                scattered.add(atom)
        return rows, columns, scattered

    def _alike(self, grid: Axis, scattered: set[int]) -> bool:
        """Whether all rows have atoms of the same families, one in each place."""
        families = []
        for row in grid:
            atoms = [self._sets[label] for label in np.unique(row).tolist()]
            free = [[atom for atom in one if atom in scattered] for one in atoms]
            if any(len(one) > 1 for one in free):
                return False
            families.append({self.family(one[0]) for one in free if one})
        return all(one == families[0] for one in families)

    def _refine(self, grid: Axis, scattered: set[int]) -> None:
        self._factors |= {len(self._families), len(self._families) + 1}
        rows, columns = self.fresh(grid.shape[0]).tolist(), self.fresh(grid.shape[1]).tolist()
        for row, labels in zip(rows, grid.tolist(), strict=True):
            for column, label in zip(columns, labels, strict=True):
                atoms = [atom for atom in self._sets[label] if atom in scattered]
                parts: list[tuple[int, ...]] = [(atom,) for atom in atoms]
                for part in parts or [()]:
                    self._tie(part, self._sets[row] + self._sets[column])

    # ---- changing what atoms are

    def tie(self, one: Axis, other: Axis) -> None:
        """Two axes lose the same indices."""
        differ = np.flatnonzero(one != other)
        if not len(differ):
            return
        pairs = np.unique(np.stack([one[differ], other[differ]], 1), axis=0)
        for first, second in pairs.tolist():
            self._tie(self._sets[first], self._sets[second])

    def fix(self, axis: Axis, why: str = "") -> None:
        """These indices stay."""
        for label in np.unique(axis).tolist():
            for atom in self.atoms(label):
                self._fixed[atom] = why or self.why
                self._stands.clear()

    def _tie(self, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        while True:
            first, second = self._leaves(one), self._leaves(other)
            common = [atom for atom in first if atom in second]
            left = [atom for atom in first if atom not in common]
            right = [atom for atom in second if atom not in common]
            if not left and not right:
                return
            self._stands.clear()
            if not left or not right:
                for atom in left + right:
                    if common:
                        self._unite(common[0], atom)
                    else:
                        self._fixed[atom] = self._reason(one) or self._reason(other) or self.why
            elif len(left) == len(right) or min(len(left), len(right)) > 1:
                self._unite(left[0], right[0])
            elif len(left) == 1:
                self._parts[left[0]] = tuple(right)
            else:
                self._parts[right[0]] = tuple(left)

    def _unite(self, one: int, other: int) -> None:
        one, other = sorted((self._root(one), self._root(other)))
        if one != other:
            self._parent[other] = one
            families = sorted(self._whole_family(atom) for atom in (one, other))
            self._families[families[1]] = families[0]

    # ---- what they are today

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _whole_family(self, atom: int) -> int:
        return self._whole(self._family[atom])

    def _whole(self, family: int) -> int:
        while self._families[family] != family:
            family = self._families[family]
        return family

    def _leaves(self, atoms: Iterable[int]) -> tuple[int, ...]:
        found: dict[int, None] = {}
        waiting = list(atoms)[::-1]
        while waiting:
            root = self._root(waiting.pop())
            if root in self._parts:
                waiting.extend(self._parts[root][::-1])
            elif root not in self._fixed:
                found[root] = None
        return tuple(found)

    def atoms(self, label: int) -> tuple[int, ...]:
        """What a label consists of today; () where the index stays."""
        return self._sets[self._today(label)]

    def _today(self, label: int) -> int:
        number = self._stands.get(label)
        if number is None:
            number = self._stands[label] = self.label(self._leaves(self._sets[label]))
        return number

    def today(self, axis: Axis) -> Axis:
        """The same axis in labels that are resolved."""
        unique, places = np.unique(axis, return_inverse=True)
        return np.array([self._today(one) for one in unique.tolist()], np.int64)[places.reshape(-1)]

    def family(self, atom: int) -> int:
        """What atoms that were made or united together have in common."""
        return self._whole_family(self._root(atom))

    def is_factor(self, atom: int) -> bool:
        """Whether it is of an axis that was taken apart."""
        factors = set(map(self._whole, self._factors))
        return self.family(atom) in factors

    def reason(self, label: int) -> str | None:
        """Why (a part of) a label is fixed."""
        return self._reason(self._sets[label])

    def _reason(self, atoms: Iterable[int]) -> str | None:
        waiting = list(atoms)[::-1]
        while waiting:
            root = self._root(waiting.pop())
            if root in self._parts:
                waiting.extend(self._parts[root][::-1])
            elif root in self._fixed:
                return self._fixed[root]
        return None
