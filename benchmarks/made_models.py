"""Models made so that a known recipe collapses, each for one reason that a diagnosis must find.

with_large_key_bias   keys carry a constant hundreds of times larger than what differs between tokens (Qwen 2.5)
with_massive_keys     the first token's massive activation reaches its keys, which then are a hundred times larger
recall_model          long-range recall through few full-attention layers, or through many
"""

import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, SmolLM3Config

WORDS = 600


def slow_pair(config) -> tuple[int, int]:
    """Channels of the rotary pair that turns least, in families whose pairs are halves."""
    return config.head_dim // 2 - 1, config.head_dim - 1


def with_large_key_bias(model: PreTrainedModel, size: float = 120.0, layers=None) -> PreTrainedModel:
    """A Llama with a key bias of ``size`` on the slowest rotary pair of every head.

    Over a few hundred tokens this pair hardly turns, so the bias shifts all logits of a query alike: the model stays
    nearly what it was, while the range of every token's key is ``size``.
    """
    config = model.config
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        bias = torch.zeros_like(attention.k_proj.weight[:, 0])
        if layers is None or index in layers:
            bias.view(-1, config.head_dim)[:, slow_pair(config)[0]] = size
        attention.k_proj.bias = torch.nn.Parameter(bias, requires_grad=False)
        # The config allows no bias of keys alone.
        for name in ("q_proj", "v_proj", "o_proj"):
            projection = getattr(attention, name)
            projection.bias = torch.nn.Parameter(torch.zeros_like(projection.weight[:, 0]), requires_grad=False)
    config.attention_bias = True
    return model


def with_massive_keys(model: PreTrainedModel, channel: int, size: float) -> PreTrainedModel:
    """Let hidden channel ``channel``, where the first token's massive activation sits, into the keys.

    It is written to the slowest rotary pair, which queries are made not to read, so only the range of keys changes.
    SmolLM2 without what its queries read there is a worse model (1.7 nats per token), but still one.
    """
    config = model.config
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            # What the massive entry is after the norm: about the root of the hidden size.
            entry = math.sqrt(config.hidden_size) * float(layer.input_layernorm.weight[channel])
            keys = attention.k_proj.weight.view(-1, config.head_dim, config.hidden_size)
            queries = attention.q_proj.weight.view(-1, config.head_dim, config.hidden_size)
            queries[:, slow_pair(config)] = 0
            keys[:, slow_pair(config)[0], channel] = size / entry
    return model


def recall_model(full_layers: int, local_layers: int = 1) -> PreTrainedModel:
    """Recall in a text of words: the word after an earlier occurrence of the last word, found by attention.

    Built by hand. The hidden state is [name | meaning | name of the word before | found | constant]. A local layer
    (window of two tokens) copies the name of the word before. Every full-attention layer looks for keys whose word
    before has this word's name, and adds the meaning of that key's own word to what was found. Names and meanings are
    random vectors; a name has so few numbers that many words come near, and both are stored in other coordinates in
    every layer. More full layers vote; with one, all recall goes through it.

    local_layers   one that copies, and the rest that do nothing.
    """
    layers = local_layers + full_layers
    config = SmolLM3Config(
        vocab_size=WORDS,
        hidden_size=_SIZE,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        use_sliding_window=True,
        sliding_window=2,
        layer_types=["sliding_attention"] * local_layers + ["full_attention"] * full_layers,
        no_rope_layers=[1] * local_layers + [0] * full_layers,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    names, meanings = (
        torch.nn.functional.normalize(torch.randn(WORDS, size, generator=generator), dim=1)
        for size in (_NAME, _MEANING)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, _THIS] = names
        model.model.embed_tokens.weight[:, _WORD] = meanings
        model.model.embed_tokens.weight[:, _CONSTANT] = _LEVEL
        for index, layer in enumerate(model.model.layers):
            if index == 0:
                _copy_name_before(layer.self_attn)
            elif index >= local_layers:
                turns = [torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (_NAME, _MEANING)]
                _look_up(layer.self_attn, *turns, full_layers)
        # What was found has length 1, so the right word gets the gain and the others a cosine of it.
        model.lm_head.weight[:, _FOUND] = meanings * _NORM * _GAIN
    return model


_HEAD_DIM, _NAME, _MEANING = 32, 12, 12
_THIS = slice(0, _NAME)
_WORD = slice(_THIS.stop, _THIS.stop + _MEANING)
_BEFORE = slice(_WORD.stop, _WORD.stop + _NAME)
_FOUND = slice(_BEFORE.stop, _BEFORE.stop + _MEANING)
_CONSTANT, _SIZE = _FOUND.stop, _FOUND.stop + 8
# So large that the norm divides all tokens by nearly the same number, whatever was found.
_LEVEL = 20.0
_NORM = _LEVEL / math.sqrt(_SIZE)
# Logit of a key whose name fits.
_SHARPNESS = 14.0
# Logit of the right word.
_GAIN = 12.0


def _copy_name_before(attention) -> None:
    """Attend to the token before: the fastest rotary pair turns by one radian a token, and the query is one behind."""
    strength = math.sqrt(80.0 * math.sqrt(_HEAD_DIM)) / (_LEVEL / _NORM)
    attention.k_proj.weight[0, _CONSTANT] = strength
    attention.q_proj.weight[0, _CONSTANT] = strength * math.cos(-1.0)
    attention.q_proj.weight[_HEAD_DIM // 2, _CONSTANT] = strength * math.sin(-1.0)
    attention.v_proj.weight[:_NAME, _THIS] = torch.eye(_NAME) * _NORM
    attention.o_proj.weight[_BEFORE, :_NAME] = torch.eye(_NAME)


def _look_up(attention, turn: torch.Tensor, value_turn: torch.Tensor, votes: int) -> None:
    sharp = math.sqrt(_SHARPNESS * math.sqrt(_HEAD_DIM)) * _NORM
    attention.q_proj.weight[:_NAME, _THIS] = turn * sharp
    attention.k_proj.weight[:_NAME, _BEFORE] = turn * sharp
    attention.v_proj.weight[:_MEANING, _WORD] = value_turn * _NORM
    attention.o_proj.weight[_FOUND, :_MEANING] = value_turn.T / votes


def recall_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0")


def recall_text(windows: int, distinct: int = 250, seed: int = 0) -> str:
    """Windows of 2 * ``distinct`` words: words without repetition, and then the same again."""
    generator = torch.Generator().manual_seed(seed)
    said = []
    for _ in range(windows):
        order = torch.randperm(WORDS, generator=generator)[:distinct].tolist()
        said += [f"w{i}" for i in order + order]
    return " ".join(said)
