"""The scan of model types (scan.py), on a fixed sample; `make scan` runs all."""

import pytest
from scan import scan, with_window
from tiny import skip_without_experts
from transformers import CONFIG_MAPPING

PACKED = """llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox granite cohere2
olmo2 gpt_oss smollm3 starcoder2 opt deepseek_v3""".split()
PADDED = "stablelm nemotron falcon bloom bart cpmant mamba".split()
REFUSED = "minicpm3 bert".split()


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [*PACKED, *PADDED, *REFUSED])
def test_packed_padded_and_the_models_own(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    skip_without_experts(CONFIG_MAPPING[kind]())
    result = scan(kind)
    expected = "packed" if kind in PACKED else "padded" if kind in PADDED else "refused"
    assert result.layout == expected, result
    assert (result.why == "") == (expected == "packed")


@pytest.mark.thorough
@pytest.mark.parametrize("kind, layout", [("phi3", "packed"), ("phimoe", "padded"), ("doge", "padded")])
def test_windows_that_a_config_leaves_out(kind, layout):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    skip_without_experts(CONFIG_MAPPING[kind]())
    assert scan(kind, **with_window(kind)).layout == layout
