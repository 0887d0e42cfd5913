"""The decoder stack of Llama and its kin, in few operations.

transformers runs a layer as some forty small operations from inside nested modules; for
a few rows of a small model they cost as much as the matrix products. Here a layer is:
norm; one product for query, key and value; rotary embedding of query and key together;
attention; product out; norm; one product for gate and up; product down. Weights are
concatenated (and packed, see `packing`) at load, layer by layer, and taken from the
modules, so that they are never held twice.

Only what is known exactly is taken: every submodule by its class, and without hooks.
What remains open is not read from the configuration either: cosines and sines are those
of the model's own rotary module, scale and window those that its layers pass on to
attention. Results are rounded to the model's precision where transformers rounds them.
Whether the logits agree is for the caller to see, who may have the weights put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from engine import packing
from engine.attention import Step
from engine.layers import Attending, Decoder, Layer, Product
from engine.native.decoder import MOST_ROWS, NativeDecoder
from engine.native.kernels import Kernels
from engine.native.panels import Panels, panels
from engine.native.step import NativeStep
from engine.packing import packed, packs
from engine.probe import AttentionCall
from engine.rows import NativeRows, Rows, TorchRows

FAMILIES = ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3")
"""What the names of their classes begin with."""

_SILU = (SiLUActivation, nn.SiLU)
_ATTENTIONS = (  # names of the products in, all with the same input
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
)
_MLPS = (  # the same, and what the activation is called
    (("gate_proj", "up_proj"), "act_fn"),
    (("gate_up_proj",), "activation_fn"),
)


class Stack:
    """A model's decoder stack; a call runs a step, as `attention.forward` does."""

    def __init__(self, model: PreTrainedModel, calls: Sequence[AttentionCall], kernels: Kernels | None = None) -> None:
        """Take the weights of a model that `fits`; it cannot be run again unless they are given back."""
        parts: Any = model
        self._packs = packs(model)
        self._linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
        self._linear = packing.linear if self._packs else functional.linear
        self._taken: list[tuple[list[nn.Linear], Tensor]] = []
        self._kernels = kernels
        self._panels: dict[int, Panels] = {}
        self._rotary: nn.Module = parts.model.rotary_emb
        embedding = parts.model.embed_tokens.weight.detach()
        with torch.no_grad():
            self._decoder = Decoder(
                embedding=embedding,
                layers=[self._layer(layer, call) for layer, call in zip(parts.model.layers, calls, strict=True)],
                norm=parts.model.norm.weight.detach(),
                head=self._product([parts.lm_head], shared=parts.lm_head.weight is parts.model.embed_tokens.weight),
                epsilon=parts.model.norm.variance_epsilon,
                heads=calls[0].heads,
                kv_heads=calls[0].geometry.kv_heads,
                dim=calls[0].geometry.key_dim,
            )
        torch_rows = TorchRows(self._decoder)
        self._rows: Rows = torch_rows if kernels is None else NativeRows(self._decoder, kernels, torch_rows)
        self._native = self._native_decoder()

    def give_back(self) -> None:
        """Put the plain weights, bit by bit what they were, back into the model; this stack ends."""
        self._native = None
        self._decoder.layers.clear()
        while self._taken:
            linears, weight = self._taken.pop()
            plain = weight.to_dense() if self._packs else weight
            for linear, part in zip(linears, plain.split([linear.out_features for linear in linears]), strict=True):
                linear.weight = nn.Parameter(part, requires_grad=False)

    def __call__(self, tokens: Tensor, positions: Tensor, keep: Tensor, step: Step) -> Tensor:
        """Return the logits `[len(keep), vocabulary]` in float32; see `attention.forward` for the arguments."""
        cosine, sine = self._rotation(tokens, positions)
        if self._native is not None and len(tokens) <= MOST_ROWS and isinstance(step, NativeStep):
            return self._native(tokens, cosine, sine, keep, step)
        linear, norm, gate = self._linear, self._rows.norm, self._rows.gate
        decoder = self._decoder
        hidden = functional.embedding(tokens, decoder.embedding)
        added: Tensor | None = None
        last = decoder.layers[-1]
        for layer in decoder.layers:
            qkv = linear(norm(hidden, added, layer.norm), *layer.qkv)
            seen = self._rows.attend(step, cosine, sine, qkv, layer.attending)
            if layer is last:  # the other rows' keys and values are written, and that was all they were for
                if not len(keep):
                    return hidden.new_empty((0, decoder.embedding.shape[0]), dtype=torch.float32)
                seen, hidden = seen.index_select(0, keep), hidden.index_select(0, keep)
            added = linear(seen, *layer.out)
            gate_up = linear(norm(hidden, added, layer.mlp_norm), *layer.gate_up)
            added = linear(gate(gate_up), *layer.down)
        return linear(norm(hidden, added, decoder.norm), *decoder.head).float()

    def _rotation(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[rows, dim]`, dense."""
        cosine, sine = self._rotary(self._decoder.embedding[:1], positions[None])
        return cosine.reshape(len(tokens), -1).contiguous(), sine.reshape(len(tokens), -1).contiguous()

    def _layer(self, layer: Any, call: AttentionCall) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            weights = [attention.q_norm.weight] * call.heads + [attention.k_norm.weight] * call.geometry.kv_heads
            head_norm = torch.stack(weights).detach()
        return Layer(
            norm=layer.input_layernorm.weight.detach(),
            qkv=self._product(_present(attention, _ATTENTIONS)),
            attending=Attending(head_norm, call.scale, call.window),
            out=self._product([attention.o_proj]),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=self._product(_present(mlp, [names for names, _ in _MLPS])),
            down=self._product([mlp.down_proj]),
        )

    def _product(self, linears: list[nn.Linear], *, shared: bool = False) -> Product:
        """Return one product for several with the same input; take their weights unless something `shared` is one."""
        weight: Tensor = linears[0].weight.detach()
        bias: Tensor | None = linears[0].bias
        if len(linears) > 1:
            weight = torch.cat([linear.weight for linear in linears])
            if any(linear.bias is not None for linear in linears):
                bias = torch.cat([_bias(linear) for linear in linears])
        if not shared:
            for linear in linears:
                linear.register_parameter("weight", None)
        if self._packs:
            weight = self._packed(weight)
        if not shared:
            self._taken.append((linears, weight))
        return Product(weight, None if bias is None else bias.detach())

    def _packed(self, plain: Tensor) -> Tensor:
        """Pack a weight, and note where its numbers are, if that can be found out."""
        result = packed(plain)
        if self._kernels is not None and self._kernels.runs_steps:
            found = panels(result, plain)
            if found is not None:
                self._panels[id(result)] = found
        return result

    def _native_decoder(self) -> NativeDecoder | None:
        """Return what runs a whole step, if it can read all weights, and no token that is sampled lies outside."""
        decoder = self._decoder
        products = 4 * len(decoder.layers) + 1
        if self._kernels is None or len(self._panels) < products or len(decoder.head.weight) > len(decoder.embedding):
            return None
        return NativeDecoder(self._kernels, decoder, self._panels)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _present(module: nn.Module, choices: Iterable[Sequence[str]]) -> list[nn.Linear]:
    return next([getattr(module, name) for name in names] for names in choices if hasattr(module, names[0]))


# What fits


def known(model: PreTrainedModel) -> bool:
    """Say whether the model is of a class whose models mostly fit."""
    kind = type(model)
    return kind.__module__.startswith("transformers.models.") and _family(kind) in FAMILIES


def fits(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> bool:
    """Say whether a Stack runs a model whose layers make these calls; if in doubt, it does not."""
    first = calls[0]
    parameters = list(model.parameters())
    return (
        known(model)
        and not model.training
        and all(_untouched(module) for module in model.modules())
        and all(parameter.dtype == model.dtype for parameter in parameters)
        and all(tensor.device == model.device for tensor in [*parameters, *model.buffers()])
        and all(call.softcap is None and not call.sinks for call in calls)
        and all((call.geometry, call.heads) == (first.geometry, first.heads) for call in calls)
        and first.geometry.key_dim == first.geometry.value_dim
        and _modules_fit(model, first)
    )


def _family(kind: type) -> str:
    return kind.__name__.removesuffix("ForCausalLM")


def _untouched(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _modules_fit(model: Any, call: AttentionCall) -> bool:
    modeling = sys.modules[type(model).__module__]

    def own(name: str) -> tuple[type, ...]:
        return (getattr(modeling, _family(type(model)) + name, type(None)),)

    linear, norm = (nn.Linear,), own("RMSNorm")
    if not _consists(model, {"model": own("Model"), "lm_head": linear}):
        return False
    base = model.model
    kinds = {"embed_tokens": (nn.Embedding,), "layers": (nn.ModuleList,), "norm": norm}
    if not _consists(base, {**kinds, "rotary_emb": own("RotaryEmbedding")}):
        return False
    if base.embed_tokens.max_norm is not None:
        return False
    if 2 * len(getattr(base.rotary_emb, "inv_freq", ())) != call.geometry.key_dim:
        return False  # only a part of each head is turned, or there are several embeddings
    epsilons = {getattr(module, "variance_epsilon", None) for module in base.modules() if type(module) in norm}
    if len(epsilons) > 1 or None in epsilons:
        return False
    kinds = {"self_attn": own("Attention"), "mlp": own("MLP"), "input_layernorm": norm}
    kinds = {**kinds, "post_attention_layernorm": norm}
    dropout = dict.fromkeys(("resid_attn_dropout", "resid_mlp_dropout"), (nn.Dropout,))  # nothing in evaluation mode
    heads = dict.fromkeys(("q_norm", "k_norm"), norm)
    attentions = [dict.fromkeys((*names, "o_proj"), linear) for names in _ATTENTIONS]
    mlps = [{**dict.fromkeys((*names, "down_proj"), linear), activation: _SILU} for names, activation in _MLPS]
    return all(
        type(layer) in own("DecoderLayer")
        and any(_consists(layer, {**kinds, **more}) for more in ({}, dropout))
        and any(_consists(layer.self_attn, {**names, **more}) for names in attentions for more in ({}, heads))
        and any(_consists(layer.mlp, names) for names in mlps)
        for layer in base.layers
    )


def _consists(module: nn.Module, kinds: Mapping[str, tuple[type, ...]]) -> bool:
    """Say whether the children of `module` are these, each of exactly one of its classes."""
    children = dict(module.named_children())
    return children.keys() == kinds.keys() and all(type(child) in kinds[name] for name, child in children.items())
