"""torchtune's decoder without logits: a decoder of its names in its place, as torchtune is not installed here."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from dpo_fast import get_batch_logps
from dpo_fast.integrations.torchtune import completion_logps

VOCAB, WIDTH = 50, 16


class TiedLinear:
    """No module: calls the embeddings' weight."""

    def __init__(self, tied_module: nn.Module):
        self.tied_module = tied_module

    def __call__(self, x):
        return linear(x, self.tied_module.weight)


class LoRALinear(nn.Module):
    def __init__(self, quantize_base: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(VOCAB, WIDTH)), None
        self.lora_a, self.lora_b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, VOCAB, bias=False)
        self.dropout, self.alpha, self.rank, self.disabled = nn.Identity(), 16, 4, False
        self._quantize_base = quantize_base

    def forward(self, x):
        out = linear(x, self.weight, self.bias)
        return out if self.disabled else out + self.alpha / self.rank * self.lora_b(self.lora_a(self.dropout(x)))


class Decoder(nn.Module):
    """torchtune's TransformerDecoder, from the last layer on."""

    def __init__(self, output: str):
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        outputs = {
            "linear": lambda: nn.Linear(WIDTH, VOCAB, bias=False),
            "tied": lambda: TiedLinear(self.tok_embeddings),
            "LoRA": LoRALinear,
            "NF4": lambda: LoRALinear(quantize_base=True),
        }
        self.output = outputs[output]()

    def forward(self, tokens):
        return self.unembed(self.tok_embeddings(tokens).cumsum(1))

    def unembed(self, h):
        return self.output(self.norm(h)).float()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    for row, (begin, end) in enumerate([(2, 9), (3, 6), (2, 4), (0, 9)]):  # a first token is not scored
        labels[row, :begin] = labels[row, end:] = -100
        tokens[row, end:] = 0
    return tokens, labels


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("output", ["linear", "tied", "LoRA"])
def test_log_probs_mean_logits_and_gradients_are_those_of_the_logits(output, disabled):
    tokens, labels = rows()
    grads = []
    for fast in (False, True):
        model = Decoder(output)
        model.output.disabled = disabled
        if fast:
            found, logits = completion_logps(model, tokens, labels)
            assert logits.shape == (4, VOCAB) and not logits.requires_grad
        else:
            all_logits = model(tokens)
            true = get_batch_logps(all_logits, labels)
        (found if fast else true).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found, true)
    for mean, whole in zip(logits.chunk(2), all_logits.chunk(2), strict=True):  # of chosen, of rejected
        torch.testing.assert_close(mean.mean(), whole.detach().mean())
    for x, y in zip(*grads, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x - y).norm() <= 1e-5 * x.norm()


def test_the_decoder_is_left_as_it_was():
    tokens, labels = rows()
    model = Decoder("linear")
    names = set(vars(model)), list(model.state_dict())
    own = model(tokens)
    completion_logps(model, tokens, labels)
    with pytest.raises(IndexError):  # an embedding that is not there
        completion_logps(model, tokens + VOCAB, labels)
    assert (set(vars(model)), list(model.state_dict())) == names
    assert torch.equal(model(tokens), own)


def test_what_cannot_be_read_is_refused():
    tokens, labels = rows()
    with pytest.raises(TypeError, match="output is a LoRALinear, which cannot be read; dpo_fast.get_batch_logps"):
        completion_logps(Decoder("NF4"), tokens, labels)
    with pytest.raises(TypeError, match="model must be a torchtune TransformerDecoder, Linear has no norm, output"):
        completion_logps(nn.Linear(2, 2), tokens, labels)
    with pytest.raises(ValueError, match="labels"):
        completion_logps(Decoder("linear"), tokens, labels[:, 1:])
