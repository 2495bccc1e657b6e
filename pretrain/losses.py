# SPDX-License-Identifier: Apache-2.0
"""Loss functions as pure functions of tensors, computed in float32 whatever the autocast (float64 stays float64).

Embeddings may have any length: where a loss wants unit vectors it normalises them itself. Losses over the global batch
gather it with an exact gradient, so that gradients averaged over processes are those of one process on all samples.

Shapes: `N` samples of this process, `M` = processes x N, `D` embedding, `K` queue or prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.engine.distributed import gather_with_grad, rank, world_size


def clip_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    labels_N: Tensor | None = None,
    names_CD: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the global batch (CLIP, arXiv:2103.00020, figure 3).

    Each process compares its own N rows with all M columns. Under gradient averaging over processes that is exactly the
    gradient of the loss on the global batch, with memory N x M instead of M x M.

    Args:
        image: (N, D) embeddings of the pictures, of any length, this process's part.
        text: (N, D) of the captions, in the same order.
        logit_scale: logarithm of the inverse temperature, a scalar.
        labels_N: integer labels; all pairs of an equal label count as right, in equal shares (supervised contrastive
            targets). None: only a picture's own caption is right, as in the paper.
        names_CD: embeddings of all C class names, the same on every process; needs ``labels_N``, which index them. They
            stand beside the captions when a picture chooses among texts: C further negatives, one more positive.
    """
    return clip_contrastive_top1(image, text, logit_scale, labels_N=labels_N, names_CD=names_CD)[0]


def clip_contrastive_top1(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    labels_N: Tensor | None = None,
    names_CD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`clip_contrastive`, and the share of this process's pictures whose most similar text is right (no gradient)."""
    with _without_autocast(image):
        image, text = _normalized(image), _normalized(text)
        all_image, all_text = gather_with_grad(image), gather_with_grad(text)
        scale = _float32_or_64(logit_scale).exp()
        by_image_NM = scale * image @ all_text.T
        by_text_NM = scale * text @ all_image.T
        index_N = torch.arange(len(image), device=image.device) + rank() * len(image)
        if labels_N is None:
            loss = (F.cross_entropy(by_image_NM, index_N) + F.cross_entropy(by_text_NM, index_N)) / 2
            right = by_image_NM.argmax(1) == index_N
        else:
            same = labels_N[:, None] == gather_with_grad(labels_N)[None, :]
            by_text = F.cross_entropy(by_text_NM, _soft_targets(same, by_text_NM))
            if names_CD is not None:
                by_image_NM = torch.cat([by_image_NM, scale * image @ _normalized(names_CD).T], dim=1)
                same = torch.cat([same, labels_N[:, None] == torch.arange(len(names_CD), device=same.device)], dim=1)
            by_image = F.cross_entropy(by_image_NM, _soft_targets(same, by_image_NM))
            loss = (by_image + by_text) / 2
            right = same.gather(1, by_image_NM.argmax(1, keepdim=True)).squeeze(1)
        return loss, right.float().mean()


def embedding_distillation(
    student_ND: Tensor, teacher_ND: Tensor, *, similarity_weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """1 - cosine, plus the Kullback-Leibler divergence between the similarities within the batch.

    The second part is about neighbours: which of the other phrases a phrase is near to, seen through a softmax with
    `temperature` (a phrase's similarity to itself is left out).

    Returns:
        the loss, and the mean cosine (no gradient).
    """
    with _without_autocast(student_ND):
        student, teacher = _normalized(student_ND), _normalized(teacher_ND)
        cosine = (student * teacher).sum(-1).mean()
        loss = 1 - cosine
        if similarity_weight and len(student) > 2:
            # Far below every similarity, yet finite: 0 x (-inf + inf) would be NaN in the divergence.
            diagonal_mask = torch.eye(len(student), device=student.device) * -1e4
            teacher_logits = teacher @ teacher.T / temperature + diagonal_mask
            student_logits = student @ student.T / temperature + diagonal_mask
            divergence = F.kl_div(
                student_logits.log_softmax(1), teacher_logits.log_softmax(1), log_target=True, reduction="batchmean"
            )
            loss = loss + similarity_weight * divergence
        return loss, cosine.detach()


def nt_xent(z_a: Tensor, z_b: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, arXiv:2002.05709, eq. 1 and algorithm 1), the mean over the 2M anchors of the global batch.

    An anchor's candidates are all 2M views of all processes but itself. The authors' code sums the two halves instead,
    which is twice this mean.

    Args:
        z_a: (N, D) embeddings of the first views, of any length, this process's part.
        z_b: (N, D) of the second views, in the same order.
        temperature: .1 on ImageNet, .5 on CIFAR-10 (appendices B.7 and B.9).
    """
    with _without_autocast(z_a):
        a, b = _normalized(z_a), _normalized(z_b)
        n = len(a)
        candidates = torch.cat([gather_with_grad(a), gather_with_grad(b)])
        m = len(candidates) // 2
        index_N = torch.arange(n, device=a.device) + rank() * n
        similarity = torch.cat([a, b]) @ candidates.T / temperature
        self_mask = F.one_hot(torch.cat([index_N, index_N + m]), 2 * m).bool()
        return F.cross_entropy(similarity.masked_fill(self_mask, -torch.inf), torch.cat([index_N + m, index_N]))


def moco_infonce(q: Tensor, k: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE against a queue (MoCo, arXiv:1911.05722, eq. 1): the mean over the queries of this process.

    Args:
        q: (N, D) queries, of any length.
        k: (N, D) their positive keys; no gradient flows into them.
        queue: (K, D) unit rows, the negatives; copied, so that they may be overwritten before the backward pass.
        temperature: .07 (v1), .2 (v2).
    """
    with _without_autocast(q):
        query, key = _normalized(q), _normalized(k.detach())
        negatives = queue.detach().to(query.dtype, copy=True)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], dim=1) / temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, z), the mean over the rows (SimSiam, arXiv:2011.10566, eq. 1); the caller decides on z's gradient."""
    with _without_autocast(p):
        return -(_normalized(p) * _normalized(z)).sum(1).mean()


