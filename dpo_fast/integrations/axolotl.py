"""Axolotl's DPO trainer on packed rows: one line of its YAML, which names a trainer class.

    rl: dpo
    trainer_cls: dpo_fast.integrations.axolotl.DPOTrainer

Data, optimizers, checkpoints and every method that Axolotl overrides stay its own. A plugin could name a class, too,
but Axolotl 0.19 then builds trainers without their model.
"""

import logging

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from ..trl import FastDPO

logger = logging.getLogger("dpo_fast")


class DPOTrainer(FastDPO, AxolotlDPOTrainer):
    """`AxolotlDPOTrainer`, faster: the same arguments, the same numbers. Not for other trainers of `rl:`."""

    def __init__(self, *args, **kwargs):
        logger.warning("dpo_fast: trainer_cls is %s.%s: packed rows, no logits", __name__, type(self).__name__)
        super().__init__(*args, **kwargs)
