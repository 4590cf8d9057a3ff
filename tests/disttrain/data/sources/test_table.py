"""Tables from CSV, Parquet and arrays: what columns become, and what is refused, by file, line and column."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.data import SampleSets, table_sets
from disttrain.data.sources.tabular import load_table, rows_to_predict
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe

PEOPLE = """age,city,income,note
30,Rome,10,a
40,Oslo,20,b

,Rome,30,a
50,Oslo,40,"two
lines"
"""
NEW = """city,age,ignored
Oslo,40,1
Paris,?,2
"""


def load(folder: Path, **options: Any) -> SampleSets:
    return load_table(DataRecipe.model_construct(root=str(folder), options={"target": "income", **options}))


def of_files(folder: Path, train: str | bytes, test: str | bytes | None = None, **options: Any) -> SampleSets:
    """The sets of a training and a test file with these contents, by default the same."""
    for name, content in (("train.csv", train), ("test.csv", train if test is None else test)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(folder, **{"train_file": "train.csv", "test_file": "test.csv", **options})


def refusal(folder: Path, train: str | bytes, test: str | bytes | None = None, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        of_files(folder, train, test, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.endswith((".", "?"))
    return message.replace(f"{folder}/", "")


def test_columns_become_features_by_the_training_rows_alone(tmp_path: Path) -> None:
    test = "note,income,city,age\nb,25,Paris,40\nnew,25,Rome,na\n"
    sets = of_files(tmp_path, PEOPLE, test)
    std = math.sqrt(200 / 3)
    assert sets.train.facts["columns"] == [
        {"name": "age", "mean": 40.0, "std": std, "indicator": True},
        {"name": "city", "categories": ["Oslo", "Rome"]},
        {"name": "note", "categories": ["a", "b", "two\nlines"]},
    ]
    assert sets.train.facts["kind"] == "regression"
    assert sets.train.facts["num_features"] == 7
    aged = float(np.float32(10 / std))
    assert sets.train.dataset.features.tolist() == [
        [-aged, 0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 0],
        [0, 1, 0, 1, 1, 0, 0],
        [aged, 0, 1, 0, 0, 0, 1],
    ]
    # A category that no training row has is 0 everywhere, and a missing number is the mean.
    assert sets.test.dataset.features.tolist() == [[0, 0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0, 0]]
    features, target = sets.test.dataset[0]
    assert features.dtype == target.dtype == torch.float32
    assert target.item() == 0.0  # 25 is the training rows' mean


def test_a_row_to_predict_is_read_by_the_facts_alone_as_json_holds_them(tmp_path: Path) -> None:
    facts = json.loads(json.dumps(of_files(tmp_path, PEOPLE, exclude=["note"]).train.facts))
    (tmp_path / "new.csv").write_text(NEW)
    assert rows_to_predict(tmp_path / "new.csv", facts).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    (tmp_path / "worse.csv").write_text("city,agee\nOslo,3\n")
    with pytest.raises(ConfigurationError, match=r"worse\.csv has no column 'age'; did you mean agee\?"):
        rows_to_predict(tmp_path / "worse.csv", facts)
    (tmp_path / "worse.csv").write_text("city,age\nOslo,old\n")
    with pytest.raises(ConfigurationError, match=r"worse\.csv, line 2, column 'age': 'old' is not a finite number"):
        rows_to_predict(tmp_path / "worse.csv", facts)


def test_a_constant_column_is_zero_whatever_a_later_row_holds(tmp_path: Path) -> None:
    rows = "".join(f"0.1,{number},{number}\n" for number in range(3))
    sets = of_files(tmp_path, f"same,x,income\n{rows}", "same,x,income\n7,1,1\n")
    assert sets.train.facts["columns"][0]["std"] == 0.0
    assert sets.train.dataset.features[:, 0].tolist() == [0, 0, 0]
    assert sets.test.dataset.features[:, 0].tolist() == [0]


def test_a_file_is_split_by_its_seed_and_every_row_is_in_one_part(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("x,income\n" + "".join(f"{n},{n}\n" for n in range(20)))

    def parts(**options: Any) -> tuple[list[float], list[float]]:
        sets = load(tmp_path, file="all.csv", **options)
        mean, std = sets.train.facts["target_mean"], sets.train.facts["target_std"]
        train, test = (
            [round(value * std + mean) for value in part.dataset.targets.tolist()] for part in (sets.train, sets.test)
        )
        return train, test

    train, test = parts()
    assert len(test) == 4
    assert sorted(train + test) == list(range(20))
    assert parts() == (train, test)
    assert parts(seed=1) != (train, test)
    assert len(parts(test_fraction=0.5)[1]) == 10


def test_spreadsheets_write_a_byte_order_mark_semicolons_and_latin_1(tmp_path: Path) -> None:
    table = 'größe;income\r\n1;"2"\r\n3;4\r\n'
    for content, options in (
        (b"\xef\xbb\xbf" + table.encode(), {}),
        (table.encode("latin-1"), {"encoding": "latin-1"}),
        (table.encode("utf-16"), {"encoding": "utf-16"}),
    ):
        sets = of_files(tmp_path, content, delimiter=";", **options)
        assert [column["name"] for column in sets.train.facts["columns"]] == ["größe"]


@pytest.mark.parametrize(
    ("targets", "options", "kind", "classes"),
    [
        (["no", "yes", "no"], {}, "classification", ["no", "yes"]),
        ([0, 1, 1], {}, "classification", ["0", "1"]),
        ([1, 2, 2], {}, "regression", None),
        ([10, 9, 9], {"kind": "classification"}, "classification", ["9", "10"]),
        ([0, 1, 1], {"kind": "regression"}, "regression", None),
    ],
)
def test_the_kind_follows_from_the_target(
    tmp_path: Path, targets: list[Any], options: dict[str, Any], kind: str, classes: list[str] | None
) -> None:
    rows = "".join(f"{number},{target}\n" for number, target in enumerate(targets))
    sets = of_files(tmp_path, f"x,income\n{rows}", **options)
    assert sets.train.facts["kind"] == kind
    assert sets.train.facts.get("classes") == classes
    if classes is not None:
        assert sets.train.dataset.targets.tolist() == [classes.index(str(target)) for target in targets]
        assert sets.train.dataset.targets.dtype == torch.int64


def test_parquet_and_arrays_give_the_same_as_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    x, code, y = [0.1, math.nan, 3e5], [2, 7, 2], [1.5, 2.5, 0.25]
    parquet.write_table(pyarrow.table({"x": x, "code": code, "income": y}), tmp_path / "t.parquet")
    binary = load(tmp_path, train_file="t.parquet", test_file="t.parquet", categorical=["code"]).train
    text = "".join(f"{a!r},{b},{c!r}\n" for a, b, c in zip(x, code, y, strict=True))
    by_csv = of_files(tmp_path, f"x,code,income\n{text}", categorical=["code"]).train
    assert torch.equal(binary.dataset.features, by_csv.dataset.features)
    assert torch.equal(binary.dataset.targets, by_csv.dataset.targets)
    assert binary.dataset.training_digest() == by_csv.dataset.training_digest()

    pair = (torch.tensor([x, code], dtype=torch.float64).T, np.array(y))
    given = table_sets(pair, pair, categorical=["x1"]).train
    assert torch.equal(given.dataset.features, by_csv.dataset.features)
    assert [column["name"] for column in given.facts["columns"]] == ["x0", "x1"]
    with pytest.raises(ConfigurationError, match=r"^the test set: 2 rows of features and targets \(3,\)"):
        table_sets(pair, (pair[0][:2], y))
    with pytest.raises(ConfigurationError, match=r"^kind: "):
        table_sets(pair, pair, kind="ranking")

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigurationError, match=r"t\.parquet: not a valid Parquet file: "):
        load(tmp_path, file="t.parquet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_a_model_are_a_table(dtype: torch.dtype) -> None:
    x, y = torch.tensor([[0.1], [0.5], [2.0]], dtype=dtype), torch.tensor([1.5, 2.5, 0.25])
    expected = table_sets((x.double().numpy(), y), (x.double().numpy(), y)).train.dataset
    tracked = x.clone().requires_grad_(), y.to(dtype).requires_grad_()
    given = table_sets(tracked, tracked).train.dataset
    assert torch.equal(given.features, expected.features)
    assert torch.equal(given.targets, expected.targets)


def test_arrays_that_are_no_table_are_refused_in_a_line() -> None:
    x, y = np.zeros((3, 2)), np.arange(3) / 7
    mixed = np.array([[1, "a"], [2.5, None], [np.int64(3), "b"]], dtype=object)
    assert [column["name"] for column in table_sets((mixed, y), (mixed, y)).train.facts["columns"]] == ["x0", "x1"]
    for train, test, words in (
        ((x, y), (np.zeros((3, 5)), y), "^the features of the training set have 2 columns and those of the test set 5"),
        ((x, y), (np.zeros((3, 1)), y), "^the features of the training set have 2 columns and those of the test set 1"),
        ((x, y, y), (x, y), r"^the training set: give \(features, targets\), not 3 values"),
        ((x, y), y, r"^the test set: give \(features, targets\), not a ndarray"),
        ((x * 1j, y), (x, y), "^the training set: features hold complex128; an array has to hold numbers or text"),
        ((x, y), (x, torch.zeros(3) * 1j), "^the test set: targets hold complex64"),
        ((np.array([[1j, []]] * 3, dtype=object), y), (x, y), "^the training set: features hold a complex"),
        ((x.astype("datetime64[s]"), y), (x, y), "^the training set: features hold datetime64"),
        (([[1, 2], [1]], [1, 2]), (x, y), "^the training set: features cannot be made an array"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            table_sets(train, test)  # type: ignore[arg-type]


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError, match=r"Parquet is read by pyarrow, .* pip install pyarrow"):
        load(tmp_path, file="t.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.csv: the file is empty; its first line should name the columns."),
        ("x,income\n", "train.csv: the table has no rows."),
        ("x,income\n1,2\n\n3\n", "train.csv, line 4: 1 values, and the first line names 2 columns."),
        ("x,income\n1,2\n1,2,3\n", "train.csv, line 3: 3 values, and the first line names 2 columns."),
        ('x,income\n"a\nb",2\n1\n', "train.csv, line 4: 1 values, and the first line names 2 columns."),
        ("x;income\n1,5;2\n", "train.csv, line 2: 2 values, and the first line names 1 columns."),
        ('x,income\n"1,2\n', "train.csv, line 2: not valid CSV: unexpected end of data."),
        (b"x,income\n\xfc,2\n", "train.csv, line 2: not utf-8 (invalid start byte). Save the file as UTF-8, or name"),
        ("x,x,income\n1,2,3\n", "train.csv: 2 columns are named 'x'; give each a different name."),
        (",x,income\n1,2,3\n", "train.csv: column 1 has no name in the first line; name it, or leave it out (pandas:"),
        ("5.1,3.5\n4.9,3.0\n", "train.csv: the first line holds numbers (5.1, 3.5); it should name the columns."),
        ("x,incme\n1,2\n", "data.options.target: train.csv has no column 'income'; did you mean incme?"),
        ("income\n1\n", "train.csv: there is no column besides 'income' to predict it from."),
        ("x,income\n1,2\n1,3\n?,x\n", "train.csv, line 4: the target 'income' is 'x', not a finite number. Correct or"),
        ("x,income\n1,2\n2,2\n", "train.csv: the target 'income' is 2 in every training row; there is nothing to"),
        ("x,income\n1,a\n2,a\n", "train.csv: the target 'income' is 'a' in every training row; there is nothing to"),
        ("x,income\n1,a\n2,\n3,b\n", "train.csv, line 3: the target 'income' is empty; fill in or remove the row."),
        ("x,income\n,1\n,2\n", "train.csv: column 'x' is empty in all training rows; leave it out (data"),
        ("x,income\n1,1\n2,2\n1e,3\n", "train.csv, line 4, column 'x': '1e' is not a finite number like most of"),
        ("x,income\n1,1\n2,2\ninf,3\n", "train.csv, line 4, column 'x': 'inf' is not a finite number"),
        ("x,income\n1e300,1\n2,2\n", "train.csv: column 'x' holds numbers as large as 1e+300; scale it."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named_with_its_place(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert refusal(tmp_path, content).startswith(message)


def test_what_only_the_test_rows_do_is_named_too(tmp_path: Path) -> None:
    train = "x,income\n1,a\n2,b\n"
    assert refusal(tmp_path, train, "x,income\n1,c\n") == (
        "test.csv, line 2: 'c' is not among the 2 classes of the training rows."
    )
    assert refusal(tmp_path, train, "x,income\nlow,a\n").startswith(
        "test.csv, line 2, column 'x': 'low' is not a finite number, which the training rows of the column hold."
    )
    words = "".join(f"id{number},{number}\n" for number in range(101))
    refused = refusal(tmp_path, f"x,income\n{words}")
    assert "column 'x' holds 101 different texts, such as 'id0'." in refused
    assert "a date's year and month" in refused
    assert "has 101 classes in 101 training rows" in refusal(
        tmp_path, f"x,income\n{words}", kind="classification", categorical=["x"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targt": "income"}, "data.options.targt: a table has no such option; did you mean target?"),
        ({"test_fraction": 1.0}, "data.options.test_fraction: Input should be less than 1, not 1.0"),
        ({"test_file": None}, "data.options: train_file and test_file belong together; give both, or `file` alone."),
        ({"file": "a.csv"}, "data.options: give either file, which is split, or train_file and test_file."),
        ({"features": ["X"]}, "data.options.features: train.csv has no column 'X'; did you mean x?"),
        ({"features": ["income"]}, "data.options.features: 'income' is the target; leave it out."),
        ({"encoding": "klingon"}, "data.options.encoding: 'klingon' is not an encoding that Python supports."),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert refusal(tmp_path, "x,income\n1,2\n3,4\n", **options).startswith(message)


def test_a_file_in_the_current_folder_is_found_for_whoever_forgot_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("x,income\n1,2\n")
    with pytest.raises(ConfigurationError, match=r'There is \./t\.csv: set data\.root = "\."'):
        load(tmp_path / "data", file="t.csv")
