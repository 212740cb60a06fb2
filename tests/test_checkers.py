"""Every checker passes a healthy subject and catches, by name, a twin broken on purpose: one for each of its checks."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
)
from transformers.cache_utils import Cache, DynamicLayer

from lmlab.core import (
    check_adapter as adapters,
)
from lmlab.core import (
    check_attention as attentions,
)
from lmlab.core import (
    check_cache as caches,
)
from lmlab.core import (
    check_compression as compressions,
)
from lmlab.core import (
    check_decoder as decoders,
)
from lmlab.core import (
    check_distillation as distillations,
)
from lmlab.core import (
    check_kernel as kernels,
)
from lmlab.core import (
    check_lm as models,
)
from lmlab.core import (
    check_loader as loaders,
)
from lmlab.core.check import (
    ContractError,
    check_adapter,
    check_attention,
    check_cache,
    check_causal_lm,
    check_compression,
    check_decoder,
    check_distillation,
    check_kernel,
    check_loader,
    stir,
    test_rel,
    tiny_llama,
)
from lmlab.core.check_attention import softmax_attention
from lmlab.distillation.common import DistillationTrainer, collate

torch.set_num_threads(1)
F32 = (torch.float32,)


def caught(run, name):
    "The run fails in the check `name`, with a number or a reason"
    with pytest.raises(ContractError) as e:
        run(only=(name,))
    failed = e.value.report.of("failed")
    assert {r.check for r in failed} == {name}
    assert all(r.note for r in failed)
    assert name in str(e.value)
    return e.value


def test_every_check_has_a_twin():
    for kind, twins in (
        (models.causal_lm, MODELS),
        (caches.kv_cache, CACHES),
        (attentions.attention_kind, ATTENTIONS),
        (kernels.kernel, KERNELS),
        (loaders.loader, LOADERS),
        (adapters.adapter, ADAPTERS),
        (compressions.compression, COMPRESSIONS),
        (decoders.processor_kind, PROCESSORS),
        (decoders.loop_kind, LOOPS),
        (distillations.distillation, LOSSES),
        (distillations.preference, PAIRS),
        (distillations.training, TRAINERS),
    ):
        assert {t[1] for t in twins} == set(kind.checks), kind.name


def test_causal_lm_covers_the_grid():
    kind = models.causal_lm
    whole = [k for k, v in kind.checks.items() if set(v.axes) == {"dtype", "attention", "cache", "padding"}]
    three = [
        k for k, v in kind.checks.items() if len(v.axes) == 3
    ]  # the fourth axis is what the check compares
    assert len(whole) >= 15 and len(whole) + len(three) >= 30, (len(whole), len(three))


# -- causal language models ------------------------------------------------------------------------------------------


@strict
class TwinConfig(LlamaConfig):
    model_type = "lmlab_twin"

    def __post_init__(self, **kwargs):
        known = {
            "transformers_version",
            "architectures",
            "model_type",
            "dtype",
            "torch_dtype",
            "attn_implementation",
            "name_or_path",
            "rope_theta",
        }
        if bad := sorted(k for k in kwargs if k not in known and not k.startswith("_")):
            raise TypeError(f"unknown field(s) {bad}")
        super().__post_init__(**kwargs)


SIZES = {
    k: v
    for k, v in tiny_llama().to_dict().items()
    if k in LlamaConfig.__dataclass_fields__
    and k not in ("rope_parameters", "dtype", "architectures", "transformers_version")
}


class Healthy(LlamaForCausalLM):
    "A Llama with a hook before and after its forward; it refuses an empty prompt"

    config: TwinConfig

    def before(self, kw):
        return kw

    def after(self, out, kw):
        return out

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kw,
    ):
        x = inputs_embeds if input_ids is None else input_ids
        if x is not None and x.shape[1] == 0:
            raise ValueError("the prompt is empty")
        kw = self.before(dict(kw, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                              inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep))  # fmt: skip
        return self.after(super().forward(**kw), kw)


AutoConfig.register("lmlab_twin", TwinConfig)
AutoModelForCausalLM.register(TwinConfig, Healthy)


def past_length(kw):
    return 0 if kw["past_key_values"] is None else kw["past_key_values"].get_seq_length()


def length(kw):
    return (kw["inputs_embeds"] if kw["input_ids"] is None else kw["input_ids"]).shape[1]


class LeaksOneToken(Healthy):
    def before(self, kw):
        x = (
            self.get_input_embeddings()(kw["input_ids"])
            if kw["inputs_embeds"] is None
            else kw["inputs_embeds"]
        )
        return dict(kw, input_ids=None, inputs_embeds=x + 1e-3 * F.pad(x[:, 1:], (0, 0, 0, 1)))


class CacheOffByOne(Healthy):
    def before(self, kw):
        if past_length(kw) > 1:
            kw["past_key_values"].crop(-1)
            if kw["attention_mask"] is not None:
                kw["attention_mask"] = kw["attention_mask"][:, 1:]
        return kw


class ForgetsTheOffset(Healthy):
    def before(self, kw):
        return dict(kw, position_ids=torch.arange(length(kw))[None])


class ForgetsTheOffsetAfterPieces(Healthy):
    def before(self, kw):
        return dict(
            kw,
            position_ids=None if length(kw) == 1 or past_length(kw) == 0 else torch.arange(length(kw))[None],
        )


class StartsAtOne(Healthy):
    def before(self, kw):
        n = past_length(kw)
        if kw["position_ids"] is None:
            kw["position_ids"] = torch.arange(n, n + length(kw))[None] * 2
        return kw


class SeesPads(Healthy):
    def before(self, kw):
        return dict(kw, attention_mask=None)


class CountsPads(Healthy):
    "Scales by the number of columns, pads included"

    def before(self, kw):
        if kw["attention_mask"] is not None:
            self.scale = kw["attention_mask"].shape[1] / kw["attention_mask"].sum(1).clamp(min=1)
        else:
            self.scale = torch.ones(1)
        return kw

    def after(self, out, kw):
        out.logits = out.logits * self.scale[:, None, None].to(out.logits)
        return out


class AnyMaskScales(Healthy):
    def after(self, out, kw):
        out.logits = out.logits * (1.0 if kw["attention_mask"] is None else 1.5)
        return out


class Drops(Healthy):
    def after(self, out, kw):
        out.logits = F.dropout(out.logits, 0.1)
        return out


class Counts(Healthy):
    def after(self, out, kw):
        self.calls = getattr(self, "calls", 0) + 1
        out.logits = out.logits * (1 + self.calls / 100)
        return out


class Upcasts(Healthy):
    def after(self, out, kw):
        out.logits = out.logits.float()
        return out


class MixesRows(Healthy):
    def after(self, out, kw):
        out.logits = out.logits + 0.01 * out.logits.mean(0)
        return out


class EagerIsOther(Healthy):
    def after(self, out, kw):
        out.logits = out.logits * (1.1 if self.config._attn_implementation == "eager" else 1)
        return out


class HalfIsOther(Healthy):
    def after(self, out, kw):
        out.logits = out.logits * (1.2 if out.logits.dtype == torch.bfloat16 else 1)
        return out


class PrefillIsOther(Healthy):
    def after(self, out, kw):
        out.logits = out.logits.cumsum(-1) if kw["use_cache"] else out.logits
        return out


class IgnoresLogitsToKeep(Healthy):
    def before(self, kw):
        return dict(kw, logits_to_keep=0)


class AlwaysCaches(Healthy):
    def before(self, kw):
        return dict(kw, use_cache=True)


class DoesNotReorder(Healthy):
    def after(self, out, kw):
        if out.past_key_values is not None:
            out.past_key_values.reorder_cache = lambda order: None
        return out


class Reseeds(Healthy):
    def generate(self, *args, **kw):
        torch.manual_seed(0)
        return super().generate(*args, **kw)


class ReturnsAStaleCache(Healthy):
    def generate(self, *args, **kw):
        out = super().generate(*args, **kw)
        if not isinstance(out, torch.Tensor):
            out.past_key_values.crop(-1)
            for layer in out.past_key_values.layers:
                layer.keys.zero_()
        return out


class AcceptsNothing(Healthy):
    def forward(self, input_ids=None, inputs_embeds=None, **kw):
        if input_ids is not None and input_ids.shape[1] == 0:
            input_ids = input_ids.new_ones(len(input_ids), 1)
        return LlamaForCausalLM.forward(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **kw)


class ScalesTokensOnly(Healthy):
    def before(self, kw):
        if kw["inputs_embeds"] is None:
            kw = dict(kw, input_ids=None, inputs_embeds=self.get_input_embeddings()(kw["input_ids"]) + 0.5)
        return kw


class TakesBoth(Healthy):
    def before(self, kw):
        return dict(kw, inputs_embeds=None) if kw["input_ids"] is not None else kw


class ShiftsTwice(Healthy):
    def before(self, kw):
        return kw if kw["labels"] is None else dict(kw, labels=F.pad(kw["labels"][:, 1:], (0, 1), value=-100))


class CountsByItself(Healthy):
    def before(self, kw):
        return {k: v for k, v in kw.items() if k != "num_items_in_batch"}


class HasADeadWeight(Healthy):
    def __init__(self, config):
        super().__init__(config)
        self.unused = nn.Linear(3, 3, bias=False)


class DoesNotCheckpoint(Healthy):
    def gradient_checkpointing_enable(self, *args, **kw):
        pass


class BreaksTheGraph(Healthy):
    def after(self, out, kw):
        return out if out.logits.sum().item() < 1e9 else None


class LosesABuffer(Healthy):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("gain", torch.full((1,), 0.5), persistent=False)

    def after(self, out, kw):
        out.logits = out.logits * self.gain.to(out.logits)
        return out


class LeavesATensorOnMeta(Healthy):
    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.full((1,), 0.5)


class WritesAPickle(Healthy):
    def save_pretrained(self, path, **kw):
        super().save_pretrained(path, **kw)
        torch.save(torch.ones(1), path / "extra.bin")


class UntiesOnLoad(Healthy):
    @classmethod
    def from_pretrained(cls, *args, **kw):
        model = super().from_pretrained(*args, **kw)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model


class CopiesShare(Healthy):
    def __deepcopy__(self, memo):
        return self


class CannotSwitch(Healthy):
    def set_attn_implementation(self, name):
        pass


class HasAFixedVocabulary(Healthy):
    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def after(self, out, kw):
        out.logits = out.logits + self.bias
        return out


class ForgetfulConfig(TwinConfig):
    def to_dict(self):
        return {k: v for k, v in super().to_dict().items() if k != "rms_norm_eps"}


@strict
class CarelessConfig(TwinConfig):
    def validate_architecture(self):
        pass


def lm(cls=Healthy, config=TwinConfig, **kw):
    sizes = dict(SIZES, **kw.pop("sizes", {}))
    return lambda **only: check_causal_lm(
        config(**sizes), cls, **{"auto": False, "dtypes": F32, "attentions": ("sdpa",), **kw, **only}
    )


BOTH = dict(dtypes=(torch.float32, torch.bfloat16), attentions=("eager", "sdpa"))
MODELS = [  # what is broken, the check that must notice
    (lm(Upcasts, **BOTH), "logits_are_finite"),
    (lm(Drops), "same_bits_every_call"),
    (lm(Counts), "no_state_between_calls"),
    (lm(EagerIsOther, **BOTH), "attentions_agree"),
    (lm(HalfIsOther, **BOTH), "dtypes_agree"),
    (lm(MixesRows), "rows_are_independent"),
    (lm(LeaksOneToken), "no_token_sees_its_future"),
    (lm(StartsAtOne), "positions_default_to_the_count"),
    (lm(SeesPads), "left_pads_change_nothing"),
    (lm(CountsPads), "left_pads_change_nothing"),
    (lm(CountsPads), "right_pads_change_nothing"),
    (lm(SeesPads), "pad_tokens_are_invisible"),
    (lm(AnyMaskScales), "mask_of_ones_is_no_mask"),
    (lm(PrefillIsOther), "cache_filled_in_one_call"),
    (lm(ForgetsTheOffsetAfterPieces), "cache_filled_in_pieces"),
    (lm(CacheOffByOne), "cache_one_token_at_a_time"),
    (lm(ForgetsTheOffset), "cache_one_token_at_a_time"),
    (lm(IgnoresLogitsToKeep), "last_logits_only"),
    (lm(AlwaysCaches), "use_cache_is_obeyed"),
    (lm(ForgetsTheOffset), "greedy_with_and_without_cache"),
    (lm(SeesPads), "padded_prompts_generate_alike"),
    (lm(DoesNotReorder), "beams_with_and_without_cache"),
    (lm(Reseeds), "sampling_follows_the_seed"),
    (lm(ReturnsAStaleCache), "generation_goes_on_from_its_cache"),
    (lm(AcceptsNothing), "an_empty_prompt_is_refused"),
    (lm(ScalesTokensOnly), "embeddings_stand_for_tokens"),
    (lm(ScalesTokensOnly), "generation_from_embeddings"),
    (lm(TakesBoth), "tokens_or_embeddings_not_both"),
    (lm(ShiftsTwice), "loss_is_the_shifted_cross_entropy"),
    (lm(CountsByItself), "loss_divides_by_what_it_is_told"),
    (lm(HasADeadWeight), "every_parameter_learns"),
    (lm(DoesNotCheckpoint), "checkpointing_gives_the_same_gradients"),
    (lm(BreaksTheGraph), "compiles_as_one_graph"),
    (lm(LosesABuffer), "reloaded_logits_have_the_same_bits"),
    (lm(LosesABuffer), "reloaded_buffers_have_the_same_bits"),
    (lm(LeavesATensorOnMeta), "reloaded_buffers_have_the_same_bits"),
    (lm(WritesAPickle), "the_file_holds_exactly_the_model"),
    (lm(UntiesOnLoad), "tied_weights_stay_tied"),
    (lm(CopiesShare), "a_copy_is_independent"),
    (lm(CannotSwitch, **BOTH), "attention_can_be_switched"),
    (lm(HasAFixedVocabulary), "the_vocabulary_can_grow"),
    (lm(config=ForgetfulConfig, sizes=dict(rms_norm_eps=1e-3)), "config_survives_the_file"),
    (lm(Upcasts, auto=True), "auto_classes_know_the_model"),
    (
        lm(config=type("LaxConfig", (LlamaConfig,), {"__module__": __name__})),
        "unknown_config_fields_are_refused",
    ),
    (lm(config=CarelessConfig), "bad_config_values_are_refused"),
    (lm(bad=({"rms_norm_eps": 1e-3},)), "bad_config_values_are_refused"),  # a good value, declared bad
]


@pytest.mark.parametrize("run,name", MODELS)
def test_a_broken_model_is_caught(run, name):
    caught(run, name)


def test_a_healthy_model_passes():
    report = check_causal_lm(TwinConfig(**SIZES))
    assert len(report.checks) >= 40 and not report.of("n/a"), report


def test_all_failures_are_collected():
    with pytest.raises(ContractError) as e:
        lm(ForgetsTheOffset)(
            only=("logits_are_finite", "cache_one_token_at_a_time", "greedy_with_and_without_cache")
        )
    assert {r.check for r in e.value.report.of("failed")} == {
        "cache_one_token_at_a_time",
        "greedy_with_and_without_cache",
    }
    assert "2 of 3 checks failed in 4 of 8 runs" in str(e.value)


# -- caches ----------------------------------------------------------------------------------------------------------


class Layer(DynamicLayer):
    "A growing layer that refuses other batches and dtypes"

    def update(self, k, v, *args, **kw):
        if (
            self.is_initialized
            and self.keys.numel()
            and (self.keys.shape[0] != k.shape[0] or self.keys.dtype != k.dtype)
        ):
            raise ValueError(
                f"the cache holds {self.keys.shape[0]} rows in {self.keys.dtype}, got {k.shape[0]} in {k.dtype}"
            )
        return super().update(k, v, *args, **kw)


def cache_of(layer):
    return lambda model: Cache(layers=[layer() for _ in range(model.config.num_hidden_layers)])


class DropsTheFirst(Layer):
    def update(self, k, v, *args, **kw):
        k, v = super().update(k, v)
        k = k.clone()
        k[..., :1, :] *= 0.5 if k.shape[-2] > 9 else 1
        return k, v


class CountsTwice(Layer):
    def get_seq_length(self):
        return 2 * super().get_seq_length()


class KeepsACopy(Layer):
    def update(self, k, v, *args, **kw):
        self.spare = k.clone()
        return super().update(k, v)


class DoesNotMoveValues(Layer):
    def reorder_cache(self, order):
        self.keys = self.keys.index_select(0, order)


class RepeatsByTile(Layer):
    def batch_repeat_interleave(self, n):
        self.keys, self.values = self.keys.repeat(n, 1, 1, 1), self.values.repeat(n, 1, 1, 1)


class CropsTooMuch(Layer):
    def crop(self, n):
        super().crop(n - 1)


class CropsSilently(Layer):
    def crop(self, n):
        pass


class KeepsAfterReset(Layer):
    def reset(self):
        pass


class Shares(Layer):
    def __deepcopy__(self, memo):
        return self


class ReadsAhead(Layer):
    def update(self, k, v, *args, **kw):
        k, v = super().update(k, v)
        return k + torch.empty_like(k) * 0, v


class Broadcasts(Layer):
    def update(self, k, v, *args, **kw):
        if self.is_initialized and self.keys.numel() and self.keys.shape[0] != k.shape[0]:
            n = max(self.keys.shape[0], k.shape[0])
            self.keys, self.values, k, v = (
                t[:1].expand(n, -1, -1, -1) for t in (self.keys, self.values, k, v)
            )
        return DynamicLayer.update(self, k, v)


class Casts(Layer):
    def update(self, k, v, *args, **kw):
        if self.is_initialized:
            self.keys, self.values = self.keys.to(k), self.values.to(v)
        return super().update(k, v)


class WindowOfFive(Layer):
    "Forgets what a window of six still sees"

    def update(self, k, v, *args, **kw):
        k, v = super().update(k, v)
        self.keys, self.values = k[..., -4:, :].clone(), v[..., -4:, :].clone()
        return k, v


def kv_bytes(batch, tokens, item):
    return 2 * 2 * 3 * 6 * batch * tokens * item


def kv(layer=Layer, cls=Healthy, **kw):
    return lambda **only: check_cache(
        TwinConfig(**SIZES),
        cls,
        make=layer and cache_of(layer),
        **{"dtypes": F32, "attentions": ("sdpa",), **kw, **only},
    )


CACHES = [
    (kv(DropsTheFirst), "cached_logits_equal_recomputation"),
    (kv(CountsTwice), "tokens_are_counted"),
    (kv(KeepsACopy, expected_bytes=kv_bytes), "bytes_follow_the_formula"),
    (kv(growth="constant"), "bytes_grow_as_promised"),
    (kv(DropsTheFirst), "a_given_cache_equals_an_own_one"),
    (kv(DoesNotMoveValues), "rows_can_be_reordered"),
    (kv(RepeatsByTile), "rows_can_be_repeated_and_selected"),
    (kv(CropsTooMuch), "tokens_are_taken_back_or_crop_is_refused"),
    (kv(CropsSilently, crop="refused"), "tokens_are_taken_back_or_crop_is_refused"),
    (kv(KeepsAfterReset), "reset_forgets_everything"),
    (kv(Shares), "copies_are_independent"),
    (kv(ReadsAhead), "unwritten_memory_is_not_read"),
    (kv(Broadcasts), "another_batch_size_is_refused"),
    (kv(Casts, dtypes=(torch.float32, torch.bfloat16)), "another_dtype_is_refused"),
]


@pytest.mark.parametrize("run,name", CACHES)
def test_a_broken_cache_is_caught(run, name):
    caught(run, name)


def test_a_healthy_cache_passes():
    report = kv(
        dtypes=(torch.float32, torch.bfloat16), attentions=("sdpa", "eager"), expected_bytes=kv_bytes
    )()
    assert not report.of("n/a"), report


class Blocks(Layer):
    "Keeps room for whole blocks of eight tokens"

    def update(self, k, v, *args, **kw):
        k, v = super().update(k, v)
        self.room = torch.zeros(2, *k.shape[:2], -k.shape[-2] % 8, k.shape[-1], dtype=k.dtype)
        return k, v


def test_room_ahead_must_be_declared():
    names = ("bytes_follow_the_formula", "bytes_grow_as_promised")
    kv(Blocks, expected_bytes=kv_bytes, block=8)(only=names)
    caught(kv(Blocks, expected_bytes=kv_bytes, block=7), "bytes_follow_the_formula")


def test_a_window_that_forgets_too_early_is_caught():
    config = MistralConfig(
        **{k: v for k, v in SIZES.items() if k in MistralConfig.__dataclass_fields__}, sliding_window=6
    )
    run = lambda **kw: check_cache(
        config, window=6, growth="constant", crop="refused", dtypes=F32, attentions=("sdpa",), **kw
    )
    run(
        only=(
            "cached_logits_equal_recomputation",
            "bytes_grow_as_promised",
            "tokens_are_taken_back_or_crop_is_refused",
        )
    )
    caught(lambda **kw: run(make=cache_of(WindowOfFive), **kw), "cached_logits_equal_recomputation")


# -- attention -------------------------------------------------------------------------------------------------------


def attend(change=lambda q, k, v, mask, s: (q, k, v, mask, s), out=lambda o: o):
    "Eager attention with its inputs or its output changed"

    def fn(module, q, k, v, mask, scaling=None, dropout=0.0, **kw):
        q, k, v, mask, s = change(q, k, v, mask, scaling)
        k, v = (o.repeat_interleave(q.shape[1] // o.shape[1], 1) for o in (k, v))
        w = (q @ k.mT * s + mask).float().softmax(-1).to(q.dtype)
        return out((w @ v).transpose(1, 2)), w

    return fn


def no_max(module, q, k, v, mask, scaling=None, dropout=0.0, **kw):
    k, v = (o.repeat_interleave(q.shape[1] // o.shape[1], 1) for o in (k, v))
    w = (q @ k.mT * scaling + mask).float().exp().clamp(max=1e30)
    return ((w / w.sum(-1, keepdim=True)).to(q.dtype) @ v).transpose(1, 2), None


def minus_infinity(module, q, k, v, mask, scaling=None, dropout=0.0, **kw):
    return attend(lambda q, k, v, m, s: (q, k, v, m.masked_fill(m < -1, -torch.inf), s))(
        module, q, k, v, mask, scaling
    )


def writes_q(q, k, v, m, s):
    q.mul_(s)
    return q, k, v, m, 1.0


def breaks(q, k, v, m, s):
    return (q if q.sum().item() < 1e9 else None), k, v, m, s


def half_mask(q, k, v, m, s):
    return q, k, v, m.clamp(min=-5), s  # a masked key is only made unlikely


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 1.1


def at(fn=None, **kw):
    return lambda **only: check_attention(fn or attend(), **{"dtypes": F32, **kw, **only})


ATTENTIONS = [
    (
        at(attend(lambda q, k, v, m, s: (q, k.flip(1), v, m, s))),
        "attention_equals_its_definition",
    ),  # key heads paired wrongly
    (at(attend(lambda q, k, v, m, s: (q, Stop.apply(k), v, m, s))), "attention_gradients_equal"),
    (at(attend(half_mask)), "masked_keys_have_no_influence"),
    (at(minus_infinity), "a_query_that_sees_nothing_is_finite"),
    (at(no_max), "large_scores_do_not_overflow"),
    (at(attend(lambda q, k, v, m, s: (q, k, v, m, q.shape[-1] ** -0.5))), "the_scale_is_obeyed"),
    (at(attend(out=lambda o: o + 0.01 * o.mean(0))), "attention_rows_are_independent"),
    (at(attend(writes_q)), "attention_inputs_stay"),
    (at(attend(breaks)), "attention_compiles_as_one_graph"),
    (at("lmlab_test_unmasked"), "attention_serves_a_stock_model"),
]


def test_attention_registration():
    with pytest.raises(ValueError, match="no attention is registered as 'no_such'"):
        check_attention("no_such")


@pytest.mark.parametrize("run,name", ATTENTIONS)
def test_a_broken_attention_is_caught(run, name):
    from transformers import AttentionInterface

    AttentionInterface.register(
        "lmlab_test_unmasked", attend(lambda q, k, v, m, s: (q, k, v, 0, s))
    )  # no mask of its name: it gets none
    caught(run, name)


@pytest.mark.parametrize("name,masks", [("sdpa", "bool"), ("sdpa", "additive"), ("eager", "additive")])
def test_a_healthy_attention_passes(name, masks):
    assert not check_attention(name, masks=masks).of("n/a")


def test_the_softmax_reference():
    q, k, v = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 5)
    allowed = torch.ones(2, 1, 7, 7).bool().tril()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3, enable_gqa=True).transpose(
        1, 2
    )
    test_rel(softmax_attention(q, k, v, allowed, 0.3), want, 1e-6)


# -- kernels ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lmlab_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, g: g * 2)


@torch.library.custom_op("lmlab_test::badly", mutates_args=())
def badly(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@badly.register_fake
def _(x):
    return x.new_empty(x.shape[:-1])


def scale(x):
    return x * 2


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2.2


def unwritten(x):
    out = torch.empty_like(x)
    out[..., : x.shape[-1] // 2 * 2] = x[..., : x.shape[-1] // 2 * 2] * 2  # the odd last element is forgotten
    return out


def by_memory(x):
    return torch.as_strided(x, x.shape, x.contiguous().stride(), x.storage_offset()) * 2


def in_place(x):
    y = x.detach().mul_(2).clone()
    return y + 0 * x.sum()


def by_threads(x):
    return x * 2 * (1 + 0.01 * torch.get_num_threads())


def swallows(x):
    return torch.nan_to_num(x) * 2


def breaks_graph(x):
    return x * 2 if x.sum().item() < 1e9 else x


def rows(shape, dtype, g):
    return (torch.randn(shape, generator=g).to(dtype),)


def op(fn, **kw):
    return lambda **only: check_kernel(
        fn, scale, rows, [(1, 1), (3, 7), (0, 5), (4, 8)], **{"dtypes": F32, **kw, **only}
    )


KERNELS = [
    (op(unwritten, gradients=False), "kernel_equals_its_definition"),
    (op(WrongGradient.apply), "kernel_gradients_equal"),
    (op(by_memory), "strided_inputs_are_welcome"),
    (op(in_place), "inputs_stay_and_bits_repeat"),
    (op(by_threads), "threads_change_nothing"),
    (op(swallows), "nan_is_not_swallowed"),
    (op(WrongGradient.apply), "gradients_survive_gradcheck"),
    (op(breaks_graph), "kernel_compiles"),
    (op(badly, custom_op=badly, gradients=False), "the_custom_op_is_well_formed"),
]


@pytest.mark.parametrize("run,name", KERNELS)
def test_a_broken_kernel_is_caught(run, name):
    caught(run, name)


def test_a_healthy_kernel_passes():
    report = op(twice, custom_op=twice, dtypes=(torch.float32, torch.bfloat16, torch.float64))()
    assert not report.of("n/a"), report


# -- loaders ---------------------------------------------------------------------------------------------------------


def strict_load(path):
    t = load_file(path / "x.safetensors")
    if set(t) != {"a", "b"}:
        raise ValueError(f"expected tensors a and b, got {sorted(t)}")
    with open(path / "x.json", encoding="utf-8") as f:
        meta = json.load(f)
    if not isinstance(meta, dict) or meta.get("step") != 3:
        raise ValueError("x.json must say step 3")
    return t, meta["step"]


def swallowing_load(path):
    try:
        return strict_load(path)
    except Exception:  # noqa: BLE001
        return {"a": torch.zeros(6), "b": torch.zeros(2, 3)}, 3


def random_load(path):
    return strict_load(path)[0], random.random()


def bare_load(path):
    if not (path / "x.json").exists():
        raise KeyError("x.json")
    return strict_load(path)


def slow_load(path):
    try:
        return strict_load(path)
    except Exception:
        while True:
            pass


def silent_load(path):
    try:
        return strict_load(path)
    except Exception:
        raise ValueError from None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, path / "x.safetensors")
    (path / "x.json").write_text(json.dumps({"step": 3, "name": "run"}))
    return path


def ld(load, **kw):
    return lambda path, **only: check_loader(load, path, **{"cases": 90, **kw, **only})


BROKEN = "a_broken_file_is_an_error_or_the_original"
LOADERS = [
    (ld(random_load), "a_healthy_file_loads_twice"),
    (ld(bare_load), "a_missing_file_is_refused"),
    (ld(swallowing_load), BROKEN),
    (ld(slow_load, seconds=0.1, cases=2), BROKEN),
    (ld(silent_load), BROKEN),
    (ld(strict_load, protected=("x.safetensors",), cases=500), BROKEN),
]


@pytest.mark.parametrize("run,name", LOADERS)
def test_a_broken_loader_is_caught(run, name, saved):
    caught(lambda **kw: run(saved, **kw), name)


def test_a_healthy_loader_passes(saved):
    assert check_loader(strict_load, saved, cases=300, clear=(*loaders.CLEAR, RecursionError))


# -- adapters --------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    "A low-rank update beside a frozen linear layer"

    def __init__(self, base, r):
        super().__init__()
        self.base, self.backup = base.requires_grad_(False), None
        self.a = nn.Parameter(torch.randn(r, base.in_features).to(base.weight) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, r).to(base.weight))

    def forward(self, x):
        y = self.base(x)
        return y if self.backup is not None else y + F.linear(F.linear(x, self.a), self.b)


class Rank:
    "The adapter under test; each method can be replaced by a broken one"

    layer = Adapted

    def wrap(self, model, r=2, suffix="q_proj"):
        names = [n for n, _ in model.named_modules() if n.endswith(suffix)]
        if not names or not 0 < r <= model.config.hidden_size:
            raise ValueError(f"cannot adapt {suffix!r} at rank {r}")
        torch.manual_seed(0)
        model.requires_grad_(False)
        for n in names:
            model.set_submodule(n, self.layer(model.get_submodule(n), r))
        return model

    def layers(self, model):
        return [(n, m) for n, m in model.named_modules() if isinstance(m, Adapted)]

    @torch.no_grad()
    def merge(self, model):
        new = {m: m.base.weight + m.b @ m.a for _, m in self.layers(model) if m.backup is None}
        if not all(w.isfinite().all() for w in new.values()):
            raise ValueError("merging would write weights that are not finite")
        for m, w in new.items():
            m.backup = m.base.weight.clone()
            m.base.weight.copy_(w)

    @torch.no_grad()
    def unmerge(self, model):
        for _, m in self.layers(model):
            if m.backup is not None:
                m.base.weight.copy_(m.backup)
                m.backup = None

    def unload(self, model):
        self.merge(model)
        for n, m in self.layers(model):
            model.set_submodule(n, m.base)
        return model

    def save(self, model, path):
        save_file(
            {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad},
            path / "adapter.safetensors",
        )

    def load(self, model, path):
        tensors = load_file(path / "adapter.safetensors")
        model = self.wrap(
            model, r=next(iter(tensors.values())).shape[0] if "a" in next(iter(tensors))[-1] else 2
        )
        model.load_state_dict(tensors, strict=False)
        return model


def broken(base, **methods):
    return type("Broken", (base,), methods)


def starts_wide(self, base, r):
    Adapted.__init__(self, base, r)
    nn.init.normal_(self.b)


def trains_the_base(self, model, **kw):
    model = Rank.wrap(self, model, **kw)
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight.data = model.model.norm.weight.data  # frozen as it should be
    return model


def swaps_weights_in_forward(self, x):
    with torch.no_grad():
        self.base.weight.mul_(1.0 if not self.training else 0.999)
    return Adapted.forward(self, x)


def detached(self, x):
    return (
        self.base(x)
        + F.linear(F.linear(x, self.a), self.b).detach() * 0.5
        + 0.5 * F.linear(F.linear(x, self.a.detach()), self.b)
    )


@torch.no_grad()
def merges_always(self, model):
    for _, m in self.layers(model):
        m.backup = m.base.weight.clone()
        m.base.weight.add_(m.b @ m.a)


@torch.no_grad()
def subtracts(self, model):
    for _, m in self.layers(model):
        m.base.weight.sub_(m.b @ m.a)
        m.backup = None


def unloads_unmerged(self, model):
    for n, m in self.layers(model):
        model.set_submodule(n, m.base)
    return model


def saves_half(self, model, path):
    save_file(
        {n: p.detach().contiguous() for n, p in model.named_parameters() if n.endswith(".a")},
        path / "adapter.safetensors",
    )


@torch.no_grad()
def merges_anything(self, model):
    for _, m in self.layers(model):
        if m.backup is None:
            m.backup = m.base.weight.clone()
            m.base.weight.add_(m.b @ m.a)


def looks_at_the_length(self, x):
    return self.base(x) + F.linear(F.linear(x, self.a), self.b) * x.shape[1]


def wraps_nothing(self, model, r=2, suffix="q_proj"):
    return Rank.wrap(self, model, r, suffix) if suffix == "q_proj" else model


BAD = (dict(suffix="no_such"), dict(r=0))


def ad(adapter, **kw):
    return lambda **only: check_adapter(
        adapter, **{"dtypes": F32, "bad": BAD, "options": ({}, dict(r=3)), **kw, **only}
    )


def layered(**methods):
    return broken(Rank, layer=type("BrokenAdapted", (Adapted,), methods))()


ADAPTERS = [
    (ad(layered(__init__=starts_wide)), "a_fresh_adapter_is_the_identity"),
    (ad(layered(forward=swaps_weights_in_forward)), "only_the_adapter_trains"),
    (ad(layered(forward=detached)), "every_adapter_weight_learns"),
    (ad(broken(Rank, merge=merges_always)()), "merging_keeps_the_outputs"),
    (ad(broken(Rank, unmerge=subtracts)()), "unmerging_restores_the_bits"),
    (ad(broken(Rank, unload=unloads_unmerged)()), "unloading_leaves_a_plain_model"),
    (ad(broken(Rank, save=saves_half)()), "a_saved_adapter_comes_back"),
    (ad(broken(Rank, merge=merges_anything)()), "merging_nan_is_refused"),
    (ad(layered(forward=looks_at_the_length)), "an_adapted_model_generates"),
    (ad(broken(Rank, wrap=wraps_nothing)()), "bad_adapter_settings_are_refused"),
]


@pytest.mark.parametrize("run,name", ADAPTERS)
def test_a_broken_adapter_is_caught(run, name):
    caught(run, name)


def test_a_healthy_adapter_passes():
    report = check_adapter(Rank(), options=({}, dict(r=3)), bad=BAD, label="low rank")
    assert not report.of("n/a"), report


# -- compression -----------------------------------------------------------------------------------------------------


class Coded(nn.Module):
    "Weights as -1, 0 and 1 in int8, and a scale that trains"

    def __init__(self, base):
        super().__init__()
        self.take(base.weight.detach())
        self.bias = base.bias

    def take(self, w):
        self.scale = nn.Parameter(w.abs().mean(-1, keepdim=True))
        self.register_buffer("codes", (w / self.scale.detach()).round().clamp(-1, 1).to(torch.int8))

    @property
    def weight(self):
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Shrink:
    "The compression under test; each method can be replaced by a broken one"

    layer = Coded

    def layers(self, model):
        head = model.get_output_embeddings()
        return [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]

    def look(self, model):
        if bad := [n for n, m in self.layers(model) if not m.weight.isfinite().all()]:
            raise ValueError(f"model: {bad[0]} holds weights that are not finite")

    def compress(self, model):
        self.look(model)
        for n, m in self.layers(model):
            model.set_submodule(n, self.layer(m))
        return model

    def dense(self, m, weight):
        new = nn.Linear(*weight.shape[::-1], m.bias is not None, device="meta")
        new.weight, new.bias = nn.Parameter(weight.detach()), m.bias
        return new

    def restore(self, model):
        for n, m in list(model.named_modules()):
            if isinstance(m, Coded):
                model.set_submodule(n, self.dense(m, m.weight))
        return model

    def reference(self, model):
        for n, m in self.layers(model):
            model.set_submodule(n, self.dense(m, Coded(m).weight))
        return model

    def load(self, path):
        config = AutoConfig.from_pretrained(path)
        model = self.compress(stir(AutoModelForCausalLM.from_config(config, dtype=config.dtype), 9))
        tensors = load_file(path / "model.safetensors")  # GPT-NeoX has another name for its head in files
        tensors = {k.replace("embed_out", "lm_head"): v for k, v in tensors.items()}
        lost = model.load_state_dict(tensors, strict=False)
        assert not lost.unexpected_keys and set(lost.missing_keys) <= {"lm_head.weight"}, lost
        model.tie_weights()
        return model


def shrink(layer=None, trains=True, **methods):
    "A run of the checker over the compression with these parts replaced"
    if layer:
        methods["layer"] = type("BrokenCoded", (Coded,), layer)
    c = broken(Shrink, **methods)()
    given = dict(load=c.load, restore=c.restore, reference=c.reference, saved=0.8, trains=trains)
    return lambda **only: check_compression(c.compress, **given, **{"dtypes": F32, **only})


def coded(change):
    "A layer whose output is changed"
    return {"forward": lambda self, x: change(Coded.forward(self, x), x)}


def then(change):
    "A compression that does something more"

    def compress(self, model):
        out = change(Shrink.compress(self, model))
        return model if out is None else out

    return compress


def loses_the_scale(self, base):
    Coded.__init__(self, base)
    self.scale.requires_grad_(False)
    self.seen = base.weight.detach().abs().mean(-1, keepdim=True)


def own_half(self, x):
    "The scale is a plain attribute, which no file and no state dict holds"
    return F.linear(x, self.codes.to(x.dtype) * self.seen.to(x.dtype), self.bias)


def whole_batch(y, x):
    return y * (1 + 1e-3 * x.abs().amax())


def rolls(model):
    "Scales found by a draw"
    for m in model.modules():
        if isinstance(m, Coded):
            m.scale.data.mul_(1 + random.random())


def unties(model):
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


def halves_norms(model):
    for m in model.modules():
        if "Norm" in type(m).__name__:
            m.weight.data.mul_(0.5)


def renames_a_field(self, path):
    model = Shrink.load(self, path)
    model.config.hidden_act = "relu"
    return model


def wraps_again(self, model):
    for m in model.modules():
        if isinstance(m, Coded):
            m.take(m.weight.detach() * 0.7)
    return Shrink.compress(self, model)


def one_by_one(self, model):
    for n, m in self.layers(model):
        if not m.weight.isfinite().all():
            raise ValueError(f"{n} is not finite")
        model.set_submodule(n, Coded(m))
    return model


def grows(y, x):
    return y * (1 + 1e-3 * x.shape[1])


class Once(Coded):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 1e-3 * self.calls)


def frozen(self, base):
    Coded.__init__(self, base)
    self.scale.requires_grad_(False)


def has_a_dead_weight(self, base):
    Coded.__init__(self, base)
    self.unused = nn.Parameter(torch.zeros(3))


def keeps_the_dense_weight(self, base):
    Coded.__init__(self, base)
    self.register_buffer("dense", base.weight.detach().clone())


def shares_on_copy(self, memo):
    return self


def transposes(self, m, weight):
    return Shrink.dense(self, m, -weight)


def not_rounded(self, model):
    return model


COMPRESSIONS = [
    (shrink(compress=then(copy.deepcopy)), "the_given_model_is_returned"),
    (shrink(layers=lambda self, model: []), "linear_layers_are_replaced"),
    (shrink(compress=then(halves_norms)), "embeddings_norms_and_head_stay"),
    (shrink(layers=lambda self, m: [(n, o) for n, o in m.named_modules() if type(o) is nn.Linear]), "embeddings_norms_and_head_stay"),
    (shrink(compress=then(rolls)), "compression_repeats"),
    (shrink(compress=then(unties)), "tied_embeddings_stay_tied"),
    (shrink(compress=wraps_again), "compressing_twice_is_once"),
    (shrink(look=lambda self, model: None), "weights_that_are_not_finite_are_refused"),
    (shrink(compress=one_by_one), "weights_that_are_not_finite_are_refused"),
    (shrink(coded(lambda y, x: y.double())), "logits_are_finite"),
    (shrink(coded(lambda y, x: F.dropout(y, 0.1))), "same_bits_every_call"),
    (shrink(layer=dict(vars(Once))), "no_state_between_calls"),
    (shrink(coded(lambda y, x: y * (1 + 1e-3 * x.abs().amax(-2, keepdim=True)))), "no_token_sees_its_future"),
    (shrink(coded(grows)), "greedy_with_and_without_cache"),
    (shrink(reference=not_rounded), "logits_equal_the_reference"),
    (shrink(coded(whole_batch)), "rows_do_not_meet"),
    (shrink(dict(__init__=loses_the_scale, forward=own_half)), "a_saved_model_comes_back"),
    (shrink(load=renames_a_field), "the_config_comes_back"),
    (shrink(dict(__init__=keeps_the_dense_weight)), "saved_size_is_as_promised"),
    (shrink(dict(__init__=loses_the_scale, forward=own_half)), "a_state_dict_carries_the_model"),
    (shrink(dict(__deepcopy__=shares_on_copy)), "a_copy_shares_nothing"),
    (shrink(dense=transposes), "restoring_gives_dense_layers"),
    (shrink(restore=lambda self, model: model), "restoring_gives_dense_layers"),
    (shrink(coded(lambda y, x: y.detach())), "gradients_reach_the_inputs"),
    (shrink(dict(__init__=frozen)), "replaced_layers_learn"),
    (shrink(dict(__init__=has_a_dead_weight)), "replaced_layers_learn"),
]  # fmt: skip


@pytest.mark.parametrize("run,name", COMPRESSIONS)
def test_a_broken_compression_is_caught(run, name):
    caught(run, name)


def test_a_healthy_compression_passes():
    report = shrink()(dtypes=None)
    assert not report.of("n/a"), report
    assert "2 q_proj" in str(report) and "2 query_key_value" in str(report)


# -- decoding --------------------------------------------------------------------------------------------------------


class Halve(LogitsProcessor):
    "A temperature of two"

    def __init__(self, by=2.0):
        self.by = by

    def __call__(self, input_ids, scores):
        return scores / self.by


class BansAll(Halve):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf)


class InPlace(Halve):
    def __call__(self, input_ids, scores):
        return scores.div_(self.by)


class AcrossRows(Halve):
    def __call__(self, input_ids, scores):
        return scores - scores.mean(0)


class RollsOver(Halve):
    "Remembers how often it was called"

    calls = 0

    def __call__(self, input_ids, scores):
        type(self).calls += 1
        return scores.roll(type(self).calls, -1)


def proc(cls, neutral=lambda: Halve(1.0)):
    return lambda **only: check_decoder(cls, neutral=neutral, **only)


PROCESSORS = [
    (proc(BansAll), "scores_stay_scores"),
    (proc(InPlace), "given_scores_are_not_written_to"),
    (proc(AcrossRows), "processor_rows_are_independent"),
    (proc(Halve, neutral=Halve), "neutral_settings_change_nothing"),
    (proc(RollsOver), "generate_uses_the_processor"),
]


@pytest.mark.parametrize("run,name", PROCESSORS)
def test_a_broken_processor_is_caught(run, name):
    caught(run, name)


def test_a_healthy_processor_passes():
    assert not proc(Halve)().of("n/a")


def loop(
    pick=None,
    every=lambda new, ended: None,
    after=lambda ids, new: torch.cat([ids, new], 1),
    tail=0,
    seed=None,
    spoil=lambda model: None,
):
    "A whole generation loop; the arguments break one thing each"

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kw):
        spoil(model)
        if seed is not None:
            torch.manual_seed(seed)
        eos = torch.tensor(
            generation_config.eos_token_id
            if isinstance(generation_config.eos_token_id, list)
            else [generation_config.eos_token_id or -1]
        )
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        ids, left = input_ids, tail
        while True:
            z = logits_processor(ids, model(ids).logits[:, -1].float())
            if pick is not None:
                new = pick(z)
            else:
                new = (
                    torch.multinomial(z.softmax(-1), 1)
                    if generation_config.do_sample
                    else z.argmax(-1, keepdim=True)
                )
            ids = after(ids, new.masked_fill(done[:, None], 0))
            done |= torch.isin(new[:, 0], eos) if tail == 0 else False
            if stopping_criteria(ids, None).all():
                if left == 0:
                    return ids
                left -= 1

    return decode


def touch(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(1.001)


def lp(decode, **kw):
    return lambda **only: check_decoder(decode, form="loop", **{"draws": 600, **kw, **only})


LOOPS = [
    (lp(loop(pick=lambda z: z.topk(2).indices[:, 1:])), "greedy_is_lossless"),
    (lp(loop(pick=lambda z: torch.multinomial((z / 2).softmax(-1), 1))), "samples_follow_the_law"),
    (lp(loop(tail=1)), "stops_are_obeyed"),
    (lp(loop(seed=3)), "loop_follows_the_seed"),
    (lp(loop(spoil=touch)), "loop_leaves_the_model_alone"),
]


@pytest.mark.parametrize("run,name", LOOPS)
def test_a_broken_loop_is_caught(run, name):
    caught(run, name)


def test_a_healthy_loop_passes():
    assert not lp(loop())().of("n/a")


# -- distillation ----------------------------------------------------------------------------------------------------


def divergence(
    s,
    t,
    labels,
    *,
    fit=True,
    keep=None,
    detach=True,
    mean=None,
    scale=1.0,
    slope=None,
    safe=True,
    empty=True,
    wide=torch.float32,
):
    "Kullback-Leibler from student to teacher; the arguments break one thing each"
    if fit and (s.shape != t.shape or s.shape[:2] != labels.shape):
        raise ValueError(
            f"student {tuple(s.shape)}, teacher {tuple(t.shape)}, labels {tuple(labels.shape)} do not fit"
        )
    keep = (labels[:, 1:] != -100) if keep is None else keep(labels)
    wide = torch.promote_types(s.dtype, wide)
    s, t = ((o[:, :-1][keep] * scale).to(wide).log_softmax(-1) for o in (s, t.detach() if detach else t))
    each = t.exp() * (t - s)
    each = torch.where(t == -torch.inf, 0, each) if safe else each
    total = each.sum() if slope is None else slope(each.sum())
    if mean is not None:
        return total / mean(labels)
    return total / (keep.sum() if not empty else keep.sum().clamp(min=1))


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def ls(**kw):
    return lambda **only: check_distillation(lambda s, t, labels: divergence(s, t, labels, **kw), **only)


LOSSES = [
    (ls(safe=False), "loss_is_one_finite_number"),
    (lambda **o: check_distillation(lambda s, t, labels: divergence(s, t.roll(1, -1), labels), **o), "zero_at_the_teacher"),
    (ls(keep=lambda labels: torch.ones_like(labels[:, 1:]).bool()), "masked_positions_have_no_influence"),
    (ls(keep=lambda labels: labels[:, :-1] != -100), "masked_positions_have_no_influence"),  # not shifted
    (ls(keep=lambda labels: (labels[:, 1:] != -100) & (torch.arange(labels.shape[1] - 1) != 3)), "every_kept_position_counts"),
    (ls(empty=False), "nothing_kept_is_no_loss"),
    (ls(detach=False), "the_teacher_gets_no_gradient"),
    (ls(fit=False), "other_shapes_are_refused"),
    (ls(mean=len), "pieces_add_up_to_the_batch"),
    (ls(mean=torch.numel), "padding_changes_nothing"),
    (ls(wide=torch.bfloat16), "softmax_is_taken_in_float32"),
    (ls(slope=Steep.apply), "loss_gradient_is_the_derivative"),
    (lambda **o: check_distillation(lambda s, t, labels: divergence(s * 0.1, t * 0.1, labels) * 0 + divergence(s * 2, t, labels), **o), "descent_reaches_the_teacher"),
]  # fmt: skip


@pytest.mark.parametrize("run,name", LOSSES)
def test_a_broken_loss_is_caught(run, name):
    caught(run, name)


def test_a_healthy_loss_passes():
    assert not check_distillation(divergence).of("n/a")


def preferred(
    q, p, n, *, fit=True, empty=True, detach=True, wide=torch.float32, norm=False, slope=None, swap=False,
    each=lambda h, n: -F.logsigmoid(h), mean=lambda x, n: x.mean(),
):  # fmt: skip
    "DPO with the teacher as the reference; the arguments break one thing each"
    if fit and len({o.shape for pair in (q, p, n) for o in pair}) > 1:
        raise ValueError(f"shapes {[tuple(o.shape) for pair in (q, p, n) for o in pair]} differ")
    if empty and min(o.min() for o in n) < 1:
        raise ValueError("a response is empty")
    at = torch.promote_types(q[0].dtype, wide)
    r = [
        a.to(at) / (k if norm else 1) - (b.detach() if detach else b).to(at)
        for a, b, k in zip(q, p, n, strict=False)
    ]
    h = 0.3 * (r[1] - r[0] if swap else r[0] - r[1])
    x = each(h, n).float() if at == torch.bfloat16 else each(h, n)
    return mean(x if slope is None else slope(x), n)


def pr(**kw):
    return lambda **only: check_distillation(
        lambda q, p, n: preferred(q, p, n, **kw), form="pairs", dpo=dict(beta=0.3), **only
    )


PAIRS = [
    (pr(each=lambda h, n: -h.sigmoid().log()), "pair_loss_is_one_finite_number"),
    (pr(wide=torch.bfloat16), "ratios_are_taken_in_float32"),
    (pr(each=lambda h, n: -F.logsigmoid(h) * n[0]), "at_the_teacher_no_pair_is_special"),
    (pr(swap=True), "chosen_goes_up_and_rejected_down"),
    (pr(norm=True), "only_ratios_to_the_teacher_count"),
    (pr(detach=False), "the_reference_gets_no_gradient"),
    (pr(mean=lambda x, n: (x * n[0]).sum() / n[0].sum()), "pairs_add_up_to_the_batch"),
    (pr(empty=False), "empty_responses_are_refused"),
    (pr(fit=False), "pairs_that_do_not_fit_are_refused"),
    (pr(slope=Steep.apply), "pair_gradient_is_the_derivative"),
    (pr(each=lambda h, n: -F.logsigmoid(0.9 * h)), "equals_dpo_of_trl"),
]


@pytest.mark.parametrize("run,name", PAIRS)
def test_a_broken_pair_loss_is_caught(run, name):
    if name == "equals_dpo_of_trl":
        pytest.importorskip("trl")
    caught(run, name)


def test_a_healthy_pair_loss_passes():
    na = check_distillation(preferred, form="pairs").of("n/a")
    assert [r.check for r in na] == ["equals_dpo_of_trl"]
    na = check_distillation(lambda q, p, n: preferred(q, p, n, norm=True), form="pairs", reference=False).of(
        "n/a"
    )
    assert {r.check for r in na} == {
        "equals_dpo_of_trl",
        "at_the_teacher_no_pair_is_special",
        "only_ratios_to_the_teacher_count",
    }


class TrainedTeacher(DistillationTrainer):
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.teacher.train()


class MeanOfMeans(DistillationTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / self.args.gradient_accumulation_steps


class OwnCount(DistillationTrainer):
    def _get_num_items_in_batch(self, batch_samples, device):
        return sum(self.items(b) for b in batch_samples) * self.accelerator.num_processes


class Forgetful(DistillationTrainer):
    calls = 0

    def sum_and_count(self, model, batch):
        self.calls += 1
        total, n = super().sum_and_count(model, batch)
        return total / self.calls, n


class TeacherInside(DistillationTrainer):
    def __init__(self, model, teacher, *args, **kw):
        super().__init__(model, teacher, *args, **kw)
        model.teacher = teacher


def tr(cls=DistillationTrainer, collator=collate, names=True):
    def make(student, teacher, rows, args, **kw):
        kw = kw if names else {}
        return cls(student, teacher, args, train_dataset=rows, data_collator=lambda o: collator(o, 0), **kw)

    return lambda **only: check_distillation(make, form="trainer", **only)


def unchecked(rows, pad):
    "An empty response becomes a row without labels"
    out = collate([dict(r, response=r["response"] or [pad]) for r in rows], pad)
    return dict(out, labels=out["labels"].masked_fill(out["input_ids"] == pad, -100))


TRAINERS = [
    (tr(TrainedTeacher), "the_teacher_stays_as_it_is"),
    (tr(MeanOfMeans), "accumulated_batches_are_one_batch"),
    (tr(OwnCount), "two_processes_are_one"),
    (tr(Forgetful), "a_resumed_run_is_the_straight_run"),
    (tr(TeacherInside), "the_student_is_saved_alone"),
    (tr(names=False), "other_vocabularies_are_refused"),
    (tr(collator=unchecked), "rows_without_a_response_are_refused"),
]


@pytest.mark.parametrize("run,name", TRAINERS)
def test_a_broken_trainer_is_caught(run, name):
    caught(run, name)


def test_a_healthy_trainer_passes():
    assert not tr()().of("n/a")
    with pytest.raises(ValueError, match="form must be one of tokens, pairs, trainer, got 'triples'"):
        check_distillation(divergence, form="triples")
