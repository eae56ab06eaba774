from __future__ import annotations

import csv
import gzip
import json
import logging
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tropism.data.config import DataConfig
from tropism.data.readers import locate_records, read_records
from tropism.errors import DataError, TropismError

ROWS = [{"prompt": "a film\u2028with a separator", "label": "1"}, {"prompt": "naïve 🎬", "label": "0"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def as_jsonl(rows) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


# ---- each format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", as_jsonl(ROWS)),
        (".json", json.dumps(ROWS, indent=1)),
        (".json", json.dumps({"prompt": [r["prompt"] for r in ROWS], "label": [r["label"] for r in ROWS]})),
        (".csv", 'prompt,label\n"a film\u2028with a separator",1\nnaïve 🎬,0\n'),
        (".tsv", "prompt\tlabel\na film\u2028with a separator\t1\nnaïve 🎬\t0\n"),
    ],
)
def test_text_formats(tmp_path, suffix, content, ending):
    assert read_records(write(tmp_path, f"data{suffix}{ending}", content)) == ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_bom_crlf_and_blank_lines(tmp_path, suffix):
    content = {
        ".jsonl": '\ufeff\r\n{"text": "one"}\r\n\r\n   \r\n{"text": "two"}',
        ".csv": "\ufefftext\r\n\r\none\r\n\r\ntwo\r\n",
        ".txt": "\ufeffone\r\n\r\n  \r\ntwo\r\n",
    }[suffix]
    assert read_records(write(tmp_path, f"d{suffix}", content)) == [{"text": "one"}, {"text": "two"}]


def test_json_lines_may_be_plain_strings(tmp_path):
    assert read_records(write(tmp_path, "d.jsonl", '"one"\n"two"\n')) == [{"text": "one"}, {"text": "two"}]


def test_csv_quotes_newlines_and_very_long_fields(tmp_path):
    long = "x" * 1_000_000
    limit = csv.field_size_limit()
    path = write(tmp_path, "d.csv", f'text,n\n"say ""hi"",\nfriend",1\n{long},2\n')
    assert read_records(path) == [{"text": 'say "hi",\nfriend', "n": "1"}, {"text": long, "n": "2"}]
    assert csv.field_size_limit() == limit


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "a", "n": 1, "tags": ["x"]}, {"prompt": "b", "n": None, "tags": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read_records(tmp_path / "d.parquet") == rows
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        read_records(write(tmp_path, "bad.parquet", b"PAR1 nothing PAR1"))


def test_saved_data_sets_and_their_splits(tmp_path):
    import datasets

    train = datasets.Dataset.from_list([{"prompt": "a", "n": 1}])
    test = datasets.Dataset.from_list([{"prompt": "b", "n": 2}])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert read_records(tmp_path / "one") == [{"prompt": "a", "n": 1}]
    assert read_records(DataConfig(path=str(tmp_path / "two"), split="test")) == [{"prompt": "b", "n": 2}]
    with pytest.raises(DataError, match="no split 'dev'; there are: test, train"):
        read_records(DataConfig(path=str(tmp_path / "two"), split="dev"))
    with pytest.raises(DataError, match="has splits; pass one of them: 'train', 'test'"):
        read_records(datasets.DatasetDict(train=train, test=test))
    with pytest.raises(DataError, match="streams its rows"):
        read_records(train.to_iterable_dataset())
    assert read_records(train) == [{"prompt": "a", "n": 1}]


def test_a_saved_data_set_may_not_point_outside(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "d")
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../secret.arrow"
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"'\.\./secret\.arrow' is outside the folder"):
        read_records(tmp_path / "d")


def test_a_folder_that_is_no_data_set_lists_its_files(tmp_path):
    write(tmp_path, "p.txt", "x")
    with pytest.raises(DataError, match=r"none written by Dataset\.save_to_disk; name one of its files: p\.txt"):
        read_records(tmp_path)


def test_hub_id_without_network_says_what_to_do():
    with pytest.raises(DataError, match=r"'no-such-user/no-such-data': no such file.*hub.*without network"):
        read_records("no-such-user/no-such-data")


