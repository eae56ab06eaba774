"""Files that are too large, cut, of odd types or no files at all: refused by name with the mend, or read as stated."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from fuzz_budget import within
from tropism.data import files
from tropism.data.config import DataConfig
from tropism.data.demonstrations import make_demonstrations
from tropism.data.prompts import make_prompts
from tropism.data.readers import read_records
from tropism.errors import ConfigError, DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- line ends, byte order marks, cut characters -------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_every_kind_of_line_end_and_blank_lines(end: str, bom: str, tmp_path: Path) -> None:
    expected = [{"text": "one"}, {"text": "two"}]
    lines = {
        "d.txt": ["one", "", "  ", "two"],
        "d.jsonl": ['{"text": "one"}', "", '{"text": "two"}'],
        "d.csv": ["text", "", "one", "two"],
        "d.json": ["[", '{"text": "one"},', "", '{"text": "two"}', "]"],
    }
    for name, rows in lines.items():
        assert read_records(write(tmp_path, name, bom + end.join(rows) + end)) == expected, name


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_in_every_kind_of_file(end: str, tmp_path: Path) -> None:
    bad: dict[str, list[Any]] = {
        "d.txt": ["one", "", "tw\0o"],
        "d.jsonl": ['{"a": 1}', "", '{"a": }'],
        "d.csv": ["a,b", "1,2", "3"],
        "d.json": ['[{"a": 1},', "", '{"a": }]'],
        "cut.txt": ["one", "", b"\xe2\x82"],
    }
    for name, rows in bad.items():
        content = end.encode().join(row if isinstance(row, bytes) else row.encode() for row in rows)
        with pytest.raises(DataError, match=rf"{name}:3: "):
            read_records(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf", r"d\.\w+: the file is empty"),
        (b" \r\n\t\r \n", r"d\.\w+: the file is empty"),
        (b"\xff\xfe", r"UTF-16 text; save it as UTF-8"),
        (b"one\n\xed\xa0\x80", r"d\.\w+:2: not UTF-8 text \(byte 0xed\); save it as UTF-8"),
        (b"one\ntwo \xf0\x9f\x98", r"d\.\w+:2: not UTF-8 text \(byte 0xf0\); the file ends within a character: copy"),
        (b"one\ncaf\xe9 au lait\n", r"d\.\w+:2: not UTF-8 text \(byte 0xe9\); save it as UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_by_line(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("d.txt", "d.jsonl", "d.json", "d.csv", "d.tsv"):
        with pytest.raises(DataError, match=message):
            read_records(write(tmp_path, name, content))


@pytest.mark.parametrize("number", ["1e999", "-1e400", "Infinity", "-Infinity", "NaN"])
def test_numbers_that_are_not_finite_are_refused_by_line(number: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:2: .* write null for a missing number"):
        read_records(write(tmp_path, "d.jsonl", f'{{"a": 1.5}}\n{{"a": {number}}}\n'))


def test_names_that_differ_only_in_unusable_characters_are_not_merged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:1: two names differ only in characters that are no text"):
        read_records(write(tmp_path, "d.jsonl", '{"a\\ud800": 1, "a\\udfff": 2}\n'))


# ---- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10**6, 10**7])
def test_very_long_lines_take_bounded_time_and_memory(length: int, tmp_path: Path) -> None:
    long = "é" + "x" * length
    contents: dict[str, str] = {
        "d.txt": long,
        "d.jsonl": json.dumps({"text": long}),
        "d.json": json.dumps([{"text": long}]),
        "d.csv": f"text\n{long}\n",
        "spaces.json": "[" + " " * length + json.dumps({"text": long}) + "\n]",
    }
    for name, content in contents.items():
        path = write(tmp_path, name, content)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with within(30):
            assert read_records(path) == [{"text": long}]
        assert time.process_time() - began < 2.0, name
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < 200e6 + 20 * length, name


def test_messages_about_huge_values_stay_short(tmp_path: Path) -> None:
    long = "k" * 10**6
    for name, content in {
        "d.jsonl": f'{{"{long}": 1, "{long}": 2}}',
        "d.json": json.dumps({long: [1], "b": []}),
        "d.csv": f"{long},{long}\n1,2\n",
        "e.csv": ",".join(f"c{i}" for i in range(10**5)) + "\n1\n",
        "e.jsonl": f'["{long}"]',
        "f.jsonl": f'{{"a": {long}}}',
    }.items():
        with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
            read_records(write(tmp_path, name, content))
        assert len(str(caught.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], [[10**5000]]], ids=["a number", "in a list", "in a nested list"]
)
def test_numbers_that_cannot_be_printed_are_refused_or_carried(value: Any) -> None:
    with pytest.raises(DataError, match="record 0: expected text, a mapping of columns"):
        read_records([value])
    assert read_records([{"a": value}]) == [{"a": value}]


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 kB that unpack to 150 MB, against a limit of 10 MB."""
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(150):
            stream.write(b"a" * 10**6)
    monkeypatch.setattr(files, "MAX_UNPACKED", 10**7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"bomb\.txt\.gz: unpacks to more than 10,000,000 bytes; unpack it yourself"):
        read_records(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 60e6


def test_a_parquet_bomb_is_refused_by_what_it_says_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows take no room: a few hundred bytes hold a million of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["a"] * 10**6).dictionary_encode()}), path)
    assert path.stat().st_size < 5000
    monkeypatch.setattr(files, "MAX_ROWS", 999_999)
    with pytest.raises(DataError, match=r"bomb\.parquet: unpacks to 1,000,000 rows and .* use a part of it"):
        read_records(path)


