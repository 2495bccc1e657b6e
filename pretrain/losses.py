# SPDX-License-Identifier: Apache-2.0
"""Loss functions as pure functions of tensors, computed in float32 whatever the autocast.

Shapes: `N` samples of this process, `M` = processes x N, `D` embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.engine.distributed import gather_with_grad, rank


def clip_contrastive(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor,
    *,
    labels_N: Tensor | None = None,
    names_CD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over the global batch (CLIP, arXiv:2103.00020, figure 3).

    Each process compares its own N rows with all M columns. Under gradient averaging over processes that is exactly the
    gradient of the loss on the global batch, with memory N x M instead of M x M.

    Args:
        image_ND: Image embeddings of any length, this process's part.
        text_ND: Embeddings of the captions, in the same order.
        logit_scale: Logarithm of the inverse temperature, a scalar.
        labels_N: Integer labels; all pairs of an equal label count as right, in equal shares (supervised contrastive
            targets). None: only a picture's own caption is right, as in the paper.
        names_CD: Embeddings of all C class names, the same on every process; needs ``labels_N``, which index them. They
            stand beside the captions when a picture chooses among texts: C further negatives, one more positive.

    Returns:
        The loss, and the share of this process's pictures whose most similar caption is a right one (no gradient).
    """
    with torch.autocast(device_type=image_ND.device.type, enabled=False):
        image, text = F.normalize(image_ND.float(), dim=-1), F.normalize(text_ND.float(), dim=-1)
        all_image, all_text = gather_with_grad(image), gather_with_grad(text)
        scale = logit_scale.float().exp()
        by_image_NM = scale * image @ all_text.T
        by_text_NM = scale * text @ all_image.T
        own = torch.arange(len(image), device=image.device) + rank() * len(image)
        if labels_N is None:
            loss = (F.cross_entropy(by_image_NM, own) + F.cross_entropy(by_text_NM, own)) / 2
            right = by_image_NM.argmax(1) == own
        else:
            same = labels_N[:, None] == gather_with_grad(labels_N)[None, :]
            by_text = F.cross_entropy(by_text_NM, same.float() / same.sum(1, keepdim=True))
            if names_CD is not None:
                names = F.normalize(names_CD.float(), dim=-1)
                by_image_NM = torch.cat([by_image_NM, scale * image @ names.T], dim=1)
                same = torch.cat([same, labels_N[:, None] == torch.arange(len(names), device=same.device)], dim=1)
            by_image = F.cross_entropy(by_image_NM, same.float() / same.sum(1, keepdim=True))
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
        The loss, and the mean cosine (no gradient).
    """
    with torch.autocast(device_type=student_ND.device.type, enabled=False):
        student, teacher = F.normalize(student_ND.float(), dim=-1), F.normalize(teacher_ND.float(), dim=-1)
        cosine = (student * teacher).sum(-1).mean()
        loss = 1 - cosine
        if similarity_weight and len(student) > 2:
            # Far below every similarity, yet finite: 0 x (-inf + inf) would be NaN in the divergence.
            itself = torch.eye(len(student), device=student.device) * -1e4
            theirs = teacher @ teacher.T / temperature + itself
            ours = student @ student.T / temperature + itself
            divergence = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean")
            loss = loss + similarity_weight * divergence
        return loss, cosine.detach()