def byol_regression(p: Tensor, z: Tensor) -> Tensor:
    """2 - 2 cos(p, z), the mean over the rows, of one direction (BYOL, arXiv:2006.07733, eq. 2); in [0, 4]."""
    return 2 + 2 * negative_cosine(p, z)


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Soft codes that use all prototypes equally (SwAV, arXiv:2006.09882, eq. 3 and appendix A).

    Alternates between equal columns (prototypes) and equal rows (samples) over the global batch, in logarithms, so that
    no temperature overflows. Ends with the rows.

    Args:
        scores: (N, K) similarities, this process's part.
        epsilon: smoothness, .05; smaller is harder.
        iterations: 3.

    Returns:
        (N, K) codes whose rows sum to 1.
    """
    with _without_autocast(scores):
        log_q = _float32_or_64(scores) / epsilon
        for _ in range(iterations):
            log_q = log_q - _global_logsumexp(log_q)
            log_q = log_q - log_q.logsumexp(1, keepdim=True)
        return log_q.softmax(1)


def swav_loss(
    scores_per_crop: Sequence[Tensor],
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
    big_crops: int = 2,
    queue_scores: Sequence[Tensor] | None = None,
    codes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Swapped prediction (SwAV, arXiv:2006.09882, eq. 2 and section 3.2): each big crop's code from all other crops.

    Args:
        scores_per_crop: per crop (N, K) cosines to the prototypes; the big crops first.
        temperature: .1.
        epsilon, iterations: of `sinkhorn`.
        big_crops: how many of the crops give codes.
        queue_scores: per big crop (Q, K) scores of earlier samples: they take part in the assignment and are dropped.
        codes: per big crop (N, K) rows that sum to 1, instead of Sinkhorn's; without gradient.

    Returns:
        the mean over big crops and other crops of the cross-entropy; ln K when every prototype is alike.
    """
    with _without_autocast(scores_per_crop[0]):
        scores = [_float32_or_64(crop) for crop in scores_per_crop]
        total = scores[0].new_zeros(())
        for big in range(big_crops):
            if codes is not None:
                code = codes[big].detach().to(scores[big].dtype)
            else:
                assigned = scores[big].detach()
                if queue_scores is not None:
                    assigned = torch.cat([queue_scores[big].detach().to(assigned.dtype), assigned])
                code = sinkhorn(assigned, epsilon=epsilon, iterations=iterations)[-len(scores[big]) :]
            others = [F.cross_entropy(crop / temperature, code) for i, crop in enumerate(scores) if i != big]
            total = total + torch.stack(others).mean()
        return total / big_crops


def barlow_twins(z_a: Tensor, z_b: Tensor, *, lambd: float, gradient_scale: float = 1.0) -> Tensor:
    """Redundancy reduction (Barlow Twins, arXiv:2103.03230, eq. 1 and 2) on the correlation of the global batch.

    The features are standardised with the mean and the biased variance of the global batch (batch norm without affine,
    epsilon 1e-5, as in the authors' code).

    Args:
        z_a: (N, D) embeddings of the first views, this process's part.
        z_b: (N, D) of the second views.
        lambd: weight of the off-diagonal terms; .0051.
        gradient_scale: factor on the gradient only. 1 / processes gives what the authors' code has: its all-reduce has
            no gradient of its own, and the learning rate of its biases was tuned to that.

    Returns:
        sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2, the same on every process.
    """
    with _without_autocast(z_a):
        a, b = (_standardised(gather_with_grad(_float32_or_64(z))) for z in (z_a, z_b))
        correlation = a.T @ b / len(a)
        diagonal = correlation.diagonal()
        invariance = (diagonal - 1).square().sum()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        loss = invariance + lambd * redundancy
        return loss if gradient_scale == 1.0 else gradient_scale * loss + (1 - gradient_scale) * loss.detach()


def _without_autocast(x: Tensor) -> torch.autocast:
    """A context in which losses are computed as they are written."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def _float32_or_64(x: Tensor) -> Tensor:
    """float32, or float64 where it came so."""
    return x if x.dtype == torch.float64 else x.float()


def _normalized(x: Tensor) -> Tensor:
    return F.normalize(_float32_or_64(x), dim=-1)


def _soft_targets(right: Tensor, like: Tensor) -> Tensor:
    """Booleans (N, M) -> targets whose rows share 1 equally."""
    right = right.to(like.dtype)
    return right / right.sum(1, keepdim=True)


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def _global_logsumexp(x: Tensor) -> Tensor:
    """(N, K) -> (1, K) log of the sum of exponentials over the rows of all processes."""
    local = x.logsumexp(0, keepdim=True)
    return local if world_size() == 1 else gather_with_grad(local).logsumexp(0, keepdim=True)
