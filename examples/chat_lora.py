"""FastDPOTrainer on chat messages with LoRA, on a tiny random model: `python examples/chat_lora.py` (needs peft).

To use it in earnest, replace `tiny_llama()` by the name of a model, drop `processing_class`, and load your data.
"""

import datasets
import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dpo_fast import FastDPOConfig, FastDPOTrainer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}],
        "chosen": [{"role": "assistant", "content": f"{a + b}, of course!"}],
        "rejected": [{"role": "assistant", "content": f"Well, {a + b}."}],
    }
    for a in range(8)
    for b in range(4)
]


def tiny_llama():
    """(model, tokenizer): random weights, one token per byte."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokenizer


def main(output_dir: str = "runs/chat_lora", steps: int = 20) -> list[dict]:
    """Train and return the log."""
    torch.manual_seed(0)
    model, tokenizer = tiny_llama()
    trainer = FastDPOTrainer(
        model=model,  # no ref_model: the reference is the policy with its adapter switched off
        args=FastDPOConfig(
            output_dir=output_dir,
            beta=0.1,
            learning_rate=5e-3,
            max_steps=steps,
            per_device_train_batch_size=8,
            logging_steps=5,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            print_example=True,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
