"""Student and teacher see the same similarities to other images: soft labels where InfoNCE has one-hot ones."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_negative_distillation(
    student: Tensor, teacher: Tensor, anchors: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean over queries of KL(p_t || p_s), p = softmax over the anchors of cosine / temperature, in fp32.

    Args:
        student: (B, P, F) float, P queries per image; carries the gradient.
        teacher: the same shape, no gradient.
        anchors: (K, P, F), query p of an image is compared with anchors p alone; or (K, 1, F), with all queries.
        student_temperature, teacher_temperature: above 0.

    Returns:
        The loss, 0 or more; and the share of queries whose nearest anchor is the same in both networks.

    Reference: ACTION (You et al., IPMI 2023), after ISD (Tejankar et al., ICCV 2021).
    """
    with torch.autocast(student.device.type, enabled=False):
        queries = F.normalize(torch.cat((student, teacher.detach())).float(), dim=2)
        products = torch.einsum("bpf,kpf->bpk", queries, anchors.float().expand(-1, queries.shape[1], -1))
        cosines = products / torch.linalg.vector_norm(anchors, dim=2, dtype=torch.float32).clamp(min=1e-12).T
        student_cosines, teacher_cosines = cosines.chunk(2)
        log_s = torch.log_softmax(student_cosines / student_temperature, 2)
        log_t = torch.log_softmax(teacher_cosines.detach() / teacher_temperature, 2)
        loss = (log_t.exp() * (log_t - log_s)).sum(2).mean()
    with torch.no_grad():
        alike = (student_cosines.max(2).indices == teacher_cosines.max(2).indices).float().mean()
    return loss, alike
