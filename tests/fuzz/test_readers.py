"""Whatever is in a data file: records, or a DataError that names the file. Nothing else, and never a hang."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz_budget import HUGE, enlarged, examples, within
from tiny_models import tiny_tokenizer
from tropism.data.config import DataConfig
from tropism.data.demonstrations import make_demonstrations
from tropism.data.prompts import make_prompts
from tropism.data.readers import read_records
from tropism.errors import DataError, TropismError

Records = list[dict[str, Any]]

LONGEST_MESSAGE = 1500
SECONDS = 20.0

SNIPPETS = [b'{"a": "x"}', b"[", b"]", b"{", b"}", b",", b":", b'"', b"'", b"\n", b"\r", b"\r\n", b"\0", b"a,b", b"\t"]
SNIPPETS += [b"NaN", b"1e999", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x98"]
SNIPPETS += [
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"\x1f\x8b\x08\x00",
    b"PAR1",
    b"null",
    b"-Infinity",
    b"\xe2\x80\xa8",
]


# ---- valid files of every format -----------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=12)
LINES = TEXT.filter(lambda text: bool(text.strip()))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(TEXT, value, max_size=3),
    max_leaves=6,
)
ROWS: dict[str, st.SearchStrategy[Records]] = {
    "lines": st.lists(LINES.map(lambda text: {"text": text}), min_size=1, max_size=5),
    "objects": st.lists(st.dictionaries(TEXT, JSON_VALUES, min_size=1, max_size=3), min_size=1, max_size=4),
    "table": st.lists(st.fixed_dictionaries({"prompt": LINES, "b": TEXT}), min_size=1, max_size=4),
}


def as_lines(rows: Records) -> bytes:
    return "\n".join(row["text"] for row in rows).encode()


def as_json_lines(rows: Records) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_document(rows: Records) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_columns(rows: Records) -> bytes:
    return json.dumps({name: [row[name] for row in rows] for name in rows[0]}).encode()


def as_table(delimiter: str) -> Callable[[Records], bytes]:
    def write(rows: Records) -> bytes:
        out = io.StringIO(newline="")
        table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
        return out.getvalue().encode()

    return write


def as_parquet(rows: Records) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


FORMATS: dict[str, tuple[str, str, Callable[[Records], bytes]]] = {
    "txt": (".txt", "lines", as_lines),
    "jsonl": (".jsonl", "objects", as_json_lines),
    "json": (".json", "objects", as_document),
    "columns": (".json", "table", as_columns),
    "csv": (".csv", "table", as_table(",")),
    "tsv": (".tsv", "table", as_table("\t")),
    "parquet": (".parquet", "table", as_parquet),
}
"""Name -> extension, kind of rows, and how to write them, by other code than the readers'."""
TEXTUAL = [name for name in FORMATS if name != "parquet"]


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few mutations: cut, flip, insert, repeat, delete."""
    kinds = ("cut", "flip", "insert", "snippet", "repeat", "delete")
    changes = draw(
        st.lists(st.tuples(st.sampled_from(kinds), st.floats(0, 1), st.floats(0, 0.2), st.integers(0, 255)), max_size=4)
    )

    def apply(data: bytes) -> bytes:
        for kind, place, share, byte in changes:
            at = int(place * len(data))
            end = min(len(data), at + max(1, int(share * len(data))))
            piece = data[at:end]
            middle = {
                "flip": bytes([piece[0] ^ (byte or 1)]) + piece[1:] if piece else b"",
                "insert": bytes([byte]) + piece,
                "snippet": SNIPPETS[byte % len(SNIPPETS)] + piece,
                "repeat": piece + piece,
                "delete": b"",
                "cut": b"",
            }[kind]
            data = data[:at] + middle + (b"" if kind == "cut" else data[end:])
        return data

    return apply


def read(folder: Path, suffix: str, data: bytes) -> Records | None:
    """The records of a file with these bytes, or None where it is refused as it should be."""
    path = folder / f"fuzzed{suffix}"
    path.write_bytes(data)
    try:
        with within(SECONDS):
            records = read_records(path)
    except DataError as error:
        check_message(error, naming=path.name)
        return None
    assert records and all(isinstance(record, dict) and record for record in records)
    for text in texts_of(records):
        assert "\0" not in text and text.encode("utf-8")  # no lone surrogates
    return records


def check_message(error: TropismError, *, naming: str = "") -> None:
    assert naming in str(error) and 0 < len(str(error)) < LONGEST_MESSAGE


def texts_of(value: Any) -> Iterator[str]:
    """Every text in plain data."""
    if isinstance(value, str):
        yield value or "-"
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", TEXTUAL)
@examples(12)
@given(data=st.data())
def test_valid_files_give_their_records(name: str, ending: str, data: st.DataObject, tmp_path: Path) -> None:
    suffix, kind, encode = FORMATS[name]
    rows = data.draw(ROWS[kind])
    content = encode(rows)
    assert read(tmp_path, suffix + ending, gzip.compress(content) if ending else content) == rows


@examples(15)
@given(rows=ROWS["table"])
def test_valid_parquet_files_give_their_records(rows: Records, tmp_path: Path) -> None:
    assert read(tmp_path, ".parquet", as_parquet(rows)) == rows


@pytest.mark.parametrize("suffix", [*sorted({FORMATS[name][0] for name in FORMATS}), ".txt.gz", ".jsonl.gz", ".csv.gz"])
@examples(25)
@given(data=st.binary(max_size=120) | st.lists(st.sampled_from(SNIPPETS), max_size=10).map(b"".join))
@example(data=b"")
@example(data=b"\xef\xbb\xbf")
@example(data=b"[" * 100_000)
@example(data=b'{"a":' * 100_000)
@example(data=b'"' * 10_001)
def test_arbitrary_bytes(suffix: str, data: bytes, tmp_path: Path) -> None:
    read(tmp_path, suffix, data)
    if suffix.endswith(".gz"):
        read(tmp_path, suffix, gzip.compress(data, 1))


@pytest.mark.parametrize("name", FORMATS)
@examples(35)
@given(data=st.data(), harm=damage())
def test_damaged_files(name: str, data: st.DataObject, harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    suffix, kind, encode = FORMATS[name]
    read(tmp_path, suffix, harm(encode(data.draw(ROWS[kind]))))


@examples(35)
@given(rows=ROWS["objects"], harm=damage())
def test_damaged_gzip_files(rows: Records, harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    read(tmp_path, ".jsonl.gz", harm(gzip.compress(as_json_lines(rows))))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@examples(15)
@given(harm=damage())
def test_damaged_saved_data_sets(name: str, harm: Callable[[bytes], bytes], tmp_path_factory: Any) -> None:
    import datasets  # type: ignore[import-untyped,unused-ignore]

    folder = tmp_path_factory.mktemp("saved") / "d"
    datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]).save_to_disk(folder)
    original = (folder / name).read_bytes()
    # Bytes changed inside an Arrow file are values that differ, or offsets into memory that Arrow trusts.
    (folder / name).write_bytes(original[: len(harm(original))] if name.endswith(".arrow") else harm(original))
    try:
        with within(SECONDS):
            records = read_records(folder)
    except DataError as error:
        check_message(error)
    else:
        assert all(isinstance(record, dict) for record in records)


# ---- from records to token ids -------------------------------------------------------------------------------------

NASTY = st.sampled_from(
    ["", " ", "\ud800", "\0", "\x1b[2J", "\u202e", "<eos>", "<bos>", "{text}", "a" * 3000, "\ufffd"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(HUGE)
    | st.floats()
    | NASTY
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=4) | NASTY, value, max_size=3),
    max_leaves=5,
)
ROLES = st.sampled_from(["user", "assistant", "system", "", "\ud800"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES | VALUES, "content": NASTY | VALUES}), max_size=3)
RECORDS = st.lists(
    VALUES
    | MESSAGES
    | st.dictionaries(
        st.sampled_from(["prompt", "text", "messages", "completion", "x"]), VALUES | MESSAGES, max_size=3
    ),
    max_size=3,
)
COLUMNS = st.none() | st.sampled_from(["prompt", "text", "x", "a.b", "prompt.a", "\0"])
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "prompt_column": COLUMNS,
        "completion_column": COLUMNS,
        "first_words": st.none() | st.integers(0, 3),
        "limit": st.none() | st.integers(0, 3),
        "system_prompt": st.none() | NASTY,
        "template": st.none() | st.sampled_from(["{x}", "{prompt} {{}}", "{", "{text!r}", "\ud800"]),
        "chat": st.booleans(),
        "overlong": st.sampled_from(["error", "truncate_left"]),
    },
)
TOKENIZERS = {chat: tiny_tokenizer(chat=chat) for chat in (False, True)}


@examples(120)
@given(records=RECORDS, fields=CONFIGS, chat=st.booleans(), learn=st.booleans())
def test_any_records_become_token_ids_or_are_refused(
    records: list[Any], fields: dict[str, Any], chat: bool, learn: bool
) -> None:
    tokenizer, records = TOKENIZERS[chat], enlarged(records)
    try:
        with within(SECONDS):
            config = DataConfig(path="unused", **fields)
            if learn:
                for one in make_demonstrations(records, tokenizer, config, max_length=20):
                    assert 1 < len(one.prompt_ids) + len(one.completion_ids) <= 20
                    assert max(*one.prompt_ids, *one.completion_ids) < len(tokenizer)
            else:
                for prompt in make_prompts(records, tokenizer, config, max_length=20):
                    assert 1 <= len(prompt.ids) <= 20 and max(prompt.ids) < len(tokenizer)
    except TropismError as error:
        check_message(error)
