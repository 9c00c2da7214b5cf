"""Adapters to frameworks that train with a DPO loop of their own, one file each: see docs/swap.md.

    openrlhf       a trainer to import in place of OpenRLHF's
    torchtune      log-probs of torchtune's decoder without its logits

Nothing here acts on import: a swap is a class or a function that is named.
"""
