"""What packing makes of token ids, token by token in lists: what `batch`, `layout` and `trl_rows` are judged by."""


def common(a: list, b: list) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def packed(groups: list, prompts: list, ids: list, across: bool = False) -> dict[str, list]:
    """The fields of `packed_batch`; of its layout, what each sequence shares and where its tokens are."""
    names = "input_ids position_ids targets sequence_ids predictors shared index".split()
    row, positions, targets, sequence_ids, predictors, shared, index = found = [[] for _ in names]
    lengths, number = [0] * len(ids), 0
    before, places = [], []  # the sequence before, and where its tokens are
    for group in groups:
        before = before if across else []
        for tokens in group:
            k = common(before, tokens)
            places = places[:k] + list(range(len(row), len(row) + len(tokens) - k))
            row += tokens[k:]
            positions += range(k, len(tokens))
            shared.append(k)
            index += places
            for t in range(max(prompts[number], 1), len(tokens)):  # the first token has nothing to predict it
                targets.append(tokens[t])
                sequence_ids.append(ids[number])
                predictors.append(places[t - 1])
                lengths[ids[number]] += 1
            before, number = tokens, number + 1
    return {**dict(zip(names, found, strict=True)), "lengths": lengths}


def padded(sequences: list, prompts: list, pad: int, multiple: int) -> dict[str, list]:
    """The fields of `padded_batch`; sequences: those of all chosen, then of all rejected."""
    width = -(-max(1, *map(len, sequences)) // multiple) * multiple
    scored = [(s, t) for s, tokens in enumerate(sequences) for t in range(max(prompts[s], 1), len(tokens))]
    return {
        "input_ids": [tokens + [pad] * (width - len(tokens)) for tokens in sequences],
        "attention_mask": [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in sequences],
        "targets": [sequences[s][t] for s, t in scored],
        "sequence_ids": [s for s, _ in scored],
        "predictors": [s * width + t - 1 for s, t in scored],
        "lengths": [sum(one == s for one, _ in scored) for s in range(len(sequences))],
    }
