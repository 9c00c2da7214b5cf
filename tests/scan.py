"""Every causal language model type of the installed transformers, tiny, through `attach`: `make scan`.

    python tests/scan.py                       all types, and docs/models.md
    python tests/scan.py llama opt falcon      only these, nothing written

Each model's log-probs of a few completions, from its own forward with one sequence at a time, are compared with those
of `model(batch)` for padded rows and for a packed row. A packed row that the model cannot run runs as padded rows; the
reason is what the library says. Exit status 1 if a number is wrong or `attach` ends in anything but TypeError or
ValueError.

A config is shrunk by what its fields are called (`SIZES`); one field that no rule knows makes a model large, and it is
listed with its size instead of being run. Windows are run, too: where a config has a field `sliding_window` that is
empty, a second model has it set.
"""

import argparse
import gc
import logging
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_fast import attach
from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.forward import reasons_against_packed_rows
from dpo_fast.layout import shared_prefix_batch
from dpo_fast.probe import probe_tokens

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
MAX_PARAMETERS = 20_000_000
WINDOW = 8
# Nats per sequence. Rounding does some 1e-5 to these models; a lost mask or window, 1e-2 and more
WRONG = 1e-3
# name of a field (a regular expression that must match all of it) -> its value; the first that matches
SIZES = [
    (r".*vocab_size.*", 96),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"(eos|decoder_start)_token_id", 2),
    (r".*(moe|expert).*intermediate_size|moe_ffn.*|expert_ffn_hidden_size|.*expert_hidden_(size|dim)", 16),
    (r".*(intermediate|ffn|inner|mlp_hidden|feed_forward|ff).*(size|dim)|n_inner|d_ff|.*_ffn_dim|ffn_dim", 48),
    (r"(num|n)_(key_value|kv)_heads|num_kv_heads|num_key_value_groups|n_head_kv|.*num_key_value_heads", 2),
    (r"(num|n|encoder|decoder|linear_num).*heads?|.*_attention_heads|.*num_heads", 4),
    (r"(qk_rope_head_dim|rotary_dim|qk_pos.*|rope_head_dim)", 4),
    (r".*head_dim|d_kv|head_size|attention_head_size|kv_channels|.*head_width", 8),
    (r".*lora_rank", 16),
    (r"num_experts_per_tok.*|num_selected_experts|moe_topk|top_k_experts|moe_top_k|experts_per_token|moe_k", 2),
    (r"(num|n)_.*experts|num_experts|moe_num_experts|expert_num", 4),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r"(num_hidden|n|num|encoder|decoder|num_decoder|num_encoder|text).*layers?|n_layer|num_blocks", 2),
    (r"(max_)?(target_|source_)?positions?(_embeddings)?|n_positions|n_ctx|max_.*(position|length|seq_len).*", 256),
    (r".*(window_size|sliding_window|attention_window)", WINDOW),
    (r"(mamba|ssm|time_step).*rank|.*dt_rank", 4),
    (r"(ssm_)?state_size|.*d_state|mamba_d_ssm", 8),
    (r"(hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|word_embed_proj_dim|.*hidden_size|.*embedding_size)", 32),
    (r".*(hidden|model|embed|emb|proj).*(dim|size|width)|dim_model|.*width", 32),
]  # fmt: skip
_MLA, _MAMBA = dict(head_dim=4, qk_head_dim=12), dict(mamba_n_heads=8, mamba_d_head=8)
# what the rules cannot know
OVERRIDES: dict[str, dict] = {
    "axk1": _MLA,
    "bamba": _MAMBA,
    "deepseek_v2": dict(num_experts_per_tok=2, n_routed_experts=4),
    "deepseek_v3": _MLA,
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2),
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": _MLA,
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "reformer": dict(is_decoder=True),
    "xmod": dict(default_language="en_XX"),
    "youtu": _MLA,
}
PAIRS = [
    TokenPair([5, 6, 7], [8, 9, 10, 11], [5, 6, 7], [12, 13]),
    TokenPair([*range(20, 36)], [40, 41], [*range(20, 36)], [43, 44, 45, 46, 47]),  # longer than the window
    TokenPair([50], [51], [50], [51, 52, 53]),
]


@dataclass
class Result:
    kind: str
    layout: str  # "packed", "padded", "refused", "not built", "wrong", "crash"
    why: str = ""

    @property
    def is_bad(self) -> bool:
        return self.layout in ("wrong", "crash")


def shrunk(config_class: type, **more) -> dict:
    """Keywords for a tiny config of that class, its sub-configs included."""
    config = config_class()
    fields = {}
    parts = getattr(config_class, "sub_configs", {})
    for name, value in vars(config).items():
        if name in parts and type(value) in CONFIG_MAPPING.values() or hasattr(value, "model_type"):
            fields[name] = {**shrunk(type(value)), "model_type": value.model_type}
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and (value > size or name.endswith("_token_id")):
                fields[name] = size
    if "num_key_value_heads" in fields and getattr(config, "num_key_value_heads", 0) == getattr(
        config, "num_attention_heads", None
    ):
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 4)
    return {**fields, **more}


def build(kind: str, **more) -> torch.nn.Module:
    """A tiny model of a type, in eval mode, fp32; weights large enough for attention to matter."""
    config_class = CONFIG_MAPPING[kind]
    config = config_class(**{**shrunk(config_class), **OVERRIDES.get(kind, {}), **more})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters: a field of its config is unknown to SIZES")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for p in model.parameters():
        p.data.mul_(2 if p.ndim > 1 else 1)
    return model


