"""A recipe: a YAML file and options of the command line -> typed arguments of dataclasses.

Keys of the file and options are the same, and options win. What other libraries call by another name is hinted at, not
obeyed: the same word often means something else there.
"""

import dataclasses
import difflib
import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from .sources import BadInput, one_line

# What recipes for TRL, alignment-handbook, LLaMA-Factory and Axolotl call by another name -> what to write here
_INIT = "model_init_kwargs"
ALIASES = {
    "model": "model_name_or_path model_name base_model model_path pretrained_model_name_or_path hf_model model_id",
    "ref_model": "ref_model_name_or_path reference_model ref_model_path",
    "dataset": "dataset_name datasets dataset_path dataset_mixer dataset_mixture dataset_dir data_path train_file "
    "train_data data train_dataset",
    "dataset_config": "dataset_config_name dataset_subset",
    "dataset_split": "dataset_train_split train_split split dataset_splits",
    "eval_split": "dataset_test_split test_split val_split",
    "eval_dataset": "test_datasets eval_file validation_file val_size val_set_size eval_dataset_name",
    f"{_INIT}: {{dtype: bfloat16}}": "torch_dtype dtype model_dtype precision",
    f"{_INIT}: {{attn_implementation: sdpa}}": "attn_implementation flash_attn flash_attention use_flash_attention_2 "
    "sdp_attention attn_impl",
    f"{_INIT}: {{quantization_config: ...}}": "load_in_4bit load_in_8bit quantization_bit quantization_method "
    "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_compute_dtype",
    f"{_INIT}: {{revision: ...}}": "model_revision revision_of_model",
    "lora_r (a rank; without it all weights train)": "use_peft finetuning_type adapter peft use_lora lora lora_rank",
    "lora_target_modules": "lora_target lora_target_linear target_modules",
    "lora_alpha": "lora_a",
    "max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length context_length",
    "max_completion_length": "max_target_length max_response_length",
    "beta": "pref_beta dpo_beta rl_beta",
    "loss_type": "pref_loss dpo_loss loss loss_name rl stage",
    "loss_type: [sigmoid, sft] with loss_weights": "rpo_alpha dpo_ftx pref_ftx",
    "label_smoothing": "dpo_label_smoothing pref_label_smoothing",
    "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "num_train_epochs": "num_epochs epochs n_epochs",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "learning_rate": "lr",
    "optim": "optimizer optimizer_type",
    "max_grad_norm": "gradient_clipping clip_grad_norm max_norm",
    "eval_strategy": "evaluation_strategy evals_per_epoch do_eval_strategy",
    "save_strategy": "saves_per_epoch",
    "layout (nothing is padded or repeated where it is packed)": "padding_free packing sample_packing",
    "dataset_num_proc": "preprocessing_num_workers dataset_processes num_proc",
    "samples": "generate_during_eval",
    "chat_template_kwargs, or the tokenizer's own template": "chat_template template",
    "use_liger_kernel": "liger_kernel enable_liger_kernel use_liger liger_rope liger_rms_norm liger_glu_activation",
    "report_to: wandb": "wandb_project use_wandb wandb_name wandb_entity",
    "nothing: leave it out": "overwrite_output_dir overwrite_cache remove_unused_columns_ val_set special_tokens "
    "plot_loss do_sample strict logging_config force_use_ref_model resize_vocab",
}
_HINTS = {alias: here for here, names in ALIASES.items() for alias in names.split()}