def test_a_file_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "huge.txt", "one\n")

    def exhausted(self: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", exhausted)
    with pytest.raises(DataError, match=r"huge\.txt: too large for the memory of this machine; use a part of it"):
        read_records(path)


def test_a_cut_gzip_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": "x"}\n' * 50)
    for length in range(len(whole)):
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz: (damaged gzip file .* it again|the file is empty)"):
            read_records(write(tmp_path, "cut.jsonl.gz", whole[:length]))


# ---- what is no regular file ---------------------------------------------------------------------------------------


def test_devices_pipes_and_sockets_are_refused_and_never_waited_for(tmp_path: Path) -> None:
    import socket

    os.mkfifo(tmp_path / "p.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s.txt"))
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    kinds = {tmp_path / "p.jsonl": "a named pipe", tmp_path / "s.txt": "a socket", tmp_path / "zero.txt": "a device"}
    with within(20), server:
        for path, kind in {**kinds, Path("/dev/zero"): "a device", Path("/dev/null"): "a device"}.items():
            with pytest.raises(DataError, match=rf"{kind}, not a regular file; save the data to a file first"):
                read_records(path)


def test_links_lead_to_files_or_are_refused(tmp_path: Path) -> None:
    real = write(tmp_path, "real.txt", "one\n")
    (tmp_path / "link.txt").symlink_to(real)
    assert read_records(tmp_path / "link.txt") == [{"text": "one"}]
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"gone\.txt: a link to '.*nothing\.txt', which is not there"):
        read_records(tmp_path / "gone.txt")
    (tmp_path / "round.txt").symlink_to(tmp_path / "round.txt")
    with pytest.raises(DataError, match=r"round\.txt: cannot be read \(Too many levels of symbolic links\)"):
        read_records(tmp_path / "round.txt")


