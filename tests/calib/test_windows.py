"""Windows are packed or by document, seeded, identified, and start as the runtime starts a text."""

import copy
import hashlib
import json

import pytest
import torch
from tokenizers import processors

from kvq.calib.data import DataIdentity, load_documents
from kvq.calib.windows import token_windows, windows_hash
from kvq.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
CHAT_TEXT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"


@pytest.fixture
def bos_tokenizer(tiny_tokenizer):
    """The tiny tokenizer, with a token before every text and one after it, as Llama's and T5's do."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    return tokenizer


def texts_of(tokenizer, windows) -> list[str]:
    valid = windows.valid if windows.valid is not None else torch.ones_like(windows.tokens, dtype=torch.bool)
    return [tokenizer.decode(row[real]) for row, real in zip(windows.tokens, valid)]


def test_windows_are_consecutive_pieces_of_the_joined_text(tiny_tokenizer):
    texts = ["abcdefg", "hijklmnopqrstuvwxyz"]
    windows = token_windows(tiny_tokenizer, texts, samples=4, seq_len=7, seed=3, source="builtin")
    text = "abcdefg\n\nhijklmnopqrstuvwxyz"
    assert windows.tokens.dtype == torch.int64
    assert windows.valid is None
    # One token is one character here, so the four whole windows are the text's first 28 characters.
    assert texts_of(tiny_tokenizer, windows) == [text[i : i + 7] for i in range(0, 28, 7)]
    assert windows.identity == DataIdentity(
        source="builtin",
        text_sha256=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        tokenizer_sha256=windows.identity.tokenizer_sha256,
        samples=4,
        seq_len=7,
        seed=3,
        tokens=28,
        form="packed",
        chat_template="",
        windows_sha256=windows_hash(windows.tokens, None),
    )


def test_the_choice_is_seeded_ordered_and_without_repetition(tiny_tokenizer):
    text = "".join(chr(97 + i // 5 % 26) * 5 for i in range(0, 650, 5))

    def choose(seed):
        return token_windows(tiny_tokenizer, [text[:130]], samples=9, seq_len=5, seed=seed).tokens

    assert torch.equal(choose(1), choose(1))
    assert not torch.equal(choose(1), choose(2))
    first = choose(1)[:, 0]
    assert (first.diff() > 0).all()


def test_every_packed_window_starts_as_the_tokenizer_starts_a_text(bos_tokenizer):
    windows = token_windows(bos_tokenizer, ["abcdefghij"], samples=2, seq_len=6)
    assert windows.tokens[:, 0].tolist() == [0, 0]
    assert texts_of(bos_tokenizer, windows) == ["<|endoftext|>abcde", "<|endoftext|>fghij"]
    with pytest.raises(DataError, match="samples=3 of seq_len=6 need 15 tokens and the text has 10"):
        token_windows(bos_tokenizer, ["abcdefghij"], samples=3, seq_len=6)


def test_windows_by_document_are_cut_or_padded(tiny_tokenizer, bos_tokenizer):
    documents = ["abc", "x", "defghijkl", "mn"]
    windows = token_windows(tiny_tokenizer, documents, samples=3, seq_len=5, packed=False)
    # A lone token has nothing to attend to and is passed over.
    assert texts_of(tiny_tokenizer, windows) == ["abc", "defgh", "mn"]
    assert windows.valid.sum(1).tolist() == [3, 5, 2]
    assert (windows.identity.tokens, windows.identity.form) == (10, "documents")
    marked = token_windows(bos_tokenizer, documents, samples=4, seq_len=5, packed=False)
    assert texts_of(bos_tokenizer, marked) == [f"<|endoftext|>{t}" for t in ("abc", "x", "defg", "mn")]
    even = token_windows(tiny_tokenizer, ["abcd", "efgh"], samples=2, seq_len=3, packed=False)
    assert even.valid is None


def test_documents_are_chosen_by_the_seed_in_their_order(tiny_tokenizer):
    documents = [chr(97 + i) * 3 for i in range(20)]

    def choose(seed):
        windows = token_windows(tiny_tokenizer, documents, samples=5, seq_len=3, seed=seed, packed=False)
        return texts_of(tiny_tokenizer, windows)

    assert choose(1) == choose(1) == sorted(choose(1))
    assert len(set(choose(1))) == 5
    assert choose(1) != choose(2)


def test_a_lone_text_is_taken_by_its_paragraphs(tiny_tokenizer):
    windows = token_windows(tiny_tokenizer, ["ab\n\ncd\n  \nef\n\n"], samples=3, seq_len=9, packed=False)
    assert texts_of(tiny_tokenizer, windows) == ["ab", "cd", "ef"]


def test_conversations_go_through_the_chat_template(tiny_tokenizer):
    windows = token_windows(tiny_tokenizer, [CHAT, CHAT], samples=2, seq_len=25)
    # A special token is one token, so each conversation has 25.
    assert texts_of(tiny_tokenizer, windows) == [CHAT_TEXT, CHAT_TEXT]
    single = token_windows(tiny_tokenizer, [CHAT], samples=1, seq_len=999, packed=False)
    assert texts_of(tiny_tokenizer, single) == [CHAT_TEXT]
    template = hashlib.sha256(tiny_tokenizer.chat_template.encode()).hexdigest()
    assert single.identity.chat_template == windows.identity.chat_template == template


def test_texts_are_messages_of_a_user_when_the_template_is_asked_for(tiny_tokenizer):
    windows = token_windows(tiny_tokenizer, ["ab", "cd"], samples=2, seq_len=99, packed=False, chat_template=True)
    assert texts_of(tiny_tokenizer, windows) == [f"<|im_start|>user\n{t}<|im_end|>\n" for t in ("ab", "cd")]
    plain = token_windows(tiny_tokenizer, ["ab", "cd"], samples=2, seq_len=99, packed=False)
    assert plain.identity.chat_template == ""
    assert plain.identity.windows_sha256 != windows.identity.windows_sha256


def test_a_missing_or_refusing_template_is_one_sentence(tiny_tokenizer):
    without = copy.deepcopy(tiny_tokenizer)
    without.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        token_windows(without, [CHAT], samples=1, seq_len=9)
    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(DataError, match=r"refuses conversation 1 .roles must.: mend or remove it"):
        token_windows(strict, [CHAT], samples=1, seq_len=9)


def test_identity_follows_what_is_in_the_windows(tiny_tokenizer):
    one = token_windows(tiny_tokenizer, ["abcd"], samples=1, seq_len=2).identity
    two = token_windows(tiny_tokenizer, ["abce"], samples=1, seq_len=2).identity
    assert one.text_sha256 != two.text_sha256
    assert one.windows_sha256 == two.windows_sha256
    tokens, valid = torch.tensor([[1, 2, 3]]), torch.tensor([[True, True, False]])
    other = torch.tensor([[1, 2, 9]])
    assert windows_hash(tokens, valid) == windows_hash(other, valid)
    assert windows_hash(tokens, None) != windows_hash(other, None)
    assert windows_hash(tokens, None) != windows_hash(tokens, valid)


def test_the_source_is_recorded_without_its_folder(tiny_tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdef")
    identity = token_windows(tiny_tokenizer, load_documents(file), samples=1, seq_len=3, source=file).identity
    assert identity.source == "text.txt"


@pytest.mark.parametrize(
    ("samples", "seq_len", "packed", "reason"),
    [
        (5, 10, True, "need 50 tokens and the text has 49: use at most 4 samples, or more text"),
        (1, 50, True, "need 50 tokens and the text has 49: use shorter windows, or more text"),
        (2, 50, False, "samples=2 documents are needed and the data has 1 of two tokens or more"),
        (0, 10, True, "samples=0"),
        (1, 1, True, "seq_len=1"),
    ],
)
def test_too_little_text_gives_the_numbers(tiny_tokenizer, samples, seq_len, packed, reason):
    with pytest.raises(DataError, match=reason):
        token_windows(tiny_tokenizer, ["a" * 49], samples=samples, seq_len=seq_len, packed=packed)


def test_windows_too_short_for_their_start_are_refused(bos_tokenizer):
    bos_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> <|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with pytest.raises(DataError, match="seq_len=2 has no room beside 2 special tokens"):
        token_windows(bos_tokenizer, ["abc"], samples=1, seq_len=2)
