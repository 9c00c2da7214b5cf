"""`FastDPOTrainer`: transformers' `Trainer` around `dpo_fast.functional`."""

import contextlib
import dataclasses
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import get_mixed_precision_context_manager
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, has_length

from dpo_fast import reference, text
from dpo_fast.batch import PreferenceBatch
from dpo_fast.copies import WeightSample, base_model_of, check_storage, compute_with_own_weights, digest
from dpo_fast.forward import attach, is_attached, release
from dpo_fast.functional import PreferenceStep, SequenceScores, preference_step, step_metrics
from dpo_fast.metrics import MetricSums, loss_metrics, term_metrics
from dpo_fast.objective import Objective
from dpo_fast.ops.checks import describe
from dpo_fast.prepared import check_ranks, let_reentrant_checkpoints_run, prepare_anew, prepare_early
from dpo_fast.report.callback import reporting
from dpo_fast.report.pairs import PairEvaluation
from dpo_fast.report.record import plain
from dpo_fast.router import router_coefficient

from . import aliases, card, checkpoints, facts, models, reference_columns, references
from .config import FastDPOConfig
from .data import (
    LENGTH_COLUMN,
    TOKEN_COLUMNS,
    PairCollator,
    format_example,
    prepare_dataset,
)
from .finite import LossWatch, are_finite
from .sampler import GroupsOfEpoch, TokenBudgetBatchSampler, set_epoch

logger = logging.getLogger("dpo_fast")

# Arguments of other trainers -> what to do instead
NOT_TAKEN = {
    "compute_metrics": "no logits leave the model. evaluate() returns rewards, margins and accuracies, extra_metrics "
    "adds more; others can be computed in an overridden evaluate()",
    "preprocess_logits_for_metrics": "no logits leave the model",
    "compute_loss_func": "loss_type takes functions of `PairLogps`; compute_loss() can be overridden",
    "model_init": "give the model, and build a trainer for each trial of a search",
    "tokenizer": "it is called processing_class",
    "optimizer_cls_and_kwargs": "give optimizers=(optimizer, None), or args.optim",
    "formatting_func": "prepare the rows with datasets.map()",
}


