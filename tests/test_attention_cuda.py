"""What attention.py does on CUDA, executed on a CPU.

torch's two kernels are replaced by exact mathematics behind their own signatures and their own checks; the questions
that only a GPU can answer are answered for it. fp64 stands in for 16 bits, so that sums can be compared exactly.
"""

import functools
import shutil
import sys
import types
from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch.nn.attention import flex_attention as torch_flex

from dpo_fast import attention, flash, flex
from dpo_fast.attention import Scores, choose_implementation, reasons_against_implementation, shared_prefix_attention
from dpo_fast.batch import TokenPair
from dpo_fast.layout import make_layout, shared_prefix_batch

HOPPER, AMPERE, CONSUMER_AMPERE, TURING, VOLTA = (9, 0), (8, 0), (8, 6), (7, 5), (7, 0)
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def by_the_book(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size, dtypes, softcap=0.0):
    """The checks of mha_varlen_fwd, in its words where a user sees them; then causal attention by the book."""
    if query.dtype not in dtypes:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    assert key.dtype == value.dtype == query.dtype and query.ndim == key.ndim == value.ndim == 3
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    for ends, total, longest in ((cu_q, query.shape[0], max_q), (cu_k, key.shape[0], max_k)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends[0] == 0 and ends[-1] == total
        assert (ends.diff() >= 0).all() and type(longest) is int and longest == ends.diff().max()
    if query.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if query.shape[-1] % 8:
        raise RuntimeError("head_size must be a multiple of 8, this is ensured by padding!")
    if value.shape[-1] != query.shape[-1] or key.shape != value.shape:
        raise RuntimeError("v must have shape (total_k, num_heads_k, head_size_og)")
    assert query.shape[1] % key.shape[1] == 0 and window_size[1] == 0 and type(scale) is float
    groups, left = query.shape[1] // key.shape[1], window_size[0]
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        n, m = q1 - q0, k1 - k0
        k, v = (x[k0:k1].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
        back = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
        hidden = (back < 0) | ((back > left) if left >= 0 else False)
        scores = query[q0:q1].transpose(0, 1) @ k.transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def varlen_of(version, calls, dtypes=(FP64,)):
    """A stand-in with the signature that torch's `varlen_attn` has in a version."""

    def run(query, key, value, *rest, scale, window_size):
        calls.append((version, query.shape[1], key.shape[1], window_size))
        return by_the_book(query, key, value, *rest, scale, window_size, dtypes)

    def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal is True and query.shape[1] == key.shape[1]
        scale = query.shape[-1] ** -0.5
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=(-1, 0))

    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert query.shape[1] == key.shape[1]
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def torch_2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return {"2.9": None, "2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12}[version]


def package_of(version, calls, dtypes=(FP64,)):
    """A stand-in with the signature that `flash_attn_varlen_func` has in a version of flash_attn or flash_attn_3."""

    def run(query, key, value, *rest, softmax_scale, causal, window_size, softcap, dropout_p=0.0, deterministic):
        assert causal is True and dropout_p == 0.0 and deterministic is False
        calls.append((version, query.shape[1], key.shape[1], window_size))
        return by_the_book(query, key, value, *rest, softmax_scale, window_size, dtypes, softcap)

    def flash_attn_2_5(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), alibi_slopes=None, deterministic=False, return_attn_probs=False,
        block_table=None,
    ):  # fmt: skip
        raise AssertionError("it has no soft-cap")

    def flash_attn_2_8_3(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return run(q, k, v, *lengths, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
                   softcap=softcap, dropout_p=dropout_p, deterministic=deterministic)  # fmt: skip

    def flash_attn_3_0_0(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return run(q, k, v, *lengths, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
                   softcap=softcap, deterministic=deterministic)  # fmt: skip

    def flash_attn_3_beta(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out = run(q, k, v, *lengths, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
                  softcap=softcap, deterministic=deterministic)  # fmt: skip
        return out, out.new_zeros((q.shape[1], q.shape[0]))  # with the log-sum-exp

    return {"2.5": flash_attn_2_5, "2.8.3": flash_attn_2_8_3, "3.0.0": flash_attn_3_0_0, "3 beta": flash_attn_3_beta}[
        version
    ]


def flex_of(calls):
    """A stand-in for torch's `flex_attention` with its lowering's checks for GPUs; it visits the mask's blocks."""

    def flex(query, key, value, score_mod=None, block_mask=None, scale=None, enable_gqa=False, **asked):
        calls.append(("flex", query.shape[1], key.shape[1], None))
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError("Expected query, key, and value to have the same dtype")
        if min(query.shape[-1], value.shape[-1]) < 16:
            raise NotImplementedError("NYI: embedding dimension of the query, key, and value must be at least 16")
        assert block_mask.seq_lengths == (query.shape[2], key.shape[2])
        assert enable_gqa or query.shape[1] == key.shape[1]
        for function in (score_mod, block_mask.mask_mod):  # a captured number does not compile
            cells = getattr(function, "__closure__", None) or ()
            assert all(isinstance(cell.cell_contents, torch.Tensor) for cell in cells)
        S, block = query.shape[2], block_mask.BLOCK_SIZE[0]
        rows = torch.arange(S)
        sees = block_mask.mask_mod(0, 0, rows[:, None], rows)
        visited = block_mask.to_dense()[0, 0].bool().repeat_interleave(block, 0).repeat_interleave(block, 1)[:S, :S]
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scale
        if score_mod is not None:
            scores = score_mod(scores, 0, 0, 0, 0)
        scores = scores.masked_fill(~(sees & visited), -torch.inf)
        out = scores.softmax(-1) @ value
        if not asked:
            return out
        lse = scores.logsumexp(-1)
        return out, (types.SimpleNamespace(lse=lse) if asked.keys() == {"return_aux"} else lse)

    return flex


@pytest.fixture
def gpu(monkeypatch):
    """Answers as a GPU of some kind; what ran is noted in the list that it returns."""
    calls = []
    monkeypatch.delenv("DPO_FAST_ATTENTION", raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn_config", None)

    def answer(version="2.12", capability=HOPPER, half=(FP64,), flash_attn_2=None, flash_attn_3=None):
        monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
        monkeypatch.setattr(attention, "_capability", lambda device: capability)
        for module in (flash, flex):
            monkeypatch.setattr(module, "HALF", half)
        installed = {"varlen_attn": varlen_of(version, calls, half)}
        packages = {"flash_attn.flash_attn_interface": flash_attn_2, "flash_attn_interface": flash_attn_3}
        modules = {"torch.nn.attention.varlen": installed if installed["varlen_attn"] else None}
        for module, of in packages.items():
            modules[module] = {"flash_attn_varlen_func": package_of(of, calls, half)} if of else None
        for module, functions in modules.items():  # None: not to be imported
            monkeypatch.setitem(sys.modules, module, functions and types.SimpleNamespace(**functions))
        flash._find.cache_clear()
        monkeypatch.setattr(torch_flex, "flex_attention", flex_of(calls))
        return calls

    yield answer
    flash._find.cache_clear()
    flash._left_out_of_3.cache_clear()


# --- which implementation --------------------------------------------------------------------------------------------

CHOICES = [
    # dtype, width of queries, of values, soft-cap, sinks, capability, torch -> implementation, why not the faster ones
    (BF16, 128, 128, None, False, HOPPER, "2.12", "varlen", ""),
    (FP16, 64, 64, None, False, AMPERE, "2.12", "varlen", ""),
    (BF16, 8, 8, None, False, HOPPER, "2.11", "varlen", ""),
    (BF16, 256, 256, None, False, CONSUMER_AMPERE, "2.12", "varlen", ""),
    (BF16, 128, 128, None, False, HOPPER, "2.10", "varlen", ""),
    (BF16, 128, 128, None, False, HOPPER, "2.9", "flex", "no variable-length attention"),
    (BF16, 128, 128, 50.0, False, HOPPER, "2.12", "flex", "takes no soft-cap"),
    (BF16, 128, 128, None, True, HOPPER, "2.12", "flex", "flash attention takes no sinks"),
    (BF16, 192, 128, None, False, HOPPER, "2.12", "flex", "values as wide as queries, got 128 and 192"),
    (BF16, 24, 8, None, False, HOPPER, "2.12", "eager", "heads of at least 16, got 8"),
    (BF16, 12, 12, None, False, HOPPER, "2.12", "eager", "a multiple of 8 and at most 256, got 12"),
    (BF16, 20, 20, None, False, HOPPER, "2.12", "flex", "a multiple of 8 and at most 256, got 20"),
    (BF16, 512, 512, None, False, HOPPER, "2.12", "eager", "tiles of heads wider than 256"),
    (BF16, 208, 208, None, False, HOPPER, "2.12", "varlen", ""),
    (BF16, 208, 208, None, False, CONSUMER_AMPERE, "2.12", "eager", "backward has no heads of 208"),
    (FP32, 128, 128, None, False, HOPPER, "2.12", "flex", "takes bfloat16 and float16, not float32"),
    (FP32, 8, 8, None, False, HOPPER, "2.12", "eager", "heads of at least 16, got 8"),
    (FP32, 256, 256, None, False, HOPPER, "2.12", "eager", "tiles of heads wider than 128"),
    (FP32, 128, 128, None, False, CONSUMER_AMPERE, "2.12", "eager", "tiles of heads wider than 64"),
    (FP64, 64, 64, None, False, HOPPER, "2.12", "eager", "takes bfloat16, float16 and float32, not float64"),
    (FP16, 64, 64, None, False, TURING, "2.12", "eager", "flash attention needs compute capability 8.0"),
    (BF16, 64, 64, None, False, TURING, "2.12", "eager", "Triton needs compute capability 8.0, this GPU has 7.5"),
    (FP32, 64, 64, None, False, VOLTA, "2.12", "eager", "Triton needs compute capability 8.0, this GPU has 7.0"),
]


@pytest.mark.parametrize("dtype, width, value_width, softcap, sinks, capability, version, expected, why", CHOICES)
def test_choice(gpu, dtype, width, value_width, softcap, sinks, capability, version, expected, why):
    gpu(version, capability, half=(FP16, BF16))
    query, key = torch.empty((1, 4, 9, width), dtype=dtype), torch.empty((1, 2, 9, width), dtype=dtype)
    value = torch.empty((1, 2, 9, value_width), dtype=dtype)
    sinks = torch.zeros(4) if sinks else None
    scores = Scores(width**-0.5, softcap=softcap, sinks=sinks)
    chosen = choose_implementation(query, scores, key, value)
    assert chosen == expected
    reasons = {
        name: reasons_against_implementation(name, query, scores, key, value) for name in attention.IMPLEMENTATIONS
    }
    assert not reasons[chosen]
    faster = attention.IMPLEMENTATIONS[: attention.IMPLEMENTATIONS.index(chosen)]
    assert all(reasons[name] for name in faster)
    assert why in "; ".join(reason for name in faster for reason in reasons[name])
    for name in faster:  # an explicit choice says all of it
        with pytest.raises(ValueError, match=f"implementation='{name}' cannot run: ") as error:
            choose_implementation(query, scores, key, value, name)
        assert str(error.value).endswith("; ".join(reasons[name]))


INSTALLED = [
    # flash_attn, flash_attn_3, dtype, soft-cap, capability -> implementation
    ("2.8.3", "3.0.0", BF16, None, HOPPER, "flash_attn_3"),
    ("2.8.3", "3.0.0", BF16, 50.0, HOPPER, "flash_attn_3"),
    ("2.8.3", None, BF16, None, HOPPER, "varlen"),
    ("2.8.3", None, FP16, 50.0, HOPPER, "flash_attn_2"),
    ("2.8.3", "3.0.0", BF16, 50.0, AMPERE, "flash_attn_2"),
    (None, "3 beta", BF16, None, (10, 0), "varlen"),
    ("2.5", None, BF16, 50.0, HOPPER, "flex"),
    ("2.8.3", "3.0.0", FP32, None, HOPPER, "flex"),
    ("2.8.3", "3.0.0", FP16, None, TURING, "eager"),
]


@pytest.mark.parametrize("flash_attn_2, flash_attn_3, dtype, softcap, capability, expected", INSTALLED)
def test_packages(gpu, flash_attn_2, flash_attn_3, dtype, softcap, capability, expected):
    gpu("2.12", capability, half=(FP16, BF16), flash_attn_2=flash_attn_2, flash_attn_3=flash_attn_3)
    query, scores = torch.empty((1, 4, 9, 128), dtype=dtype), Scores(0.1, 5, softcap)
    assert choose_implementation(query, scores) == expected
    reasons = [reasons_against_implementation(name, query, scores) for name in ("flash_attn_2", "flash_attn_3")]
    said = [of[0] if of else "" for of in reasons]
    assert said[0].endswith("it has no softcap") == (flash_attn_2 == "2.5")
    assert (said[1] == "flash_attn_3 is not installed") == (flash_attn_3 is None)


def test_packages_have_no_sinks(gpu):
    gpu(flash_attn_2="2.8.3", flash_attn_3="3.0.0")
    query, scores = torch.empty((1, 4, 9, 64), dtype=FP64), Scores(sinks=torch.ones(4))
    for name in flash.NAMES:
        reasons = reasons_against_implementation(name, query, scores)
        assert len(reasons) == 1 and reasons[0].startswith("flash attention takes no sinks")


def test_a_package_that_was_built_for_another_torch_says_so(gpu, monkeypatch):
    gpu(flash_attn_2="2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", types.SimpleNamespace())
    error = ImportError("undefined symbol: _ZN3c105Error")
    with monkeypatch.context() as patch:
        patch.setattr(flash.importlib, "import_module", lambda name: (_ for _ in ()).throw(error))
        assert flash.missing("flash_attn_2") == f"flash_attn_2 cannot be imported ({error})"
    with pytest.raises(ValueError, match="cannot run: flash_attn_2 cannot be imported .undefined symbol"):
        choose_implementation(torch.empty((1, 4, 9, 64), dtype=FP64), implementation="flash_attn_2")


def test_what_a_build_of_flash_attention_3_is_without(gpu, monkeypatch):
    """Its packages may be built without parts, and their kernels raise where one is asked for."""
    gpu(half=(FP16, BF16), flash_attn_3="3.0.0")
    off = ("LOCAL", "SOFTCAP", "FP16", "HDIM256")
    flags = {f"FLASHATTENTION_DISABLE_{name}": name in off for name in ("BACKWARD", "VARLEN", *off, "HDIM192")}
    flags["FLASHATTENTION_ENABLE_VCOLMAJOR"] = True
    monkeypatch.setitem(sys.modules, "flash_attn_config", types.SimpleNamespace(CONFIG={"build_flags": flags}))
    flash._left_out_of_3.cache_clear()

    def reasons(width, scores, dtype=BF16):
        return reasons_against_implementation("flash_attn_3", torch.empty((1, 4, 9, width), dtype=dtype), scores)

    without = "this build of FlashAttention 3 is without"
    assert reasons(192, Scores()) == []
    assert reasons(256, Scores()) == [f"{without} heads of 256"]
    assert reasons(64, Scores(window=4, softcap=2.0), FP16) == [f"{without} {name}" for name in off[:3]]
    torch.use_deterministic_algorithms(True)
    try:
        assert reasons(192, Scores()) == []
        assert "in a fixed order has heads of at most 192" in reasons(256, Scores())[0]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (24, 8), (12, 12), (8, 8), (20, 20), (264, 264), (192, 128)])
@pytest.mark.parametrize(
    "version, packages",
    [
        *[(version, {}) for version in ("2.9", "2.10", "2.11", "2.12")],
        ("2.9", dict(flash_attn_2="2.8.3")),
        ("2.12", dict(flash_attn_3="3.0.0")),
        ("2.12", dict(flash_attn_3="3 beta")),
    ],
)
def test_what_is_chosen_runs(gpu, version, packages, widths):
    """In the stand-ins' checks, which are the kernels': dtypes, widths, windows, soft-caps, scales."""
    layout = make_layout([(5, 3, 4), (0, 2, 3), (7, 0, 2)])
    for half in ((FP64,), ()):  # as if in 16 bits, as if not
        gpu(version, half=half, **packages)
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 4, layout.length, widths[0]), (1, 2, layout.length, widths[0]), (1, 2, layout.length, widths[1])]
        inputs = [torch.randn(shape, generator=generator, dtype=FP64) for shape in shapes]
        for knobs in ({}, dict(window=3), dict(softcap=2.0), dict(window=99), dict(sinks=torch.zeros(4))):
            for scaling in (widths[0] ** -0.5, 0.3):
                out = shared_prefix_attention(*inputs, layout, scaling=scaling, **knobs)
                true = shared_prefix_attention(*inputs, layout, scaling=scaling, implementation="eager", **knobs)
                torch.testing.assert_close(out, true, rtol=1e-6, atol=1e-6)  # eager's softmax is in fp32 with a cap


def test_queries_that_are_not_read_head_by_head(gpu):
    gpu()
    layout = make_layout([(5, 3, 4)])
    query, key, value = (torch.randn((1, 2, 16, layout.length), dtype=FP64).transpose(2, 3) for _ in range(3))
    out = shared_prefix_attention(query, key, value, layout, scaling=0.25)
    true = shared_prefix_attention(query, key, value, layout, scaling=0.25, implementation="eager")
    torch.testing.assert_close(out, true)


def test_torch_2_10_says_what_it_lacks(gpu):
    gpu("2.10")
    query = torch.empty((1, 4, 9, 16), dtype=FP64)
    assert choose_implementation(query, Scores(0.25)) == "varlen"
    assert reasons_against_implementation("varlen", query, Scores(window=4)) == [
        "this torch's variable-length attention has no windows"
    ]
    assert "scales by 1/sqrt(16), not by 0.5" in reasons_against_implementation("varlen", query, Scores(0.5))[0]


def test_environment_is_an_explicit_choice(gpu, monkeypatch):
    gpu(half=(FP16, BF16))
    query = torch.empty((1, 4, 9, 12), dtype=FP32)
    monkeypatch.setenv("DPO_FAST_ATTENTION", "varlen")
    with pytest.raises(ValueError) as error:
        choose_implementation(query, Scores(softcap=3.0))
    message = "DPO_FAST_ATTENTION='varlen' cannot run: torch's variable-length attention takes no soft-cap; "
    message += "flash attention takes bfloat16 and float16, not float32; "
    assert str(error.value) == message + "flash attention wants heads of a multiple of 8 and at most 256, got 12"
    assert choose_implementation(query, Scores(softcap=3.0), implementation="eager") == "eager"


def test_without_a_gpu():
    """torch's own kernel is for CUDA alone."""
    if flash.missing("varlen"):
        pytest.skip(f"torch {torch.__version__} has no variable-length attention")
    layout = make_layout([(2, 1, 1)])
    inputs = [torch.zeros((1, 2, 4, 16), dtype=BF16)] * 3
    with pytest.raises(ValueError, match="flash attention needs a CUDA device, the tensors are on 'cpu'"):
        shared_prefix_attention(*inputs, layout, scaling=0.25, implementation="varlen")
    assert choose_implementation(inputs[0]) == "eager"


# --- dtypes ----------------------------------------------------------------------------------------------------------


def dtypes_seen(monkeypatch, run):
    """(implementation, dtypes of query, key and value) of every call during `run`."""
    seen = set()
    eager = attention._eager

    def note(name, query, key, value, layout, scores, *_mask):
        seen.add((name, query.dtype, key.dtype, value.dtype))
        return eager(query, key, value, layout, scores)

    monkeypatch.setattr(flash, "attend", note)
    monkeypatch.setattr(flex, "attend", functools.partial(note, "flex"))
    monkeypatch.setattr(attention, "_eager", functools.partial(note, "eager"))
    run()
    return seen


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_autocast(gpu, monkeypatch, name, dtype):
    """Rotary embeddings and norms leave queries and keys in fp32: attention casts them, as SDPA does."""
    gpu(half=(FP16, BF16))
    model = tiny(name).float()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        seen = dtypes_seen(monkeypatch, lambda: packed(model, PAIRS))
    assert seen == {("varlen", dtype, dtype, dtype)}


def test_autocast_and_mixed_dtypes(gpu, monkeypatch):
    gpu(half=(FP16, BF16))
    layout = make_layout([(3, 2, 2)])

    def run(*dtypes):
        inputs = [torch.zeros((1, 2, 7, 16), dtype=dtype) for dtype in dtypes]
        return lambda: results.append(shared_prefix_attention(*inputs, layout, scaling=0.25).dtype)

    cases = [
        # autocast's dtype, whether on, dtypes of query, key, value -> the dtype of all three
        (BF16, True, (FP32, FP32, BF16), BF16),
        (FP16, True, (FP32, FP32, FP32), FP16),
        (FP16, True, (BF16, BF16, BF16), FP16),
        (BF16, True, (FP64, FP64, FP64), FP64),
        (BF16, False, (FP32, FP32, FP32), FP32),
        (BF16, False, (FP32, FP32, BF16), BF16),  # rotary embeddings in fp32, no autocast
        (BF16, False, (BF16, BF16, FP32), FP32),
    ]
    for autocast, on, dtypes, expected in cases:
        results = []
        with torch.autocast("cpu", autocast, enabled=on), monkeypatch.context() as patch:
            seen = dtypes_seen(patch, run(*dtypes))
        assert {found for _, *three in seen for found in three} == {expected} and results == [expected]


# --- whole models ----------------------------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "one key head": lambda: tf.LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "mistral": lambda: tf.MistralConfig(**SIZES, head_dim=16, sliding_window=4),
    "window of 1": lambda: tf.MistralConfig(**SIZES, head_dim=16, sliding_window=1),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=16),
    "heads of 12": lambda: tf.LlamaConfig(**SIZES, head_dim=12),
    "narrow values": lambda: tf.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=24,
        v_head_dim=16, n_routed_experts=4, moe_intermediate_size=8, num_experts_per_tok=2, first_k_dense_replace=2,
        n_group=1, topk_group=1,
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}  # fmt: skip
RUNS = {"heads of 12": "eager", "narrow values": "flex", "gemma2": "flex"}
PAIRS = [
    TokenPair(list(range(3, 14)), list(range(20, 27)), list(range(3, 14)), list(range(40, 45))),
    TokenPair([], [5, 6, 7], [], [8, 9]),
    TokenPair([50, 51, 52], [60], [50, 51, 52], [60, 61, 62]),
    TokenPair([70, 71, 72, 73], [80, 81], [71, 72, 73], [82]),  # cut differently: nothing shared
]


