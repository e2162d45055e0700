"""Text sources are read or refused with a sentence; windows are packed, seeded and identified."""

import copy
import hashlib
import json
import re

import pytest
import torch

from kvq.calib.data import DataIdentity, builtin_text, load_texts, token_windows, tokenizer_hash
from kvq.errors import DataError, ModelNotFoundError


def paragraphs(text: str) -> set[str]:
    return set(re.split(r"\n\s*\n", text))


def test_builtin_parts_are_large_and_share_no_paragraph():
    calibration, evaluation = builtin_text("calibration"), builtin_text("evaluation")
    assert len(calibration) > 150_000
    assert len(evaluation) > 100_000
    assert not paragraphs(calibration) & paragraphs(evaluation)


def test_builtin_topics_are_split_by_the_hash_of_their_name():
    from pydoc_data.topics import topics

    parts = {name: hashlib.sha256(name.encode()).digest()[0] % 2 for name in topics}
    assert set(parts.values()) == {0, 1}
    both = {0: paragraphs(builtin_text("calibration")), 1: paragraphs(builtin_text("evaluation"))}
    for name, odd in parts.items():
        assert paragraphs(topics[name].strip()) <= (both[0] | both[1] if odd else both[0]), name


def test_builtin_text_has_two_parts_only():
    with pytest.raises(DataError, match="no part 'test': use 'calibration' or 'evaluation'"):
        builtin_text("test")


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    texts = ["first\u2028text", "second\ntext", " é"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in texts) + "\n", "utf-8")
    assert load_texts(rows) == texts
    plain = tmp_path / "plain.txt"
    plain.write_text(texts[1], "utf-8")
    assert load_texts(str(plain)) == [texts[1]]
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra 'data'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts, "n": [1, 2, 3]}), tmp_path / "rows.parquet")
    assert load_texts(tmp_path / "rows.parquet") == texts
    with pytest.raises(DataError, match=r"no field 'body' \(it has text, n\)"):
        load_texts(tmp_path / "rows.parquet", field="body")
    with pytest.raises(DataError, match="field 'n' is int, not text"):
        load_texts(tmp_path / "rows.parquet", field="n")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"text", "of no known kind"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 of 'a.jsonl' is not JSON"),
        ("a.jsonl", b"[1]", "line 1 of 'a.jsonl' is not a JSON object"),
        ("a.jsonl", b'{"body": "a"}', r"no field 'text' \(it has body\)"),
        ("a.jsonl", b'{"text": 3}', "field 'text' is int, not text"),
        ("a.parquet", b"PAR1", "not readable parquet"),
    ],
)
def test_an_unusable_file_is_refused_with_the_reason(tmp_path, name, content, reason):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="parquet needs the extra 'data'")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        load_texts(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./none.txt", "/none/at/all", "none.jsonl", "~/none"])
def test_a_missing_file_is_not_sought_on_the_hub(name):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_texts(name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        load_texts(tmp_path)


def test_no_network_for_a_hub_data_set_is_one_sentence():
    pytest.importorskip("datasets", reason="hub data sets need the extra 'data'")
    with pytest.raises(ModelNotFoundError, match=r"nobody/nothing.*hub") as error:
        load_texts("nobody/nothing")
    assert "\n" not in str(error.value)


def test_windows_are_consecutive_pieces_of_the_joined_text(tiny_tokenizer):
    texts = ["abcdefg", "hijklmnopqrstuvwxyz"]
    windows, identity = token_windows(tiny_tokenizer, texts, samples=4, seq_len=7, seed=3, source="builtin")
    text = "abcdefg\n\nhijklmnopqrstuvwxyz"
    assert windows.dtype == torch.int64
    # One token is one character here, so the four whole windows are the text's first 28 characters.
    assert [tiny_tokenizer.decode(row) for row in windows] == [text[i : i + 7] for i in range(0, 28, 7)]
    assert identity == DataIdentity(
        source="builtin",
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokenizer_sha256=tokenizer_hash(tiny_tokenizer),
        samples=4,
        seq_len=7,
        seed=3,
        tokens=28,
    )


def test_the_choice_is_seeded_ordered_and_without_repetition(tiny_tokenizer):
    text = "".join(chr(97 + i // 5 % 26) * 5 for i in range(0, 650, 5))

    def choose(seed):
        return token_windows(tiny_tokenizer, [text[:130]], samples=9, seq_len=5, seed=seed)[0]

    assert torch.equal(choose(1), choose(1))
    assert not torch.equal(choose(1), choose(2))
    first = choose(1)[:, 0]
    assert (first.diff() > 0).all()


def test_identity_follows_text_and_tokenizer(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    assert tokenizer_hash(other) == tokenizer_hash(tiny_tokenizer)
    other(["a", "bcd"], padding=True)
    assert tokenizer_hash(other) == tokenizer_hash(tiny_tokenizer)
    other.add_tokens(["new"])
    assert tokenizer_hash(other) != tokenizer_hash(tiny_tokenizer)
    one = token_windows(tiny_tokenizer, ["abcd"], samples=1, seq_len=2)[1]
    two = token_windows(tiny_tokenizer, ["abce"], samples=1, seq_len=2)[1]
    assert one.text_sha256 != two.text_sha256


def test_the_source_is_recorded_without_its_folder(tiny_tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdef")
    identity = token_windows(tiny_tokenizer, load_texts(file), samples=1, seq_len=3, source=file)[1]
    assert identity.source == "text.txt"


@pytest.mark.parametrize(
    ("samples", "seq_len", "reason"),
    [
        (5, 10, "need 50 tokens and the text has 49: use at most 4 samples, or more text"),
        (1, 50, "need 50 tokens and the text has 49: use shorter windows, or more text"),
        (0, 10, "samples=0"),
        (1, 1, "seq_len=1"),
    ],
)
def test_too_little_text_gives_the_numbers(tiny_tokenizer, samples, seq_len, reason):
    with pytest.raises(DataError, match=reason):
        token_windows(tiny_tokenizer, ["a" * 49], samples=samples, seq_len=seq_len)