def test_python_values():
    chat = [{"role": "user", "content": "hi"}]
    assert read_records(["a", {"prompt": "b", "k": 1}, chat]) == [
        {"text": "a"},
        {"prompt": "b", "k": 1},
        {"messages": chat},
    ]
    assert read_records({"prompt": ["a", "b"], "k": (1, 2)}) == [{"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}]


def test_reading_leaves_the_callers_records_alone():
    record = {"prompt": "a\ud800", "extra": ["b\0"]}
    read_records([record])
    assert record == {"prompt": "a\ud800", "extra": ["b\0"]}


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": "x"}\n{"a": "y",}\n', r"d\.jsonl:2: not valid JSON .* near '\{\"a\": \"y\",\}'"),
        ("d.jsonl", '{"a": "x"}\n\n[1]\n', r"d\.jsonl:3: expected an object \{\.\.\.\}, got list \[1\]"),
        ("d.jsonl", '{"a": "x"} {"a": "y"}\n', r"d\.jsonl:1: more than one JSON value on the line"),
        ("d.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"d\.jsonl:2: duplicate key 'a'"),
        ("d.jsonl", '{"a": NaN}\n', r"d\.jsonl:1: NaN is not JSON; write null"),
        ("d.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", r"d\.jsonl:2: a whole number with thousands of digits"),
        ("d.jsonl", '{"a": 1}\n' + "[" * 100_000 + "\n", r"d\.jsonl:2: nested more than 64 levels"),
        ("d.jsonl", '{"a": ' + "[" * 70 + "]" * 70 + "}\n", r"d\.jsonl:1: nested more than 64 levels"),
        ("d.jsonl", '{"a": 1}\n\0\0\0\n', r"d\.jsonl:2: not valid JSON .* near '\\x00\\x00\\x00'"),
        ("d.jsonl", "{}\n", r"d\.jsonl:1: the record has no columns"),
        ("d.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', r"d\.jsonl:2: not UTF-8 text \(byte 0xff\)"),
        ("d.jsonl", '{"a": "x"}'.encode("utf-16"), r"d\.jsonl: UTF-16 text; save it as UTF-8"),
        ("d.json", '[\n{"a": 1},\n{"a": 1, "a": 2}]', r"d\.json:3: duplicate key 'a'"),
        ("d.json", '[\n{"a": 1}\n{"a": 2}]', r"d\.json:3: not valid JSON \(expected , or \]\)"),
        ("d.json", '[{"a": 1},\n{"a": \n}]', r"d\.json:3: not valid JSON"),
        ("d.json", '[{"a": 1}', r"d\.json:1: not valid JSON"),
        ("d.json", "[]", r"d\.json: no records"),
        ("d.json", '{"a": 1}', r"d\.json: expected a list of objects or an object of columns"),
        ("d.json", '{"a": [1]}\n{"a": [2]}', r"d\.json: more than one JSON value; .* \.jsonl"),
        ("d.json", '{"a": [1], "b": []}', r"d\.json: columns differ in length: \{'a': 1, 'b': 0\}"),
        ("d.csv", "a,b\n1,2\n3\n", r"d\.csv:3: 1 fields, but the header has 2: a, b"),
        ("d.csv", "a,a\n1,2\n", r"d\.csv:1: the header names the column 'a' 2 times"),
        ("d.csv", "a,\n1,2\n", r"d\.csv:1: the header names the column '' 1 times"),
        ("d.csv", 'a\n"x\n', r"d\.csv:2: not a valid table \(unexpected end of data\)"),
        ("d.csv", "a\n\0\n", r"d\.csv:2: a NUL character"),
        ("d.csv", "a,b\n", r"d\.csv: no records"),
        ("d.txt", "one\ntwo\0\n", r"d\.txt:2: a NUL character"),
        ("d.txt", "\n \n", r"d\.txt: the file is empty"),
        ("d.jsonl", "", r"d\.jsonl: the file is empty"),
        ("d.xml", "<a/>", r"d\.xml: unsupported kind of file \.xml; supported: \.txt, \.jsonl"),
        ("d.parquet.gz", "x", r"unsupported kind of file \.parquet"),
    ],
)
def test_refusals_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path, name, content))


