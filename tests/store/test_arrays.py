"""Arrays: what was never written or was damaged is noticed, and any Zarr reader opens the rest."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from trak_dist.errors import CorruptChunk, StoreError
from trak_dist.store import arrays
from trak_dist.store.arrays import ArraySpec

SPEC = ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float32")
CODECS = {"none": ["crc32c"], "zstd": ["zstd", "crc32c"]}
RACERS = 8

_RACE = """
import sys, time
from pathlib import Path
from trak_dist.store import arrays
gate, target, columns = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.001)
arrays.ensure(target, arrays.ArraySpec(shape=(20, columns), chunks=(8, columns), dtype="float32"))
"""


def rows(start: int, stop: int) -> np.ndarray:
    return np.random.default_rng(start).standard_normal((stop - start, 3)).astype(np.float32)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(params=["none", "zstd"])
def spec(request: pytest.FixtureRequest) -> ArraySpec:
    return ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float32", compression=request.param)


@pytest.fixture
def made(tmp_path: Path, spec: ArraySpec) -> Path:
    arrays.ensure(tmp_path / "grads", spec)
    return tmp_path / "grads"


def chunk(path: Path, block: int) -> Path:
    return path / "c" / str(block) / "0"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_chunk_that_was_never_written_reads_as_nan(tmp_path: Path, dtype: str) -> None:
    spec = ArraySpec(shape=(20, 3), chunks=(8, 3), dtype=dtype)
    arrays.ensure(tmp_path / "a", spec)
    arrays.write_rows(tmp_path / "a", spec, 8, rows(8, 16).astype(dtype))
    read = zarr.open_array(tmp_path / "a", mode="r")[:]
    assert read.dtype == dtype
    assert np.isnan(read[:8]).all()
    assert np.isnan(read[16:]).all()
    np.testing.assert_array_equal(read[8:16], rows(8, 16).astype(dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float32"])
def test_a_chunk_that_was_never_written_is_no_rows(tmp_path: Path, dtype: str) -> None:
    spec = ArraySpec(shape=(20, 3), chunks=(8, 3), dtype=dtype)
    arrays.ensure(tmp_path / "a", spec)
    values = np.array([[1, 0, 127]] * 8, dtype)
    arrays.write_rows(tmp_path / "a", spec, 8, values)
    np.testing.assert_array_equal(arrays.read_rows(tmp_path / "a", spec, 8, 16), values)
    for start, stop in ((0, 8), (16, 20), (9, 20), (0, 10)):
        with pytest.raises(CorruptChunk, match="a chunk is missing"):
            arrays.read_rows(tmp_path / "a", spec, start, stop)
    others = zarr.open_array(tmp_path / "a", mode="r")[:8]
    if dtype == "int8":
        assert (others == -128).all(), "which no row has"


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_rows_are_read_at_once_or_in_pieces(tmp_path: Path, compression: str) -> None:
    spec = ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float32", compression=compression)
    arrays.ensure(tmp_path / "a", spec)
    values = rows(0, 20)
    arrays.write_rows(tmp_path / "a", spec, 0, values)
    for start in range(20):
        for stop in range(start + 1, 21):
            found = arrays.read_rows(tmp_path / "a", spec, start, stop)
            np.testing.assert_array_equal(found, values[start:stop])
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        for size in (1, 3, 8, 9):
            pieces = arrays.read_pieces(tmp_path / "a", spec, start, stop, rows=size)
            found = np.concatenate([piece.copy() for piece in pieces])
            np.testing.assert_array_equal(found, values[start:stop])
    file = chunk(tmp_path / "a", 1)
    file.write_bytes(file.read_bytes()[:-5] + b"\x00wrong"[:5])
    with pytest.raises(CorruptChunk, match="rows 8-16 can't be read"):
        list(arrays.read_pieces(tmp_path / "a", spec, 8, 16, rows=3))


def test_rows_come_back_bit_for_bit_through_any_zarr_reader(made: Path, spec: ArraySpec) -> None:
    for start, stop in ((16, 20), (0, 16)):  # several chunks, and the last, shorter one
        digest = arrays.write_rows(made, spec, start, rows(start, stop))
        assert digest == arrays.content_digest(arrays.read_rows(made, spec, start, stop))
    plain = zarr.open_array(str(made), mode="r")
    np.testing.assert_array_equal(plain[:], np.concatenate([rows(0, 16), rows(16, 20)]))
    codecs = [c["name"] for c in json.loads((made / "zarr.json").read_text())["codecs"]]
    assert codecs == ["bytes", *CODECS[spec.compression]]


def test_attributes_and_shape_are_read_back(tmp_path: Path) -> None:
    spec = ArraySpec(shape=(5,), chunks=(5,), dtype="float32", attributes={"model_ids": [0, 1]})
    arrays.ensure(tmp_path / "a", spec)
    assert dict(zarr.open_array(tmp_path / "a", mode="r").attrs) == {"model_ids": [0, 1]}
    assert zarr.open_array(tmp_path / "a", mode="r").shape == (5,)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_chunks_of_nothing_but_the_fill_value_or_zeros_are_written(
    made: Path, spec: ArraySpec, value: float
) -> None:
    arrays.write_rows(made, spec, 0, np.full((8, 3), value, np.float32))
    assert chunk(made, 0).stat().st_size > 0
    np.testing.assert_array_equal(arrays.read_rows(made, spec, 0, 8), np.full((8, 3), value))


def test_any_flipped_bit_of_a_chunk_is_noticed(made: Path, spec: ArraySpec) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 16))
    file = chunk(made, 1)
    whole = file.read_bytes()
    for position in range(0, len(whole) * 8, 37):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(CorruptChunk):
            arrays.read_rows(made, spec, 8, 16)
    np.testing.assert_array_equal(arrays.read_rows(made, spec, 0, 8), rows(0, 16)[:8])
    file.write_bytes(whole)
    np.testing.assert_array_equal(arrays.read_rows(made, spec, 0, 16), rows(0, 16))


def test_a_truncated_or_empty_chunk_is_noticed(made: Path, spec: ArraySpec) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 8))
    whole = chunk(made, 0).read_bytes()
    for length in (0, 1, 3, 4, 5, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        chunk(made, 0).write_bytes(whole[:length])
        with pytest.raises(CorruptChunk):
            arrays.read_rows(made, spec, 0, 8)


def test_corruption_says_where(tmp_path: Path) -> None:
    arrays.ensure(tmp_path / "grads", SPEC)
    arrays.write_rows(tmp_path / "grads", SPEC, 0, rows(0, 8))
    chunk(tmp_path / "grads", 0).write_bytes(b"")
    with pytest.raises(CorruptChunk, match="rows 0-8 can't be read") as raised:
        arrays.read_rows(tmp_path / "grads", SPEC, 0, 8)
    assert raised.value.where == str(tmp_path / "grads")


def test_a_damaged_chunk_heals_when_its_rows_are_written_again(made: Path, spec: ArraySpec) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 8))
    chunk(made, 0).write_bytes(b"torn")
    arrays.write_rows(made, spec, 0, rows(0, 8))
    np.testing.assert_array_equal(arrays.read_rows(made, spec, 0, 8), rows(0, 8))


def test_an_array_is_made_once_and_verified_after(made: Path, spec: ArraySpec) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 8))
    before = files(made)
    arrays.ensure(made, spec)
    assert files(made) == before
    assert sorted(p.name for p in made.parent.iterdir()) == ["grads"]


@pytest.mark.parametrize(
    "other",
    [
        ArraySpec(shape=(21, 3), chunks=(8, 3), dtype="float32"),
        ArraySpec(shape=(20, 3), chunks=(4, 3), dtype="float32"),
        ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float16"),
        ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float32", compression="zstd"),
        ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float32", attributes={"proj_dim": 4}),
    ],
)
def test_an_array_of_another_kind_is_refused_and_kept(tmp_path: Path, other: ArraySpec) -> None:
    path = tmp_path / "grads"
    arrays.ensure(path, SPEC)
    arrays.write_rows(path, SPEC, 0, rows(0, 8))
    before = files(path)
    with pytest.raises(StoreError, match="a different array exists"):
        arrays.ensure(path, other)
    assert files(path) == before


def test_replace_keeps_an_array_of_the_same_kind_and_empties_another(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    grown = ArraySpec(shape=(20, 3), chunks=(8, 3), dtype="float32", attributes={"model_ids": [0]})
    arrays.replace(path, SPEC)
    arrays.write_rows(path, SPEC, 0, rows(0, 8))
    arrays.replace(path, SPEC)
    np.testing.assert_array_equal(arrays.read_rows(path, SPEC, 0, 8), rows(0, 8))
    arrays.replace(path, grown)
    assert np.isnan(zarr.open_array(path, mode="r")[:]).all()
    assert dict(zarr.open_array(path, mode="r").attrs) == {"model_ids": [0]}
    assert list(tmp_path.iterdir()) == [path]


def race(gate: Path, path: Path, columns: list[int]) -> list[subprocess.Popen[str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, gate, path, str(n)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in columns
    ]
    for process in processes:
        assert process.stdout
        process.stdout.readline()
    gate.touch()
    return processes


@pytest.mark.slow
def test_processes_that_make_the_same_array_at_once_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "store" / "grads"
    processes = race(tmp_path / "gate", path, [3] * RACERS)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * RACERS, errors
    arrays.ensure(path, SPEC)
    assert list(path.parent.iterdir()) == [path]


def test_of_processes_that_make_different_arrays_at_once_the_losers_are_reported(
    tmp_path: Path,
) -> None:
    path = tmp_path / "grads"
    columns = [2, 3]
    processes = race(tmp_path / "gate", path, columns)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    won = zarr.open_array(path, mode="r").shape[1]
    for process, n, error in zip(processes, columns, errors, strict=True):
        assert (process.returncode == 0) == (n == won), error
        assert n == won or "a different array exists" in error


def test_only_whole_chunks_of_the_right_kind_are_written(made: Path, spec: ArraySpec) -> None:
    for start, values in (
        (4, rows(0, 8)),  # begins inside a chunk
        (0, rows(0, 6)),  # ends inside a chunk
        (8, rows(0, 11)),  # ends inside the last chunk
        (0, rows(0, 8).astype(np.float64)),
        (0, rows(0, 8)[:, :2]),
    ):
        with pytest.raises(AssertionError):
            arrays.write_rows(made, spec, start, values)
    assert np.isnan(zarr.open_array(made, mode="r")[:]).all()


def test_an_array_that_is_not_there_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no readable array: it is missing") as raised:
        arrays.read_rows(tmp_path / "grads", SPEC, 0, 8)
    assert raised.value.next == "stage=plan makes what is missing, and metadata that can't be read"


def test_a_writer_that_finds_no_array_does_not_keep_it_from_being_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no readable array"):
        arrays.write_rows(tmp_path / "grads", SPEC, 0, rows(0, 8))
    arrays.ensure(tmp_path / "grads", SPEC)
    arrays.write_rows(tmp_path / "grads", SPEC, 0, rows(0, 8))


def test_growing_keeps_what_is_there_and_rows_that_another_plan_has_more(tmp_path: Path) -> None:
    def spec(rows: int) -> ArraySpec:
        return ArraySpec(shape=(rows, 3), chunks=(1, 3), dtype="float32", if_changed="grow")

    path = tmp_path / "a"
    arrays.grow(path, spec(2))
    first = np.arange(3, dtype=np.float32)[None]
    arrays.write_rows(path, spec(2), 1, first)
    for rows in (4, 3):
        arrays.grow(path, spec(rows))
        np.testing.assert_array_equal(arrays.read_rows(path, spec(rows), 1, 2), first)
        assert zarr.open_array(path, mode="r").shape == (4, 3)


EDITS = {
    "shape": lambda m: m["shape"].__setitem__(0, 19),
    "chunk_grid": lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[4, 3]),
    "data_type": lambda m: m.update(data_type="int32", fill_value=0),
    "fill_value": lambda m: m.update(fill_value=0.0),
    "codecs": lambda m: m["codecs"].pop(),
    "codecs ": lambda m: m["codecs"][0]["configuration"].update(endian="big"),
    "chunk_key_encoding": lambda m: m["chunk_key_encoding"]["configuration"].update(separator="."),
    "attributes": lambda m: m.update(attributes={"proj_dim": 4}),
}


@pytest.mark.parametrize("name", EDITS)
def test_metadata_that_is_not_what_is_planned_is_refused(
    made: Path, spec: ArraySpec, name: str
) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 8))
    metadata = made / "zarr.json"
    edited = json.loads(metadata.read_text())
    EDITS[name](edited)
    metadata.write_text(json.dumps(edited))
    before = files(made)
    told = f"the array's metadata is not what is planned: .*{name.strip()} "
    for do in (
        lambda: arrays.read_rows(made, spec, 0, 8),
        lambda: arrays.write_rows(made, spec, 0, rows(0, 8)),
    ):
        with pytest.raises(StoreError, match=told) as raised:
            do()
    with pytest.raises(StoreError, match="a different array exists"):
        arrays.ensure(made, spec)
    assert files(made) == before
    subprocess.run(["sh", "-c", raised.value.next.partition(", then")[0]], check=True)
    arrays.ensure(made, spec)
    np.testing.assert_array_equal(arrays.read_rows(made, spec, 0, 8), rows(0, 8))


def test_any_flipped_bit_of_metadata_is_reported_or_harmless(made: Path, spec: ArraySpec) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 8))
    metadata = made / "zarr.json"
    whole = metadata.read_bytes()
    harmless = 0
    for position in range(0, len(whole) * 8, 7):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        metadata.write_bytes(damaged)
        try:
            found = arrays.read_rows(made, spec, 0, 8)
        except StoreError:
            continue
        np.testing.assert_array_equal(found, rows(0, 8))
        harmless += 1
    assert harmless < len(whole) * 8 / 7 / 2  # white space, for instance


def test_metadata_that_can_not_be_read_is_made_anew_and_the_chunks_stay(
    made: Path, spec: ArraySpec
) -> None:
    arrays.write_rows(made, spec, 0, rows(0, 8))
    before = files(made)
    metadata = before["zarr.json"]
    for content in (b"", metadata[:-9], b"\x00" * 99, b"[" * 10**5, b'{"zarr_format": {}}'):
        (made / "zarr.json").write_bytes(content)
        with pytest.raises(StoreError, match="no readable array"):
            arrays.read_rows(made, spec, 0, 8)
        arrays.ensure(made, spec)
        assert files(made) == before


@pytest.mark.parametrize("place", ["codec of format 3", "compressor", "filter"])
def test_an_array_whose_chunks_are_pickles_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "array"
    arrays.ensure(path, SPEC)
    described = json.loads((path / "zarr.json").read_text())
    if place == "codec of format 3":
        described["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
        (path / "zarr.json").write_text(json.dumps(described))
    else:  # as if format 3 was taken away just after it was seen to be there
        monkeypatch.setattr(arrays, "_there", lambda path: True)
        (path / "zarr.json").unlink()
        old = {"zarr_format": 2, "shape": [20, 3], "chunks": [8, 3], "dtype": "<f4", "order": "C"}
        own = {"id": "pickle"}
        old |= {"fill_value": 0, "compressor": own if place == "compressor" else None}
        old |= {"filters": [own] if place == "filter" else None}
        (path / ".zarray").write_text(json.dumps(old))
    for chunk in ("c/0/0", "0.0"):
        (path / chunk).parent.mkdir(parents=True, exist_ok=True)
        (path / chunk).write_bytes(pickle.dumps([_Calls()]))
    with pytest.raises(StoreError, match="no readable array"):
        arrays.read_rows(path, SPEC, 0, 8)


class _Calls:
    def __reduce__(self) -> object:
        return pytest.fail, ("unpickled",)
