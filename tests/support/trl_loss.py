"""TRL's own `DPOTrainer._compute_loss`, driven with stand-ins for the models, and our loss of the same tokens."""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.logps import pair_logps
from dpo_fast.losses import LossParams
from dpo_fast.objective import Objective, ld_dpo_token_weights, wpo_weights
from dpo_fast.ops.oracle import oracle_sequence_logps


def make_tokens(P=4, T=9, seed=3, shortest_prompt=1, scale=3.0):
    """[policy, reference, log sum p^2] as (2P, T - 1) in TRL's padded layout, and the completion mask (2P, T)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, T - 2, (2 * P,), generator=generator)
    prompt = torch.randint(shortest_prompt, shortest_prompt + 2, (P,), generator=generator).repeat(2)
    position = torch.arange(T)
    mask = (position >= prompt[:, None]) & (position < (prompt + lengths)[:, None])
    logps = -torch.rand(2 * P, T - 1, generator=generator) * scale
    reference = logps + torch.randn(2 * P, T - 1, generator=generator) * scale / 6
    sum_sq = -torch.rand(2 * P, T - 1, generator=generator)
    scored = mask[:, 1:]
    return [x * scored for x in (logps, reference, sum_sq)], mask.long()


def trl_loss(names, *, tokens=None, loss_weights=None, ld_alpha=None, use_weighting=False, **params):
    """(loss, its gradient for the token log-probs, the metrics that TRL logs)."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    (logps, reference, sum_sq), mask = tokens or make_tokens()
    leaf = logps.clone().requires_grad_()
    zeros = torch.zeros_like(logps)
    # numbers that tell the metrics of tokens apart: each statistic is another function of the position
    outputs = SimpleNamespace(log_probs=leaf, log_sum_sq_probs=sum_sq, aux_loss=None, **statistics(zeros))
    known = {**vars(LossParams()), **params}
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        ref_model=lambda **_: SimpleNamespace(log_probs=reference),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=known["discopop_tau"], gradient_checkpointing_kwargs=None),
        loss_types=names,
        loss_weights=loss_weights or [1.0] * len(names),
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{k: known[k] for k in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef")},
    )
    trainer.model.is_gradient_checkpointing = False
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    compute = inspect.unwrap(trl.DPOTrainer._compute_loss)
    loss = compute(trainer, lambda **_: outputs, inputs, return_outputs=False)
    # It sums over padding too, where a model's forward gives constant zeros
    return loss, torch.autograd.grad(loss, leaf)[0] * mask[:, 1:], trainer._metrics["train"]


def our_loss(names, *, tokens=None, loss_weights=None, ld_alpha=None, use_weighting=False, **params):
    """(loss, its gradient for the token log-probs, the pairs, the objective)."""
    (logps, reference, sum_sq), mask = tokens or make_tokens()
    leaf = logps.clone().requires_grad_()
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    lengths = mask[:, 1:].sum(1)
    weights = None if ld_alpha is None else ld_dpo_token_weights(rows, lengths, ld_alpha)

    def sums(x, w=weights):
        return oracle_sequence_logps(x[rows, columns], rows, mask.shape[0], w).float()

    pair_weights = wpo_weights(sums(leaf - sum_sq, None), lengths) if use_weighting else None
    loss = Objective(names, weights=loss_weights, use_weighting=use_weighting, **params)
    pairs = pair_logps(sums(leaf), sums(reference), lengths, pair_weights)
    value = loss(pairs).mean()
    return value, torch.autograd.grad(value, leaf)[0], pairs, loss


def statistics(like):
    """Token statistics of the shape of `like`, (2P, T - 1), that differ from row to row and column to column."""
    rows, columns = torch.meshgrid(*map(torch.arange, like.shape), indexing="ij")
    return dict(entropy=rows + 0.1 * columns, mean_logits=columns - 0.3 * rows, is_top1=(rows + columns) % 3 == 0)
