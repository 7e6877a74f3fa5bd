"""Settings and small real objects that every test shares: no network, no login files, tiny models made in memory."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import socket
import tempfile
from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Edit the following sentence for grammar. He go to the park every day.",
    "He goes to the park every day. Convert 45 kilometers to meters. 45 kilometers is 45000 meters.",
    "What is the capital of France? The capital of France is Paris.",
    "Name three colours: red, green and blue. The chef cooks the meal every day.",
]


@pytest.fixture(scope="session")
def free_port():
    """Return a function that gives a TCP port of the loopback interface on which nothing listens."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="module")
def short_folder():
    """Return a folder with a short path: a socket's path has at most 107 characters, and Ray's lie below it."""
    path = Path(tempfile.mkdtemp(prefix="tf-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Return a 320-entry byte-level BPE with a chat template, built in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama():
    """Return a factory of fresh small Llama models: tiny_llama(vocab=320, hidden=32, layers=2, seed=0)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(
        vocab: int = 320, hidden: int = 32, layers: int = 2, seed: int = 0, tied: bool = True
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_tokenizer, tiny_llama) -> Path:
    """Return a folder that `from_pretrained` loads: a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
