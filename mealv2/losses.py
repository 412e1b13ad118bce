"""The loss terms of the paper (similarity, discriminator), and the inputs of the discriminator."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mealv2.codec import Kept
from mealv2.models.discriminator import Discriminator
from mealv2.soft_labels import Labels, keep_logits


def similarity_loss(student_logits_BC: Tensor, probs_BC: Tensor | Labels) -> Tensor:
    """Return the cross-entropy of the student to the ensemble's probabilities, a float32 scalar.

    It equals the KL divergence up to the entropy of the ensemble, so the gradient is the same
    (paper eq. 2-3; official loss.py). Each row of ``probs_BC`` sums to 1 and has no gradient.
    Compressed labels must be on the device of the logits; they are not expanded to B x C.
    """
    if not isinstance(probs_BC, Tensor):
        return _compressed_similarity_loss(student_logits_BC.float(), probs_BC)
    # L = -(1/B) sum_i sum_c q_ic log softmax(s_i)_c
    log_probs_BC = torch.log_softmax(student_logits_BC.float(), dim=1)
    return -(probs_BC.float() * log_probs_BC).sum(dim=1).mean()


def _compressed_similarity_loss(logits_BC: Tensor, labels: Labels) -> Tensor:
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
    """Return the discriminator's loss and accuracy on the student's and the teachers' rows.

    The loss is a binary cross-entropy (paper eq. 4-5) that student and discriminator both minimise.
    One output (variant ``paper``) has y = 1 for the teachers. Two (variant ``official``) have the
    targets (1, 0) for the student and (0, 1) for the teachers, and the mean over all 4B entries
    (official loss.py). A tie counts as half in the accuracy.
    """
    outputs = discriminator(torch.cat([student_BC.float(), teacher_BC.float()]))
    batch_size = len(student_BC)
    targets = torch.zeros_like(outputs)
    if outputs.shape[1] == 2:
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


def compress_log_probs(logits_NC: Tensor, kept: Kept) -> Tensor:
    """Return a model's log-probabilities, float32 N x C, compressed as stored labels are.

    Kept classes keep their probability; every other class gets the mean of the others, as in
    ``to_dense``: log tail = logsumexp(logits not kept) - log(C - K) - logsumexp(all logits).
    """
    log_probs_NC = torch.log_softmax(logits_NC.float(), dim=1)
    num_classes = logits_NC.shape[1]
    mask_NC = kept.mask(num_classes)
    # the lowest number, not -inf: in a row that keeps every class, -inf has a NaN gradient
    rest_NC = log_probs_NC.masked_fill(mask_NC, torch.finfo(torch.float32).min)
    num_others_N1 = (num_classes - kept.is_kept_NK.sum(dim=1, keepdim=True)).clamp_min(1)
    tail_N1 = rest_NC.logsumexp(dim=1, keepdim=True) - num_others_N1.log()
    return torch.where(mask_NC, log_probs_NC, tail_N1)


def compress_logits(logits_NC: Tensor, kept: Kept) -> Tensor:
    """Return a model's logits, float32 N x C, compressed as stored mean logits are.

    Kept classes keep their logit; every other class gets the mean of the others.
    """
    return keep_logits(logits_NC, kept).to_dense(kept, logits_NC.shape[1])
