"""What the seams have in common: the trainer around TRL's."""

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from trl.trainer import dpo_trainer

from .. import attention
from ..drift import AdapterWatch
from ..forward import is_ready, reasons_against_packed_rows
from ..hooks import NEFTUNE
from ..objective import Objective
from ..ops.stats import TokenStats
from ..preference import preference_from_stats
from ..prepared import check_ranks, let_reentrant_checkpoints_run, prepare_anew, prepare_early
from ..reference import is_peft_model
from ..report.callback import reporting
from ..report.pairs import PairEvaluation
from ..training import checkpoints
from .checks import (
    check_keywords,
    check_models,
    given_by_name,
    in_trl,
    layout_asked_for,
    padding_free_unseen,
    refuse_or_log,
    take_old_dtype,
)
from .installed import SEAMS, UsesModels

logger = logging.getLogger("dpo_fast")


class Mixin(UsesModels, PairEvaluation):
    """Comes before TRL's `DPOTrainer`, or a class built on it, in a class's bases.

    layout: "auto" packs what can be packed, "padded" nothing; "shared_prefix" raises ValueError instead of falling
    back. None: DPO_FAST_LAYOUT, or "auto".

    What is checked before anything is loaded is what the other class's constructor takes by TRL's names.
    """

    args: Any  # TRL's trainer's, as are these
    model: Any
    ref_model: Any
    train_dataset: Any
    beta: float

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if transformers.Trainer not in mro:  # a part of a trainer yet to be built
            return
        if not issubclass(cls, dpo_trainer.DPOTrainer):
            raise TypeError(f"{cls.__name__}: FastDPO is for classes that are built on trl.DPOTrainer")
        if mro.index(Mixin) > mro.index(dpo_trainer.DPOTrainer):
            raise TypeError(f"{cls.__name__}: FastDPO comes first, class {cls.__name__}(FastDPO, ...)")

    def __init__(self, *args, layout: str | None = None, **kwargs):
        layout = layout_asked_for(layout)
        construct = super().__init__
        parameters = inspect.signature(construct).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            check_keywords(kwargs, set(parameters))
        given = given_by_name(construct, args, kwargs)
        config, watch = given.get("args"), AdapterWatch.of(given.get("model"))
        if config is not None:
            if not isinstance(config, dpo_trainer.DPOConfig):
                raise TypeError(f"args must be a trl.DPOConfig, got {type(config).__name__}")
            check_ranks(config.world_size)
            take_old_dtype(config)
            let_reentrant_checkpoints_run(config)
        self._check_models(given.get("model"), given.get("ref_model"))
        if layout != "padded" and getattr(config, "neftune_noise_alpha", None) is not None:
            refuse_or_log(layout, [NEFTUNE])
            layout = "padded"
        self._layout = layout
        noting = watch.noting(getattr(dpo_trainer, "get_peft_model", None))  # not there without PEFT
        with in_trl(get_peft_model=noting, **self._names_in_trl()), padding_free_unseen(config):
            super().__init__(*args, **kwargs)
        self._take_models()
        for model in (there.model for there in self._installed):  # proven before the first batch where they can run
            packs = SEAMS in vars(model) and layout != "padded"
            reasons = reasons_against_packed_rows(model) if packs and is_ready(model, self.args.device) else []
            if reasons:
                refuse_or_log(layout, reasons)
            attention.disable(model)
        if not torch.accelerator.is_available():  # there is nothing to pin memory for, of which torch would warn
            self.args.dataloader_pin_memory = False
        try:
            self._check_trains()
        except ValueError as error:  # it may be here to be evaluated
            logger.warning("dpo_fast.trl: %s", error)
        if is_peft_model(self.model) and self.ref_model is None and (reasons := watch.reasons(self.model)):
            logger.warning(
                "dpo_fast.trl: TRL's reference is not the model before training, because %s. Pass ref_model; or use "
                "dpo_fast.FastDPOTrainer, which keeps the model from before training as the reference",
                "; ".join(reasons),
            )

    _check_models = staticmethod(check_models)

    def _take_models(self) -> None:
        """Fills `_installed`, or finds that TRL's constructor has."""
        raise NotImplementedError

    def _names_in_trl(self) -> dict[str, Any]:
        """What names of TRL's module mean while the trainer is built."""
        return {}

    def train(self, *args, **kwargs):
        """As TRL's; ValueError for a model of which nothing trains."""
        self._check_trains()
        with self._models_in_use(), reporting(self):
            prepare_anew(self)
            return super().train(*args, **kwargs)

    def _check_trains(self) -> None:
        from ..training.models import check_trains

        check_trains(self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As TRL's, which leaves out weights that are saved under other names, as experts are."""
        model = self.model if model is None else model
        if not checkpoints.loads_renamed(self, Path(resume_from_checkpoint), model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not checkpoints.loads_renamed(self, Path(self.state.best_model_checkpoint), self.model):
            super()._load_best_model()

    def evaluation_loop(self, *args, **kwargs):
        """As TRL's."""
        prepare_early(self)
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As TRL's."""
        if self._of_pairs is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        outputs: list = []
        models = [m for m in (self.model, self.ref_model) if m is not None]
        hooks = [m.register_forward_hook(lambda _, __, output: outputs.append(output)) for m in models]
        try:
            inputs = self._prepare_inputs(inputs)
            found = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if outputs and all(hasattr(output, "log_probs") for output in outputs):  # not where TRL's own logits run
            self._note_pairs(self._rewards_and_lengths(inputs, *outputs[:2]))
        return found

    def _rewards_and_lengths(self, inputs: dict, policy, reference=None) -> Tensor:
        """(4, P): rewards of chosen and rejected, their scored tokens. policy, reference: what the models gave."""
        scored = policy.label_mask
        if "ref_chosen_logps" in inputs:
            references = dict(reference_logps=torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]))
        else:
            references = dict(reference_token_logps=reference.log_probs[scored])
        objective = Objective(beta=self.beta, ld_alpha=self.args.ld_alpha)
        out = preference_from_stats(
            TokenStats(policy.log_probs[scored]),
            scored.nonzero()[:, 0],
            len(scored) // 2,
            loss=objective,
            **references,
        )
        found = out.chosen_rewards, out.rejected_rewards, out.pairs.chosen_lengths, out.pairs.rejected_lengths
        return torch.stack([x.to(out.loss) for x in found])

    def report_facts(self) -> dict:
        """What `dpo_fast.report` shows of this trainer, each choice with its reason."""
        from ..training import facts  # not needed to train
        from ..training.data import Truncation

        cut = Truncation(self.args.max_length, mode=self.args.truncation_mode)
        if self.ref_model is not None:
            reference = ("another model, which stays as it is", "ref_model was given, or TRL loaded a copy")
        elif self.args.precompute_ref_log_probs:
            reference = ("log-probs that lie with the data", "precompute_ref_log_probs")
        else:
            reference = ("the model without its adapter", "TRL's choice for a model with an adapter")
        with self._models_in_use():
            layout = self._layout_and_why()
        return {
            "how": [("reference", *reference), ("layout", *layout)],
            "lengths": facts.of_lengths(self.train_dataset, cut, facts.limits_of(self.args)),
            "notes": [],
        }

    def _layout_and_why(self) -> tuple[str, str]:
        if self._layout == "padded":
            return "padded", "asked for, or the embeddings get noise"
        models = [there.model for there in self._installed]
        if any(SEAMS not in vars(model) for model in models):
            return "padded", "a model runs with TRL's own head"
        if not all(is_ready(model, self.args.device) for model in models):
            return "shared_prefix", "if the first batch shows that the models run it right"
        reasons = [reason for model in models for reason in reasons_against_packed_rows(model)]
        if reasons:
            return "padded", "; ".join(dict.fromkeys(reasons))
        return "shared_prefix", "each prompt runs once; a probe shows that the models run it right"
