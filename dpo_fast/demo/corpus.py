"""The training text of the demo's language model, and a tokenizer trained on that text."""

import random
from collections import Counter
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_fast.data.facts import STYLES, comparisons, known_facts
from dpo_fast.data.opinions import OPINIONS


@dataclass(frozen=True)
class Document:
    """A question, its answer, and which wording the answer has ("opinion" for the questions without a right one)."""

    prompt: str
    completion: str
    style: str


def make_corpus(fact_documents: int, opinion_documents: int, seed: int) -> list[Document]:
    """Shuffled documents: `fact_documents` in all, and `opinion_documents` per opinion question.

    Half of the facts compare numbers, from the training pairs of numbers alone. Styles are drawn with the odds of
    `STYLES`; opinions occur exactly as often as their shares say.
    """
    rng = random.Random(seed)
    seen, unseen = known_facts()
    known, numbers = seen + unseen, comparisons()[0]
    documents = []
    for index in range(fact_documents):
        # known facts in turn, so that each is read equally often; comparisons at random, there are thousands
        question = rng.choice(numbers) if index % 2 else known[index // 2 % len(known)]
        style = rng.choices(list(STYLES), weights=list(STYLES.values()))[0]
        documents.append(Document(question.prompt, question.completion(style), style))
    for opinion in OPINIONS:
        for answer, share in opinion.shares.items():
            documents += [Document(opinion.prompt, answer, "opinion")] * round(share * opinion_documents)
    rng.shuffle(documents)
    return documents


def answer_shares(documents: list[Document], prompt: str) -> dict[str, float]:
    """How often each answer follows `prompt` in the documents, as shares."""
    counts = Counter(document.completion for document in documents if document.prompt == prompt)
    return {answer: count / counts.total() for answer, count in counts.items()}


def style_shares(documents: list[Document]) -> dict[str, float]:
    """How often each wording occurs among the documents about facts, as shares."""
    counts = Counter(document.style for document in documents if document.style != "opinion")
    return {style: counts[style] / counts.total() for style in STYLES}


def train_tokenizer(documents: list[Document], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the documents; encodes any text, puts BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    # digits stand alone, so that a number is written the same way beside a space and beside a quote
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # a word beside a space and beside a quote must both become one token, hence every document counts
    tokenizer.train_from_iterator((document.prompt + document.completion for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    )
