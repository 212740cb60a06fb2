"""Every check of a speaking pair catches, by name, a pair broken on purpose."""

import copy
import math

import numpy as np
import pytest
import torch

from lmlab.core import check_speech as pairs
from lmlab.core.check import ContractError, check_speech
from lmlab.core.check_speech import MuLaw, TinyProcessor, TinySpeech, TinySpeechConfig, tiny_speech


def logits(model, inputs):
    h = model.start(**inputs)
    return model.head(model.cell(torch.zeros_like(h), h))


def pair(model=None, processor=None, codec=None, **kw):
    "Run the checker on a pair with other methods"

    def make():
        p, m = tiny_speech()
        p.__class__ = type("Broken", (TinyProcessor,), processor or {})
        m.__class__ = type("Broken", (TinySpeech,), model or {})
        if codec:
            p.codec.__class__ = type("Broken", (MuLaw,), codec)
        return p, m

    kw = dict(sampled=dict(do_sample=True), logits=logits) | kw
    return lambda **o: check_speech(make, **kw, **o)


def generates(change):
    "A `generate` that goes wrong afterwards"

    def generate(self, **kw):
        return change(self, TinySpeech.generate(self, **kw), kw)

    return dict(generate=generate)


def prepares(change):
    "A processor that changes its arguments first"

    def call(self, **kw):
        return TinyProcessor.__call__(self, **change(kw))

    return dict(__call__=call)


def decodes(change):
    return dict(decode=lambda self, out: change(TinyProcessor.decode(self, out)))


def saves_pickles(self, folder, **kw):
    TinySpeech.save_pretrained(self, folder, **kw)
    torch.save(self.state_dict(), f"{folder}/pytorch_model.bin")


def loads_fresh_ends(cls, folder, **kw):
    model = TinySpeech.from_pretrained.__func__(cls, folder, **kw)
    torch.nn.init.normal_(model.head.weight)
    return model


def hears_padding(self, input_ids, attention_mask, prompt_codes, prompt_mask):
    return TinySpeech.start(self, input_ids, attention_mask, prompt_codes, torch.ones_like(prompt_mask))


def reads_nothing(self, input_ids, attention_mask, prompt_codes, prompt_mask):
    return TinySpeech.start(
        self, torch.ones_like(input_ids), torch.ones_like(attention_mask), prompt_codes, prompt_mask
    )


def hears_nothing(self, input_ids, attention_mask, prompt_codes, prompt_mask):
    return TinySpeech.start(self, input_ids, attention_mask, torch.zeros_like(prompt_codes), prompt_mask)


def ignores_the_seed(self, *, seed=None, **kw):
    return TinySpeech.generate(self, seed=torch.seed(), **kw)


def one_for_all_seeds(self, *, seed=None, **kw):
    return TinySpeech.generate(self, seed=7, **kw)


def draws_globally(self, *, seed=None, **kw):
    torch.manual_seed(seed)
    return TinySpeech.generate(self, seed=None, **kw)


def scales_in_place(kw):
    for w in kw["prompt_audio"]:
        if w.dtype == np.float32:
            w *= np.float32(0.5)
    return kw


def masks_in_place(self, out, kw):
    kw["attention_mask"][:] = True
    return out


def shifts_codes(self, out):
    waves = TinyProcessor.decode(self, out)
    out.codes.add_(1)
    return waves


def forgets_train(self, out, kw):
    self.eval()
    return out


def trains_again(self, out, kw):
    self.train(self.training)
    return out


def with_graph(self, **kw):
    out = TinySpeech.generate(self, **kw)
    out.codes = out.codes + torch.zeros_like(out.codes) * self.end.bias
    return out


def leaves_gradients(self, out, kw):
    self.end.bias.grad = torch.ones(1)
    return out


HELD = []


def remembers(self, out, kw):
    HELD.append(torch.ones(1000))
    return out


def breaks_in_bfloat16(self, input_ids, attention_mask, prompt_codes, prompt_mask):
    return TinySpeech.start(self, input_ids, attention_mask, prompt_codes, prompt_mask).float()


def coarse_logits(model, inputs):
    out = logits(model, inputs)
    return out if out.dtype == torch.float32 else out.round()


def says(**kw):
    def change(self, out, inputs):
        for k, f in kw.items():
            setattr(out, k, f(getattr(out, k)))
        return out

    return generates(change)