class FastDPOTrainer(PairEvaluation, transformers.Trainer):
    """Trains a causal language model on preference pairs.

    model: a Hugging Face causal LM, a PEFT model around one, or a path to load one from.
    ref_model: a model or a path. Omitted: the policy as it is before training. That is a frozen copy of it; with
      `peft_config`, the policy with its adapter off; for a PEFT model, the policy with copies of the weights that
      train, which are put in for the reference's pass. Where weights train that no adapter holds (unfrozen norms,
      `bias="all"`), and where an adapter's initialisation rewrites the base model (PiSSA, OLoRA), the reference still
      is what the model was; TRL's drifts there, or is another model.
    train_dataset, eval_dataset: see `dpo_fast.training.data.prepare_dataset`; eval_dataset may be a dict of data sets.
    processing_class: the tokenizer; omitted: the one that lies with the model.
    data_collator: makes a `PreferenceBatch` of a list of rows; omitted: `PairCollator`, in the layout of `args.layout`.
    quantization_config: for a model that is loaded from a path, as in `model_init_kwargs`; with an adapter on top.
    The other arguments are those of `transformers.Trainer`; those of its, and of TRL's, that have no meaning here are
    refused with the reason (`NOT_TAKEN`).
    """

    args: FastDPOConfig
    objective: Objective
    _said: list[str]  # what was said of the data

    def __init__(
        self,
        model: str | torch.nn.Module,
        ref_model: str | torch.nn.Module | None = None,
        args: FastDPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config=None,
        quantization_config=None,
        **others,
    ):
        for name, value in others.items():
            if name not in NOT_TAKEN:
                known = name in FastDPOConfig.__dataclass_fields__
                hint = "put it into FastDPOConfig" if known else aliases.hint_for(name, "")
                raise TypeError(f"FastDPOTrainer takes no argument {name}{hint and f': {hint}'}")
            if value is not None:
                raise TypeError(f"FastDPOTrainer takes no {name}: {NOT_TAKEN[name]}")
        args = FastDPOConfig() if args is None else args
        check_arguments(model, ref_model, args)
        text.remember(vars(args))
        check_hooks(callbacks, optimizers)
        let_reentrant_checkpoints_run(args)
        args.accelerator_config.dispatch_batches = False  # left to accelerate, it would be True for streams
        if (
            args.use_liger_kernel
        ):  # its layers; its forward, which ends in a cross-entropy, would take the place of ours
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
        self.objective, self._uses = args.objective(), 0

        transformers.set_seed(args.seed)  # a new adapter is initialised at random
        given, model = model, models.load_model(model, args, quantization_config, adapter_trains=True)
        self._base_name, self.data_name = str(getattr(model, "name_or_path", "")), ""  # for the card
        base = None if peft_config is None else WeightSample(model, leave_out=reference.of_adapters(model))
        model = models.make_policy(model, args, peft_config)
        if train_dataset is not None:
            models.check_trains(model)
        self.router_aux_loss_coef = router_coefficient(model, args.router_aux_loss_coef)
        if ref_model is not None:
            ref_model = models.load_model(ref_model, args)
            compute_with_own_weights(base_model_of(ref_model), original=model)
            check_storage(model, ref_model)
        tokenizer = models.load_tokenizer(processing_class, model, args, given)

        self.args, self.processing_class, self._said = args, tokenizer, []  # what _prepare needs
        self._limits = models.limits(model, ref_model)
        train_dataset = self._prepare(train_dataset, "train")
        eval_dataset = self._prepare(eval_dataset, "eval")
        self._given_reference = ref_model is not None
        self._reference_name = "" if ref_model is None else getattr(ref_model, "name_or_path", "") or "a model"
        self._all_scored = self._check_reference_columns(train_dataset, eval_dataset)
        choose_layout = data_collator is None
        self._layout = "of the data_collator", "it was given"
        if choose_layout:
            pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
            models.check_layout(args, *(m for m in (model, ref_model) if m is not None))
            data_collator = PairCollator(pad, args.truncation(), int(args.pad_to_multiple_of or 1))
        else:
            check_collator(data_collator, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_devices(args)
        # The loss is a mean over pairs, which compute_loss takes care of; nothing depends on a count of labels
        self.model_accepts_loss_kwargs = False
        attach(self.model, impl=args.impl, tile_mib=args.tile_mib)
        self.reference = self._make_reference(ref_model, base)
        # A reference that is made from the policy must agree with it when training starts
        self._must_agree = ref_model is None and self.reference is not None
        self._unproven = False
        if choose_layout:  # proven on the models as they run, before the first batch
            self._layout = models.choose_layout(args, args.device, *self._own_models())
            self.data_collator = dataclasses.replace(data_collator, layout=self._layout[0])
        self._sums, self._evaluated_pairs = {"train": MetricSums(), "eval": MetricSums()}, 0
        self._counts, self._losses = {"pairs": 0, "tokens": 0, "scored": 0}, LossWatch(tokenizer)
        self._passes = self._batches = 0  # over a stream
        self.run_id = ""  # what its checkpoints are marked with
        self._start = self._digest_of_start()
        self._say_what_repeats()
        if args.precompute_ref_log_probs:
            self._precompute_reference()
        if args.print_example and train_dataset is not None and self.is_world_process_zero():
            pair = args.truncation()(next(iter(train_dataset)))
            print(format_example(pair, tokenizer, colour=sys.stdout.isatty()))

    # --- data ------------------------------------------------------------------------------------------------------

    def _prepare(self, dataset, name: str):
        if dataset is None:
            return None
        if isinstance(dataset, dict) and name != "train":  # DatasetDict included
            return {key: self._prepare(part, f"{name} {key}") for key, part in dataset.items()}
        args = self.args
        with args.main_process_first(desc=f"tokenising the {name} dataset"):
            return prepare_dataset(
                dataset,
                self.processing_class,
                args.truncation(),
                name=name,
                num_proc=args.dataset_num_proc,
                limits=self._limits,
                template_options=args.chat_template_kwargs,
                said=self._said,
            )

    def _precompute_reference(self) -> None:
        """Score the data with the reference, add the results as columns, and let the reference go."""
        args = self.args
        if self.reference is None:
            return
        scorer = references.scorer_of(self.reference, self.model, self.accelerator, args)
        self.train_dataset = self._with_logps_of(scorer, self.train_dataset, "train", args.per_device_train_batch_size)
        self.eval_dataset = self._with_logps_of(scorer, self.eval_dataset, "eval", args.per_device_eval_batch_size)
        if scorer is not self.reference:
            references.empty(scorer.model)
        if not models.is_peft_model(self.model):
            self.reference = reference_columns.DataColumns()

    def _with_logps_of(self, scorer, dataset, name: str, batch_size: int):
        if dataset is None:
            return dataset
        if isinstance(dataset, dict):
            return {key: self._with_logps_of(scorer, part, key, batch_size) for key, part in dataset.items()}
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"precompute_ref_log_probs needs data of known length, the {name} dataset is a stream")
        loader = DataLoader(
            self._as_arrays(dataset),
            batch_size=self.args.precompute_ref_batch_size or batch_size,
            collate_fn=self.data_collator,
        )
        found = []
        for batch in self.accelerator.prepare(loader):
            with self._autocast():
                tokens = scorer(self.model, batch).tokens
            pairs = reference_columns.tokens_by_pair(tokens.logps, batch)
            found += self.accelerator.gather_for_metrics(pairs, use_gather_object=True)
        replaced = {*reference_columns.SUMS, *reference_columns.TOKENS} & set(dataset.column_names)
        dataset = dataset.remove_columns(sorted(replaced))
        for index, column in enumerate(reference_columns.TOKENS):
            dataset = dataset.add_column(column, [pair[index] for pair in found])
        return dataset

    # --- reference -------------------------------------------------------------------------------------------------

    def _digest_of_start(self) -> str:
        """Of the weights that training must begin from for its reference to be the same, "" where it does not matter.

        An adapter's base in any case; a whole model's where the reference is made of it.
        """
        of_policy = self._must_agree and not isinstance(self.reference, reference_columns.DataColumns)
        if not (of_policy or models.is_peft_model(self.model)):
            return ""
        return digest(self.model, leave_out=reference.of_adapters(self.model))

    def _make_reference(self, ref_model, base: WeightSample | None):
        """What gives the reference log-probs, None where no loss needs them. base: see `references.of_adapter`."""
        if not self.objective.needs_reference:
            return None
        if ref_model is None:
            adapter = models.is_peft_model(self.model)
            if self._all_scored and (not adapter or references.is_sharded(self.accelerator)):
                return reference_columns.DataColumns()
            if adapter:
                return references.of_adapter(self.model, base, self.accelerator)
            if self.args.precompute_ref_log_probs:
                return reference.InitialPolicy(reference.Snapshot())  # before training the policy is the reference
            ref_model = references.frozen_copy(self.model)
        source = references.prepare_model(ref_model, self.accelerator, self.args)
        check_storage(self.model, source.model)  # whatever has placed it
        return source

    def _check_reference_columns(self, *sets, precompute: bool | None = None) -> bool:
        """Whether all these data come with log-probs of a reference that are used: see `reference_columns.check`."""
        precompute = self.args.precompute_ref_log_probs if precompute is None else precompute
        return self.objective.needs_reference and reference_columns.check(
            sets, self.objective, self._given_reference, precompute
        )

    def _autocast(self):
        """As accelerate wraps a model's forward. Not `accelerator.autocast()`, which stays on after an exception."""
        return get_mixed_precision_context_manager(self.accelerator.native_amp, self.accelerator.autocast_handler)

    def reference_scores(self, model, batch: PreferenceBatch) -> SequenceScores | None:
        """The reference's log-probs of a batch, without gradients; None where no loss needs them."""
        self._attach()
        if reference_columns.serve(batch):
            return reference_columns.DataColumns()(model, batch)
        if self.reference is None:
            return None
        with self._autocast():
            return self.reference(model, batch)

    # --- batches ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s, or with `tokens_per_batch`, batches of as many pairs as fit that many tokens."""
        args, dataset = self.args, self.train_dataset
        if args.tokens_per_batch is None:
            return super().get_train_dataloader()
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError("tokens_per_batch needs data of known length, train_dataset is a stream")
        padded = getattr(self.data_collator, "layout", None) == "padded"
        sampler = TokenBudgetBatchSampler(
            [self.data_collator.padded_length(row) for row in dataset] if padded else dataset[LENGTH_COLUMN],
            args.tokens_per_batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
            group_by_length=args.train_sampling_strategy == "group_by_length",
            multiple_of=args.world_size,
            padded=padded,
        )
        loader = DataLoader(
            self._as_arrays(dataset),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
        )
        self.accelerator.even_batches = False  # the sampler has seen to it
        return self.accelerator.prepare(loader)

    def _get_dataloader(self, dataset, *args, **kwargs) -> DataLoader:
        return super()._get_dataloader(self._as_arrays(dataset), *args, **kwargs)

    def _as_arrays(self, dataset):
        """The same rows; token ids are arrays for our own collator, and no lists are made of them."""
        if not isinstance(dataset, datasets.Dataset) or type(self.data_collator) is not PairCollator:
            return dataset  # a subclass may add lists up
        if dataset.format["type"] is not None or not set(TOKEN_COLUMNS) <= set(dataset.column_names):
            return dataset  # with somebody's transform; or the collator says what is missing
        return dataset.with_format("numpy", columns=list(TOKEN_COLUMNS), output_all_columns=True)

    def _say_what_repeats(self) -> None:
        args, dataset = self.args, self.train_dataset
        if args.world_size == 1 or args.dataloader_drop_last or args.tokens_per_batch or not has_length(dataset):
            return
        of_all = args.train_batch_size * args.world_size
        if missing := -len(dataset) % of_all:
            logger.warning(
                "%d pairs fill no whole number of batches on %d ranks: at the end of an epoch its first %d pairs are "
                "taken again, as accelerate does it; dataloader_drop_last=True leaves out the last %d instead",
                len(dataset),
                args.world_size,
                missing,
                of_all - missing,
            )

    # --- steps -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, and how many pairs they hold on average over the ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches and not has_length(self.train_dataset):
            if batches:
                self._say_left_out(len(batches), num_batches)
            batches = []  # Trainer would add their gradients to the next pass's first step
        self._batches += len(batches)
        pairs = sum(batch.num_pairs for batch in batches)
        tokens = sum(batch.num_chosen_tokens for batch in batches)
        self._counts["pairs"] += pairs
        self._counts["tokens"] += sum(batch.input_ids.numel() for batch in batches)
        self._counts["scored"] += sum(sum(batch.host_lengths) for batch in batches)
        if self.args.world_size > 1:  # gradients are averaged over ranks, whatever number of pairs each holds
            counts = torch.tensor([pairs, tokens], device=device, dtype=torch.float32)
            pairs, tokens = self.accelerator.reduce(counts, reduction="mean")
        self._mean_chosen_length = tokens / pairs if batches else None
        return batches, pairs

    def _say_left_out(self, count: int, needed: int) -> None:
        if self._passes == 0:
            logger.warning(
                "the last batches of a pass over the stream (%d of gradient_accumulation_steps=%d) are left out, as "
                "they make no whole optimizer step",
                count,
                needed,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the pairs of the batch, or, in training, the batch's share of the mean over the optimizer step:
        micro-batches of different sizes then weigh as much as they hold, in a likelihood by their chosen tokens."""
        of_step = None if num_items_in_batch is None else self._mean_chosen_length
        step = self.run_step(model, inputs, of_step)
        loss = step.loss if step.aux_loss is None else step.loss + self.router_aux_loss_coef * step.aux_loss
        if num_items_in_batch is not None:
            # training_step divides by the number of micro-batches
            loss = loss * (inputs.num_pairs * self.current_gradient_accumulation_steps / num_items_in_batch)
        return (loss, step) if return_outputs else loss

    def run_step(self, model, batch: PreferenceBatch, mean_chosen_length=None) -> PreferenceStep:
        """Reference, then policy, then loss; metrics are added up on the device. mean_chosen_length: that of all
        micro-batches of the optimizer step, None: the batch's."""
        ref = self.reference_scores(model, batch)
        if self._unproven and model.training:
            self._prove_reference(model, batch, ref)
        # Accelerate's own autocast around the forward is gone after an earlier use (see `release`). One context for
        # each pass here: autocast keeps cast weights until its end, and the reference's have no gradients
        with self._autocast():
            step = preference_step(
                model,
                batch,
                self.objective,
                ref,
                mean_chosen_length=mean_chosen_length,
                extra_metrics=self.args.extra_metrics,
                aux_loss=self.router_aux_loss_coef != 0.0,
            )
        if model.training:
            self._losses.add(self.state.global_step + 1, step, batch)
            metrics = step_metrics(step, batch, self.objective)
            del metrics["loss"]  # Trainer logs its own
            self._sums["train"].add(metrics | term_metrics(step.pairs, self.objective))
        else:
            count = self.pairs_that_count(batch.num_pairs)
            pairs = step.pairs if count is None else step.pairs.first(count)
            metrics = step_metrics(step, batch, self.objective, first=count)
            metrics |= loss_metrics(step.losses[:count], pairs, self.objective)
            if "aux_loss" in metrics:
                total, weight = metrics["loss"]
                metrics["loss"] = total + self.router_aux_loss_coef * metrics["aux_loss"][0], weight
            self._sums["eval"].add(metrics)
        return step

    def _prove_reference(self, model, batch: PreferenceBatch, ref: SequenceScores | None) -> None:
        """Once per trainer, before the first update of `train`: `references.check_start`."""
        self._unproven = self._must_agree = False
        if self.state.global_step == 0 and ref is not None and not reference_columns.serve(batch):
            with self._autocast():
                references.check_start(model, batch, ref, self.reference, self.accelerator)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, None, None): there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        self._evaluated_pairs += inputs.num_pairs
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._of_pairs is None:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, step = self.compute_loss(model, inputs, return_outputs=True)
        rewards = torch.stack(self.objective.rewards(step.pairs)).float()  # (2, P)
        lengths = inputs.lengths.to(rewards)[inputs.compared().index.t()]
        self._note_pairs(torch.cat([rewards, lengths]))
        return loss.detach(), None, None

    # --- loops -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`. True: from the newest whole checkpoint of output_dir, which a line names; from the start
        where a run was killed before it had one.

        Raises ValueError for a directory that is not a whole checkpoint of such a model, and where no step was trained.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None and self.is_world_process_zero():
            logger.warning("resuming from %s, at step %d", checkpoint, checkpoints.step_of(checkpoint))
        self._sums["train"], self._unproven = MetricSums(), self._must_agree
        self._counts, self._losses = dict.fromkeys(self._counts, 0), LossWatch(self.processing_class)
        with self._models_in_use(), reporting(self):
            prepare_anew(self)
            output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        if self.state.global_step == 0:
            kind = "data" if has_length(self.train_dataset) else "stream"
            raise ValueError(f"no step was trained: the {kind} made no batch, or none that fills an optimizer step")
        return output

    def steps_in_all(self) -> int:
        """Optimizer steps of a whole training."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def checkpoint_to_resume(self, resume: str | Path | bool | None) -> Path | None:
        """What `train` goes on from, checked; None where it begins."""
        if resume is None or resume is False:
            return None
        out = Path(str(self.args.output_dir))
        if resume is True:
            first = self.is_world_process_zero()
            checkpoint = checkpoints.newest(out, self.run_id, say=first)
            if checkpoint is None and not any(out.glob("checkpoint-*")) and not self.run_id:
                raise checkpoints.Unfit(
                    f"resume_from_checkpoint=True, but there is no checkpoint in output_dir, {str(out)!r}"
                )
            if checkpoint is None:
                if first:
                    logger.warning("no whole checkpoint in %s yet: training begins at step 0", out)
                return None
        else:
            checkpoint = Path(str(resume))
        copied = self.reference.adapter if isinstance(self.reference, reference.FrozenAdapter) else None
        checkpoints.check(checkpoint, self.model, unseen=copied, start=self._start)
        return checkpoint

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, *rest
    ):
        """As `Trainer`'s, but where a finished run is taken up there is nothing to do, and a stream goes on where it
        was, also in a later pass."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, *rest
        )
        if resume_from_checkpoint is None:
            return epochs, batches
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0
        if has_length(self.train_dataset) or self.args.ignore_data_skip:
            return epochs, batches
        progress = checkpoints.read_progress(Path(resume_from_checkpoint))
        if progress is None:
            logger.warning("%s does not say how far the stream was read: one pass is assumed", resume_from_checkpoint)
            return epochs, batches
        return progress.passes, progress.batches

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        """As `Trainer`'s; every sampler is told the epoch, also below those that accelerate puts around it to skip."""
        set_epoch(train_dataloader, epoch)
        resumed = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
        self._passes, self._batches = epoch, kwargs["steps_trained_in_current_epoch"] if resumed else 0
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        """As `Trainer`'s; groups by length are drawn from seed and epoch, so that a resumed run has the same."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return GroupsOfEpoch(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    @contextlib.contextmanager
    def _models_in_use(self):
        """Models are attached inside; after the outermost use they are as they were."""
        self._uses += 1
        try:
            self._attach()
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                for model in self._own_models():
                    release(model)

    def _own_models(self) -> list[torch.nn.Module]:
        others = [self.reference.model] if isinstance(self.reference, reference.FrozenModel) else []
        policy: Any = self.model
        return [policy, *(model for model in others if model is not self.model)]

    def _attach(self) -> None:
        """Attach what is not, or not any more: after an earlier training, or as something replaced a forward."""
        for model in self._own_models():
            if not is_attached(model):
                attach(model, impl=self.args.impl, tile_mib=self.args.tile_mib)

    def _save_checkpoint(self, model, trial):
        """As `Trainer`'s, of finite weights only. A folder of that name is no checkpoint any more before the first of
        its files is written, and is gone if they cannot be written."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if not self.is_finite():
            logger.warning("%s is not written: weights of the model are not finite", folder)
            return
        if self.args.should_save and folder.exists():  # of an earlier run, maybe with other files
            (folder / checkpoints.STATE).unlink(missing_ok=True)
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        try:
            with checkpoints.writing(f"checkpoint-{self.state.global_step}", folder):
                if self.args.should_save:
                    counts = self.args.world_size, self._passes, self._batches
                    checkpoints.write_progress(folder, checkpoints.Progress(self.run_id, *counts, self._start))
                super()._save_checkpoint(model, trial)
        except OSError as error:
            if checkpoints.is_written(folder):  # pushing it, or removing older ones, has failed
                raise
            shutil.rmtree(folder, ignore_errors=True)
            kept = checkpoints.newest(folder.parent, self.run_id)
            raise OSError(f"{error}; {kept.name} is whole" if kept else str(error)) from error

    @property
    def first_bad_step(self) -> int | None:
        """The first step of this training whose loss was not finite, as far as logs have shown."""
        return self._losses.first

    def is_finite(self) -> bool:
        """Whether every parameter that trains is, on all ranks; waits for the device."""
        finite = are_finite(self.model)
        return bool(self.accelerator.reduce(finite, reduction="mean").item() == 1)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As `Trainer`'s, and right where that is not: before transformers 5.23 it loads no adapter but those in
        sub-folders where there is one (one named "default" is in none), and it leaves out weights that are saved under
        other names, as experts are. Which adapters are active stays as it is."""
        model = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        if checkpoints.loads_renamed(self, folder, model):
            return
        with references.keep_adapters(model), references.keep_dtypes(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            in_root = any(folder.glob("adapter_model.*"))
            if in_root and models.is_peft_model(model) and {"default"} < set(model.peft_config):
                model.load_adapter(resume_from_checkpoint, "default", is_trainable="default" in model.active_adapters)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As `Trainer`'s; raises ValueError for an optimizer of another kind or of other parameters."""
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            checkpoints.check_optimizer(Path(checkpoint), self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self):
        if checkpoints.loads_renamed(self, Path(self.state.best_model_checkpoint), self.model):
            return
        with references.keep_adapters(self.model):
            super()._load_best_model()

    def _save(self, output_dir=None, state_dict=None):
        """As `Trainer`'s, with a model card; a README.md that somebody else has put there stays as it is."""
        folder = Path(output_dir or self.args.output_dir)
        ours = card.is_ours(card.read(folder))
        with references.unseen(self.reference), models.without_progress_bar(), without_tokens(self.args):
            super()._save(output_dir, state_dict)
        if ours:
            card.write(folder, self._base_name, self._card_rows(), self.state.log_history)

    def _card_rows(self) -> list[tuple[str, str]]:
        return card.rows_of(self, self.data_name, facts.of_reference(self.reference, self._reference_name))

    def create_model_card(self, *args, **kwargs):
        """Nothing: the card that `_save` has written is what is pushed to the hub."""

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """As `Trainer.predict`; takes a data set as it comes, too. There are metrics, but no predictions."""
        if test_dataset is None:
            raise TypeError("predict: test_dataset must be a data set, got None")
        return super().predict(self._evaluable(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    def _evaluable(self, dataset, name: str):
        dataset = self._prepare(dataset, name)
        self._check_reference_columns(dataset, precompute=False)
        return dataset

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As `Trainer.evaluate`; takes data sets as they come, too. Returns eval_loss, eval_rewards/chosen, ..."""
        if isinstance(eval_dataset, str) and eval_dataset not in (self.eval_dataset or ()):
            raise ValueError(f"evaluate: there is no eval_dataset named {eval_dataset!r}")
        if eval_dataset is not None and not isinstance(eval_dataset, (str, Mapping)):
            eval_dataset = self._evaluable(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def report_facts(self) -> dict:
        """What `dpo_fast.report` shows of this trainer, each choice with its reason."""
        lengths = facts.of_lengths(self.train_dataset, self.args.truncation(), facts.limits_of(self.args))
        scored = lengths["scored_per_pair"] * self.args.per_device_train_batch_size if lengths else 0
        how = [
            ("reference", *facts.of_reference(self.reference, self._reference_name)),
            ("layout", *self._layout),
            *facts.of_head(self.model, self.objective, self.args, scored),
        ]
        return {"how": how, "lengths": lengths, "notes": list(self._said)}

    def report_counts(self) -> dict[str, int]:
        """Pairs, positions that the model read and scored tokens of this training so far, of this process."""
        return dict(self._counts)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Adds the metrics to what `Trainer` returns, each a mean over all pairs or tokens; one sync at the end."""
        self._sums["eval"], self._evaluated_pairs = MetricSums(), 0
        with self._models_in_use():
            prepare_early(self)
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        if not has_length(dataloader.dataset):  # Trainer has counted the rows of the first tensor
            output = output._replace(num_samples=self._evaluated_pairs * self.args.world_size)
        means = self._sums["eval"].means(self._sum_over_ranks)
        if "likelihood" in means:
            means["loss"] += means.pop("likelihood")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log of training steps: one reduction, one sync."""
        if "loss" in logs:
            logs.update(self._sums["train"].means(self._sum_over_ranks))
        if "loss" in logs or "train_loss" in logs:
            if not all(math.isfinite(value) for value in logs.values() if isinstance(value, float)):
                self._losses.check(self.args.process_index if self.args.world_size > 1 else None)
            self._losses.steps.clear()
        super().log(logs, start_time)

    def _sum_over_ranks(self, packed: Tensor) -> Tensor:
        return self.accelerator.reduce(packed, reduction="sum")


@contextlib.contextmanager
def without_tokens(args: FastDPOConfig) -> Iterator[None]:
    """Hide the hub's tokens, which would lie in training_args.bin and be pushed with the model."""
    secret = {name: value for name, value in vars(args).items() if value is not None and text.is_secret(name)}
    options = args.model_init_kwargs
    vars(args).update(dict.fromkeys(secret), model_init_kwargs=options and plain(options))
    try:
        yield
    finally:
        vars(args).update(secret, model_init_kwargs=options)


def check_arguments(model, ref_model, args) -> None:
    """Raise for what can be seen to be wrong before anything is loaded."""
    if not isinstance(args, FastDPOConfig):
        raise TypeError(f"args must be a FastDPOConfig, which has TRL's names, got {type(args).__name__}")
    models.check_reference(model, ref_model)
    check_ranks(args.world_size)
    of_path = (args.model_init_kwargs or {}).get("device_map") if isinstance(model, str) else None
    mapped = of_path or getattr(model, "hf_device_map", None)
    if not mapped:
        check_devices(args)
    if args.accelerator_config.dispatch_batches:
        raise ValueError("dispatch_batches must not be True: batches would be cut up by rows for other processes")


def check_devices(args) -> None:
    """Raise ValueError where transformers would put nn.DataParallel around the model. Of a model that is spread over
    devices its Trainer takes one to be visible."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices are visible to one process, which transformers serves with nn.DataParallel, and "
            "that copies the model in each step; start with torchrun or accelerate launch, or make one visible"
        )


def check_hooks(callbacks, optimizers) -> None:
    """Raise TypeError for callbacks and optimizers that `Trainer` could not call."""
    kind = transformers.TrainerCallback
    of_callbacks = isinstance(callbacks, (list, tuple, NoneType)) and all(
        isinstance(c, kind) or isinstance(c, type) and issubclass(c, kind) for c in callbacks or ()
    )
    if not of_callbacks:
        raise TypeError(f"callbacks must be a list of TrainerCallback or None, got {describe(callbacks)}")
    pair = isinstance(optimizers, (tuple, list)) and len(optimizers) == 2
    if not (pair and isinstance(optimizers[0], (torch.optim.Optimizer, NoneType))):
        raise TypeError(f"optimizers must be a pair (optimizer or None, scheduler or None), got {describe(optimizers)}")
    if not (optimizers[1] is None or hasattr(optimizers[1], "step")):
        raise TypeError(f"optimizers[1] must be a learning-rate scheduler or None, got {describe(optimizers[1])}")


def check_collator(data_collator, dataset) -> None:
    """Raise TypeError for a collator that makes something else of the first row than a `PreferenceBatch`."""
    if not callable(data_collator):
        raise TypeError(f"data_collator must be callable, got {type(data_collator).__name__}")
    sized = has_length(dataset)
    if not sized or not len(dataset):
        return
    name = getattr(data_collator, "__name__", type(data_collator).__name__)
    expected = (
        f"data_collator ({name}) must make a PreferenceBatch of rows with the columns {', '.join(dataset.column_names)}"
    )
    try:
        batch = data_collator([dataset[0]])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"it raises {type(error).__name__}: {error}"
        raise TypeError(f"{expected}; {reason}. Omit it to have one") from error
    if not isinstance(batch, PreferenceBatch):
        raise TypeError(f"{expected}; it makes a {type(batch).__name__}. Omit it to have one")