def read_values(options: list[str], fields: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """`[CONFIG.yaml] [--key value ...]` -> values by key, of the file's types or text, and the file.

    Raises BadInput for a file that is no mapping, and for all keys that are not `fields` at once.
    """
    file = None
    if options and not options[0].startswith("-"):
        file, options = Path(options[0]), options[1:]
    values = {} if file is None else _read_yaml(file)
    given = _read_options(options)
    unknown = [key for key in (*values, *given) if key not in fields]
    if unknown:
        where = f"{file}: " if file is not None and unknown[0] in values else ""
        if len(unknown) == 1:
            raise BadInput(f"{where}unknown key {unknown[0]!r}; {_hint(unknown[0], fields)}")
        hints = "; ".join(f"{key} ({_hint(key, fields)})" for key in unknown)
        raise BadInput(f"{where}{len(unknown)} unknown keys: {hints}")
    return {**values, **given}, file


def _hint(key: str, fields: Mapping[str, Any]) -> str:
    plain = key.replace("-", "_")
    if plain in fields:
        return f"did you mean {plain}?"
    if plain.lower() in _HINTS:
        return f"here it is {_HINTS[plain.lower()]}"
    close = difflib.get_close_matches(plain, list(fields), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else "dpo-fast train --help lists all keys"


def _read_options(options: list[str]) -> dict[str, Any]:
    """`--key=value`, `--key value`, `--key value value`, `--flag`; the last one counts. Values are text."""
    given: dict[str, Any] = {}
    key = None
    for option in options:
        if option.startswith("--"):
            name, equals, value = option[2:].partition("=")
            key = name.replace("-", "_")
            given[key] = [value] if equals else []
        elif key is None:
            raise BadInput(f"unexpected {option!r}; options are --key value")
        else:
            given[key].append(option)
    return {key: _Text(words) for key, words in given.items()}


class _Text(list):
    """The words of an option of the command line."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML without keys that come twice, and without aliases, of which a short file can unfold into gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.constructor.ConstructorError(
                None, None, f"aliases (*{event.anchor}) are not read", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"there is no file {str(path)!r}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold keys and values, as in `model: path`, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


# --- types -----------------------------------------------------------------------------------------------------------


def types_of(*classes: type) -> dict[str, Any]:
    """The keys of dataclasses: name -> type, for those that can be set."""
    found = {}
    for data_class in classes:
        hints = typing.get_type_hints(data_class)
        found.update({field.name: hints[field.name] for field in dataclasses.fields(data_class) if field.init})
    return found


def convert(key: str, value, kind, choices=None, optional: bool = False):
    """`value`, of YAML or as words of the command line, as `kind`; raises BadInput that names the key."""
    if value is None and (optional or type(None) in _members(kind)):
        return None
    for member in sorted(_members(kind), key=lambda member: _ORDER.get(typing.get_origin(member) or member, 5)):
        if isinstance(value, _Text):
            found = _from_words(value, member, kind, optional or type(None) in _members(kind))
        else:
            found = _from_yaml(value, member)
        if found is not _NO and (choices is None or _all_among(found, choices)):
            return found
    said = " ".join(value) if isinstance(value, _Text) else value
    wanted = f"one of {', '.join(map(str, choices))}" if choices else _said(kind)
    raise BadInput(f"{key} must be {wanted}, got {said!r}")


_NO = object()
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
_NAMES |= {dict: "a mapping", type(None): "null"}
_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_ORDER = {type(None): 0, bool: 1, int: 2, float: 3, dict: 4, list: 6, str: 7}  # from narrow to wide; enums before text


def _members(kind) -> tuple:
    """The types of a union; where words are listed, text alone is none of them."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(member for member in members if member is not str or not any(map(_is_enum, members)))


def _all_among(found, choices) -> bool:
    return all(item in choices for item in (found if isinstance(found, list) else [found]))


def _said(kind) -> str:
    members = [typing.get_origin(member) or member for member in _members(kind)]
    words = [f"one of {', '.join(str(item.value) for item in kind)}" for kind in members if _is_enum(kind)]
    words += [_NAMES[kind] for kind in members if kind in _NAMES]
    return " or ".join(dict.fromkeys(words)) or str(kind)


def _is_enum(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _from_words(words: _Text, kind, of, optional: bool):
    """kind: one of the types that the key may be `of`."""
    origin = typing.get_origin(kind) or kind
    text = " ".join(words)
    if optional and (text in ("null", "None", "~") or text == "none" and str not in _members(of)):
        return None
    if origin is bool and not words:
        return True  # a flag
    if origin is list:
        if len(words) == 1 and text.lstrip().startswith("["):
            return _from_yaml(_json(text), kind)
        (item,) = typing.get_args(kind) or (str,)
        found = [_from_yaml(word, item) for word in words]
        return _NO if not words or any(x is _NO for x in found) else found
    if len(words) != 1:
        return _NO
    return _from_yaml(_json(text) if origin is dict else text, kind)


def _json(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _from_yaml(value, kind):
    """`_NO` where it is none; numbers may be text, because YAML 1.1 reads 1e-4 as text."""
    origin = typing.get_origin(kind) or kind
    if kind is type(None):
        return None if value is None else _NO
    if origin is Literal:
        return next(
            (item for item in typing.get_args(kind) if item is value or item == value and item is not False), _NO
        )
    if origin is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        return (
            value
            if isinstance(value, bool)
            else words.get(str(value).lower(), _NO)
            if isinstance(value, (str, int))
            else _NO
        )
    if origin in (int, float):
        return _number(value, origin)
    if _is_enum(origin):
        value = _word(value)
        return next((item for item in origin if item.value == value), _NO)
    if origin is str:
        value = _word(value)
        return str(value) if isinstance(value, (str, int, float)) else _NO
    if origin is list:
        (item,) = typing.get_args(kind) or (str,)
        found = [_from_yaml(v, item) for v in (value if isinstance(value, list) else [value])]
        return _NO if value is None or any(x is _NO for x in found) else found
    if origin is dict:
        value = _json(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
        return dict(value) if isinstance(value, Mapping) else _NO
    return value if isinstance(origin, type) and isinstance(value, origin) else _NO


def _word(value):
    """YAML 1.1 reads the words no and yes as truths."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _number(value, kind: type):
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _NO
    try:
        number = float(value)
    except ValueError:
        return _NO
    if kind is float:
        return number
    return (
        int(value)
        if isinstance(value, int)
        else int(number)
        if math.isfinite(number) and number == int(number)
        else _NO
    )