def one_more_step(self, *, max_steps=100, **kw):
    return TinySpeech.generate(self, max_steps=2 * max_steps if max_steps > 1 else 1, **kw)


def any_cap(self, *, max_steps=100, **kw):
    return TinySpeech.generate(self, max_steps=max(1, max_steps), **kw)


def short_sound(self, out):
    waves = TinyProcessor.decode(self, out)
    return [waves[0][: len(waves[0]) // 3], *waves[1:]]


def any_rate(kw):
    return kw | dict(sampling_rate=8000)


def any_given_rate(kw):
    return kw | (dict(sampling_rate=8000) if kw.get("sampling_rate") else {})


def any_text(kw):
    return kw | dict(text=[t if t.strip() else "a" for t in kw["text"]])


def crashes_on_empty(kw):
    [t[0] for t in kw["text"]]
    return kw


def repeats_prompts(kw):
    n = len(kw["text"])
    return kw | dict(prompt_audio=(list(kw["prompt_audio"]) * n)[:n])


def cleans(kw):
    return kw | dict(
        prompt_audio=[np.nan_to_num(w, posinf=1.0) if w.dtype.kind == "f" else w for w in kw["prompt_audio"]]
    )


def first_channel(kw):
    return kw | dict(prompt_audio=[w[0] if w.ndim == 2 else w for w in kw["prompt_audio"]])


def flattens(kw):
    return kw | dict(prompt_audio=[w.reshape(-1) for w in kw["prompt_audio"]])


def unscaled(kw):
    return kw | dict(
        prompt_audio=[w.astype(np.float32) if w.dtype == np.int16 else w for w in kw["prompt_audio"]]
    )


def wide_integers(kw):
    return kw | dict(
        prompt_audio=[w.astype(np.int16) if w.dtype == np.int64 else w for w in kw["prompt_audio"]]
    )


def divides_by_the_peak(kw):
    return kw | dict(
        prompt_audio=[
            w / np.float32(np.abs(w).max(initial=0)) if w.dtype.kind == "f" and len(w) else w
            for w in kw["prompt_audio"]
        ]
    )


def nan_for_short(self, out):
    return [w * math.nan if len(w) else w for w in TinyProcessor.decode(self, out)]


def takes_no_samples(kw):
    return kw | dict(prompt_audio=[w if len(w) else np.zeros(4, np.float32) for w in kw["prompt_audio"]])


def two_frames_more(self, codes):
    return torch.cat((MuLaw.decode(self, codes), torch.zeros(8)))


def drops_the_rest(self, wave):
    n = len(wave) // 4 * 4
    return MuLaw.encode(self, wave[: max(n, 4)])


def clips_codes(self, out):
    out.codes.clamp_(0, 255)
    return TinyProcessor.decode(self, out)


def index_error(self, out):
    torch.zeros(256)[out.codes.reshape(-1)]
    return TinyProcessor.decode(self, out)


PAIRS = [
    (pair(dict(save_pretrained=saves_pickles)), "saved_and_loaded_is_the_same"),
    (pair(dict(from_pretrained=classmethod(loads_fresh_ends))), "saved_and_loaded_is_the_same"),
    (pair(dict(start=hears_padding)), "a_row_is_what_it_is_alone"),
    (pair(dict(generate=ignores_the_seed)), "one_seed_one_result"),
    (pair(dict(generate=one_for_all_seeds)), "one_seed_one_result"),
    (pair(dict(generate=draws_globally)), "the_global_generator_is_left_alone"),
    (pair(processor=prepares(scales_in_place)), "inputs_are_untouched"),
    (pair(generates(masks_in_place)), "inputs_are_untouched"),
    (pair(processor=dict(decode=shifts_codes)), "inputs_are_untouched"),
    (pair(dict(start=reads_nothing)), "text_matters"),
    (pair(dict(start=hears_nothing)), "the_voice_matters"),
    (pair(generates(forgets_train)), "modes_are_left_alone"),
    (pair(generates(trains_again)), "modes_are_left_alone"),
    (pair(dict(generate=with_graph)), "nothing_is_kept"),
    (pair(generates(leaves_gradients)), "nothing_is_kept"),
    (pair(generates(remembers)), "nothing_is_kept"),
    (pair(dict(start=breaks_in_bfloat16)), "bfloat16_is_close"),
    (pair(logits=coarse_logits), "bfloat16_is_close"),
    (pair(says(lengths=lambda n: n * 0)), "lengths_are_what_they_say"),
    (pair(processor=dict(decode=short_sound)), "lengths_are_what_they_say"),
    (pair(says(terminated=torch.ones_like)), "the_cap_is_no_end"),
    (pair(says(terminated=lambda t: t.long())), "the_cap_is_no_end"),
    (pair(dict(generate=one_more_step)), "a_cap_is_kept"),
    (pair(dict(generate=any_cap)), "a_cap_is_kept"),
    (pair(processor=decodes(lambda waves: [w * 3 for w in waves])), "it_sounds"),
    (pair(processor=decodes(lambda waves: [w.double() for w in waves])), "it_sounds"),
    (pair(processor=decodes(lambda waves: torch.nn.utils.rnn.pad_sequence(waves, True))), "it_sounds"),
    (pair(processor=prepares(any_rate)), "another_rate_is_as_declared"),
    (pair(processor=prepares(any_given_rate)), "another_rate_is_as_declared"),
    (pair(processor=prepares(any_given_rate), other_rates="resampled"), "another_rate_is_as_declared"),
    (pair(processor=prepares(any_text)), "empty_texts_are_refused"),
    (pair(processor=prepares(crashes_on_empty)), "empty_texts_are_refused"),
    (pair(processor=prepares(repeats_prompts)), "unequal_batches_are_refused"),
    (pair(processor=prepares(cleans)), "what_is_not_finite_is_refused"),
    (pair(processor=prepares(first_channel)), "two_channels_are_as_declared"),
    (pair(processor=prepares(flattens), stereo="mixed"), "two_channels_are_as_declared"),
    (pair(processor=prepares(unscaled)), "integers_are_as_declared"),
    (pair(processor=prepares(wide_integers)), "integers_are_as_declared"),
    (pair(integers="refused"), "integers_are_as_declared"),
    (pair(processor=dict(decode=nan_for_short)), "silence_and_short_prompts_do_no_harm"),
    (pair(processor=prepares(takes_no_samples)), "silence_and_short_prompts_do_no_harm"),
    (pair(codec=dict(decode=two_frames_more)), "a_round_trip_keeps_the_length"),
    (pair(codec=dict(encode=drops_the_rest)), "a_round_trip_keeps_the_length"),
    (pair(processor=dict(decode=clips_codes)), "codes_outside_are_refused"),
    (pair(processor=dict(decode=index_error)), "codes_outside_are_refused"),
]


@pytest.mark.parametrize("run,name", PAIRS)
def test_a_broken_pair_is_caught(run, name):
    with pytest.raises(ContractError) as e:
        run(only=(name,))
    failed = e.value.report.of("failed")
    assert {r.check for r in failed} == {name}
    assert all(r.note for r in failed)


def test_every_check_has_a_twin():
    assert {name for _, name in PAIRS} == set(pairs.speech.checks)


def test_a_healthy_pair_passes():
    report = pair()()
    assert not report.of("failed") and not report.of("n/a")


def test_declared_otherwise():
    "Two channels mixed and integers refused are fine where they are declared"
    mixed = prepares(
        lambda kw: kw | dict(prompt_audio=[w.mean(0) if w.ndim == 2 else w for w in kw["prompt_audio"]])
    )

    def no_integers(self, wave):
        if torch.as_tensor(wave).dtype == torch.int16:
            raise ValueError("prompt_audio: got int16, allowed: floats")
        return TinyProcessor._checked(self, wave)

    assert not pair(processor=mixed, stereo="mixed")(only=("two_channels_are_as_declared",)).of("failed")
    refuses = dict(_checked=no_integers)
    assert not pair(processor=refuses, integers="refused")(only=("integers_are_as_declared",)).of("failed")


def test_what_is_declared_is_checked():
    for bad in (dict(stereo="left"), dict(integers="kept"), dict(other_rates="any")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            check_speech(tiny_speech, **bad)


def test_a_config_with_a_typo_is_refused():
    with pytest.raises(TypeError, match="hiden_size"):
        TinySpeechConfig(hiden_size=9)
    assert copy.deepcopy(TinySpeechConfig()).hidden_size == 32
