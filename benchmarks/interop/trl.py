"""TRL's DPOTrainer and dpo_fast.trl's, for every TRL of the table: `--completions-only` for the second row of 1.16."""

import datasets
import torch
import transformers

from ..train_step.worker import score_completions_only
from .task import DPO_SETTINGS, Measure, Task, logged


def run_with_transformers_5() -> None:
    """TRL to 0.28 takes the pair that transformers 5 answers with for yes, and imports what is not installed
    (LLaMA-Factory has such lines, too); to 0.24 it writes to an attribute of models that is gone."""
    from transformers.utils import import_utils

    class Answer(tuple):
        def __bool__(self):
            return self[0]

    found = import_utils._is_package_available
    import_utils._is_package_available = lambda *args, **kwargs: Answer(found(*args, **kwargs))
    transformers.PreTrainedModel.warnings_issued = {}


def main() -> None:
    task = Task.of_command_line()
    if "--transformers-5" in task.options:
        run_with_transformers_5()
    if task.way == "before":
        # swap: before
        from trl import DPOConfig, DPOTrainer
        # swap: after
    else:
        from dpo_fast.trl import DPOConfig, DPOTrainer
        # swap: end
    if task.way == "before" and "--completions-only" in task.options:
        score_completions_only()
    args = DPOConfig(output_dir=str(task.folder / "trl"), **DPO_SETTINGS)
    texts = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in task.pairs()]
    measure = Measure()
    trainer = DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32),
        args=args,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=transformers.AutoTokenizer.from_pretrained(task.model),
        callbacks=[measure.callback()],
    )
    with measure:
        trainer.train()
    task.write(**logged(trainer), weights=trainer.model.state_dict(), measured=measure.measured())


if __name__ == "__main__":
    main()
