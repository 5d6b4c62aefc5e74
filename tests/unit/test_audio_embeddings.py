"""The store: what is kept and when, one encoding for many processes, eviction, damage."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from posttrain.config import load_recipe
from posttrain.data.audio import load_audio, write_audio
from posttrain.data.chat import encode, expanded_prompt
from posttrain.model import audio_embeddings
from posttrain.model.audio_embeddings import (
    AudioEmbeddings,
    AudioStoreSettings,
    StoredAudio,
    TensorStore,
    stored_audio,
)
from posttrain.model.load import load_model, load_processor, save_checkpoint
from posttrain.train.audio_inputs import audio_store_settings

QUESTION = [{"role": "user", "content": "When is seven heard?"}]


def test_what_is_stored_follows_from_what_trains(recipe_file: Path) -> None:
    assert stored_audio(train_encoder=False, train_projector=False) is StoredAudio.EMBEDDINGS
    assert stored_audio(train_encoder=False, train_projector=True) is StoredAudio.ENCODER_OUTPUTS
    assert stored_audio(train_encoder=True, train_projector=False) is None
    assert stored_audio(train_encoder=True, train_projector=True) is None
    recipe = load_recipe(recipe_file, ["model.train_encoder=true"])
    assert audio_store_settings(recipe) is None


@pytest.mark.parametrize("seconds", [2.5, 10.0, 23.4, 95.02])
def test_embeddings_are_those_of_the_model(nano: str, tmp_path: Path, seconds: float) -> None:
    """Both kinds, against `get_audio_features`; and the prompt that goes with them."""
    path = tmp_path / "clip.wav"
    noise = np.random.default_rng(0).standard_normal(round(16_000 * seconds))
    write_audio(path, (0.1 * noise).astype(np.float32))
    model, processor = load_model(nano), load_processor(nano)
    batch = encode(processor, QUESTION, load_audio(path))
    with torch.no_grad():
        expected = model.get_audio_features(**batch).pooler_output
    for kind in StoredAudio:
        settings = AudioStoreSettings(nano, kind, "float32", str(tmp_path / "store"))
        _, stored = AudioEmbeddings(settings, "cpu")(str(path))
        if kind is StoredAudio.ENCODER_OUTPUTS:
            assert stored.shape[1] == model.config.audio_config.hidden_size
            with torch.no_grad():
                stored = model.model.multi_modal_projector(stored)
        torch.testing.assert_close(stored, expected, atol=1e-5, rtol=1e-5)
    ids = expanded_prompt(processor, QUESTION, len(expected))
    assert torch.equal(ids, batch["input_ids"][0])


def test_key_is_of_content_kind_dtype_and_weights(
    nano: str, noise_clip: str, tmp_path: Path
) -> None:
    def key(path: str = noise_clip, checkpoint: str = nano, **changes: object) -> str:
        settings = AudioStoreSettings(
            checkpoint,
            **{"kind": StoredAudio.EMBEDDINGS, "folder": str(tmp_path)} | changes,  # type: ignore[arg-type]
        )
        return AudioEmbeddings(settings, "cpu").key(path)

    copy = tmp_path / "copy.wav"
    shutil.copy(noise_clip, copy)
    assert key(str(copy)) == key()
    other = tmp_path / "other.wav"
    write_audio(other, load_audio(noise_clip) * 0.9)
    model = load_model(nano)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias[0] += 1
    save_checkpoint(model, load_processor(nano), tmp_path / "changed")
    changed = str(tmp_path / "changed")
    outputs = {"kind": StoredAudio.ENCODER_OUTPUTS}
    keys = [key(), key(str(other)), key(dtype="float32"), key(checkpoint=changed), key(**outputs)]
    assert len(set(keys)) == 5
    assert key(checkpoint=changed, **outputs) == key(**outputs), "the projector is not in these"
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        key(str(tmp_path / "gone.wav"))


def made_by_one(folder: str, made: str) -> float:
    """Adds a line when it makes the tensor; several processes run this at once."""

    def make() -> torch.Tensor:
        with open(made, "a") as out:
            out.write(f"{os.getpid()}\n")
        return torch.full((300, 16), 7.0)

    store = TensorStore(folder, 2**20)
    return float(sum(store.get_or_make(f"key-{i}", make).sum() for i in range(5)))


def test_many_processes_make_each_tensor_once(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"), str(tmp_path / "made"))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(made_by_one, [arguments] * 6)
    assert set(sums) == {5 * 300 * 16 * 7.0}
    assert len((tmp_path / "made").read_text().splitlines()) == 5


def test_least_recently_used_goes_first_and_open_tensors_stay(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, max_bytes=3 * 5_000)
    tensors = {}
    for i, name in enumerate("abc"):
        tensors[name] = store.get_or_make(name, lambda: torch.ones(1_000))
        os.utime(tmp_path / f"{name}.safetensors", (i, i))
    store.get_or_make("a", lambda: pytest.fail("a is there"))
    store.get_or_make("d", lambda: torch.ones(1_000))
    kept = sorted(path.stem for path in tmp_path.glob("*.safetensors"))
    assert kept == ["a", "c", "d"]
    assert float(tensors["b"].sum()) == 1_000, "mapped memory outlives the name"
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "c.safetensors") in maps.read_text(), "not read into memory"


def test_a_store_with_room_does_not_read_its_folder_at_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TensorStore(tmp_path, max_bytes=500_000)
    looks, sizes = [], []
    evict = TensorStore._evict
    monkeypatch.setattr(
        TensorStore, "_evict", lambda *a, **k: looks.append(len(sizes)) or evict(*a, **k)
    )
    for i in range(200):
        store.get_or_make(str(i), lambda: torch.ones(1_000))
        sizes.append(sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")))
    # 4,000 bytes a write into (500,000 - the first file) / 16 = 30,995: the eighth is too many
    assert looks[:2] == [0, 8]
    assert max(sizes) <= 500_000, "sixteen writers could not pass the limit, nor does one"
    after_first_removal = next(b for a, b in pairwise(sizes) if b < a)
    assert 470_000 < after_first_removal <= 475_000, "down to 95 %, or every write would look"


def test_a_damaged_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = TensorStore(tmp_path, 2**20)
    store.get_or_make("a", lambda: torch.ones(3))
    (tmp_path / "a.safetensors").write_bytes(b"half a file")
    assert store.get_or_make("a", lambda: torch.zeros(2)).tolist() == [0.0, 0.0]
    assert "is damaged" in caplog.text
    assert not list(tmp_path.glob("*.partial"))


def test_a_literal_placeholder_in_the_text_is_refused(nano: str) -> None:
    with pytest.raises(ValueError, match="2 audio placeholders"):
        expanded_prompt(load_processor(nano), [{"role": "user", "content": "a <sound> b"}], 5)


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"some")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(audio_embeddings, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*set audio_embeddings.dir"):
        TensorStore(tmp_path, 2**20).get_or_make("a", lambda: torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]


def test_files_of_killed_writers_are_removed_after_an_hour(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, 2**20)
    old, young = tmp_path / ".a.1.partial", tmp_path / ".b.2.partial"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.get_or_make("c", lambda: torch.ones(3))
    assert not old.exists() and young.exists()


def test_a_stored_clip_is_refused_where_it_is_too_long(
    nano: str, noise_clip: str, tmp_path: Path
) -> None:
    def store(limit_s: float | None) -> AudioEmbeddings:
        kind = StoredAudio.EMBEDDINGS
        return AudioEmbeddings(
            AudioStoreSettings(nano, kind, "float32", str(tmp_path), 1.0, limit_s), "cpu"
        )

    store(None)(noise_clip)
    with pytest.raises(ValueError, match=r"2.5 s is longer than max_audio_len 2 s"):
        store(2.0)(noise_clip)


def test_a_missing_clip_leaves_the_random_numbers_alone(
    nano: str, noise_clip: str, tmp_path: Path
) -> None:
    """A run with a cold store must be the run with a warm one, dropout included."""
    settings = AudioStoreSettings(nano, StoredAudio.EMBEDDINGS, "float32", str(tmp_path), 1.0)
    before = torch.get_rng_state()
    AudioEmbeddings(settings, "cpu")(noise_clip)
    assert torch.equal(torch.get_rng_state(), before)
