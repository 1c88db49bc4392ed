"""The shipped problems: real MNIST, Fashion-MNIST's and CIFAR-10's file formats, the networks."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trak_dist
from trak_dist.errors import ConfigError, DatasetError
from trak_dist.hashing import digest_of
from trak_dist.problems import cifar2, fashion_mnist, mnist
from trak_dist.problems.networks import resnet9

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def idx_files(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, count in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", draw.integers(0, 10, count))
    return tmp_path


def write_cifar(path: Path, labels: list[int]) -> None:
    """The structure of CIFAR-10's python batches, with noise for images."""
    data = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    content = {b"batch_label": b"noise", b"labels": labels, b"data": data, b"filenames": []}
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture
def cifar_files(tmp_path: Path) -> Path:
    for i in range(1, 6):
        write_cifar(tmp_path / f"data_batch_{i}", [3, 5, 0, 3, 9])
    write_cifar(tmp_path / "test_batch", [1, 5, 3])
    return tmp_path


def test_mnist_is_the_real_one_split_into_4000_and_200() -> None:
    problem = mnist.problem()
    assert (len(problem.train), len(problem.targets["val"])) == (4000, 200)
    labels = np.bincount([int(problem.train[i][1]) for i in range(4000)], minlength=10)
    assert labels.min() > 350, "all digits, mixed"
    image, _ = problem.train[0]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32


def test_mnist_refuses_a_network_it_does_not_have() -> None:
    with pytest.raises(ConfigError, match="'vit' is not one of mlp, cnn"):
        mnist.problem(model="vit")


@pytest.mark.long
def test_trained_classifiers_learn_and_differ_by_seed_alone() -> None:
    problem = mnist.problem(model="cnn")
    assert problem.train_checkpoint
    train = torch.utils.data.Subset(problem.train, range(1000))
    states = [problem.train_checkpoint(train, seed, torch.device("cpu")) for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
    problem.model.load_state_dict(states[0])
    val = [problem.targets["val"][i] for i in range(200)]
    images, labels = torch.utils.data.default_collate(val)
    assert (problem.model(images).argmax(1) == labels).float().mean() > 0.85


def test_fashion_mnist_reads_idx_files_plain_and_gzipped(idx_files: Path) -> None:
    plain = fashion_mnist.problem(str(idx_files), train=25, targets=10)
    assert (len(plain.train), len(plain.targets["val"])) == (25, 10)
    for path in idx_files.glob("*ubyte"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = fashion_mnist.problem(str(idx_files), train=25, targets=10)
    assert torch.equal(plain.train[3][0], packed.train[3][0])


def test_fashion_mnist_says_how_to_get_the_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        fashion_mnist.problem(str(tmp_path), train=1, targets=1)
    assert "the files of Fashion-MNIST are not there" in str(raised.value)
    assert "apt install dataset-fashion-mnist" in raised.value.next


@pytest.mark.parametrize("cut", [2, 100])
def test_fashion_mnist_refuses_a_file_cut_short(idx_files: Path, cut: int) -> None:
    path = idx_files / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DatasetError, match="not a whole IDX file"):
        fashion_mnist.problem(str(idx_files), train=1, targets=1)


@pytest.mark.skipif(not DEBIAN.exists(), reason="apt install dataset-fashion-mnist")
def test_fashion_mnist_reads_debians_files() -> None:
    problem = fashion_mnist.problem(str(DEBIAN), train=60_000, targets=10_000)
    assert (len(problem.train), len(problem.targets["val"])) == (60_000, 10_000)
    assert int(problem.train[0][1]) == 9  # an ankle boot, as everyone knows
    assert problem.render
    assert problem.render(problem.train[0]).label == "ankle boot"


def test_cifar2_takes_the_cats_and_dogs(cifar_files: Path) -> None:
    problem = cifar2.problem(str(cifar_files), targets=2000)
    assert (len(problem.train), len(problem.targets["val"])) == (15, 2)
    assert [int(problem.train[i][1]) for i in range(3)] == [0, 1, 0]
    assert [int(problem.targets["val"][i][1]) for i in range(2)] == [1, 0]
    assert problem.render
    assert problem.render(problem.train[1]).label == "dog"


def test_cifar2_never_runs_what_a_pickle_asks_for(cifar_files: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (cifar_files / "touched",)

    (cifar_files / "test_batch").write_bytes(pickle.dumps({b"labels": Attack()}, protocol=2))
    with pytest.raises(DatasetError, match="has no place in it"):
        cifar2.problem(str(cifar_files), targets=2000)
    assert not (cifar_files / "touched").exists()


def test_cifar2_says_which_files_it_wants(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the python batches of CIFAR-10 are not there"):
        cifar2.problem(str(tmp_path), targets=1)


def test_resnet9_is_the_one_of_traks_quickstart() -> None:
    model = resnet9(10).eval()
    convolutions = [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    residual = [(128, 128, 3, 1)] * 2
    assert convolutions == [
        (3, 64, 3, 1), (64, 128, 5, 2), *residual, (128, 256, 3, 1),
        *[(256, 256, 3, 1)] * 2, (256, 128, 3, 1),
    ]  # fmt: skip
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.long
def test_cifar2_runs_from_files_to_report(launch, cifar_files: Path, tmp_path: Path) -> None:
    ended = launch(
        *(
            "problem=cifar2",
            f"problem.root={cifar_files}",
            "checkpoints.train=1",
            "cluster=debug",
        ),
        *("cluster=debug", f"run_dir={tmp_path / 'run'}", "proj_dim=64"),
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "run/report/val.png").exists()


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("cifar2", "c86d47226e4ce069ea0b69100204c4b7"),
        ("fashion_mnist", "d358c991363c44e9b4f94dd28bb67977"),
        ("mnist", "24f68f03f0c7a8ff7b3634437e067502"),
    ],
)
def test_a_shipped_problem_changes_only_where_what_it_computes_does(name: str, digest: str) -> None:
    """Plans hold the digest of its file: after any edit runs of before ask for accept_source."""
    file = Path(trak_dist.__file__).parent / f"problems/{name}.py"
    assert digest_of(file.read_bytes()) == digest
