"""Text sources are read or refused with a sentence."""

import copy
import hashlib
import json
import re
from dataclasses import replace

import pytest

from kvq.calib.data import DataIdentity, builtin_text, load_documents, load_texts, tokenizer_hash
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
    with pytest.raises(DataError, match=r"row 0 of 'rows\.parquet': field 'n' is int, not text"):
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


def test_a_tokenizers_hash_follows_its_rules(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    assert tokenizer_hash(other) == tokenizer_hash(tiny_tokenizer)
    other(["a", "bcd"], padding=True)
    assert tokenizer_hash(other) == tokenizer_hash(tiny_tokenizer)
    other.add_tokens(["new"])
    assert tokenizer_hash(other) != tokenizer_hash(tiny_tokenizer)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_conversations_are_read_from_every_kind_of_file(tmp_path):
    rows = tmp_path / "chat.jsonl"
    row = {"messages": [message | {"weight": 1} for message in CHAT], "text": "other"}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({"text": "plain"}) + "\n")
    # Rows with messages are conversations, others texts; what a message has beside role and content is left out.
    assert load_documents(rows) == [CHAT, "plain"]
    assert load_documents(rows, field="text") == ["other", "plain"]
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(DataError, match=r"row 1 of 'only\.jsonl': field 'messages' is list, not text"):
        load_texts(only, field="messages")
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra 'data'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), tmp_path / "chat.parquet")
    assert load_documents(tmp_path / "chat.parquet") == [CHAT, CHAT]


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], ["Hi"], [{"role": "user", "content": 3}], 7, None])
def test_what_is_no_conversation_is_refused(tmp_path, messages):
    rows = tmp_path / "chat.jsonl"
    rows.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=r"line 1 of 'chat\.jsonl': field 'messages' is .*'role' and 'content'"):
        load_documents(rows)


IDENTITY = DataIdentity(
    source="a.txt",
    text_sha256="aa",
    tokenizer_sha256="tt",
    samples=3,
    seq_len=5,
    seed=0,
    tokens=15,
    windows_sha256="w1",
)


def test_identities_join():
    other = replace(IDENTITY, source="b.txt", text_sha256="bb", samples=2, seq_len=9, tokens=18, windows_sha256="w2")
    both = IDENTITY.join(other)
    assert (both.source, both.samples, both.seq_len, both.tokens) == ("a.txt + b.txt", 5, 9, 33)
    assert both.text_sha256 not in ("aa", "bb")
    assert both.windows_sha256 != other.join(IDENTITY).windows_sha256
    with pytest.raises(DataError, match="same windows"):
        IDENTITY.join(IDENTITY)
    with pytest.raises(DataError, match="different tokenizers"):
        IDENTITY.join(replace(other, tokenizer_sha256="uu"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Hub data sets as folders of ``tmp_path``: ``owner/name/{config}/{split}.jsonl``, streamed by datasets itself."""
    datasets = pytest.importorskip("datasets", reason="hub data sets need the extra 'data'")
    real = datasets.load_dataset

    def load(repository, config=None, *, split, streaming):
        file = tmp_path / repository / (config or "default") / f"{split}.jsonl"
        return real("json", data_files={split: str(file)}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load)

    def add(name: str, rows: list[dict], config: str = "default", split: str = "train") -> None:
        file = tmp_path / name / config / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return add


def test_a_hub_data_set_is_read_by_its_columns_configs_and_splits(hub):
    hub("owner/data", [{"text": "first"}, {"text": "second"}])
    hub("owner/data", [{"text": "other"}], config="small", split="validation")
    hub("owner/chats", [{"messages": CHAT, "text": "not this"}])
    assert load_documents("owner/data") == ["first", "second"]
    assert load_documents("owner/data:small", split="validation") == ["other"]
    assert load_documents("owner/chats") == [CHAT]
    assert load_documents("owner/chats", field="text") == ["not this"]


def test_an_unknown_column_of_a_hub_data_set_names_those_it_has(hub):
    hub("owner/data", [{"body": "first", "n": 1}])
    with pytest.raises(DataError, match=r"'owner/data' has no field 'text' \(it has body, n\)"):
        load_documents("owner/data")
    with pytest.raises(DataError, match="field 'n' is int"):
        load_documents("owner/data", field="n")


def test_of_a_large_hub_data_set_only_the_beginning_is_read(hub, monkeypatch):
    monkeypatch.setattr("kvq.calib.data.HUB_CHARACTERS", 25)
    hub("owner/data", [{"text": f"{i:010}"} for i in range(100)])
    assert load_documents("owner/data") == [f"{i:010}" for i in range(3)]


def test_a_split_that_is_not_there_is_one_sentence(hub):
    hub("owner/data", [{"text": "first"}])
    with pytest.raises(ModelNotFoundError, match="'owner/data' is neither a file nor") as error:
        load_documents("owner/data", split="test")
    assert "\n" not in str(error.value)