def test_damaged_gzip(tmp_path):
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text " * 100)[:-12])
    (tmp_path / "not.txt.gz").write_bytes(b"plain text")
    for name in ("cut", "not"):
        with pytest.raises(DataError, match=rf"{name}\.txt\.gz: damaged gzip file"):
            read_records(tmp_path / f"{name}.txt.gz")


def test_missing_file_names_the_closest(tmp_path):
    write(tmp_path, "prompts.jsonl", '{"a": 1}')
    with pytest.raises(DataError, match=r"no such file or folder; did you mean '.*prompts\.jsonl'\?"):
        read_records(tmp_path / "promts.jsonl")
    with pytest.raises(DataError, match="Texts themselves are given as a list"):
        read_records("I watched this film and")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list: no records"),
        (["a", 3], "record 1: expected text, a mapping of columns or a list of messages with roles, got int 3"),
        ([["a"]], "record 0: expected text"),
        ([{1: "a"}], "record 0: the column name 1 is not text"),
        ({"a": ["x"], "b": []}, "the columns: columns differ in length"),
        ({"prompt": "x"}, "column 'prompt': expected a list of values, got str"),
        (3, "cannot read data from int; pass a path"),
        (b"abc", "cannot read data from bytes"),
        ("", "the path of the data is empty"),
        ("a\0b", "no such file or folder"),
        ("x" * 5000, "no such file or folder"),
    ],
)
def test_unusable_python_values(source, message):
    with pytest.raises(DataError, match=message):
        read_records(source)


def test_surrogates_and_nuls_are_replaced_and_counted(tmp_path, caplog):
    path = write(tmp_path, "d.jsonl", '{"a": "x\\ud800y", "b": ["\\u0000", {"c\\udfff": "\\ud83d\\ude00"}]}\n')
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": "x\ufffdy", "b": ["\ufffd", {"c\ufffd": "😀"}]}]
    assert "replaced 3 NUL or lone surrogate characters" in caplog.text


# ---- fuzz ----------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SNIPPETS = [
    '{"a": "x"}',
    "[",
    "]",
    "{",
    "}",
    ",",
    '"',
    "\n",
    "\r",
    "\0",
    "a,b",
    "\t",
    "NaN",
    "1e999",
    "\\ud800",
    "\ufeff",
]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt.gz"])
@FUZZ
@given(data=st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)))
def test_any_file_is_read_or_refused_plainly(tmp_path, suffix, data):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with suppress(TropismError):
        json.dumps(read_records(path), ensure_ascii=False).encode()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=8,
)


@FUZZ
@given(rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, min_size=1), min_size=1, max_size=4))
def test_json_round_trip(tmp_path, rows):
    # Text drawn by hypothesis has no lone surrogates, but may have NUL, which reading replaces.
    expected = json.loads(json.dumps(rows).replace("\\u0000", "\\ufffd"))
    for name, content in (("d.jsonl", as_jsonl(rows)), ("d.json", json.dumps(rows))):
        assert read_records(write(tmp_path, name, content)) == expected


@FUZZ
@given(rows=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_csv_round_trip(tmp_path, rows):
    rows = [tuple(text.replace("\0", "").replace("\r", "") for text in row) for row in rows]
    rows = [row for row in rows if "".join(row).strip()] or [("a", "b")]
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("x", "y"), *rows])
    assert read_records(tmp_path / "d.csv") == [{"x": x, "y": y} for x, y in rows]


def test_records_of_a_list_on_one_line_are_told_apart(tmp_path):
    path = tmp_path / "all.json"
    path.write_text('[{"text": "a"}, {"text": "b"},\n{"text": "c"}]')
    assert [record.where for record in locate_records(path)] == [f"{path}:1", f"{path}:1, record 1", f"{path}:2"]
