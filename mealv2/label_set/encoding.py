"""How a label set stores an ensemble's output: the encoding, its plan, its checks."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mealv2.codec import EncodedLabels, encode
from mealv2.codec.record import MAX_CLASSES, MAX_KEPT, MIN_CLASSES
from mealv2.errors import LabelSetError
from mealv2.label_set.blocks import BlockFormat, Rows
from mealv2.label_set.logits import are_finite, fit_logits
from mealv2.soft_labels import Labels, SoftLabels, keep_logits, top_k

_TAIL_RULE = "even over the classes not kept"
_LINE = "line"  # the form of mean logits with a rate


@dataclass(frozen=True)
class Encoding(BlockFormat):
    """How a set stores its labels.

    ``form`` ``curve``: blocks of the codec (docs/reference/label-codec.md): records that keep
    ``topk`` classes, or, with ``rate``, what is smallest for its fidelity. ``float16`` and
    ``float32``: ids and values of ``topk`` classes and the mass of all others; with ``topk`` equal
    to ``num_classes``, all values in class order. ``logits``: also the mean logits of the classes
    kept, and the mean over all others, in float16; with ``rate``, as a line in ln p.
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        if self.form == "curve" and not MIN_CLASSES <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"classes must be {MIN_CLASSES} to {MAX_CLASSES}")
        has_rate, has_topk = self.rate is not None, self.topk is not None
        if has_rate == has_topk or (has_rate and self.form != "curve"):
            raise ValueError("labels need either a topk or, in the form curve, a rate")
        if self.rate is not None and not 0.0 < self.rate < math.inf:
            raise ValueError(f"rate must be above 0 and finite, not {self.rate}")
        max_kept = min(self.num_classes, MAX_KEPT) if self.form == "curve" else self.num_classes
        if self.topk is not None and not 1 <= self.topk <= max_kept:
            raise ValueError(f"topk must lie in 1..{max_kept}, not {self.topk}")

    @classmethod
    def of_plan(cls, plan: dict[str, Any]) -> "Encoding":
        """Return the encoding that a plan names; raises LabelSetError for an unknown one."""
        try:
            labels = plan["labels"]
            if labels["form"] not in ("curve", "float16", "float32"):
                raise ValueError(f"this mealv2 does not know the form {labels['form']!r}")
            if labels["tail"] != _TAIL_RULE:
                raise ValueError(f"this mealv2 does not know the tail {labels['tail']!r}")
            stored, rate = labels["logits"], labels.get("rate")
            if stored is True and rate is not None:
                raise ValueError("its logits have an earlier form; make the set again")
            if type(labels.get("topk", 1)) is not int or stored not in (
                [False, _LINE] if rate is not None else [False, True]
            ):
                raise ValueError("topk must be an integer, and logits true, false or a line")
            return cls(
                len(plan["classes"]),
                labels["form"],
                rate=labels.get("rate"),
                topk=labels.get("topk"),
                logits=bool(stored),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LabelSetError(f"cannot read the labels of this set: {error}") from None

    def plan(self) -> dict[str, Any]:
        """Return the entry ``labels`` of a plan."""
        named = dataclasses.asdict(self)
        del named["num_classes"]
        if self.logits and self.rate is not None:
            named["logits"] = _LINE
        return {k: v for k, v in named.items() if v is not None} | {"tail": _TAIL_RULE}

    def __str__(self) -> str:
        if self.rate is not None:
            text = f"rate {self.rate:g}"
        elif self.is_dense:
            text = f"all classes, {self.form}"
        else:
            text = f"top-{self.topk}, {self.form}"
        return text + (", with logits" if self.logits else "")

    def encode(
        self,
        probs_NC: Tensor,
        mean_logits_NC: Tensor | None = None,
        *,
        num_views: int = 1,
        first: EncodedLabels | None = None,
    ) -> Rows:
        """Encode an ensemble's output, on its device; all views of an image follow each other.

        ``first``, a row of the first block of each image, is for ``shares_models`` only.
        """
        labels: Labels
        if self.form == "curve":
            of_first = first if self.shares_models else None
            labels = encode(
                probs_NC, rate=self.rate, topk=self.topk, num_views=num_views, first=of_first
            )
        else:
            assert self.topk is not None
            labels = top_k(probs_NC, self.topk).rounded(getattr(torch, self.form))
        if not self.logits:
            return Rows(labels)
        if mean_logits_NC is None:
            raise ValueError("this encoding stores logits: mean_logits_NC is missing")
        if self.has_fitted_logits:
            return Rows(labels, fit_logits(mean_logits_NC, probs_NC, labels.kept()))
        # a masked class has a logit of minus infinity, which makes every mean infinite
        limit = torch.finfo(torch.float16).max
        logits = keep_logits(mean_logits_NC.float().clamp(-limit, limit), labels.kept())
        return Rows(labels, logits.rounded(torch.float16))

    def check(self, rows: Rows, *, most: int | None = None) -> None:
        """Raise LabelSetError for rows, as read, that ``encode`` cannot have written.

        ``most``: of views that share a model decode at most so many (``EncodedLabels.check``).
        """
        labels = rows.labels
        if rows.logits is not None and not are_finite(rows.logits):
            raise LabelSetError("a logit is not finite")
        if isinstance(labels, SoftLabels):
            _check_values(labels)
            return
        labels.check(most=most)
        if self.topk is not None and (labels.records().counts_R != self.topk).any():
            raise LabelSetError(f"a label does not keep {self.topk} classes")


def _check_values(labels: SoftLabels) -> None:
    values = torch.cat([labels.probs_NK.float(), labels.rest_N.float()[:, None]], dim=1)
    if not bool((values >= 0).all() & torch.isfinite(values).all()):
        raise LabelSetError("a label has a probability that is negative or not finite")
    if bool((values.sum(dim=1) == 0).any()):
        raise LabelSetError("a label has no mass")
    if not labels.is_dense:
        ids_NK = labels.indices_NK.sort(dim=1).values
        if bool((ids_NK >= labels.num_classes).any() | (ids_NK.diff(dim=1) == 0).any()):
            raise LabelSetError("a label names a class twice, or an unknown class")
