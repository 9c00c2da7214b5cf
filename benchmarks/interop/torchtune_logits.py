"""The recipe of torchtune.py, whose logits are scored by `get_batch_logps`: for a model that cannot do without."""

from .torchtune import main

SWAP = """
# swap: before
from torchtune import config, modules, rlhf, training, utils
# swap: after
from torchtune import config, modules, rlhf, training, utils
from dpo_fast import get_batch_logps
# swap: end
# swap: before
        all_log_probs = rlhf.get_batch_log_probs(all_logits, concatenated_labels)
# swap: after
        all_log_probs = get_batch_logps(all_logits, concatenated_labels)
# swap: end
"""

if __name__ == "__main__":
    main(SWAP)
