"""The oracles: every op in the fewest lines of plain PyTorch, in fp64, with autograd's own gradients.

They define what is correct. They share no code with what they judge, and spend memory as they please.
"""

import torch
from torch import Tensor

from .stats import TokenStats


def oracle_transform(logits: Tensor, logit_softcap=None, temperature=1.0, logit_scale=1.0) -> Tensor:
    z = logits.double() * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return z / temperature


def oracle_token_stats(
    logits: Tensor, labels: Tensor, *, ignore_index=-100, logit_softcap=None, temperature=1.0, logit_scale=1.0
) -> TokenStats:
    """All statistics, fp64, shape of `labels`; those of floats are differentiable."""
    z = oracle_transform(logits, logit_softcap, temperature, logit_scale)
    log_p = torch.log_softmax(z, dim=-1)
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    p_log_p = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)

    def scored(x: Tensor) -> Tensor:
        return torch.where(ignored, torch.zeros_like(x), x)

    return TokenStats(
        logps=scored(log_p.gather(-1, target).squeeze(-1)),
        entropy=scored(-p_log_p.sum(-1)),
        mean_logits=scored(z.mean(-1)),
        is_top1=scored(z.argmax(-1) == target.squeeze(-1)),
        log_sum_sq_probs=scored(torch.logsumexp(2 * log_p, dim=-1)),
    )


def oracle_logits(hidden, weight, bias, low_rank) -> Tensor:
    """(N, V) fp64 logits of a head, before their transform. low_rank: (N, r), (V, r)."""
    logits = hidden.double() @ weight.double().T
    if low_rank is not None:
        logits = logits + low_rank[0].double() @ low_rank[1].double().T
    return logits if bias is None else logits + bias.double()


def oracle_sequence_logps(
    token_logps: Tensor, sequence_ids: Tensor, num_sequences: int, weights: Tensor | None = None
) -> Tensor:
    """(num_sequences,) fp64."""
    values = token_logps.double() if weights is None else token_logps.double() * weights.double()
    return torch.stack([values[sequence_ids == s].sum() for s in range(num_sequences)])
