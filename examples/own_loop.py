"""DPO in a plain PyTorch loop with a model of your own: `python examples/own_loop.py`, seconds on a CPU.

The model is a character-level GRU, so nothing here depends on transformers. What it needs from dpo_fast: log-probs of
tokens from logits, their sums per sequence, and the loss. The preference: answers in capital letters.
"""

import copy

import torch

import dpo_fast

PAIRS = [("say hello: ", "HELLO", "hello"), ("say yes: ", "YES", "yes"), ("name a tree: ", "OAK", "oak")]


class CharacterModel(torch.nn.Module):
    """(B, T) bytes -> (B, T, 256) logits of the next byte."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, width)
        self.gru = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, 256)

    def forward(self, ids):
        return self.head(self.gru(self.embedding(ids))[0])


def collate(pairs):
    """Rows in the order [chosen ..., rejected ...]; labels are -100 outside the completion."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(rows):
        text = torch.tensor(list((prompt + completion).encode()))
        ids[row, : len(text)] = text
        labels[row, len(prompt) : len(text)] = text[len(prompt) :]
    return ids, labels


def sequence_logps(model, ids, labels):
    """(2P,) log-probs of the completions."""
    token_logps = dpo_fast.logits_token_logps(model(ids[:, :-1]), labels[:, 1:])  # (2P, T - 1), 0 outside
    rows = torch.arange(len(ids)).repeat_interleave(ids.shape[1] - 1)
    return dpo_fast.sequence_logps(token_logps.flatten(), rows, len(ids))


def main(steps: int = 30) -> float:
    """Train, print, and return the last loss."""
    torch.manual_seed(0)
    policy = CharacterModel()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    ids, labels = collate(PAIRS)
    with torch.no_grad():
        ref_chosen, ref_rejected = sequence_logps(reference, ids, labels).chunk(2)
    for step in range(steps):
        chosen, rejected = sequence_logps(policy, ids, labels).chunk(2)
        loss = dpo_fast.preference_loss(chosen, rejected, ref_chosen, ref_rejected, loss="sigmoid", beta=0.1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            margin = ((chosen - ref_chosen) - (rejected - ref_rejected)).mean()
            print(f"step {step:3d}  loss {loss.item():.4f}  log-ratio margin {margin.item():7.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
