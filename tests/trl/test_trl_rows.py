"""TRL's batches as packed rows: the same bits as token by token, in the loader, and never those of another batch."""

import copy
import pickle
import traceback

import pytest
import torch
from accelerate.utils import concatenate, send_to_device, slice_tensors
from no_sync import no_sync
from reads import counted_reads
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from torch.utils.data._utils.pin_memory import pin_memory  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

from dpo_fast import transfer, trl_rows  # noqa: E402
from dpo_fast.layout import SharedPrefixLayout  # noqa: E402
from dpo_fast.ops import dispatch  # noqa: E402
from dpo_fast.trl import DPOTrainer  # noqa: E402
from dpo_fast.trl import fused_head as drop_in  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SETTINGS = dict(**QUIET, bf16=False, per_device_train_batch_size=3, gradient_checkpointing=False, max_steps=3)
SETTINGS |= dict(per_device_eval_batch_size=4, learning_rate=1e-3)
EXAMPLES = [
    dict(prompt_ids=[5, 6, 7, 8], chosen_ids=[9, 10, 11], rejected_ids=[12, 13]),
    dict(prompt_ids=[5, 6], chosen_ids=[20, 21, 22, 23], rejected_ids=[20, 21, 30]),
]


def trainer_of(folder, trainer_class=DPOTrainer, stream=False, collator=None, rows=None, **options):
    rows = datasets.Dataset.from_list(tiny_rows(9, seed=4) if rows is None else rows)
    tiny_model().save_pretrained(folder / "model")
    return trainer_class(
        str(folder / "model"),
        args=trl.DPOConfig(output_dir=str(folder), **{**SETTINGS, **options}),
        data_collator=collator,
        train_dataset=rows.to_iterable_dataset() if stream else rows,
        eval_dataset=datasets.Dataset.from_list(tiny_rows(6, seed=5)),
        processing_class=tiny_tokenizer(),
    )


def curve(trainer) -> list[tuple]:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [(log["loss"], log["logps/chosen"], log["entropy"], log["num_tokens"]) for log in logs]


@pytest.fixture
def packed_in_forward(monkeypatch):
    """Where rows were packed: True for each batch that a forward has packed, False for a collator's."""
    found, pack = [], trl_rows.packed_rows

    def noted(*args):
        found.append(
            not any(frame.name == "__call__" and "trl_rows" in frame.filename for frame in traceback.extract_stack())
        )
        return pack(*args)

    for module in (trl_rows, drop_in):
        monkeypatch.setattr(module, "packed_rows", noted)
    return found


# --- a batch on its way ----------------------------------------------------------------------------------------------


def collated(**options):
    return trl_rows.PackingCollator(DataCollatorForPreference(pad_token_id=0, **options))(EXAMPLES)


