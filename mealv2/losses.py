"""The two terms of the paper's loss: similarity to the ensemble, and the discriminator's."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mealv2.codec import EncodedLabels
from mealv2.models.discriminator import Discriminator


def similarity_loss(student_logits_BC: Tensor, probs_BC: Tensor | EncodedLabels) -> Tensor:
    """Return the cross-entropy of the student to the ensemble's probabilities, a float32 scalar.

    Equal to the KL divergence up to the ensemble's entropy, hence with the same gradient (paper
    eq. 2-3; official loss.py). Any float logits; ``probs_BC`` rows sum to 1 and carry no gradient.
    Encoded labels, on the logits' device, are never expanded to B x C.
    """
    if isinstance(probs_BC, EncodedLabels):
        return _encoded_similarity_loss(student_logits_BC.float(), probs_BC)
    # L = -(1/B) sum_i sum_c q_ic log softmax(s_i)_c
    log_probs_BC = torch.log_softmax(student_logits_BC.float(), dim=1)
    return -(probs_BC.float() * log_probs_BC).sum(dim=1).mean()


def _encoded_similarity_loss(logits_BC: Tensor, labels: EncodedLabels) -> Tensor:
    # L = -sum_c q_c l_c with l = log softmax(s) and q_c = t for every class not kept:
    # L = -sum_{c kept} (q_c - t) l_c - t sum_c l_c
    if logits_BC.shape != (len(labels), labels.num_classes):
        expected = f"{len(labels)} x {labels.num_classes}"
        raise ValueError(f"labels of {expected} and logits of {tuple(logits_BC.shape)}")
    kept = labels.kept()
    log_probs_BC = torch.log_softmax(logits_BC, dim=1)
    above_tail_BK = (kept.probs_NK - kept.tail_N[:, None]) * kept.is_kept_NK
    of_kept_B = (above_tail_BK * log_probs_BC.gather(1, kept.indices_NK)).sum(dim=1)
    return -(of_kept_B + kept.tail_N * log_probs_BC.sum(dim=1)).mean()


def discriminator_loss(
    discriminator: Discriminator, student_BC: Tensor, teacher_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (loss, accuracy) of telling the student's rows from the teachers', both scalars.

    Binary cross-entropy over the student's rows first, then the teachers' (paper eq. 4-5). Variant
    ``paper``: one output, y = 1 for the teachers. Variant ``official``: two outputs with targets
    (1, 0) and (0, 1), mean over all 4B entries (official loss.py). Student and discriminator both
    minimise it. An undecided row counts half in the accuracy.
    """
    outputs = discriminator(torch.cat([student_BC.float(), teacher_BC.float()]))
    batch_size = len(student_BC)
    targets = torch.zeros_like(outputs)
    if discriminator.variant == "official":
        targets[:batch_size, 0] = 1.0
        targets[batch_size:, 1] = 1.0
        margin = outputs[:, 1] - outputs[:, 0]
    else:
        targets[batch_size:] = 1.0
        margin = outputs[:, 0]
    loss = F.binary_cross_entropy_with_logits(outputs, targets)
    with torch.no_grad():
        toward_truth = torch.cat([-margin[:batch_size], margin[batch_size:]])
        accuracy = (torch.sign(toward_truth) + 1.0).mean() / 2.0
    return loss, accuracy