def tiny(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]()).double().eval()
    attention.enable(model)
    return model


def packed(model, pairs):
    """(N, H) hidden states at the predictors of a packed row."""
    batch = shared_prefix_batch(pairs)
    inputs = attention.model_inputs(batch.layout, torch.device("cpu"))
    out = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs)
    return out[0][0].index_select(0, batch.predictors)


def separate(model, pairs):
    """The same, a sequence at a time."""
    rows = []
    for sequence in shared_prefix_batch(pairs).sequence_ids.unique_consecutive().tolist():
        pair = pairs[sequence % len(pairs)]
        first = sequence < len(pairs)
        prompt, completion = (pair.chosen_prompt, pair.chosen) if first else (pair.rejected_prompt, pair.rejected)
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)[0][0]
        rows.append(hidden[max(len(prompt), 1) - 1 : -1])
    return torch.cat(rows)


def assert_equal_with_gradients(model, pairs):
    parameters = list(model.base_model.parameters())
    found, true = packed(model, pairs), separate(model, pairs)
    assert (found - true).norm() <= 1e-6 * true.norm()
    cotangent = torch.randn(true.shape, dtype=true.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * cotangent).sum(), parameters, allow_unused=True) for x in (found, true)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_equals_separate_rows(gpu, name):
    model, calls = tiny(name), gpu()
    assert attention.reasons_against(model) == []
    assert_equal_with_gradients(model, PAIRS)
    ran = {"flex" if call[0] == "flex" else "varlen" for call in calls} or {"eager"}
    assert ran == {RUNS.get(name, "varlen")}