WAYS = {
    "as it is": lambda batch: batch,
    "to a device": lambda batch: send_to_device(batch, torch.device("meta")),
    "pinned": pin_memory,
    "through a worker's pipe": lambda batch: pickle.loads(pickle.dumps(batch)),
    "prepared by Trainer": lambda batch: trl_rows.prepared(
        batch, type(batch)({k: v.to("cpu") for k, v in batch.items()})
    ),
    "all of it": lambda batch: send_to_device(pin_memory(pickle.loads(pickle.dumps(batch))), torch.device("meta")),
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_rows_go_along(way, monkeypatch):
    monkeypatch.setattr(transfer, "_pinned_bytes", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(transfer, "_IN_ONE_COPY", ("meta",))
    batch = collated()
    found = WAYS[way](batch)
    assert found.keys() == batch.keys() and found.rows().input_ids.device == found["input_ids"].device
    for ours, theirs in zip(found.rows().tensors(), batch.rows().tensors(), strict=True):
        assert ours.shape == theirs.shape and (ours.is_meta or torch.equal(ours, theirs))


def written_to(batch):
    batch["completion_mask"][:, 2:] = 0
    return batch


def with_another(batch):
    return trl_rows.PairBatch({**batch, "input_ids": batch["input_ids"].clone()}, None)


def replaced(batch):
    batch["attention_mask"] = batch["attention_mask"].clone()
    return batch


LOST = {
    "cut by accelerate": lambda batch: slice_tensors(batch, slice(0, 2)),
    "joined by accelerate": lambda batch: concatenate([batch, batch]),
    "one that is joined": lambda batch: concatenate([batch]),
    "written to": written_to,
    "written to, then sent": lambda batch: send_to_device(written_to(batch), torch.device("cpu")),
    "written to, then through a pipe": lambda batch: pickle.loads(pickle.dumps(written_to(batch))),
    "a tensor replaced": replaced,
    "a tensor replaced in a copy": lambda batch: replaced(copy.copy(batch)),
    "made anew": with_another,
    "moved by Trainer": lambda batch: trl_rows.prepared(batch, type(batch)({k: v.clone() for k, v in batch.items()})),
}


@pytest.mark.parametrize("way", LOST)
def test_rows_of_other_tensors_are_never_taken(way):
    found = LOST[way](collated())
    assert getattr(found, "rows", lambda: None)() is None
    labels = trl_rows.labels_of(found)
    with trl_rows.handed_over(found):
        assert trl_rows.handed(found["input_ids"], found["attention_mask"], labels) is None


def test_rows_are_found_for_the_tensors_of_the_batch_alone():
    batch, other = collated(), collated()
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], trl_rows.labels_of(batch)
    with trl_rows.handed_over(batch):
        assert trl_rows.handed(ids, mask, labels) is batch.rows()
        assert trl_rows.handed(other["input_ids"], mask, labels) is None
        assert trl_rows.handed(ids, other["attention_mask"], labels) is None
        assert trl_rows.handed(ids, mask, labels.masked_fill(labels == 9, -100)) is None
        with trl_rows.handed_over(dict(batch)):
            assert trl_rows.handed(ids, mask, labels) is None
    assert trl_rows.handed(ids, mask, labels) is None


def test_the_collator_is_trls_to_change():
    collator = trl_rows.PackingCollator(DataCollatorForPreference(pad_token_id=0))
    collator.max_length = 3
    assert collator.collator.max_length == 3 and collator(EXAMPLES)["input_ids"].shape == (4, 3)


def test_what_a_user_adds_to_a_batch_goes_along():
    batch = collated()
    batch["names"] = ["a", "b"]
    assert send_to_device(batch, torch.device("meta"))["names"] == ["a", "b"]


def test_other_labels_stop_a_gpu_without_a_wait(monkeypatch):
    batch = collated()
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], trl_rows.labels_of(batch)
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    with trl_rows.handed_over(batch), no_sync():
        assert trl_rows.handed(ids, mask, labels) is batch.rows()
        with pytest.raises(RuntimeError, match="labels are not those of the batch's completion_mask"):
            trl_rows.handed(ids, mask, labels + 1)
    ids[0, 0] = 1  # nothing is packed for these any more: labels may be others
    with trl_rows.handed_over(batch), no_sync():
        assert trl_rows.handed(ids, mask, labels + 1) is None


def with_images(rows):
    return {**DataCollatorForPreference(pad_token_id=0)(rows), "pixel_values": torch.ones(2)}


def padded_left(rows):
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    return {name: x.flip(1) for name, x in batch.items()}


def in_lists(rows):
    return {name: x.tolist() for name, x in DataCollatorForPreference(pad_token_id=0)(rows).items()}


class Batch(dict):
    pass


@pytest.mark.parametrize(
    "collator",
    [with_images, in_lists, lambda rows: Batch(DataCollatorForPreference(0)(rows)), lambda rows: rows],
    ids=["images", "lists", "a class of its own", "rows"],
)
def test_other_collators_batches_are_theirs(collator):
    found, theirs = trl_rows.PackingCollator(collator)(EXAMPLES), collator(EXAMPLES)
    assert type(found) is type(theirs) or found.rows() is None
    assert str(dict(found) if isinstance(found, dict) else found) == str(
        dict(theirs) if isinstance(theirs, dict) else theirs
    )


