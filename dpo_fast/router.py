"""The load-balancing loss of mixtures of experts, as TRL's padded rows have it."""

from typing import Any

from torch import Tensor, nn

from .batch import PreferenceBatch


def router_coefficient(model: nn.Module, coefficient: float | None) -> float:
    """What the balancing loss is multiplied by: the given number, or, for None, what the model's config declares.

    0.0: there is no such loss. Raises ValueError for a number where the model has no router.
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        return float(getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient)
    if coefficient:
        raise ValueError(
            f"router_aux_loss_coef={coefficient}, but {type(model).__name__} is no mixture of experts that gives its "
            "router's logits (its config has no output_router_logits): leave it None"
        )
    return 0.0


def balancing_loss(model: nn.Module, router_logits, token_weights: Tensor | None) -> Tensor:
    """() loss from the router logits of each layer, 0 where no layer routes (a dense model of such a class).

    token_weights (B, T): how many tokens of padded rows each token stands for.
    """
    # transformers' function multiplies by its mask, so numbers above 1 do
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    names = [name for name in ("num_experts", "num_local_experts") if hasattr(config, name)]
    if router_logits is None or not names:
        raise ValueError(
            f"{type(model).__name__} gives no router logits, so it has no balancing loss: set router_aux_loss_coef=0"
        )
    if len(router_logits) == 0:
        return next(model.parameters()).new_zeros(())
    if token_weights is not None:
        token_weights = token_weights.to(router_logits[0].device)
    experts = getattr(config, names[0])
    loss: Any = load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, token_weights)
    return loss  # an int only where there are no router logits


def token_weights(batch: PreferenceBatch) -> Tensor:
    """(B, T): how often each token is there in padded rows; a prefix stands for both rows' tokens, padding for none."""
    if batch.layout is None:
        return batch.attention_mask
    return batch.layout.sequences_per_token().unsqueeze(0)