@pytest.mark.parametrize("version", ["2.9", "2.10", "2.11"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_older_torch(gpu, name, version):
    """Without enable_gqa keys and values come with as many heads as queries; without windows they go to flex."""
    model, calls = tiny(name), gpu(version)
    assert_equal_with_gradients(model, PAIRS)
    flex = version == "2.9" or (version == "2.10" and name == "mistral")
    assert {call[0] for call in calls} == {"flex" if flex else version}
    assert flex or {call[1:3] for call in calls} == {(4, 4)}


@pytest.mark.parametrize("packages", [dict(flash_attn_2="2.8.3"), dict(flash_attn_3="3.0.0")], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_models_on_packages(gpu, name, packages):
    """Grouped heads, windows and soft-caps; Gemma-2 has both of the latter."""
    model, calls = tiny(name), gpu("2.9", **packages)
    assert_equal_with_gradients(model, PAIRS)
    assert {call[:3] for call in calls} == {(*packages.values(), 4, 2)}


def test_sinks_are_had_from_flex(gpu):
    sizes = {**SIZES, "max_position_embeddings": 4096}
    config = tf.GptOssConfig(
        **sizes, head_dim=16, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    calls = gpu()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    attention.enable(model)
    assert_equal_with_gradients(model, PAIRS)
    assert {call[0] for call in calls} == {"flex"}


def test_grouped_heads_are_handed_through_where_torch_takes_them(gpu):
    model, calls = tiny("llama"), gpu("2.12")
    packed(model, PAIRS)
    assert {call[1:3] for call in calls} == {(4, 2)}


def test_windows(gpu):
    """`window` positions back, itself included; a window that hides nothing is none."""
    model, calls = tiny("mistral"), gpu()
    packed(model, PAIRS)
    assert {call[3] for call in calls} == {(3, 0)}
    model.config.sliding_window = 4096
    for layer in model.base_model.layers:
        layer.self_attn.sliding_window = 4096
    calls.clear()
    packed(model, PAIRS)
    assert {call[3] for call in calls} == {(-1, 0)}


# --- FlexAttention, compiled ----------------------------------------------------------------------------------------


def counted(monkeypatch, backend):
    """FlexAttention compiled as on a GPU; how often, in the list."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    for module, name in ((flex, "_with_sinks"), (torch_flex, "flex_attention")):
        monkeypatch.setattr(module, name, torch.compile(getattr(module, name), dynamic=True, backend=count))
    return graphs


def test_flex_compiles_once(monkeypatch):
    """For all lengths, windows, soft-caps and sinks: one graph for each of without and with a soft-cap, and sinks.

    (Sizes of 1, and those that equal a number of heads, have graphs of their own.)
    """
    graphs = counted(monkeypatch, lambda graph, inputs: graph.forward)
    pairs = [[(350, 3, 4), (9, 2, 3)], [(7, 850, 2)], [(30, 1, 1), (0, 300, 400), (1, 1, 1)]]
    for lengths in pairs:
        layout = make_layout(lengths)
        assert -(-layout.length // 128) not in (1, 2, 4)
        query, key = torch.zeros((1, 4, layout.length, 16)), torch.zeros((1, 2, layout.length, 16))
        for window in (None, 5, 9):
            for softcap in (None, 30.0, 50.0):
                for sinks in (None, torch.zeros(4)):
                    knobs = dict(window=window, softcap=softcap, sinks=sinks, implementation="flex")
                    with torch.no_grad():
                        shared_prefix_attention(query, key, key, layout, scaling=0.25, **knobs)
    assert len(graphs) == 4


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler on CPU")
def test_flex_compiles_with_a_soft_cap(monkeypatch):
    """Through Inductor: a soft-cap that is a number of the graph cannot be lowered."""
    monkeypatch.setattr(torch_flex, "flex_attention", flex._compiled(torch_flex.flex_attention))
    layout = make_layout([(5, 3, 4), (2, 2, 3)])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((1, heads, layout.length, 16), generator=generator) for heads in (4, 2, 2))
    knobs = dict(scaling=0.25, softcap=2.0, window=3)
    with torch.no_grad():
        out, true = (
            shared_prefix_attention(query, key, value, layout, implementation=name, **knobs)
            for name in ("flex", "eager")
        )
    torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-5)