def own_logps(model) -> torch.Tensor:
    """(2P,) from the model's own forward, one sequence at a time, chosen before rejected."""
    sums = []
    for prompts, completions in (("chosen_prompt", "chosen"), ("rejected_prompt", "rejected")):
        for pair in PAIRS:
            prompt, completion = getattr(pair, prompts), getattr(pair, completions)
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
            log_p = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            sums.append(log_p.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


@torch.no_grad()
def scan(kind: str, **more) -> Result:
    try:
        model = build(kind, **more)
        own = own_logps(model)
    except Exception as error:  # whatever a config of another field's size leads to: it is listed
        return Result(kind, "not built", said(error))
    if not own.isfinite().all():
        return Result(kind, "not built", "its own log-probs are not finite")
    plain = model(input_ids=torch.arange(3, 13).view(2, 5), use_cache=False).logits
    try:
        attach(model)
    except (TypeError, ValueError) as error:
        return Result(kind, "refused", said(error))
    except Exception as error:
        return Result(kind, "crash", f"attach: {said(error)}")
    reasons, found = ["attach"], {}
    try:
        reasons = reasons_against_packed_rows(model)
        for name, batch in (("packed", shared_prefix_batch(PAIRS)), ("padded", padded_batch(PAIRS, 0))):
            logps = model(batch).logps.double()
            found[name] = (torch.zeros_like(own).index_add_(0, batch.sequence_ids, logps) - own).abs().max().item()
    except Exception as error:
        return Result(kind, "crash", f"{'; '.join(reasons)}: {said(error)}")
    wrong = [f"{name} {error:.2g} nats off" for name, error in found.items() if not error <= WRONG]
    if not torch.equal(model(input_ids=torch.arange(3, 13).view(2, 5), use_cache=False).logits, plain):
        wrong.append("its plain forward has changed")
    if wrong:
        return Result(kind, "wrong", "; ".join([*wrong, *reasons]))
    return Result(kind, "padded" if reasons else "packed", "; ".join(reasons))


def said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def with_window(kind: str) -> dict | None:
    """The change that gives a model of a type the window that its config leaves out, None where there is none."""
    config = CONFIG_MAPPING[kind]()
    fields = vars(config)
    if fields.get("sliding_window", 0) is not None:
        return None
    return {"sliding_window": WINDOW, **({"use_sliding_window": True} if "use_sliding_window" in fields else {})}


class _Sizes(transformers.LlamaConfig):
    """What the probe reads of a config."""

    def __init__(self, window: int | None):
        super().__init__()
        self.sliding_window = window


def document(results: list[Result], windows: list[Result]) -> str:
    counts = {layout: sum(r.layout == layout for r in results) for layout in dict.fromkeys(r.layout for r in results)}
    lines = [
        "# Which models run packed rows",
        "",
        f"Made by `make scan` with transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}.",
        f"{len(results)} causal language model types, tiny, with random weights, in fp32 on a CPU: the log-probs of",
        "packed and of padded rows are compared with those of the model's own forward, one sequence at a time, to",
        f"{WRONG:g} nats a sequence.",
        "",
        ", ".join(f"{count} {layout}" for layout, count in counts.items()) + ".",
        "",
        "- packed: one row per batch, each prompt once, no padding.",
        "- padded: two rows per pair, and a log line says why. The numbers are right, the step is slower.",
        "- refused: `attach` raises, and says why. `dpo_fast.trl` leaves such a model to TRL's own head, where that is",
        "  right.",
        "- not built: this scan could not make or run a tiny one; nothing is known.",
        "",
        "Each model is asked by itself, whatever this table says: before its first batch, three short pairs run",
        "through it both ways (`dpo_fast/probe.py`). That takes forwards of "
        f"{probe_tokens(_Sizes(None))[1]} tokens, once, and of {probe_tokens(_Sizes(64))[1]} for a window of 64.",
        "A larger window is taken as kept where the layers hand it to the attention function.",
        "",
        "| type | layout | why |",
        "|---|---|---|",
    ]
    lines += [f"| {r.kind} | {r.layout} | {r.why.replace('|', '/')} |" for r in results]
    lines += ["", "With `sliding_window` set, where a type's config leaves it empty:", "", "| type | layout | why |"]
    lines += ["|---|---|---|", *(f"| {r.kind} | {r.layout} | {r.why.replace('|', '/')} |" for r in windows)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kinds", nargs="*")
    kinds = parser.parse_args().kinds
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results, windows = [], []
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results.append(scan(kind))
        print(f"{kind:<28} {results[-1].layout:<10} {results[-1].why}", flush=True)
        window = with_window(kind) if results[-1].layout in ("packed", "wrong") else None
        if window is not None:
            windows.append(scan(kind, **window))
            print(f"{kind + ' + window':<28} {windows[-1].layout:<10} {windows[-1].why}", flush=True)
        gc.collect()
    count = {layout: sum(r.layout == layout for r in [*results, *windows]) for layout in ("wrong", "crash")}
    packed = sum(r.layout == "packed" for r in results)
    print(f"{len(results)} types: {packed} packed, {count['wrong']} wrong, {count['crash']} crashes")
    if not kinds:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(results, windows), encoding="utf-8")
        print(f"written: {DOCUMENT}")
    return 1 if count["wrong"] or count["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
