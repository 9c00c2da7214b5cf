"""benchmarks.predict: what it counts is what torch counts, and its table is the one that is committed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import predict
from benchmarks.train_step.inputs import MIXES, SHAPES

ROOT = Path(__file__).parents[2]
LENGTHS = [(3, 2, 5), (1, 4, 1)]


def test_a_layers_products_are_those_that_torch_counts():
    """Of a small model that runs on a CPU, with its own attention, which is then subtracted by its formula."""
    import transformers

    tokens, shape, flops = 24, SHAPES["tiny"], []
    for layers in (1, 2):
        config = dataclasses.replace(shape, layers=layers).config(tokens)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).model
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long)).last_hidden_state.sum().backward()
        flops.append(counter.get_total_flops())
    attention = 3 * 4 * tokens**2 * shape.width  # whole rows; twice as much in the backward
    reference, forward, backward = predict.layer(shape, False)
    assert reference == forward
    assert (forward.flops + backward.flops) * tokens == flops[1] - flops[0] - attention


def test_a_layer_of_1b_has_two_flops_a_weight_and_adapters_add_little():
    shape = SHAPES["1b"]
    heads = 2 * shape.width**2 + 2 * shape.width**2 * shape.kv_heads // shape.heads
    weights = heads + 3 * shape.width * shape.intermediate
    reference, forward, backward = predict.layer(shape, False)
    assert (forward.flops, backward.flops) == (2 * weights, 4 * weights)
    assert predict.parameters(shape) == 16 * weights + 128_256 * 2048
    pytest.importorskip("peft")
    _, adapted, of_adapters = predict.layer(shape, True)
    assert forward.flops < adapted.flops < 1.05 * forward.flops
    assert forward.flops < of_adapters.flops < 1.05 * forward.flops  # the weights have no gradient


def test_bytes_are_what_operations_read_and_write():
    a, b = torch.zeros(8, 4), torch.zeros(1, 4).expand(8, 4)
    with predict.Count() as count:
        a.view(4, 8).t()
        _ = a + b
        a.mul_(2)
        torch._foreach_add_([a, a], 1)
    assert count.work == (0, 4 * (32 + 4 + 32) + 4 * 64 + 2 * 4 * 64, 3)


def test_positions_and_looks_of_each_trainer():
    assert [predict.positions(trainer, LENGTHS) for trainer in predict.TRAINERS] == [4 * 8, 13 + 7, 10 + 6]
    trl, packed, ours = (predict.looks(trainer, LENGTHS) for trainer in predict.TRAINERS)
    assert trl == 4 * 8 * 8
    assert packed == (25 + 64 + 25 + 4) / 2
    assert ours == packed - (9 + 1) / 2  # each prompt looks at itself once


@pytest.mark.parametrize("mode", predict.MODES)
def test_who_runs_fewer_positions_is_faster_and_the_parts_are_the_whole(mode):
    if mode == "lora":
        pytest.importorskip("peft")
    of, device = predict.batches(MIXES["chat"], 8, 4), predict.DEVICES["h200"]
    trl, packed, ours = (predict.mean_step(SHAPES["1b"], mode, t, of, device) for t in predict.TRAINERS)
    assert trl.total > packed.total > ours.total
    assert ours.total == pytest.approx(ours.products + ours.attention + ours.passes + ours.head + ours.optimizer)
    assert (ours.optimizer > 0) == (mode == "full") and ours.idle == 0
    slow = device._replace(launch_s=1e-3)
    waits = predict.mean_step(SHAPES["1b"], mode, "ours", of, slow)
    assert waits.total == waits.host > waits.device and waits.idle == pytest.approx(waits.host - waits.device)


def test_the_committed_table_is_what_the_command_prints():
    """Its times to a tenth: bytes that a layer moves differ among versions of transformers."""
    pytest.importorskip("peft")
    text = (ROOT / "benchmarks" / "GPU.md").read_text(encoding="utf-8")
    assert predict.markdown(predict.ratios(), predict.RATIOS) in text
    tables = (predict.COLUMNS, 4, predict.rows(predict.DEVICES["h200"])), (predict.LOOK, 2, predict.first_look()[1])
    for columns, names, rows in tables:
        begin = text.index(f"| {' | '.join(columns)} |")
        committed = [line.strip("| ").split(" | ") for line in text[begin:].split("\n\n")[0].splitlines()[2:]]
        now = [[str(row[c]) for c in columns] for row in rows]
        assert [row[:names] for row in committed] == [row[:names] for row in now]
        for old, new in zip(committed, now, strict=True):
            values = [[float(x) for x in row[names:]] for row in (old, new)]
            assert values[0] == pytest.approx(values[1], rel=0.1, abs=1), old


def test_the_first_look_is_held_against_its_own_batches():
    """The numbers of tokens that it printed."""
    of, rows = predict.first_look()
    counted = [sum(predict.positions(trainer, lengths) for lengths in of) / len(of) for trainer in predict.TRAINERS]
    assert [round(count) for count in counted] == [17_764, 8482, 6272]
    assert [row["trainer"] for row in rows] == ["trl", "ours"]
