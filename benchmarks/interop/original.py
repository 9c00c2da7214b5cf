"""The loop of the original DPO repository (eric-mitchell/direct-preference-optimization), which is no package:
functions of its signatures, in its order. No clipping, logits in fp32."""

import torch
import transformers
from torch import Tensor, nn

import dpo_fast

from .task import ADAM_EPSILON, BETA, LEARNING_RATE, PAIRS, STEPS, Measure, Task


def _get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """(B, T, V), (B, T) -> (B,): sums, or means, of the labels' log-probs, where they are not -100."""
    assert logits.shape[:-1] == labels.shape
    labels = labels[:, 1:].clone()
    scored = labels != -100
    labels[~scored] = 0
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    sums = (logps * scored).sum(-1)
    return sums / scored.sum(-1) if average_log_prob else sums


def concatenated_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of chosen, then of rejected, padded on the right to one length."""
    rows = {}
    for kind, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        sides = [batch[f"{side}_{kind}"] for side in ("chosen", "rejected")]
        width = max(side.shape[1] for side in sides)
        sides = [nn.functional.pad(side, (0, width - side.shape[1]), value=value) for side in sides]
        rows[f"concatenated_{kind}"] = torch.cat(sides)
    return rows


class Trainer:
    """Its BasicTrainer, as far as a step goes."""

    def __init__(self, policy: nn.Module, reference_model: nn.Module, measure: Measure, way: str):
        self.policy, self.reference_model, self.measure, self.way = policy, reference_model, measure, way
        self.curves: dict[str, list[float]] = {}

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        concatenated_batch = concatenated_inputs(batch)
        ids = concatenated_batch["concatenated_input_ids"]
        mask = concatenated_batch["concatenated_attention_mask"]
        labels = concatenated_batch["concatenated_labels"]
        if self.way == "before":
            # swap: before
            all_logits = model(ids, attention_mask=mask).logits.to(torch.float32)
            all_logps = _get_batch_logps(all_logits, labels, average_log_prob=False)
            # swap: after
        else:
            all_logps = dpo_fast.completion_logps(model, ids, mask, labels).logps
            # swap: end
        chosen_logps, rejected_logps = all_logps.chunk(2)
        return chosen_logps, rejected_logps

    def get_batch_metrics(self, batch: dict[str, Tensor]) -> Tensor:
        chosen, rejected = self.concatenated_forward(self.policy, batch)
        with torch.no_grad():
            reference_chosen, reference_rejected = self.concatenated_forward(self.reference_model, batch)
        logits = (chosen - rejected) - (reference_chosen - reference_rejected)
        losses = -nn.functional.logsigmoid(BETA * logits)
        chosen_rewards = BETA * (chosen - reference_chosen).detach()
        rejected_rewards = BETA * (rejected - reference_rejected).detach()
        metrics = {
            "loss": losses,
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append(float(value.detach().mean()))
        return losses.mean()

    def train(self, batches: list[dict[str, Tensor]]) -> None:
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, eps=ADAM_EPSILON)
        for batch in batches:
            self.get_batch_metrics(batch).backward()
            norm = torch.nn.utils.get_total_norm(p.grad for p in self.policy.parameters())
            self.curves.setdefault("grad_norm", []).append(float(norm))
            optimizer.step()
            optimizer.zero_grad()
            self.measure.step()


def batches_of(pairs: list[dict]) -> list[dict[str, Tensor]]:
    """As its collator pads them: chosen and rejected to lengths of their own."""

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    found = []
    for start in range(0, STEPS * PAIRS, PAIRS):
        batch, some = {}, pairs[start : start + PAIRS]
        for side in ("chosen", "rejected"):
            prompts, completions = [pair["prompt_ids"] for pair in some], [pair[f"{side}_ids"] for pair in some]
            both = list(zip(prompts, completions, strict=True))
            batch[f"{side}_input_ids"] = padded([prompt + completion for prompt, completion in both], 0)
            batch[f"{side}_attention_mask"] = padded([[1] * len(prompt + completion) for prompt, completion in both], 0)
            labels = [[-100] * len(prompt) + completion for prompt, completion in both]
            batch[f"{side}_labels"] = padded(labels, -100)
        found.append(batch)
    return found


def main(task: Task, way: str) -> None:
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32) for _ in range(2)
    )
    measure = Measure()
    trainer = Trainer(policy.train(), reference.eval(), measure, way)
    batches = batches_of(task.pairs())
    with measure:
        trainer.train(batches)
    curves = trainer.curves
    task.write(
        curves.pop("loss"), curves.pop("grad_norm"), curves, weights=policy.state_dict(), measured=measure.measured()
    )


if __name__ == "__main__":
    of_command_line = Task.of_command_line()
    main(of_command_line, of_command_line.way)
