"""The files of a split that are not its images, counted by reason."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_MAX_EXAMPLES = 3


@dataclass
class LeftOut:
    """The files of a split that are not its images.

    ``counts`` by reason (``.txt``, ``hidden``, ``not a file``); the first ``examples``; ``remarks``
    on images that are found twice or cannot be read; ``num_metadata``, the other members of the
    samples in tar files, which are not left out.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    num_metadata: int = 0

    def add(self, name: str, reason: str) -> None:
        """Count a file."""
        self.counts[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{name} ({reason})")

    def update(self, other: "LeftOut") -> None:
        """Add the files of another part of the split."""
        self.counts += other.counts
        self.examples = [*self.examples, *other.examples][:_MAX_EXAMPLES]
        self.remarks += other.remarks
        self.num_metadata += other.num_metadata

    def as_json(self) -> dict[str, Any] | None:
        """Return a JSON value, None if nothing was left out."""
        if not self.counts and not self.num_metadata:
            return None
        values = {"counts": dict(self.counts), "examples": self.examples}
        return {**values, "num_metadata": self.num_metadata}

    @classmethod
    def from_json(cls, value: Any) -> "LeftOut | None":
        """Return what ``as_json`` returned; None for any other value."""
        if value is None:
            return cls()
        match value:
            case {"counts": dict(counts), "examples": list(names), "num_metadata": int(number)}:
                if all(type(count) is int for count in counts.values()):
                    return cls(Counter(counts), list(map(str, names)), [], number)
        return None
