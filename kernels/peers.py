"""llama.cpp as a peer to race against, through the package `llama-cpp-python` (extra `bench`), on the same random model.

The model is written as a GGUF file of architecture `bitnet`: per layer q, k, v, o, gate, up, down and four norms, the embedding tied to the head.
Ternary weights times one scale are exact in F16 up to the scale's rounding, and in TQ2_0; Q4_0 rounds them.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TYPES = ("F16", "Q4_0", "TQ2_0")
_NAMES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
    "attn_norm": "input_norm", "attn_sub_norm": "attn_sub_norm", "ffn_norm": "post_norm", "ffn_sub_norm": "ffn_sub_norm",
}  # fmt: skip


def installed() -> bool:
    "Is llama.cpp here, with the writer of its files?"
    return bool(find_spec("llama_cpp") and find_spec("gguf"))


def write_gguf(
    path,  # file
    layers: list,  # for each layer name -> Tensor: q k v o gate up down [out, in], and input_norm attn_sub_norm post_norm ffn_sub_norm
    embedding: Tensor,  # vocab d
    heads: int,
    kv_heads: int,
    theta: float = 1e4,  # base of the rotary frequencies
    eps: float = 1e-5,
    context: int = 4096,  # tokens
):
    "Write a model of architecture `bitnet` in F16"
    import gguf

    w = gguf.GGUFWriter(str(path), "bitnet")
    vocab, d = embedding.shape
    w.add_context_length(context)
    w.add_embedding_length(d)
    w.add_block_count(len(layers))
    w.add_feed_forward_length(layers[0]["up"].shape[0])
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(eps)
    w.add_rope_freq_base(theta)
    w.add_rope_dimension_count(d // heads)
    w.add_vocab_size(vocab)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    w.add_tokenizer_model("none")

    def add(name, t):
        norm = t.ndim == 1
        w.add_tensor(f"{name}.weight", (t.float() if norm else t.half()).cpu().contiguous().numpy())

    add("token_embd", embedding)
    add("output_norm", torch.ones(d))
    for i, layer in enumerate(layers):
        for theirs, ours in _NAMES.items():
            add(f"blk.{i}.{theirs}", layer[ours])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _quiet(lib):
    log = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(log, ctypes.c_void_p(0))
    return log


def quantise(
    source,  # F16 file
    path,  # file
    type: str,  # one of `TYPES`
):
    "llama.cpp's own conversion of a file"
    import llama_cpp as lib

    kept = _quiet(lib)
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{type}")
    if lib.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not write {Path(path).name} as {type}")
    del kept


class LlamaCpp:
    "A GGUF file opened by llama.cpp, as few words around its C functions as decoding needs"

    def __init__(self, path, threads=None, context=2048, batch=512):
        import llama_cpp as lib

        self.lib, self._log = lib, _quiet(lib)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not open {path}")
        p = lib.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = context, batch, batch
        p.n_threads = p.n_threads_batch = threads or torch.get_num_threads()
        self.ctx = lib.llama_init_from_model(self.model, p)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def clear(self):
        "Forget everything"
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)

    def feed(
        self,
        tokens: list,  # ids, appended to what was fed before
    ) -> Tensor:  # vocab  logits of the next token
        "Read some tokens"
        ids = (self.lib.llama_token * len(tokens))(*tokens)
        if error := self.lib.llama_decode(self.ctx, self.lib.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode: error {error}")
        logits = self.lib.llama_get_logits_ith(self.ctx, -1)
        return torch.frombuffer((ctypes.c_float * self.vocab).from_address(ctypes.addressof(logits.contents)), dtype=torch.float32).clone()  # fmt: skip

    def close(self):
        "Give the memory back"
        if self.ctx:
            self.lib.llama_free(self.ctx)
            self.lib.llama_model_free(self.model)
            self.ctx = self.model = None