def test_rows_padded_on_the_left_are_packed_too():
    found, theirs = trl_rows.PackingCollator(padded_left)(EXAMPLES), padded_left(EXAMPLES)
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    assert found.rows().layout.lengths == (7, 6, 6, 5)


def test_the_collator_is_still_trls_to_ask():
    collator = trl_rows.PackingCollator(DataCollatorForPreference(pad_token_id=3, max_length=4))
    assert (collator.pad_token_id, collator.max_length) == (3, 4)
    assert pickle.loads(pickle.dumps(collator)) == collator
    with pytest.raises(AttributeError, match="no_such"):
        collator.no_such  # noqa: B018


# --- in the trainer --------------------------------------------------------------------------------------------------


def half_a_mask(rows):
    """A user's own: it scores other tokens than TRL's."""
    batch = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=8)(rows)
    batch["completion_mask"] &= torch.arange(batch["input_ids"].shape[1]) % 2
    return batch


@pytest.mark.parametrize(
    "options, in_forward",
    [
        (dict(), False),
        (dict(gradient_accumulation_steps=2, pad_to_multiple_of=16, max_length=12), False),
        (dict(collator=half_a_mask), False),
        (dict(accelerator_config={"split_batches": True}), False),  # one process: nothing is split
        (dict(accelerator_config={"dispatch_batches": True}), True),  # it joins batches and cuts them
        (dict(stream=True), False),
        (dict(rows=[{**row, "tools": "[]"} for row in tiny_rows(9, seed=4)]), False),
    ],
    ids=["plain", "accumulated", "a user's collator", "split batches", "dispatched", "a stream", "tools"],
)
def test_curves_are_trls_wherever_rows_are_packed(options, in_forward, tmp_path, packed_in_forward):
    mine = curve(trainer_of(tmp_path, **options))
    assert packed_in_forward and set(packed_in_forward) == ({True, False} if in_forward else {False})
    for ours, theirs in zip(mine, curve(trainer_of(tmp_path, trl.DPOTrainer, **options)), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_evaluation_and_precomputing(tmp_path, packed_in_forward):
    trainer = trainer_of(tmp_path, precompute_ref_log_probs=True)
    assert set(packed_in_forward) == {True}  # by the constructor, with TRL's collator
    packed_in_forward.clear()
    trainer.evaluate()
    trainer.evaluate(datasets.Dataset.from_list(tiny_rows(3, seed=6)))
    trainer.predict(datasets.Dataset.from_list(tiny_rows(3, seed=7)))
    assert packed_in_forward and not any(packed_in_forward)


def test_workers_pack(tmp_path, packed_in_forward):
    """None is packed in this process."""
    mine = curve(trainer_of(tmp_path, dataloader_num_workers=1))
    assert not packed_in_forward
    assert mine == curve(trainer_of(tmp_path))


def test_nothing_is_packed_for_padded_rows(tmp_path, packed_in_forward):
    curve(trainer_of(tmp_path, lambda *args, **kwargs: DPOTrainer(*args, layout="padded", **kwargs)))
    assert not packed_in_forward


def paused(stream, function):
    def on_the_host(*args):
        with stream.paused():
            return function(*args)

    return on_the_host


@pytest.mark.parametrize("of_loader, ours", [(True, 0), (False, 1)], ids=["packed by the loader", "a foreign batch"])
def test_reads_of_a_step(of_loader, ours, tmp_path, monkeypatch):
    """Of a whole step, CPU tensors for the device's: where the loader has packed, the host waits for TRL's metrics
    alone, else once to pack."""
    trainer = trainer_of(tmp_path)
    trainer.train()  # the probe has run
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    with trainer._models_in_use(), counted_reads() as (reads, stream):
        monkeypatch.setattr(SharedPrefixLayout, "make", paused(stream, SharedPrefixLayout.make))
        trainer.training_step(trainer.model, batch if of_loader else dict(batch))
    assert reads["trl"] > 10 and set(reads) <= {"trl", "dpo_fast"} and reads["dpo_fast"] == ours


def test_two_visible_devices_are_refused(tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS)
    args._n_gpu = 2
    rows = datasets.Dataset.from_list(tiny_rows(4))
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"does not support `nn.DataParallel`"):
        DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
