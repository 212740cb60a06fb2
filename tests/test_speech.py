"""The ground of speech: loaders on files made here, synthetic speech and its times, what trains and what it gives back."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value

from lmlab.speech import common as C

espeak = pytest.mark.skipif(
    not C.have_espeak(), reason="espeak-ng is not installed: apt-get install espeak-ng"
)


def tone(hz, n, rate=8000):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(n) / rate)).astype(np.float32)


# ---- loaders


@pytest.fixture
def takes(tmp_path):
    "Two speakers, ten digits, takes 0 to 11, in the layout of the packed file"
    rng, parts, rows = np.random.default_rng(0), [], []
    for s in ("ann", "bob"):
        for d in range(10):
            for i in range(12):
                parts.append((tone(200 + 40 * d, 1600 + 10 * i + rng.integers(5)) * 32767).astype(np.int16))
                rows.append((d, s, i))
    d, s, i = (np.array(o) for o in zip(*rows, strict=True))
    folder = tmp_path / "fsdd"
    folder.mkdir()
    cuts = np.cumsum([0, *map(len, parts)])
    np.savez(
        folder / "train.npz",
        audio=np.concatenate(parts),
        offsets=cuts,
        digit=d.astype(np.int8),
        speaker=s,
        index=i,
        rate=8000,
    )
    return tmp_path, parts, rows


def test_packed_digits(takes, monkeypatch):
    root, parts, rows = takes
    monkeypatch.setenv("LMLAB_DATA", str(root))
    seen = set()
    for split, allowed in (("train", range(10, 50)), ("validation", range(5, 10)), ("test", range(5))):
        ds = C.speech("fsdd", split)
        assert ds.column_names == ["audio", "rate", "text", "speaker", "id"]
        for r, w in zip(ds, C.waves(ds), strict=True):
            d, s, i = r["id"].split("_")
            assert (
                int(i) in allowed
                and r["text"] == C.DIGITS[int(d)]
                and r["speaker"] == s
                and r["rate"] == 8000
            )
            want = parts[rows.index((int(d), s, int(i)))] / np.float32(32768)
            assert np.array_equal(w.numpy(), want)
        seen |= set(ds["id"])
    assert len(seen) == 240
    few = C.speech("fsdd", "train", limit=7, seed=3)
    assert (
        few["id"][:]
        == C.speech("fsdd", "train", limit=7, seed=3)["id"][:]
        != C.speech("fsdd", "train", limit=7, seed=4)["id"][:]
    )
    assert len(C.speech("fsdd", "train", 16000, limit=1)["audio"][0]) == 2 * len(
        C.speech("fsdd", "train", limit=1)["audio"][0]
    )


def test_a_folder_of_recordings_is_the_same(takes, tmp_path, monkeypatch):
    root, parts, rows = takes
    for (d, s, i), p in zip(rows, parts, strict=True):
        C.save_wav(tmp_path / "recordings" / f"{d}_{s}_{i}.wav", p, 8000)
    ds = C.speech(str(tmp_path / "recordings"), "test")
    monkeypatch.setenv("LMLAB_DATA", str(root))
    packed = C.speech("fsdd", "test")
    assert sorted(ds["id"]) == sorted(packed["id"])
    a, b = (
        dict(zip(ds["id"], C.waves(ds), strict=True)),
        dict(zip(packed["id"], C.waves(packed), strict=True)),
    )
    assert all((a[k] - b[k]).abs().max() <= 1 / 32767 for k in a)


def test_digits_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("LMLAB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LMLAB_DATA"):
        C.speech("fsdd")
    with pytest.raises(FileNotFoundError, match="allowed"):
        C.speech("no-such-thing")
    np.savez(tmp_path / "x.npz", audio=np.zeros(3, np.int16))
    with pytest.raises(ValueError, match="offsets"):
        C.speech(str(tmp_path / "x.npz"))


def test_a_folder_with_texts_and_a_table(tmp_path):
    for k in range(3):
        C.save_wav(tmp_path / "train" / "ann" / f"{k}.wav", tone(300, 500 + k), 8000)
        (tmp_path / "train" / "ann" / f"{k}.txt").write_text(f"clip {k}\n")
    ds = C.speech(str(tmp_path), "train")
    assert sorted(ds["text"]) == ["clip 0", "clip 1", "clip 2"] and set(ds["speaker"]) == {"ann"}
    with pytest.raises(ValueError, match="split"):
        C.speech(str(tmp_path), "test")
    rows = [dict(file=f"train/ann/{k}.wav", text=f"clip {k}", speaker="ann", split="test") for k in range(3)]
    with open(tmp_path / "t.csv", "w", newline="") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader(), w.writerows(rows)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        sorted(C.speech(str(tmp_path / "t.csv"), "test")["text"])
        == sorted(C.speech(str(tmp_path / "t.jsonl"), "test")["text"])
        == sorted(ds["text"])
    )
    (tmp_path / "bad.jsonl").write_text(json.dumps(dict(file="train/ann/0.wav")))
    with pytest.raises(ValueError, match="text"):
        C.speech(str(tmp_path / "bad.jsonl"))
    (tmp_path / "train" / "ann" / "2.txt").unlink()
    with pytest.raises(ValueError, match="2.txt"):
        C.speech(str(tmp_path), "train")


def flac(x, rate):
    sf = pytest.importorskip("soundfile")
    out = io.BytesIO()
    sf.write(out, x, rate, format="FLAC")
    return out.getvalue()


SOUND = {"bytes": Value("binary"), "path": Value("string")}


def test_librispeech_and_vctk_rows():
    "Datasets with the features of the two, sound as bytes, as the Hub has it"
    from datasets import Audio

    x = tone(440, 1600, 16000)
    libri = Dataset.from_dict(
        dict(
            file=["a.flac"],
            audio=[dict(bytes=flac(x, 16000), path="a.flac")],
            text=["FOUR TWO"],
            speaker_id=[19],
            chapter_id=[198],
            id=["19-198-0000"],
        ),
        features=Features(
            file=Value("string"),
            audio=SOUND,
            text=Value("string"),
            speaker_id=Value("int64"),
            chapter_id=Value("int64"),
            id=Value("string"),
        ),
    ).cast_column("audio", Audio(16000, decode=False))
    for form in (libri, libri.to_iterable_dataset()):
        (row,) = C.hub_rows(form)
        assert (row["text"], row["speaker"], row["id"], row["rate"]) == (
            "FOUR TWO",
            "19",
            "19-198-0000",
            16000,
        )
        assert np.abs(row["audio"].numpy() - x).max() < 1e-4
    vctk = Dataset.from_dict(
        dict(
            speaker_id=["p225"], audio=[dict(bytes=flac(tone(440, 4800, 48000), 48000), path=None)], file=["p225_001_mic1.flac"], text=["Please call Stella."],
            text_id=["001"], age=["23"], gender=["F"], accent=["English"], region=["Southern England"], comment=[""],
        )
    ).cast_column("audio", Audio(48000, decode=False))  # fmt: skip
    (row,) = C.hub_rows(vctk)
    assert (row["text"], row["speaker"], row["rate"]) == ("Please call Stella.", "p225", 48000) and row[
        "id"
    ].startswith("p225")
    with pytest.raises(ValueError, match="text"):
        C.hub_rows(vctk.remove_columns("text"))


def test_sound_files(tmp_path):
    sf = pytest.importorskip("soundfile")
    x = tone(440, 999)
    C.save_wav(tmp_path / "a.wav", x, 8000)
    y, rate = sf.read(tmp_path / "a.wav", dtype="float32")  # another reader
    assert rate == 8000 and np.abs(x - y).max() < 2 / 32767
    sf.write(tmp_path / "b.wav", x, 8000, subtype="FLOAT")
    z, rate = C.load_wav(tmp_path / "b.wav")
    assert rate == 8000 and np.array_equal(z.numpy(), x)
    sf.write(tmp_path / "c.wav", np.stack((x, x), 1), 8000)
    with pytest.raises(ValueError, match="channel"):
        C.load_wav(tmp_path / "c.wav")
    (tmp_path / "d.wav").write_bytes(b"RIFF no sound at all")
    with pytest.raises(ValueError, match="d.wav"):
        C.load_wav(tmp_path / "d.wav")


def test_resampling_against_scipy():
    signal = pytest.importorskip("scipy.signal")
    rng = np.random.default_rng(0)
    x = signal.lfilter(*signal.butter(6, 0.25), rng.standard_normal(6000)).astype(np.float32) * 0.1
    got, want = C.resample(x, 16000, 8000).numpy(), signal.resample_poly(x, 1, 2, window=("kaiser", 8.6))
    assert len(got) == len(want) and np.linalg.norm(got - want)[()] / np.linalg.norm(want) < 0.02


# ---- strings


def test_strings_of_digits(takes):
    root, *_ = takes
    ds = C.speech(str(root / "fsdd" / "train.npz"), "train")
    a, b, c = (
        C.digit_strings(ds, 20, seed=1),
        C.digit_strings(ds, 20, seed=1),
        C.digit_strings(ds, 20, seed=2),
    )
    assert a.to_dict() == b.to_dict() != c.to_dict()
    assert all(3 <= len(t.split()) <= 6 for t in a["text"]) and set(a["speaker"]) == {"ann", "bob"}
    for w in C.waves(a):
        assert torch.isfinite(w).all() and w.abs().max() <= 1 and abs(w.square().mean().sqrt() - 0.1) < 0.02
        assert (w[:200] != 0).all()  # the gap in front is no digital silence


# ---- synthetic speech


@espeak
def test_a_text_is_the_same_sound_in_any_company():
    texts = ["seven nine nine", "zero one", "two"]
    many = C.espeak(texts, ("en+m1", "en+f2", "en+m3"), seed=1)
    for i, v in enumerate(("en+m1", "en+f2", "en+m3")):
        (one,) = C.espeak(texts[i : i + 1], v, seed=1)
        assert one == many[i]
    assert C.espeak(texts[:1], "en+m1", seed=2)["audio"][0] != many["audio"][0]


@espeak
def test_times_of_phonemes():
    ds = C.espeak(["four two, nine"] * 8, C.VOICES[:8], noise=0.0)
    for r in ds:
        s, n = r["starts"], len(r["audio"])
        assert len(s) == len(r["phonemes"]) and s == sorted(s) and 0 <= s[0] and s[-1] < n
        x = np.array(r["audio"])
        bounds = list(zip(r["phonemes"], s, [*s[1:], n], strict=True))
        power = lambda kinds, x=x, bounds=bounds: np.concatenate(
            [x[a:b] ** 2 for p, a, b in bounds if p in kinds]
        ).mean()
        assert power(("O:", "u:", "aI")) > 30 * power(("_", "_:"))
    slow, fast = (len(C.espeak(["four two nine"], "en", speed=v)["audio"][0]) for v in (100, 250))
    assert slow > 1.5 * fast


@espeak
def test_bad_requests():
    for kw, word in (
        (dict(texts="one"), "texts"), (dict(texts=[""]), "texts"), (dict(texts=["a\0b"]), "texts"), (dict(texts=["one"], voices="no such"), "voice"),
        (dict(texts=["one"], speed=20), "speed"), (dict(texts=["one"], pitch=200), "pitch"), (dict(texts=["one"], noise=-1.0), "noise"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            C.espeak(**kw)
    with pytest.raises(ValueError, match="text"):
        C.phonemes(" ")


@espeak
def test_strings_of_splits_differ():
    sets = [set(C.espeak_strings(30, s, seed=1)["text"]) for s in C.SPLITS]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert C.speech("espeak", "test", limit=3)["text"][:] == C.speech("espeak", "test", limit=3)["text"][:]


def test_without_espeak(monkeypatch):
    monkeypatch.setattr(C, "espeak_library", lambda: None)
    assert not C.have_espeak()
    with pytest.raises(OSError, match="apt-get install espeak-ng"):
        C.espeak(["one"])
    with pytest.warns(UserWarning, match="letters stand in"):
        assert C.phonemes("Four two!") == [*"four", "<space>", *"two"]
    tok = C.PhonemeTokenizer()
    with pytest.warns(UserWarning):
        assert tok.unk_token_id not in tok("four two")["input_ids"]


@pytest.mark.parametrize("seed", range(20))
def test_frames_of_phonemes(seed):
    rng = np.random.default_rng(seed)
    k, n = int(rng.integers(1, 30)), 8000
    starts = sorted(rng.integers(0, n, k).tolist())
    for frames in (k, k + 3, 100):
        c = C.frame_counts(starts, n, frames)
        assert len(c) == k and c.sum() == frames and c.min() >= 1
    wide = list(range(0, n, 800))
    want = [round((b - a) * 100 / n) for a, b in zip(wide, [*wide[1:], n], strict=True)]
    assert C.frame_counts(wide, n, 100).tolist() == want


# ---- the kit


def test_a_codec_learns():
    "A few dozen steps on tones: better than before, and every prefix of the codebooks is better than a shorter one"
    sound = [torch.from_numpy(tone(200 + 37 * k, 4000)) for k in range(12)]
    config = C.codec_config(
        codebooks=4, size=16, ratios=(4, 5, 8), num_residual_layers=1, num_filters=4, hidden_size=16
    )
    raw, done = (
        C.train_codec(sound, config, steps=n, batch_size=4, seconds=0.2, progress=False) for n in (2, 60)
    )
    loss = lambda c: np.mean(
        [C.spectral_loss(c.decode(c.encode(w))[None, : len(w)], w[None], 8000).item() for w in sound[:4]]
    )
    assert loss(done) < 0.8 * loss(raw)
    z = done.model.encoder(torch.stack(sound)[:, None])
    left = []
    for used in (1, 2, 3, 4):
        q, *_ = C.quantise(done.model, z, used)
        left.append((z - q).square().mean().item())
    assert left == sorted(left, reverse=True) and left[-1] < 0.7 * left[0]
    again = C.train_codec(sound, config, steps=2, batch_size=4, seconds=0.2, progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(raw.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )


def test_a_codec_starts_from_principal_components():
    "With as many components as samples in a block, the autoencoder is the identity; with fewer, the best projection"
    from transformers import EncodecModel

    torch.manual_seed(0)
    x = (
        torch.nn.functional.conv1d(torch.randn(1, 1, 4007), torch.hann_window(8)[None, None])[0, 0, :4000]
        * 0.05
    )
    blocks = x.view(-1, 16)
    for k, tol in ((16, 0.03), (6, None)):
        m = EncodecModel(C.codec_config(ratios=(16,), num_filters=8, hidden_size=k)).eval()
        C.start_from_klt(m, blocks, small=0.02, noise=1e-4)
        with torch.no_grad():
            y = m.decoder(m.encoder(x[None, None]))[0, 0]
        u = torch.linalg.svd(blocks).Vh[:k]
        want = (blocks @ u.T @ u).reshape(-1)
        assert (y - want).norm() / want.norm() < (tol or 0.03)
        assert k == 16 or (want - x).norm() > 0.01 * x.norm()


def test_a_spectral_codec_is_fitted_the_same_twice_and_at_any_rate():
    for rate in (8000, 16_000, 24_000):
        sound = [
            torch.from_numpy(tone(200 + 37 * k, rate // 4)) + 0.01 * torch.randn(rate // 4) for k in range(8)
        ]
        config = C.spectral_config(rate, codebooks=2, size=16, hidden_size=8)
        one, two = (C.fit_spectral_codec(sound, config, frames=90, seed=3) for _ in range(2))
        assert (one.frame_rate, one.num_codebooks, config.window >= 0.032 * rate) == (50.0, 2, True)
        assert one.decode(one.encode(sound[0])).shape == (-(-rate // 4 // one.hop) * one.hop,)
        for a, b in zip(one.encode(sound), two.encode(sound), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="rate"):
        C.spectral_config(11_025)
    with pytest.raises(ValueError, match="frames"):
        C.fit_spectral_codec(sound, config, frames=0)


def test_a_spectral_codec_keeps_what_is_quiet():
    "A tone a hundred times weaker than another is as loud after the codec as before: errors are relative"
    t = torch.arange(8000)
    loud, quiet = 0.3 * torch.sin(0.3 * t), 0.003 * torch.sin(1.1 * t)
    codec = C.fit_spectral_codec([loud, quiet, loud + quiet] * 3, C.spectral_config(floor=1e-4), frames=400)
    level = lambda x: x[1000:7000].square().mean().sqrt().item()
    for x in (loud, quiet):
        assert 0.5 < level(codec.decode(codec.encode(x))) / level(x) < 2


def test_the_gradient_passes_the_quantiser():
    config = C.codec_config(codebooks=2, size=16, num_filters=4, hidden_size=16)
    from transformers import EncodecModel

    torch.manual_seed(0)
    m = EncodecModel(config).train()
    C.fit_codebooks(m, torch.randn(500, 16))
    C.codec_loss(m, torch.randn(2, 800) * 0.1).backward()
    g = [p.grad for p in m.encoder.parameters()]
    assert all(o is not None and torch.isfinite(o).all() for o in g) and any(o.abs().sum() > 0 for o in g)


def test_a_recogniser_learns_tones(takes):
    root, *_ = takes
    ds = C.digit_strings(C.speech(str(root / "fsdd" / "train.npz"), "train"), 48, (2, 4), level=None)
    model = C.train_recogniser(
        ds, steps=150, batch_size=8, lr=8e-3, config=C.RecogniserConfig(hidden_size=48), progress=False
    )
    said = model.transcribe(C.waves(ds))
    assert C.word_errors(ds["text"][:], said)["wer"] < 0.5  # chance is about 0.9
    assert said == [model.transcribe([w])[0] for w in C.waves(ds)]


def test_a_config_with_a_typo_is_refused():
    for cls in (C.RecogniserConfig, C.SpeakerConfig):
        with pytest.raises(TypeError, match="hiden_size"):
            cls(hiden_size=3)


def test_a_damaged_kit_is_trained_again(takes, tmp_path, monkeypatch):
    root, *_ = takes
    tiny = dict(strings=8, synthetic=0, held_out=4, recogniser=1, speaker=1, again=2)
    monkeypatch.setitem(C.SIZES, "smoke", tiny)
    monkeypatch.setattr(C, "have_espeak", lambda: False)
    get = lambda: C.speech_kit(
        "smoke", source=str(root / "fsdd" / "train.npz"), folder=tmp_path / "kits", progress=False
    )
    one, two = get(), get()
    w = C.waves(one.test)[0]
    assert torch.equal(one.codec.encode(w), two.codec.encode(w)) and one.report.keys() == two.report.keys()
    (place,) = [p for p in (tmp_path / "kits").iterdir() if p.is_dir()]
    (place / "codec" / "model.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"):
        three = (
            get()
        )  # not to the bit: a matrix product may depend on where memory lies, and k-means passes it on
    assert three.report.keys() == one.report.keys()
    assert three.codec.encode(w).shape == one.codec.encode(w).shape
    assert torch.equal(three.codec.encode(w), get().codec.encode(w))  # what was written is whole again


def test_measures():
    assert C.non_termination([True, True, False, True]) == 0.25
    assert C.real_time_factor(2.0, [torch.zeros(8000), torch.zeros(8000)], 8000) == 1.0
    with pytest.raises(ValueError, match="terminated"):
        C.non_termination([])
    with pytest.raises(ValueError, match="refs"):
        C.word_errors(["one"], [])
    assert math.isclose(C.word_errors(["one two"], [""])["deletions"], 1.0)