def test_folders_in_place_of_files(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(DataError, match=r"d\.jsonl: a folder, .* name one of its files: \(it is empty\)"):
        read_records(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz", "d.parquet", "folder"])
def test_unreadable_files_and_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal of the system is put in by hand."""
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_bytes(b"x")

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for place in ("pathlib.Path.read_bytes", "gzip.open", "pyarrow.parquet.ParquetFile", "pathlib.Path.is_file"):
        monkeypatch.setattr(place, refuse)
    with pytest.raises(DataError, match=rf"{name}: .*Permission denied"):
        read_records(path)


def test_a_place_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("secret.txt"):
            raise PermissionError(13, "Permission denied")
        return looked(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(DataError, match=r"secret\.txt: cannot be read \(Permission denied\)"):
        read_records(str(tmp_path / "secret.txt"))


# ---- saved data sets -----------------------------------------------------------------------------------------------


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets  # type: ignore[import-untyped,unused-ignore]

    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def test_a_saved_data_set_without_its_files(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"prompt": "a"}])
    (data,) = path.glob("*.arrow")
    data.rename(tmp_path / "elsewhere.arrow")
    with pytest.raises(DataError, match=rf"state\.json: the file '{data.name}' is missing or no regular file; save"):
        read_records(path)
    data.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(DataError, match="is outside the folder"):
        read_records(path)
    data.unlink()
    os.mkfifo(data)
    with within(20), pytest.raises(DataError, match="is missing or no regular file"):
        read_records(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"_data_files": 3}', '{"_data_files": [{"x": 1}]}', "[" * 100_000])
def test_a_saved_data_set_with_a_broken_list_of_files(content: str, tmp_path: Path) -> None:
    path = saved(tmp_path, [{"prompt": "a"}])
    (path / "state.json").write_text(content)
    with pytest.raises(DataError, match="saved: cannot be read as a saved data set"):
        read_records(path)


def test_a_row_that_cannot_be_decoded_names_the_row() -> None:
    import datasets

    def broken(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        raise OSError(f"no image file of {len(batch)} columns")

    rows = datasets.Dataset.from_list([{"prompt": "a"}] * 3).with_transform(broken)
    with pytest.raises(DataError, match=r"record 0: cannot be read from the data set \(no image file"):
        read_records(rows)


# ---- Parquet -------------------------------------------------------------------------------------------------------


def test_parquet_values_keep_their_python_types(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    day = datetime.date(2020, 2, 29)
    columns = {
        "prompt": pa.array(["a", "b"]).dictionary_encode(),
        "day": pa.array([day, None]),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "raw": pa.array([b"\xff\x00", None]),
        "nested": pa.array([{"a": [1, None]}, None]),
        "pairs": pa.array([[("k", 1)], []], type=pa.map_(pa.string(), pa.int64())),
        "when": pa.array([0, None], type=pa.timestamp("us", tz="UTC")),
    }
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    first, second = read_records(tmp_path / "d.parquet")
    assert first["prompt"] == "a" and second["prompt"] == "b"
    assert first["day"] == day and first["price"] == decimal.Decimal("1.50") and first["raw"] == b"\xff\x00"
    assert first["nested"] == {"a": [1, None]} and first["pairs"] == [("k", 1)]
    assert first["when"] == datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    assert second == {"prompt": "b", **dict.fromkeys(("day", "price", "raw", "nested", "when")), "pairs": []}


def test_parquet_values_that_python_cannot_hold(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for values in (
        pa.array([2**40], type=pa.timestamp("s")).cast(pa.timestamp("s")),
        pa.array([2**62], type=pa.timestamp("us")),
    ):
        pq.write_table(pa.table({"prompt": ["a"], "when": values}), tmp_path / "d.parquet")
        with pytest.raises(DataError, match=r"d\.parquet: not a readable Parquet file \(.*\); write it again"):
            read_records(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([1, 2], "int"),
        ([1.5, 2.5], "float"),
        ([True, False], "bool"),
        ([datetime.date(2020, 1, 1)] * 2, "date"),
        ([decimal.Decimal(1)] * 2, "Decimal"),
        ([b"a", b"b"], r"bytes, expected text or chat messages; store it as text"),
        ([{"a": "x"}] * 2, r"dict, expected text or chat messages; reach into it, for example with prompt\.a"),
    ],
)
def test_prompts_of_other_types_are_refused_by_row(
    column: list[Any], kind: str, tmp_path: Path, make_tokenizer: Any
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": column, "n": [1, 2]}), tmp_path / "d.parquet")
    for make in (make_prompts, lambda *args: make_demonstrations(*args, max_length=9)):
        with pytest.raises(DataError, match=rf"d\.parquet, row 0: the column 'prompt' is {kind}"):
            make(tmp_path / "d.parquet", make_tokenizer(), DataConfig(path="unused", prompt_column="prompt"))


@pytest.mark.parametrize("value", ["[1, 2]", '["a"]', "[[]]", '[{"content": "x"}]', "null", "[]"])
def test_lists_and_nulls_as_prompts_are_refused_by_line(value: str, tmp_path: Path, make_tokenizer: Any) -> None:
    path = write(tmp_path, "d.jsonl", f'{{"prompt": "the"}}\n\n{{"prompt": {value}}}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:3(:|, column 'prompt':) "):
        make_prompts(path, make_tokenizer())


# ---- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"record 0: \{x\} of the template is nan, which stands for a missing number; leave"),
        (float("inf"), "is inf, which stands for a missing number"),
        (10**5000, "is a whole number with thousands of digits; give it as text"),
        (b"the", "is bytes, not text"),
    ],
    ids=["nan", "inf", "huge", "bytes"],
)
def test_values_that_no_template_should_spell(value: Any, message: str, make_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        make_prompts([{"x": value}], make_tokenizer(), DataConfig(path="unused", template="{x}"))


@pytest.mark.parametrize("name", ["system_prompt", "template"])
@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_settings_that_become_text_hold_only_text(name: str, character: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} holds a NUL or half a surrogate pair"):
        DataConfig(path="p.txt", **{name: f"a{character}b"})  # type: ignore[arg-type]


def test_the_limits_are_those_of_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    assert f"{files.MAX_UNPACKED // 1024**3} GiB" in page and f"{files.MAX_ROWS:,} rows" in page
    assert f"{files.MAX_DEPTH} levels" in page
